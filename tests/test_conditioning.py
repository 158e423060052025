"""Prompt templates, encoding, images in prompts, the cache, and loading of encoders."""

from __future__ import annotations

import base64
import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from PIL import Image
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

from kairos import UserError
from kairos.conditioning import TEMPLATES, encode_prompts, load_text_encoder
from kairos.conditioning.encoder import CACHE

GOLDEN = Path(__file__).parent / "golden"
SPECIALS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """Qwen2.5's tokenizer on what its byte-pair table has for the templates.

    The file holds those entries of dashscope's resources/qwen.tiktoken (Apache-2.0) that are single bytes or
    occur in the templates' texts, as they are there: bytes in base64, rank. Merging sees no others, so these
    texts become the tokens that the whole table gives.
    """
    lines = (GOLDEN / "qwen_cut.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the others get characters from 256 on
    others = iter(range(256, 512))
    character = {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}

    def written(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    def halves(token: bytes) -> list[bytes]:
        """The two parts that are merged last."""
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1 << 60))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return parts

    by_rank = sorted(ranks, key=ranks.__getitem__)
    return Qwen2Tokenizer(
        vocab={written(token): index for index, token in enumerate(by_rank)},
        merges=[tuple(map(written, halves(token))) for token in by_rank if len(token) > 1],
        extra_special_tokens=SPECIALS,
    )


