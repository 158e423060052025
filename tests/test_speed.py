"""What makes the LinearDiT quick leaves its results as they are."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_transformer import CAUSAL, random_inputs, random_model, velocity

from kairos import UserError
from kairos.cli import main
from kairos.errors import MachineError
from kairos.models import compiled, gated_delta_net, tiles
from kairos.models.compiled import check_compiler, compile_blocks
from kairos.models.gated_delta_net import ShortConv, l2_normalise, shifted_conv
from kairos.models.norm import RMSNorm
from kairos.models.step_cache import StepCache
from kairos.models.transformer import PromptMemory
from kairos.presets import load_pipeline


@pytest.mark.parametrize("config", [{}, {"dilation": 2, **CAUSAL}])
@pytest.mark.parametrize("times", ["clip", "frame", "token"])
def test_tiles_of_tokens_give_what_one_tile_gives(monkeypatch, config, times):
    model = random_model(**config)
    latents, timestep, text = random_inputs(7, batch=2)
    if times == "clip":
        timestep = timestep[:, 0]
    if times == "token":
        timestep = timestep.repeat_interleave(6, 1) + torch.rand(2, 42)
    whole = velocity(model, latents, timestep, text)
    for tile in (1, 4, 6, 13, 30):
        monkeypatch.setattr(tiles, "TILE", tile)
        torch.testing.assert_close(velocity(model, latents, timestep, text), whole, atol=1e-5, rtol=0)


def test_a_state_is_the_same_whatever_the_tiles(monkeypatch):
    model = random_model(dilation=2, **CAUSAL)
    inputs = random_inputs(7)
    with torch.no_grad():
        whole = model(*inputs, return_state=True).state
        monkeypatch.setattr(tiles, "TILE", 8)
        tiled = model(*inputs, return_state=True).state
    for ours, theirs in zip(tiled.layers, whole.layers, strict=True):
        for name, value in vars(ours).items():
            torch.testing.assert_close(value, getattr(theirs, name), atol=1e-5, rtol=0)


def test_a_tile_holds_whole_frames_and_while_training_there_is_one(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 10)
    x = torch.randn(1, 24, 3)
    seen: list[tuple[slice, slice]] = []

    def work(tokens: slice, rows: slice) -> tuple[torch.Tensor]:
        seen.append((tokens, rows))
        return (x[:, tokens],)

    with torch.no_grad():
        (out,) = tiles.in_tiles(work, x, times=6)  # four tokens share a time
    assert torch.equal(out, x)
    assert [(t.start, t.stop, r.start, r.stop) for t, r in seen] == [
        (0, 8, 0, 2),
        (8, 16, 2, 4),
        (16, 24, 4, 6),
    ]
    seen.clear()
    tiles.in_tiles(work, x, times=6)
    assert seen == [(slice(None), slice(None))]


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("with_past", [False, True])
def test_the_short_convolution_on_a_cpu_equals_torchs(tokens, with_past):
    conv = ShortConv(12, 4)
    x, past = torch.randn(2, tokens, 3, 4), torch.randn(2, 12, 3) if with_past else None
    expected, expected_kept = conv(x, past)
    with torch.no_grad():
        found, kept = conv(x, past)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert torch.equal(kept, expected_kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_short_convolution_for_compilers_equals_torchs_with_its_gradients(dtype):
    inputs = [torch.randn(2, 12, 8).to(dtype), torch.randn(8, 1, 4).to(dtype)]
    weights = torch.randn(2, 9, 8)

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.silu(F.conv1d(x.mT, weight, groups=len(weight))).mT

    def results(function: Any, of: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [x.to(of).requires_grad_() for x in inputs]
        out = function(*leaves)
        return out, *torch.autograd.grad((out * weights).sum(), leaves)

    truth = results(plain, torch.float64)
    own, found = results(plain, dtype), results(shifted_conv, dtype)
    for mine, theirs, expected in zip(found, own, truth, strict=True):
        assert mine.dtype == dtype
        assert (mine - expected).norm() <= (theirs - expected).norm() + 1e-6 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("dim", [16, 32, 256])
def test_unit_keys_from_a_norms_kernel_are_the_rounded_ones(monkeypatch, dim):
    x = torch.randn(2, 9, 3, dim).bfloat16()
    expected = l2_normalise(x, dim**-0.5)
    monkeypatch.setattr(gated_delta_net, "fused_by_fla", lambda *_: True)
    found = l2_normalise(x, dim**-0.5)
    assert expected.dtype == torch.float32 and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0, rtol=2**-7)  # of two roundings
    if dim != 32:  # the length is a power of two, so there is one
        torch.testing.assert_close(found.float(), expected, atol=0, rtol=2**-8)


@torch.no_grad()
def test_a_norm_is_rounded_once_to_the_dtype_it_is_asked_for_and_gated_before():
    norm = RMSNorm(48, 1e-6)
    norm.weight.uniform_(0.5, 1.5)
    x, gate = torch.randn(2, 2, 9, 48).bfloat16()
    assert torch.equal(norm(x, torch.bfloat16), norm(x).bfloat16())
    assert torch.equal(norm(x, torch.bfloat16, gate), (norm(x) * F.silu(gate)).bfloat16())


def test_the_channels_of_a_token_lie_side_by_side_in_every_block():
    """A video's latents come channel by channel; a norm would put them in line anew each time."""
    model, seen = random_model(), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    velocity(model, *random_inputs())
    assert seen == [True] * len(model.blocks)


