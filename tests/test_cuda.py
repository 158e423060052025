"""On a GPU everything is what it is on a CPU: every route, gradients, the models, the embedded pipeline.

    python -m pytest tests/test_cuda.py -o addopts= -n 6 --dist load -q

Skipped without one. Most of its time is compilers', so few layouts meet FlexAttention.
"""

from __future__ import annotations

import copy
import importlib
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import random_pipeline
from PIL import Image
from torch import Tensor

from kairos.memory import RESIDENT, STREAMED, WHOLE
from kairos.ops import routes
from kairos.ops.gated_delta import gated_delta_rule
from kairos.ops.windowed_attention import windowed_attention

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),  # compilers of other versions have much to say
]
windowed = importlib.import_module("kairos.ops.windowed_attention")

TOKENS, FRAMES = 16, 10
LAYOUTS = {
    "plain": {},
    "padded": {"dilation": 4, "pad_dilated": True},
    "chunked": {"chunk_frames": (1, 6, 3)},
    "past": {"past": 5},
    "past, dilated": {"past": 5, "dilation": 2},
}
HALF = torch.bfloat16
ROUTES = [
    *(("reference", layout, dtype) for layout in LAYOUTS for dtype in (torch.float32, HALF)),
    *(("blocked", layout, dtype) for layout in LAYOUTS for dtype in (torch.float32, HALF)),
    *(("merged", layout, HALF) for layout in LAYOUTS),
    *(("flash", layout, HALF) for layout in LAYOUTS if layout != "chunked"),
    ("flex", "padded", HALF),
    ("flex", "past", HALF),
    ("flex", "chunked", torch.float32),
    ("auto", "padded", HALF),
    ("auto", "past", torch.float32),
]


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    """No TF32, neither in products nor in convolutions."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def measured(monkeypatch):
    """Routes are measured for few keys too, for which one product under a mask would do."""
    monkeypatch.setattr(windowed, "DENSE_TOKENS_CUDA", 0)
    monkeypatch.setattr(routes, "_CHOSEN", {})


@pytest.fixture
def without_flex(monkeypatch):
    """FlexAttention is compiled for every layout, and a model has several."""
    monkeypatch.setattr(windowed, "find_spec", lambda name: None)


def random_qkv(layout: str, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], dict]:
    """q, k, v (2, N, 2, 64) on the CPU, already rounded to `dtype`, and what windowed_attention is told."""
    options = {"tokens_per_frame": TOKENS} | LAYOUTS[layout]
    past = options.pop("past", 0)
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, frames * TOKENS, 2, 64) for frames in (FRAMES, past + FRAMES, past + FRAMES)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes], options


def largest(a: Tensor, b: Tensor) -> float:
    return (a.detach().double().cpu() - b.detach().double().cpu()).abs().max().item()


def relative(a: Tensor, b: Tensor) -> float:
    """Root mean square of the difference, relative to b's."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


@pytest.mark.parametrize(("route", "layout", "dtype"), ROUTES)
@torch.no_grad()
def test_every_route_of_windowed_attention_equals_the_reference(measured, route, layout, dtype):
    qkv, options = random_qkv(layout, dtype)
    truth = windowed_attention(*(x.double() for x in qkv), **options, backend="reference")
    found = windowed_attention(*(x.cuda() for x in qkv), **options, backend=route)
    assert found.is_cuda and found.dtype == dtype
    if dtype == torch.float32:
        assert largest(found, truth) < 1e-5
    else:
        own = largest(windowed_attention(*qkv, **options, backend="reference"), truth)
        assert largest(found, truth) < 3 * own


@pytest.mark.parametrize(
    ("route", "layout", "dtype"),
    [
        ("blocked", "padded", torch.float32),
        ("blocked", "padded", HALF),
        ("flash", "padded", HALF),
        ("flash", "past", HALF),
        ("flex", "padded", HALF),
        ("auto", "padded", torch.float32),
        ("auto", "padded", HALF),
    ],
)
def test_gradients_of_windowed_attention_equal_those_of_the_reference(measured, route, layout, dtype):
    qkv, options = random_qkv(layout, dtype)
    weights = torch.randn(qkv[0].shape).to(dtype)

    def gradients(inputs: list[Tensor], backend: str) -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = windowed_attention(*inputs, **options, backend=backend)
        return torch.autograd.grad((out * weights.to(out)).sum(), inputs)

    truth = gradients([x.double() for x in qkv], "reference")
    own = gradients(qkv, "reference")
    for mine, theirs, expected in zip(gradients([x.cuda() for x in qkv], route), own, truth, strict=True):
        if dtype == torch.float32:
            assert largest(mine, expected) < 1e-4
        else:
            assert relative(mine, expected) < 3 * relative(theirs, expected) + 1e-3