def random_encoder(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return qwen_tokenizer()


@pytest.fixture
def encoder(tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """New for each test: the cache belongs to the encoder."""
    return random_encoder(tokenizer)


@pytest.fixture(scope="module")
def processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil()


def picture(width: int = 112, height: int = 56, color: str = "red") -> Image.Image:
    return Image.new("RGB", (width, height), color)


def calls_of(encoder, monkeypatch) -> list[dict]:
    """What the encoder is called with from here on."""
    seen = []
    model = encoder.model
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: seen.append(inputs) or forward(**inputs))
    return seen


def test_an_encoder_that_is_wrapped_or_hooked_as_a_whole_is_called_as_a_whole(tokenizer, encoder):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.config = encoder, encoder.config
            self.device, self.dtype = encoder.device, encoder.dtype

        def forward(self, **inputs):
            calls.append("wrapped")
            return self.encoder(**inputs)

    calls = []
    plain = encode_prompts(encoder, tokenizer, ["a ball"], template=TEMPLATES["tiny"])
    wrapped = encode_prompts(Wrapped(), tokenizer, ["a ball"], template=TEMPLATES["tiny"])
    whole = copy.deepcopy(encoder)
    whole._diffusers_hook = "of the whole"
    hook = whole.register_forward_pre_hook(lambda *_: calls.append("hooked"))
    hooked = encode_prompts(whole, tokenizer, ["a ball"], template=TEMPLATES["tiny"])
    hook.remove()
    assert calls == ["wrapped", "hooked"]
    for other in (wrapped, hooked):
        assert all(map(torch.equal, plain, other))


@pytest.mark.parametrize(("name", "tokens"), [("2025-12", 34), ("2026", 97)])
def test_the_published_prefixes_measure_the_published_number_of_tokens(tokenizer, name, tokens):
    template = TEMPLATES[name]
    assert len(tokenizer(template.prefix)["input_ids"]) == template.drop_tokens == tokens
    assert template.prefix.endswith("<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_the_encoders_last_hidden_state_less_the_prefix(tokenizer, encoder, name):
    template = TEMPLATES[name]
    whole = tokenizer(template.prefix + "a red ball rolls" + template.suffix, return_tensors="pt")
    expected = encoder.model(**whole).last_hidden_state[:, template.drop_tokens :]
    embeds, mask = encode_prompts(encoder, tokenizer, ["a red ball rolls"], template=template)
    torch.testing.assert_close(embeds, expected)
    assert mask.all() and mask.shape == embeds.shape[:2]


def test_the_empty_prompt_of_the_tiny_template_is_one_token(tokenizer, encoder):
    embeds, _ = encode_prompts(encoder, tokenizer, [""], template=TEMPLATES["tiny"])
    assert embeds.shape == (1, 1, 32)


def test_a_batch_is_its_prompts_one_by_one_padded_on_the_right_with_zeros(tokenizer):
    prompts = ["a ball", "a red ball rolls to the right", ""]
    template = TEMPLATES["2025-12"]
    embeds, mask = encode_prompts(random_encoder(tokenizer), tokenizer, prompts, template=template)
    other = random_encoder(tokenizer)  # another cache
    for row, prompt in enumerate(prompts):
        alone, _ = encode_prompts(other, tokenizer, [prompt], template=template)
        length = alone.shape[1]
        torch.testing.assert_close(embeds[row, :length], alone[0], atol=1e-5, rtol=0)
        assert mask[row].tolist() == [True] * length + [False] * (mask.shape[1] - length)
        assert not embeds[row, length:].any()


def test_a_long_prompt_loses_its_end_with_a_warning_and_keeps_the_layout(
    tokenizer, encoder, monkeypatch, caplog
):
    seen = calls_of(encoder, monkeypatch)
    with caplog.at_level(logging.WARNING, logger="kairos.conditioning"):
        embeds, _ = encode_prompts(encoder, tokenizer, ["a " * 400 + "zebra"], template=TEMPLATES["2025-12"])
    assert embeds.shape[1] == 384
    assert "the prompt has" in caplog.text and "the model takes 379" in caplog.text
    text = tokenizer.decode(seen[0]["input_ids"][0])
    assert "zebra" not in text and text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_long_prompt_leaves_room_for_its_image(tokenizer, encoder, processor):
    template = TEMPLATES["2026"]
    options = {"template": template, "processor": processor, "images": [picture(448, 448)]}
    embeds, _ = encode_prompts(encoder, tokenizer, ["a " * 1200], **options)
    assert embeds.shape[1] == template.max_tokens


def test_a_prompt_cannot_write_control_tokens(tokenizer, encoder, monkeypatch):
    seen = calls_of(encoder, monkeypatch)
    encode_prompts(encoder, tokenizer, ["<|im_end|><|image_pad|>"], template=TEMPLATES["tiny"])
    ids = seen[0]["input_ids"][0].tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") not in ids


def test_another_tokenizer_than_the_templates_is_warned_of(caplog, pipeline):
    with caplog.at_level(logging.WARNING, logger="kairos.conditioning"):
        embeds, _ = encode_prompts(
            pipeline.text_encoder, pipeline.tokenizer, [""], template=TEMPLATES["2025-12"]
        )
    assert "not the released one" in caplog.text
    assert embeds.shape[1] == len(pipeline.tokenizer(TEMPLATES["2025-12"].suffix)["input_ids"])


def test_the_image_stands_before_the_prompt_and_changes_its_embedding(
    tokenizer, encoder, processor, monkeypatch
):
    seen = calls_of(encoder, monkeypatch)
    template = TEMPLATES["2026"]
    plain, _ = encode_prompts(encoder, tokenizer, ["a ball"], template=template)
    red, _ = encode_prompts(
        encoder, tokenizer, ["a ball"], template=template, processor=processor, images=[picture()]
    )
    blue, _ = encode_prompts(
        encoder, tokenizer, ["a ball"], template=template, processor=processor, images=[picture(color="blue")]
    )
    text = tokenizer.decode(seen[1]["input_ids"][0])
    assert text == (
        f"{template.prefix}<|vision_start|>{'<|image_pad|>' * 8}<|vision_end|>"
        f"high-quality video, realistic motion, single continuous shot, no jump cuts, smooth motion. a ball"
        f"{template.suffix}"
    )
    assert red.shape == blue.shape and red.shape[1] > plain.shape[1]
    assert not torch.allclose(red, blue, atol=1e-4)


def test_an_image_alone_gets_no_sentence_about_the_video(tokenizer, encoder, processor, monkeypatch):
    seen = calls_of(encoder, monkeypatch)
    encode_prompts(
        encoder, tokenizer, [""], template=TEMPLATES["2026"], processor=processor, images=[picture()]
    )
    assert "high-quality" not in tokenizer.decode(seen[0]["input_ids"][0])


def test_large_images_are_scaled_to_448_by_448_pixels_at_most(tokenizer, encoder, processor, monkeypatch):
    seen = calls_of(encoder, monkeypatch)
    encode_prompts(
        encoder, tokenizer, [""], template=TEMPLATES["2026"], processor=processor, images=[picture(1280, 720)]
    )
    (grid,) = seen[0]["image_grid_thw"].tolist()
    assert grid[0] == 1 and 300 * 300 < grid[1] * grid[2] * 14 * 14 <= 448 * 448


def test_small_images_are_scaled_to_56_by_56_pixels_at_least(tokenizer, encoder, processor, monkeypatch):
    seen = calls_of(encoder, monkeypatch)
    encode_prompts(
        encoder, tokenizer, [""], template=TEMPLATES["2026"], processor=processor, images=[picture(30, 30)]
    )
    (grid,) = seen[0]["image_grid_thw"].tolist()
    assert grid[1] * grid[2] * 14 * 14 >= 56 * 56


def test_a_batch_that_mixes_images_and_plain_prompts_is_its_members_one_by_one(tokenizer, processor):
    prompts, images = ["a ball", "the objects", "a"], [picture(), None, picture(56, 168, "blue")]
    template = TEMPLATES["2026"]
    embeds, mask = encode_prompts(
        random_encoder(tokenizer), tokenizer, prompts, template=template, processor=processor, images=images
    )
    other = random_encoder(tokenizer)
    for row, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        alone, _ = encode_prompts(
            other, tokenizer, [prompt], template=template, processor=processor, images=[image]
        )
        assert mask[row].sum() == alone.shape[1]
        torch.testing.assert_close(embeds[row, : alone.shape[1]], alone[0], atol=1e-5, rtol=0)


def test_a_prompt_is_encoded_once_until_something_of_it_changes(tokenizer, encoder, processor, monkeypatch):
    seen = calls_of(encoder, monkeypatch)
    template = TEMPLATES["2026"]

    def encode(*prompts: str, **options) -> torch.Tensor:
        return encode_prompts(
            encoder, tokenizer, prompts, **{"template": template, "processor": processor} | options
        )[0]

    first = encode("a ball")
    assert torch.equal(encode("a ball"), first) and len(seen) == 1
    encode("a ball", "the ball", "the ball")  # only the new one, once
    assert len(seen) == 2 and len(seen[1]["input_ids"]) == 1
    encode("a ball", template=TEMPLATES["2025-12"])
    encode("a ball", images=[picture()])
    encode("a ball", images=[picture(color="blue")])
    assert len(seen) == 5
    encode("a ball", images=[picture()])
    assert len(seen) == 5
    with torch.no_grad():
        encoder.model.language_model.norm.weight.mul_(2)
    torch.testing.assert_close(encode("a ball"), first * 2)
    assert encode("a ball", dtype=torch.float64).dtype == torch.float64 and len(seen) == 6


def test_a_plain_image_upright_is_not_taken_for_the_same_across(tokenizer, encoder, processor, monkeypatch):
    seen = calls_of(encoder, monkeypatch)
    for size in ((224, 112), (112, 224)):
        encode_prompts(
            encoder,
            tokenizer,
            ["a ball"],
            template=TEMPLATES["2026"],
            processor=processor,
            images=[picture(*size)],
        )
    assert len(seen) == 2


def test_weights_that_are_replaced_and_never_written_to_make_another_encoder(tokenizer, encoder):
    def encode() -> torch.Tensor:
        return encode_prompts(encoder, tokenizer, ["a ball"], template=TEMPLATES["tiny"])[0]

    embeddings = []
    for seed in (1, 2):
        weights = random_encoder(tokenizer, seed).state_dict()
        encoder.load_state_dict({name: w.clone() for name, w in weights.items()}, assign=True)
        embeddings.append(encode())
    assert not torch.allclose(*embeddings)


def test_weights_in_another_precision_make_another_encoder(tokenizer, encoder):
    def encode() -> torch.Tensor:
        return encode_prompts(
            encoder, tokenizer, ["a ball"], template=TEMPLATES["tiny"], dtype=torch.float32
        )[0]

    exact = encode()
    encoder.to(torch.bfloat16)
    assert not torch.equal(encode(), exact)


def test_adapters_that_are_switched_make_another_encoder(tokenizer, encoder):
    def encode() -> torch.Tensor:
        return encode_prompts(encoder, tokenizer, ["a ball"], template=TEMPLATES["tiny"])[0]

    plain = encode()
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "one")
    once = encode()
    for layer in encoder.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("one", 3)
    assert not any(torch.allclose(once, other) for other in (plain, encode()))
    encoder.disable_adapters()
    assert torch.equal(encode(), plain)
    encoder.enable_adapters()
    assert not torch.allclose(encode(), plain)


def test_what_was_embedded_under_autocast_is_not_served_outside_it(tokenizer, encoder):
    def encode() -> torch.Tensor:
        return encode_prompts(encoder, tokenizer, ["a ball"], template=TEMPLATES["tiny"])[0]

    with torch.autocast("cpu", torch.bfloat16):
        rounded = encode()
    assert not torch.equal(encode(), rounded)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode(), rounded)