def test_compiled_blocks_give_the_same_velocity_at_every_length_and_are_not_compiled_for_each():
    model = random_model(num_layers=2, layer_pattern="DG")
    inputs = [random_inputs(frames) for frames in (9, 40, 70)]
    expected = [velocity(model, *each) for each in inputs]
    compile_blocks(model, backend="eager")
    graphs = []
    try:
        for each, plain in zip(inputs, expected, strict=True):
            torch.testing.assert_close(velocity(model, *each), plain, atol=1e-5, rtol=0)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    finally:
        torch._dynamo.reset()
    assert graphs[0] > 0 and graphs[1] == graphs[2]


def test_without_a_compiler_compiling_is_refused_in_one_line(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def missing() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(MachineError, match="needs a C\\+\\+ compiler such as g\\+\\+"):
        compile_blocks(random_model())
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="needs triton"):
        check_compiler("cuda")


def test_a_step_like_the_one_before_leaves_later_blocks_out_and_another_does_not(monkeypatch):
    model = random_model()
    latents, timestep, text = random_inputs()
    cache, calls = StepCache(0.05), []
    model.blocks[-1].register_forward_hook(lambda *_: calls.append(1))
    first = velocity(model, latents, timestep, text, step_cache=cache)
    assert torch.equal(first, velocity(model, latents, timestep, text))
    calls.clear()
    torch.testing.assert_close(velocity(model, latents, timestep, text, step_cache=cache), first)
    assert not calls
    near = velocity(model, latents + 0.001 * torch.randn_like(latents), timestep, text, step_cache=cache)
    assert not calls and not torch.equal(near, first)
    other = torch.randn_like(latents)
    far = velocity(model, other, timestep, text, step_cache=cache)
    assert calls and torch.equal(far, velocity(model, other, timestep, text))
    assert (cache.computed, cache.skipped) == (2, 2)
    torch.testing.assert_close(velocity(model, other, timestep, text, step_cache=cache), far)


def test_a_step_is_compared_with_the_last_one_that_was_computed_in_full():
    cache, first = StepCache(0.1), torch.ones(1, 2, 3)
    assert not cache.skips(first)
    assert cache.skips(1.06 * first)
    assert not cache.skips(1.12 * first)  # 6 % from the step before, 12 % from the one that was computed


def test_the_change_of_a_step_is_relative_to_its_mean_size():
    cache, first = StepCache(0.05), torch.tensor([[[1.0, 1.0, 1.0, 9.0]]])
    assert not cache.skips(first)
    assert not cache.skips(first + 0.3)  # 10 % of the mean, 3 % of the largest


def test_each_branch_of_guidance_has_a_step_cache_of_its_own(pipeline, caplog):
    with caplog.at_level(logging.INFO, "kairos.pipeline"):
        pipeline("a ball", num_inference_steps=3, guidance_scale=2, step_cache=1e9)
    told = [message for message in caplog.messages if message.startswith("step cache")]
    assert told == ["step cache: 2 of 3 steps left out"] * 2


def test_a_prompt_stays_remembered_over_steps_that_are_left_out():
    model = random_model()
    inputs, memory, cache = random_inputs(), PromptMemory(), StepCache(0.05)
    for _ in range(3):
        velocity(model, *inputs, prompt_memory=memory, step_cache=cache)
    assert cache.skipped == 2 and len(memory.layers) == len(model.blocks)


@torch.no_grad()
def test_a_video_is_the_same_under_a_cache_that_never_skips_and_another_under_one_that_does():
    pipeline = load_pipeline("kairos-tiny-teacher")
    pipeline.set_progress_bar_config(disable=True)

    def sampled(step_cache: float | None) -> torch.Tensor:
        made: Any = pipeline(
            "a red ball rolls to the right",
            num_frames=33,
            height=64,
            width=64,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
            step_cache=step_cache,
            output_type="latent",
        )
        return made.frames

    plain = sampled(None)
    assert torch.equal(sampled(1e-9), plain)
    assert not torch.equal(sampled(10.0), plain)
    with pytest.raises(UserError, match="step_cache must be above 0"):
        sampled(0.0)


FRESH_PAGES = """
import ctypes, resource
from kairos.process import keep_freed_memory
keep_freed_memory()
libc, size = ctypes.CDLL(None), 12 << 20
libc.malloc.restype = ctypes.c_void_p
def fresh_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [ctypes.c_void_p(libc.malloc(size)) for _ in range(16)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(fresh_pages() for _ in range(3)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap of glibc")
@pytest.mark.parametrize("said", [{}, {"MALLOC_TRIM_THRESHOLD_": "1000000"}])
def test_freed_memory_is_used_again_unless_the_environment_says_otherwise(said, monkeypatch):
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    made = subprocess.run([sys.executable, "-c", FRESH_PAGES], check=True, capture_output=True, text=True)
    first, *_, last = (int(pages) for pages in made.stdout.split())
    assert first > 40_000
    assert (last < first / 10) == (not said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a ball", "--step-cache", "0"], "step_cache must be above 0"),
        (["generate", "a ball", "--gpus", "2", "--compile"], "--compile: for one device"),
        (
            ["generate", "a ball", "--vae-dtype", "int8"],
            "vae_dtype must be one of auto, float32, bf",
        ),
        (["bench", "--step-cache", "0.1,x"], "--step-cache takes thresholds above 0"),
        (["bench", "--clock", "sun"], "--clock takes wall or cpu, got 'sun'"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments: list[str], message: str, capsys: Any):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1