def random_delta(tokens: int, heads: int, dim_k: int, dim_v: int) -> list[Tensor]:
    """q, k, v, g, beta and a state, as a layer makes them."""
    q, k = (F.normalize(torch.randn(1, tokens, heads, dim_k), dim=-1) for _ in range(2))
    g, beta = -0.5 * torch.rand(1, tokens, heads), torch.rand(1, tokens, heads)
    v, state = torch.randn(1, tokens, heads, dim_v), torch.randn(1, heads, dim_k, dim_v)
    return [q, k, v, g, beta, state]


def test_the_loop_of_the_delta_rule_is_on_a_gpu_what_it_is_on_a_cpu():
    *inputs, state = random_delta(50, 3, 32, 64)
    expected = gated_delta_rule(*inputs, initial_state=state, backend="reference")
    found = gated_delta_rule(*(x.cuda() for x in inputs), initial_state=state.cuda(), backend="reference")
    for mine, theirs in zip(found, expected, strict=True):
        assert largest(mine, theirs) < 1e-5


# The last shape is that of the released model: its kernels are compiled here and found again by benchmarks.
SHAPES = [(200, 3, 32, 64), (700, 3, 64, 128), (200, 20, 256, 512)]


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_chunks_equal_the_loop(shape):
    *inputs, state = (x.cuda() for x in random_delta(*shape))
    tolerance = 1e-5 if shape[2] < 256 else 5e-5
    for before in (None, state):
        wide = None if before is None else before.double()
        truth = gated_delta_rule(*(x.double() for x in inputs), initial_state=wide, backend="reference")
        found = gated_delta_rule(*inputs, initial_state=before, backend="chunked")
        for mine, expected in zip(found, truth, strict=True):
            assert largest(mine, expected) < tolerance
        default = gated_delta_rule(*inputs, initial_state=before)  # float32 stays float32
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(default, found, strict=True))


@pytest.mark.skipif(find_spec("fla") is None, reason="flash-linear-attention is not installed")
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_kernels_of_flash_linear_attention_equal_the_loop(shape):
    *inputs, state = (x.cuda() for x in random_delta(*shape))
    inputs = [x.to(HALF) for x in inputs[:3]] + inputs[3:]
    for before in (None, state):
        wide = None if before is None else before.double()
        truth = gated_delta_rule(*(x.double() for x in inputs), initial_state=wide, backend="reference")
        for backend in ("fla", "auto"):
            out, last = gated_delta_rule(*inputs, initial_state=before, backend=backend)
            assert out.dtype == HALF and last.dtype == torch.float32
            assert relative(out, truth[0]) < 0.015 and relative(last, truth[1]) < 0.015


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]])
def test_gradients_of_the_delta_rule_equal_those_of_the_loop(shape, dtype):
    tokens = [x.to(dtype if i < 3 else torch.float32) for i, x in enumerate(random_delta(70, *shape[1:]))]

    def gradients(backend: str, wide: bool) -> tuple[Tensor, ...]:
        *inputs, state = (x.cuda().double() if wide else x.cuda() for x in tokens)
        inputs = [x.detach().requires_grad_() for x in (*inputs, state)]
        out, last = gated_delta_rule(*inputs[:5], initial_state=inputs[5], backend=backend)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
        return torch.autograd.grad((out * weights.to(out.dtype)).sum() + last.square().mean(), inputs)

    for mine, expected in zip(gradients("auto", False), gradients("reference", True), strict=True):
        assert relative(mine, expected) < (1e-4 if dtype == torch.float32 else 0.02)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3, 200])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_the_short_convolution_is_as_near_to_float64_as_torchs_and_keeps_the_same(tokens, dtype):
    from kairos.models.gated_delta_net import ShortConv

    conv = ShortConv(192, 4).to(dtype)
    x = torch.randn(2, tokens, 3, 64).to(dtype)
    for past in (None, torch.randn(2, 192, 3).to(dtype)):
        truth, _ = copy.deepcopy(conv).double()(x.double(), past)
        with torch.enable_grad():  # torch's own convolution
            own, kept = conv(x, past)
        device_past = None if past is None else past.cuda()
        found, found_kept = copy.deepcopy(conv).cuda()(x.cuda(), device_past)
        assert found.dtype == dtype
        assert relative(found, truth) < 1.1 * relative(own, truth) + 1e-6
        assert torch.equal(found_kept.cpu(), kept)


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
def test_norms_in_half_precision_are_rounded_once(gated):
    from kairos.models.norm import RMSNorm

    norm = RMSNorm(512, 1e-6)
    norm.weight.uniform_(0.5, 1.5)
    norm = norm.to(HALF)
    x, gate = torch.randn(2, 1, 300, 4, 512).to(HALF)
    truth = F.rms_norm(x.double(), (512,), norm.weight.double(), 1e-6)
    truth = truth * F.silu(gate.double()) if gated else truth
    own = norm(x, HALF, gate if gated else None)
    found = norm.cuda()(x.cuda(), HALF, gate.cuda() if gated else None)
    assert found.dtype == HALF
    assert relative(found, truth) < 1.1 * relative(own, truth)