def test_the_cache_forgets_the_oldest_prompts(tokenizer, encoder, monkeypatch):
    seen = calls_of(encoder, monkeypatch)
    for i in range(40):
        encode_prompts(encoder, tokenizer, [f"ball {i}"], template=TEMPLATES["tiny"])
    encode_prompts(encoder, tokenizer, ["ball 39"], template=TEMPLATES["tiny"])
    assert len(seen) == 40
    encode_prompts(encoder, tokenizer, ["ball 0"], template=TEMPLATES["tiny"])
    assert len(seen) == 41


def test_a_prompt_that_is_used_again_is_not_the_oldest(tokenizer, encoder, monkeypatch):
    seen = calls_of(encoder, monkeypatch)
    for i in range(40):
        for prompt in ("blur", f"ball {i}"):
            encode_prompts(encoder, tokenizer, [prompt], template=TEMPLATES["tiny"])
    assert len(seen) == 41


def test_what_is_kept_of_a_prompt_is_not_a_view_of_its_batch(tokenizer, encoder):
    prompts = ["a ball", "a ball that is " + "very " * 30 + "red"]
    encode_prompts(encoder, tokenizer, prompts, template=TEMPLATES["tiny"])
    for embedding in CACHE._entries[encoder].values():
        assert embedding.untyped_storage().nbytes() == embedding.nbytes


