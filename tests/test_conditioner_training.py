"""The prompt encoder's training writes what the pipeline reads; its labels are what captions say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from kairos.conditioning import TEMPLATES, encode_prompts
from kairos.training import conditioner
from kairos.training.conditioner import (
    SPECIAL_TOKENS,
    caption_of,
    label_answers,
    label_targets,
    labels,
    train_conditioner,
    train_tokenizer,
    vary,
)

SCENES = ("uniform", "collision", "parabola")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp("conditioner")
    measured = train_conditioner(output, scenes=SCENES, captions=90, vocabulary=400, steps=3, batch_size=4)
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(output / "text_encoder").float().eval()
    return measured, AutoTokenizer.from_pretrained(output / "tokenizer"), encoder, output


def test_what_is_written_loads_and_encodes_prompts(trained):
    _, tokenizer, encoder, _ = trained
    embeds, mask = encode_prompts(encoder, tokenizer, ["a red ball", ""], template=TEMPLATES["tiny"])
    assert mask.sum(1).tolist()[1] == 1
    assert torch.isfinite(embeds).all()
    level = embeds[mask].square().mean(-1).sqrt()
    assert ((level > 0.3) & (level < 3)).all()


def test_the_weights_are_small(trained):
    output = trained[3]
    weights = list((output / "text_encoder").glob("*.safetensors"))
    assert weights and sum(file.stat().st_size for file in weights) < 3 * 2**20


def test_every_label_is_measured(trained):
    measured = trained[0]
    parts = ("colors", "sizes", "directions", "speeds")
    assert set(measured) == {"scene", "all", *(f"{part}-{ball}" for part in parts for ball in range(2))}
    assert all(0 <= share <= 1 for share in measured.values())


def test_a_seed_gives_one_prompt_encoder(trained, tmp_path):
    train_conditioner(tmp_path, scenes=SCENES, captions=90, vocabulary=400, steps=3, batch_size=4)
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "text_encoder").float()
    for name, tensor in trained[2].state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """Trains into `tmp_path` and is killed at its last step; gives a list that grows with each batch."""
    monkeypatch.setattr("kairos.training.minimise.SAVE_EVERY_S", -1.0)
    targets, batches = conditioner.label_targets, []

    def train(**options):
        def label(*what):
            batches.append(1)
            if len(batches) == options["steps"]:
                raise RuntimeError("killed")
            return targets(*what)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
            patch.setattr(conditioner, "label_targets", label)
            train_conditioner(tmp_path, scenes=SCENES, vocabulary=400, batch_size=4, **options)
        monkeypatch.setattr(conditioner, "label_targets", lambda *what: batches.append(1) or targets(*what))
        return batches

    return train


def test_a_prompt_encoders_training_that_was_killed_goes_on_to_the_same_weights(trained, tmp_path, killed):
    batches = killed(captions=90, steps=3)
    train_conditioner(tmp_path, scenes=SCENES, captions=90, vocabulary=400, steps=3, batch_size=4)
    assert len(batches) == 3 + 1 + 1  # the last step again, and the measure
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "text_encoder").float()
    for name, tensor in trained[2].state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_prompt_encoder_of_other_words_begins_anew(tmp_path, killed):
    batches = killed(captions=90, steps=2)
    train_conditioner(tmp_path, scenes=SCENES, captions=91, vocabulary=400, steps=2, batch_size=4)
    assert len(batches) == 2 + 2 + 1  # both steps again, and the measure


def test_the_tokenizer_writes_any_text_and_keeps_its_special_tokens():
    tokenizer = train_tokenizer([caption_of(SCENES, "train", 0, index)[0] for index in range(60)], 400)
    for text in ("a red ball rolls", "Ein Ball für €5 ☃ 球", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(6))
    assert tokenizer("<|im_start|>x<|im_end|>")["input_ids"][::2] == [1, 2]


def test_labels_are_what_the_caption_says():
    corpus = [caption_of(SCENES, "train", 0, index)[1] for index in range(60)]
    answers = label_answers(corpus)
    targets = label_targets(corpus, answers)
    for row, said in enumerate(corpus):
        for name, answer in labels(said):
            assert answers[name][targets[name][row]] == answer
    one = dict(labels(corpus[0]))
    assert one["scene"] == "uniform" and one["colors-1"] == "none"


def test_captions_are_varied_without_losing_a_colour():
    rng = np.random.default_rng(0)
    caption = "a red ball hits an orange ball"
    varied = {vary(caption, rng) for _ in range(200)}
    assert len(varied) > 5
    assert all("red" in text.lower() and "orange" in text.lower() for text in varied)