@torch.no_grad()
def test_unit_queries_in_half_precision_are_the_rounded_ones():
    from kairos.models.gated_delta_net import l2_normalise

    x = torch.randn(1, 300, 4, 256).to(HALF)
    expected = l2_normalise(x, 1 / 16)
    assert largest(l2_normalise(x.cuda(), 1 / 16).to(HALF), expected.to(HALF)) <= 2**-7 * expected.max()


def test_positions_turn_as_on_a_cpu_with_their_gradients():
    from kairos.ops.rotary import apply_rotary, rotary_table

    x, weights, found = torch.randn(2, 60, 3, 64), torch.randn(2, 60, 3, 64), []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        out = apply_rotary(leaf, rotary_table(5, 3, 4, 64, device=torch.device(device)))
        found.append((out, *torch.autograd.grad((out * weights.to(device)).sum(), leaf)))
    for mine, expected in zip(found[1], found[0], strict=True):
        assert largest(mine, expected) < 1e-5


SMALL = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "ffn_dim": 256,
    "num_layers": 4,
    "gated_delta_head_dim": 32,
    "text_dim": 40,
    "freq_dim": 32,
}


def random_transformer(**config):
    """A small LinearDiT that is not silent, and inputs for 9 latent frames of 16 tokens, on the CPU."""
    from kairos import KairosTransformer3DModel

    model = KairosTransformer3DModel(**SMALL | config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5)
    return model, (torch.randn(1, 16, 9, 8, 8), torch.tensor([500.0]), torch.randn(1, 7, 40))


@torch.no_grad()
def test_the_transformer_in_float32_gives_the_velocity_of_a_cpu(measured, without_flex):
    model, inputs = random_transformer()
    expected = model(*inputs).sample
    found = model.cuda()(*(x.cuda() for x in inputs)).sample
    assert largest(found, expected) < 1e-4 * max(1, expected.abs().max().item())


@torch.no_grad()
def test_the_transformer_carries_its_state_from_chunk_to_chunk_as_on_a_cpu(without_flex):
    model, (latents, time, prompt) = random_transformer(causal="chunk", pad_dilated=False)
    made = []
    for device in ("cpu", "cuda"):
        state, parts = None, []
        model = model.to(device)
        for part in latents.to(device).split(3, dim=2):
            out = model(part, time.to(device), prompt.to(device), state=state, return_state=True)
            state = out.state
            parts.append(out.sample)
        made.append(torch.cat(parts, dim=2))
    assert largest(made[1], made[0]) < 1e-4 * max(1, made[0].abs().max().item())


@torch.no_grad()
def test_the_transformer_in_bfloat16_is_as_near_to_float32_as_on_a_cpu(measured):
    model, inputs = random_transformer()
    truth = model(*inputs).sample
    latents, time, prompt = inputs[0].to(HALF), inputs[1], inputs[2].to(HALF)
    low = copy.deepcopy(model).to(HALF)
    own = relative(low(latents, time, prompt).sample, truth)
    mask = torch.ones(1, 7, dtype=torch.bool, device="cuda")
    found = low.cuda()(latents.cuda(), time.cuda(), prompt.cuda(), encoder_attention_mask=mask).sample
    assert found.dtype == HALF
    assert relative(found, truth) < 2 * own + 1e-3