def test_images_that_cannot_be_used_are_refused_in_one_line(tokenizer, encoder, processor):
    def refusal(**options) -> str:
        with pytest.raises(UserError) as caught:
            encode_prompts(encoder, tokenizer, ["a ball"], template=TEMPLATES["2026"], **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no image processor" in refusal(images=[picture()])
    assert "6000 x 2 cannot be used" in refusal(images=[picture(6000, 2)], processor=processor)
    assert "got 1 and 2" in refusal(images=[picture()] * 2, processor=processor)
    encoder.config.image_token_id = 7
    assert "they are of different models" in refusal(images=[picture()], processor=processor)


@pytest.mark.parametrize("split", [True, False])
def test_an_encoder_folder_loads_in_both_layouts(tokenizer, encoder, processor, tmp_path, split):
    encoder.save_pretrained(tmp_path / "text_encoder" if split else tmp_path)
    tokenizer.save_pretrained(tmp_path / "tokenizer" if split else tmp_path)
    processor.save_pretrained(tmp_path / "processor" if split else tmp_path)
    # As Qwen2.5-VL's repository has it.
    settings = (tmp_path / "processor" if split else tmp_path) / "preprocessor_config.json"
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"image_processor_type": "Qwen2VLImageProcessor"})
    )
    loaded, its_tokenizer, its_processor = load_text_encoder(tmp_path)
    arguments = {"template": TEMPLATES["2026"], "images": [picture()]}
    expected, _ = encode_prompts(encoder, tokenizer, ["a ball"], processor=processor, **arguments)
    embeds, _ = encode_prompts(loaded, its_tokenizer, ["a ball"], processor=its_processor, **arguments)
    torch.testing.assert_close(embeds, expected)
    assert load_text_encoder(tmp_path, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_folder_without_image_processor_gives_none(tokenizer, encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_text_encoder(tmp_path)[2] is None


def test_encoders_that_are_missing_torn_or_incomplete_are_refused_in_one_line(tokenizer, encoder, tmp_path):
    def refusal() -> str:
        with pytest.raises(UserError) as caught:
            load_text_encoder(tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no text encoder" in refusal()
    encoder.save_pretrained(tmp_path)
    assert "no tokenizer" in refusal()
    (tmp_path / "tokenizer.json").write_text("{")
    assert "cannot load the tokenizer" in refusal()
    tokenizer.save_pretrained(tmp_path)
    states = encoder.state_dict()
    del states["model.language_model.norm.weight"]
    encoder.save_pretrained(tmp_path, state_dict=states)
    assert "lacks model.language_model.norm.weight" in refusal()
    states = encoder.state_dict()
    states["model.language_model.norm.weight"] = torch.ones(3)
    encoder.save_pretrained(tmp_path, state_dict=states)
    assert "has misshapen model.language_model.norm.weight" in refusal()
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot load the text encoder" in refusal()
    (tmp_path / "config.json").write_text("{")
    assert "cannot load the text encoder" in refusal()
