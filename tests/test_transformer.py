"""The LinearDiT gives the golden cases, keeps its promises of causality and precision, and trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from kairos import FlowMatchScheduler, KairosTransformer3DModel, UserError
from kairos.models.gated_delta_net import PRECISE, GatedDeltaNet
from kairos.models.transformer import PromptMemory

GOLDEN = Path(__file__).parent / "golden"
SMALL = {
    "hidden_size": 48,
    "num_attention_heads": 2,
    "ffn_dim": 96,
    "num_layers": 4,
    "gated_delta_head_dim": 16,
    "text_dim": 40,
    "freq_dim": 32,
}
CAUSAL = {"causal": "chunk", "pad_dilated": False}


def random_model(seed: int = 0, **config) -> KairosTransformer3DModel:
    """A small model whose every parameter is random, also those that training begins at zero."""
    torch.manual_seed(seed)
    model = KairosTransformer3DModel(**SMALL | config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5)
    return model


def random_inputs(
    frames: int = 6, batch: int = 1, height: int = 4, width: int = 6, text: int = 5, seed: int = 0
):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 16, frames, height, width, generator=generator)
    timestep = 1000 * torch.rand(batch, frames, generator=generator)
    return latents, timestep, torch.randn(batch, text, 40, generator=generator)


@torch.no_grad()
def velocity(model: KairosTransformer3DModel, *inputs: Tensor, **options) -> Tensor:
    return model(*inputs, **options, return_dict=False)[0]


def golden_model(dilation: int) -> KairosTransformer3DModel:
    model = KairosTransformer3DModel(
        hidden_size=48,
        num_attention_heads=2,
        ffn_dim=96,
        num_layers=8,
        dilation=dilation,
        text_dim=40,
        freq_dim=32,
    )
    model.load_state_dict(load_file(GOLDEN / "dit_weights.safetensors"))
    return model.eval()


CASES = load_file(GOLDEN / "dit_cases.safetensors")


@pytest.mark.parametrize("name", sorted({key.split(".")[0] for key in CASES}))
def test_golden_case_and_the_hidden_states_inside(name):
    case = {key.split(".")[1]: value for key, value in CASES.items() if key.startswith(name + ".")}
    model = golden_model(dilation=6 if "d6" in name else 4)
    hidden: dict[str, Tensor] = {}
    for index in (0, 2, 3, 7):
        model.blocks[index].register_forward_hook(
            lambda module, args, output, key=f"block{index}": hidden.__setitem__(key, output[0])
        )
    sample = velocity(
        model,
        case["latents"],
        case["timestep"],
        case["context"],
        encoder_attention_mask=case.get("context_mask"),
    )
    torch.testing.assert_close(sample, case["sample"], atol=1e-4, rtol=0)
    for key, value in hidden.items():
        torch.testing.assert_close(value, case[key], atol=1e-4, rtol=0)


def test_golden_gated_delta_layer_with_its_states():
    golden = load_file(GOLDEN / "gated_delta_net.safetensors")
    layer = GatedDeltaNet(24, 2, 16, 2)
    layer.load_state_dict({k.removeprefix("param."): v for k, v in golden.items() if k.startswith("param.")})
    x = golden["x"]
    with torch.no_grad():
        y, state = layer.pass_over(x, None)
        first, carried = layer.pass_over(x[:, :67], None)
        second, last = layer.pass_over(x[:, 67:], carried)
    torch.testing.assert_close(y, golden["y"], atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat((first, second), dim=1), golden["y"], atol=1e-4, rtol=0)
    torch.testing.assert_close(carried.recurrent_state, golden["state_after_67"], atol=1e-4, rtol=0)
    for final in (state, last):
        torch.testing.assert_close(final.recurrent_state, golden["state_final"], atol=1e-4, rtol=0)
        for name in "qkv":
            found = getattr(final, f"conv_{name}")
            torch.testing.assert_close(found, golden[f"conv_{name}_final"], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(1,) * 7, (2, 1, 4), (1, 2, 2, 2)])
def test_a_gated_delta_layer_goes_on_from_pieces_shorter_than_its_convolution(sizes):
    torch.manual_seed(0)
    layer, x = GatedDeltaNet(16, 2, 8), torch.randn(1, 7, 16)
    whole, state = layer.pass_over(x, None)
    past, parts = None, []
    for piece in x.split(sizes, dim=1):
        y, past = layer.pass_over(piece, past)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    for ours, theirs in zip(vars(past).values(), vars(state).values(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", ["t2v", "ti2v"])
def test_golden_denoising_with_guidance(mode):
    golden = load_file(GOLDEN / "denoise_cases.safetensors")
    model, scheduler = golden_model(dilation=4), FlowMatchScheduler()
    latents = golden["noise"]
    scheduler.set_timesteps(6, latent_frames=9, tokens_per_frame=12)
    for time in scheduler.timesteps:
        timestep = time.expand(1, 9).clone()
        if mode == "ti2v":
            latents[:, :, :1], timestep[:, 0] = golden["first_frame_latents"], 0
        positive = velocity(model, latents, timestep, golden["prompt_embeds"])
        negative = velocity(model, latents, timestep, golden["negative_prompt_embeds"])
        latents = scheduler.step(negative + 5 * (positive - negative), time, latents).prev_sample
    if mode == "ti2v":
        latents[:, :, :1] = golden["first_frame_latents"]
    torch.testing.assert_close(latents, golden[f"{mode}_steps6_cfg5"], atol=1e-4, rtol=0)


def test_the_default_is_the_released_4b_model_with_its_names():
    with torch.device("meta"):
        model = KairosTransformer3DModel()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(4.0e9, rel=0.02)
    for key in load_file(GOLDEN / "dit_weights.safetensors"):
        assert key in shapes

    both = (".weight", ".bias")
    top = [part + end for part in ("patch_embedding", "head.head", "time_projection.1") for end in both]
    top += [f"{part}_embedding.{i}{end}" for part in ("text", "time") for i in (0, 2) for end in both]
    block = [
        "modulation",
        *(f"cross_attn_norm{end}" for end in both),
        *(f"ffn.{i}{e}" for i in (0, 2) for e in both),
    ]
    attention = [f"{part}{end}" for part in "qkvo" for end in both] + ["norm_q.weight", "norm_k.weight"]
    delta = [f"{part}_proj.weight" for part in "qkvabgo"] + [f"{part}_conv1d.weight" for part in "qkv"]
    delta += ["A_log", "dt_bias", "o_norm.weight"]
    expected = {*top, "head.modulation"}
    for index in range(32):
        mix = [f"gated_delta.{n}" for n in delta] if index % 4 == 3 else [f"self_attn.{n}" for n in attention]
        expected |= {f"blocks.{index}.{n}" for n in (*block, *mix, *(f"cross_attn.{n}" for n in attention))}
    assert set(shapes) == expected
    assert shapes["patch_embedding.weight"] == (2560, 16, 1, 2, 2)
    assert shapes["text_embedding.0.weight"] == (2560, 3584)
    assert shapes["blocks.3.gated_delta.v_proj.weight"] == (20 * 512, 2560)
    assert shapes["blocks.3.gated_delta.q_conv1d.weight"] == (20 * 256, 1, 4)
    assert shapes["head.head.weight"] == (64, 2560)


def test_patches_that_are_no_squares_of_other_channels_than_they_came_in_lie_where_they_were_cut():
    model = random_model(patch_size=(1, 1, 2), out_channels=4)
    seen = {}
    model.patch_embedding.register_forward_hook(lambda module, args, out: seen.update(cut=out))
    model.head.register_forward_hook(lambda module, args, out: seen.update(patches=out))
    latents, timestep, text = random_inputs(3, batch=2, height=3, width=8)
    sample = velocity(model, latents, timestep, text)
    assert sample.shape == (2, 4, 3, 3, 8) and seen["cut"].shape == (2, 48, 3, 3, 4)
    patches = seen["patches"].view(2, 3, 3, 4, 2, 4)  # clip, frame, row, column, place in the patch, channel
    for place in (0, 1):
        assert torch.equal(sample[..., place::2], patches[..., place, :].permute(0, 4, 1, 2, 3))


@pytest.mark.parametrize("config", [{}, CAUSAL])
def test_a_batch_equals_its_members_one_by_one(config):
    model = random_model(**config)
    latents, timestep, text = random_inputs(frames=9, batch=3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    together = velocity(model, latents, timestep, text, encoder_attention_mask=mask)
    for i in range(3):
        real = int(mask[i].sum())
        alone = velocity(model, latents[i : i + 1], timestep[i : i + 1], text[i : i + 1, :real])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


def test_a_time_for_the_clip_for_each_frame_and_for_each_token_agree():
    model = random_model()
    latents, _, text = random_inputs(frames=5, batch=2)
    clip = torch.tensor([900.0, 17.5])
    expected = velocity(model, latents, clip, text)
    for timestep in (clip[:, None].expand(-1, 5), clip[:, None].expand(-1, 30)):
        torch.testing.assert_close(velocity(model, latents, timestep, text), expected, atol=1e-5, rtol=0)
    frame = torch.tensor([0.0, 900.0, 900.0, 17.5, 17.5]).expand(2, -1)
    token = frame.repeat_interleave(6, dim=1)
    by_frame = velocity(model, latents, frame, text)
    torch.testing.assert_close(velocity(model, latents, token, text), by_frame, atol=1e-5, rtol=0)
    uneven = token.clone()
    uneven[:, 3] = 400
    assert not torch.allclose(velocity(model, latents, uneven, text), by_frame, atol=1e-3)


@pytest.mark.parametrize("frames", [3, 9, 40])
def test_a_later_chunk_does_not_change_an_earlier_one_by_a_bit(frames):
    model = random_model(**CAUSAL)
    latents, timestep, text = random_inputs(frames)
    first = frames // 3
    options = {"chunk_frames": (first, frames - first)}
    before = velocity(model, latents, timestep, text, **options)
    latents[:, :, first:] = 30 * torch.randn_like(latents[:, :, first:])
    timestep[:, first:] = 3
    after = velocity(model, latents, timestep, text, **options)
    assert torch.equal(before[:, :, :first], after[:, :, :first])
    assert not torch.allclose(before[:, :, first:], after[:, :, first:], atol=1e-2)


def test_a_chunk_sees_itself_both_ways_and_earlier_chunks():
    model = random_model(**CAUSAL)
    latents, timestep, text = random_inputs(6)
    before = velocity(model, latents, timestep, text, chunk_frames=(2, 4))
    for changed, seen_by in ((5, [2, 3, 4, 5]), (1, [0, 1, 2, 3, 4, 5])):
        other = latents.clone()
        other[:, :, changed] += 1
        moved = (velocity(model, other, timestep, text, chunk_frames=(2, 4)) - before).abs().amax(
            (0, 1, 3, 4)
        ) > 1e-6
        assert moved.nonzero().flatten().tolist() == seen_by


@pytest.mark.parametrize("cuts", [(1, 2, 3, 3), (9,), (1,) * 9, (4, 5)])
@pytest.mark.parametrize("batch", [1, 2])
def test_chunks_one_after_the_other_equal_one_pass(cuts, batch):
    model = random_model(dilation=2, **CAUSAL)
    latents, timestep, text = random_inputs(9, batch)
    whole = velocity(model, latents, timestep, text, chunk_frames=cuts)
    state, parts = None, []
    for chunk, time in zip(latents.split(cuts, 2), timestep.split(cuts, 1), strict=True):
        with torch.no_grad():
            part, state = model(chunk, time, text, state=state, return_state=True, return_dict=False)
        parts.append(part)
    assert state.frames == 9
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-5, rtol=0)


def test_the_state_has_one_size_however_many_frames_there_were():
    model = random_model(dilation=2, **CAUSAL)
    latents, timestep, text = random_inputs(12)
    state, sizes = None, []
    for chunk, time in zip(latents.split(3, 2), timestep.split(3, 1), strict=True):
        with torch.no_grad():
            state = model(chunk, time, text, state=state, return_state=True).state
        tensors = [t for layer in state.layers for t in vars(layer).values()]
        sizes.append([tuple(t.shape) for t in tensors])
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)  # no view of what it saw
    assert sizes[1] == sizes[2] == sizes[3]


def test_a_prompt_that_is_remembered_is_not_computed_again_and_gives_the_same_velocity(monkeypatch):
    model = random_model()
    latents, timestep, text = random_inputs()
    memory = PromptMemory()
    assert torch.equal(
        velocity(model, latents, timestep, text, prompt_memory=memory),
        velocity(model, latents, timestep, text),
    )
    later = velocity(model, latents, timestep / 2, text)
    monkeypatch.setattr(model, "text_embedding", None)
    for block in model.blocks:
        monkeypatch.setattr(block.cross_attn, "k", None)
        monkeypatch.setattr(block.cross_attn, "v", None)
    assert torch.equal(velocity(model, latents, timestep / 2, text, prompt_memory=memory), later)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_gates_in_float32(tmp_path, dtype):
    model = random_model()
    gates = {
        n: p.clone() for n, p in model.named_parameters() if any(part in PRECISE for part in n.split("."))
    }
    assert len(gates) == 4
    model.save_pretrained(tmp_path)
    loaded = KairosTransformer3DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    model(*random_inputs(3)).sample.sum().backward()
    for half in (model.to(dtype), loaded):
        assert half.dtype == dtype
        for name, parameter in half.named_parameters():
            assert parameter.dtype == (torch.float32 if name in gates else dtype), name
            assert parameter.grad is None or parameter.grad.dtype == parameter.dtype, name
            if name in gates:
                assert torch.equal(parameter, gates[name])


@torch.no_grad()
def test_gates_stay_exact_under_autocast(monkeypatch):
    torch.manual_seed(0)
    layer, x, seen = GatedDeltaNet(16, 2, 8), torch.randn(1, 9, 16), []
    mix = layer.mix

    def watched(projections, g, beta, past):
        seen.append((g, beta))
        return mix(projections, g, beta, past)

    monkeypatch.setattr(layer, "mix", watched)
    layer.pass_over(x, None)
    with torch.autocast("cpu", torch.bfloat16):
        layer.pass_over(x, None)
    for exact, cast in zip(*seen, strict=True):
        assert cast.dtype == torch.float32 and torch.equal(exact, cast)


def test_bfloat16_stays_near_float32():
    model = random_model()
    latents, timestep, text = random_inputs(9)
    timestep = timestep.bfloat16().float()
    expected = velocity(model, latents, timestep, text)
    found = velocity(model.bfloat16(), latents.bfloat16(), timestep, text.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - expected).square().mean() < 1e-3 * expected.square().mean()


def test_a_bfloat16_model_rounds_the_time_as_the_released_pipeline_does():
    latents, _, text = random_inputs(3)
    half = random_model().bfloat16()
    for time, same in ((998.0, True), (990.0, False)):  # 1000 and its neighbours are 4 apart in bfloat16
        found = velocity(half, latents.bfloat16(), torch.tensor([time]), text.bfloat16())
        expected = velocity(half, latents.bfloat16(), torch.tensor([1000.0]), text.bfloat16())
        assert torch.equal(found, expected) == same
    exact = random_model()
    assert not torch.equal(
        velocity(exact, latents, torch.tensor([998.0]), text),
        velocity(exact, latents, torch.tensor([1000.0]), text),
    )


def test_saving_and_loading_gives_the_same_model(tmp_path):
    model = random_model(layer_pattern="GSD", dilation=3, **CAUSAL)
    model.save_pretrained(tmp_path)
    again = KairosTransformer3DModel.from_pretrained(tmp_path)
    assert (
        again.config.layer_pattern == "GSD" and again.config.causal == "chunk" and again.config.dilation == 3
    )
    inputs = random_inputs(5)
    assert torch.equal(velocity(model, *inputs), velocity(again, *inputs))


def test_a_lora_is_added_trained_and_taken_away():
    model = random_model()
    inputs = random_inputs(3)
    before = velocity(model, *inputs)
    model.add_adapter(LoraConfig(r=2, target_modules=["q", "v", "o_proj", "b_proj"], init_lora_weights=False))
    changed = velocity(model, *inputs)
    assert not torch.allclose(changed, before, atol=1e-4)
    model(*inputs).sample.square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all("lora" in name for name in trained)
    assert any("gated_delta.b_proj" in name for name in trained)
    model.disable_adapters()
    assert torch.equal(velocity(model, *inputs), before)


def test_weights_that_hooks_bring_only_for_a_layers_own_forward_give_the_same_velocity():
    inputs = random_inputs(3)
    expected = velocity(random_model(), *inputs)
    model = cpu_offload(random_model(), torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(velocity(model, *inputs), expected)


def test_layers_stored_in_eight_bits_are_widened_where_they_work():
    latents, timestep, text = random_inputs(3)
    model, inputs = random_model().bfloat16(), (latents.bfloat16(), timestep, text.bfloat16())
    expected = velocity(model, *inputs)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    assert model.blocks[3].gated_delta.q_conv1d.weight.dtype == torch.float8_e4m3fn
    assert (velocity(model, *inputs) - expected).norm() < 0.1 * expected.norm()


@torch.no_grad()
def test_a_model_is_exported_with_its_mask_and_works_on_itself():
    model = random_model(num_layers=2, layer_pattern="SG")
    latents, _, text = random_inputs(3)
    options = {"encoder_attention_mask": torch.tensor([[True] * 3 + [False] * 2]), "return_dict": False}
    inputs = latents, torch.tensor([500.0]), text
    exported = torch.export.export(model, inputs, options).module()
    for mask in (options["encoder_attention_mask"], torch.ones(1, 5, dtype=torch.bool)):
        options["encoder_attention_mask"] = mask
        torch.testing.assert_close(exported(*inputs, **options), model(*inputs, **options), atol=1e-4, rtol=0)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = random_model(**CAUSAL).train()
    inputs = random_inputs(5, batch=2)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(*inputs, chunk_frames=(2, 3)).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_new_model_is_still_and_every_branch_learns_from_the_first_steps():
    torch.manual_seed(0)
    model = KairosTransformer3DModel(**SMALL | CAUSAL)
    latents, timestep, text = random_inputs(5, batch=2)
    assert not velocity(model, latents, timestep, text).any()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            sample = model(latents, timestep, text, chunk_frames=(1, 4)).sample
        loss = (sample.float() - latents).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 3:
            still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
            assert still == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 50, "num_attention_heads": 4}, "multiple of num_attention_heads, got 50 and 4"),
        ({"hidden_size": 6, "num_attention_heads": 2}, "must be even for rotary positions, got 3"),
        ({"layer_pattern": "SXG"}, "made of S (sliding), D (dilated) and G (gated delta), got 'SXG'"),
        ({"layer_pattern": ""}, "got ''"),
        ({"patch_size": (2, 2, 2)}, "patch_size must be (1, height, width)"),
        ({"patch_size": (2, 2)}, "patch_size must be (1, height, width)"),
        ({"causal": "full"}, 'causal must be "none" or "chunk"'),
        ({"causal": "chunk"}, "needs pad_dilated=False"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"dilation": 0}, "dilation must be at least 1, got 0"),
        ({"freq_dim": 31}, "freq_dim must be even, got 31"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_in_one_line(config, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        KairosTransformer3DModel(**SMALL | config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(1, 16, 4, 4)}, "latents must be (B, 16, F, H, W)"),
        ({"hidden_states": torch.zeros(1, 4, 3, 4, 4)}, "latents must be (B, 16, F, H, W)"),
        ({"hidden_states": torch.zeros(1, 16, 3, 5, 4)}, "multiples of the patch 2 x 2, got 5 x 4"),
        ({"timestep": torch.zeros(1, 2)}, "timestep must be (1,), (1, 3) or (1, 18), got (1, 2)"),
        ({"timestep": torch.zeros(3)}, "one value for each of the 1 clips, got 3"),
        ({"encoder_hidden_states": torch.zeros(1, 5, 41)}, "prompt embeddings must be (1, T, 40)"),
        ({"encoder_hidden_states": torch.zeros(2, 5, 40)}, "prompt embeddings must be (1, T, 40)"),
        ({"encoder_attention_mask": torch.ones(1, 3)}, "prompt's mask must be (1, 5), got (1, 3)"),
        ({"encoder_attention_mask": torch.ones(2, 5)}, "prompt's mask must be (1, 5), got (2, 5)"),
        ({"encoder_attention_mask": torch.ones(5)}, "prompt's mask must be (1, 5), got (5,)"),
        ({"chunk_frames": (1, 2)}, 'for models made with causal="chunk"'),
        ({"return_state": True}, 'for models made with causal="chunk"'),
    ],
)
def test_input_that_does_not_fit_is_refused_in_one_line(change, message):
    latents, timestep, text = random_inputs(3)
    inputs = {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": text}
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        random_model()(**inputs | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chunk_frames", [(1, 1), (0, 3), (4, -1), ()])
def test_chunks_that_do_not_make_up_the_clip_are_refused(chunk_frames):
    with pytest.raises(UserError, match="chunk_frames must be positive and sum to 3 latent frames"):
        random_model(**CAUSAL)(*random_inputs(3), chunk_frames=chunk_frames)


@pytest.mark.parametrize(
    ("inputs", "config"),
    [
        ({"batch": 2}, {}),
        ({"height": 6}, {}),
        ({}, {"num_layers": 5}),
        ({}, {"layer_pattern": "SDGS"}),
        ({}, {"layer_pattern": "DDDG", "dilation": 2}),
        ({}, {"window_frames": 1}),
    ],
)
def test_a_state_of_other_videos_or_of_another_model_is_refused_in_one_line(inputs, config):
    with torch.no_grad():
        state = random_model(**CAUSAL)(*random_inputs(6), return_state=True).state
    with pytest.raises(UserError, match="the state is of other videos or of another model") as caught:
        random_model(**CAUSAL | config)(*random_inputs(3, **inputs), state=state)
    assert "\n" not in str(caught.value)