def test_the_transformer_trains_with_the_gradients_of_a_cpu(measured, without_flex):
    model, inputs = random_transformer()
    gradients = []
    for device in ("cpu", "cuda"):
        model = model.to(device)
        model.zero_grad()
        model(*(x.to(device) for x in inputs)).sample.square().mean().backward()
        gradients.append({name: p.grad.cpu().clone() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-4, rtol=1e-2, msg=name)


def test_it_trains_in_bfloat16_with_the_same_gradients_whether_or_not_blocks_are_computed_twice(
    measured, without_flex
):
    model, inputs = random_transformer()

    def gradients(device: str, precise: bool = False) -> Tensor:
        model.to(device).zero_grad()
        with torch.autocast(device, HALF, enabled=not precise):
            velocity = model(*(x.to(device) for x in inputs)).sample
        velocity.float().square().mean().backward()
        return torch.cat([p.grad.flatten().cpu() for p in model.parameters()])

    truth, own, once = gradients("cpu", precise=True), gradients("cpu"), gradients("cuda")
    model.enable_gradient_checkpointing()
    twice = gradients("cuda")
    for found in (once, twice):
        assert relative(found, truth) < 2 * relative(own, truth) + 1e-3


@torch.no_grad()
@pytest.mark.parametrize("causal", ["none", "chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_nothing_in_a_step_waits_for_the_gpu(measured, without_flex, causal, dtype):
    model, (latents, time, prompt) = random_transformer(causal=causal, pad_dilated=causal == "none")
    mask = torch.ones(1, 7, dtype=torch.bool, device="cuda")
    model.to("cuda", dtype)
    inputs = latents.to("cuda", dtype), time.to("cuda"), prompt.to("cuda", dtype)
    options = {"encoder_attention_mask": mask, "chunk_frames": (1, 6, 2) if causal == "chunk" else None}
    model(*inputs, **options)  # routes are measured, tables made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(*inputs, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_compiled_blocks_give_the_velocity_of_plain_ones(measured, without_flex):
    from kairos.models.compiled import compile_blocks

    model, inputs = random_transformer()
    model, inputs = model.cuda(), [x.cuda() for x in inputs]
    plain = model(*inputs).sample
    compile_blocks(model)
    assert largest(model(*inputs).sample, plain) < 1e-4 * max(1, plain.abs().max().item())


@torch.no_grad()
def test_the_vae_encodes_and_decodes_as_on_a_cpu():
    from diffusers import AutoencoderKLWan

    from kairos.models.vae import decode, encode
    from kairos.models.vae_layers import channels_last, quicken

    vae = quicken(AutoencoderKLWan(base_dim=8, num_res_blocks=1).eval())
    video = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    latents = encode(vae, video)
    frames = decode(vae, latents)
    vae = vae.cuda()
    assert largest(encode(vae, video.cuda()), latents) < 1e-4
    assert largest(decode(vae, latents.cuda()), frames) < 1e-4
    low = channels_last(vae.to(HALF))
    assert (decode(low, latents.cuda().to(HALF)).float().cpu() - frames).abs().mean() < 0.02


def test_kairos_tiny_makes_the_video_of_a_cpu(without_flex):
    from kairos.presets import load_pipeline

    made = []
    for device in ("cpu", "cuda"):
        pipeline = load_pipeline("kairos-tiny", device=device, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        made.append(torch.as_tensor(pipeline("a red ball rolls to the right", generator=generator).frames))
    difference = (made[1] - made[0]).abs()
    assert difference.mean() < 1e-3 and difference.max() < 0.02


def test_a_rollout_is_that_of_a_cpu(measured, without_flex):
    made = []
    for device in ("cpu", "cuda"):
        pipeline = random_pipeline(causal="chunk", pad_dilated=False).to(device)
        pipeline.set_progress_bar_config(disable=True)
        rollout = pipeline.stream("a ball", generator=torch.Generator().manual_seed(0), chunk_frames=2)
        made.append(torch.cat([torch.as_tensor(next(rollout)) for _ in range(4)], dim=1))
    assert largest(made[1], made[0]) < 1e-3


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("places", [(WHOLE, WHOLE, WHOLE), (STREAMED, STREAMED, RESIDENT)])
def test_parts_that_come_and_go_make_the_videos_of_parts_that_stay(places, kind):
    from kairos.placement import place, quantize

    made = []
    for there in ((RESIDENT, RESIDENT, RESIDENT), places):
        pipeline = random_pipeline()
        pipeline.set_progress_bar_config(disable=True)
        if kind is not None:
            pytest.importorskip("torchao")
            quantize(pipeline, kind)
        names = ("transformer", "text_encoder", "vae")
        parts = [SimpleNamespace(name=name, place=where) for name, where in zip(names, there, strict=True)]
        place(pipeline, SimpleNamespace(parts=parts), torch.device("cuda"))
        for prompt, image in (("a ball", None), ("two balls", Image.new("RGB", (32, 32), "red"))):
            generator = torch.Generator().manual_seed(0)
            made.append(pipeline(prompt, image=image, generator=generator, output_type="pt").frames)
    for mine, expected in zip(made[2:], made[:2], strict=True):
        assert largest(mine, expected) < 1e-5


@pytest.mark.parametrize("ranks", [1, 2])
def test_several_gpus_make_the_video_of_one(kairos, ranks):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    status, said, errors = kairos("certify", "--gpus", "--ranks", ranks)
    assert status == 0, said + errors
