"""The VAE: golden numbers, normalisation, causality, tiles, refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file

from kairos import UserError
from kairos.models.vae import decode, encode, normalisation, quickest_dtype
from kairos.models.vae_layers import (
    OneDNNCausalConv3d,
    UpsamplingConv2d,
    channels_last,
    computed_in,
    quicken,
)
from kairos.weights import load_vae_file

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    return load_vae_file(GOLDEN / "vae_weights.safetensors")


@pytest.fixture(scope="module")
def cases() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "vae_cases.safetensors")


@torch.no_grad()
def test_the_published_arithmetic_is_reproduced(vae, cases):
    latents = encode(vae, cases["video"])
    assert latents.shape == (1, 16, 4, 6, 8)
    torch.testing.assert_close(latents, cases["latents"], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        encode(vae, cases["video"][:, :, :1]), cases["image_latents"], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(decode(vae, cases["latents"]), cases["decoded"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_latents_are_normalised_with_the_mean_and_deviation_of_the_configuration(vae, cases):
    other = AutoencoderKLWan.from_config(vae.config, latents_mean=[2.0] * 16, latents_std=[0.5] * 16)
    other.load_state_dict(vae.state_dict())
    plain = vae.encode(cases["video"]).latent_dist.mode()
    torch.testing.assert_close(encode(other, cases["video"]), (plain - 2) / 0.5)
    again = decode(other, encode(other, cases["video"]))
    torch.testing.assert_close(again, decode(vae, encode(vae, cases["video"])), atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_quicker_layers_give_the_frames_and_latents_of_the_stock_ones(vae, cases):
    quick = quicken(copy.deepcopy(vae))
    assert list(quick.state_dict()) == list(vae.state_dict())
    for quicker in (OneDNNCausalConv3d, UpsamplingConv2d):
        assert any(isinstance(module, quicker) for module in quick.modules())
    video = torch.rand(1, 3, 21, 32, 40) * 2 - 1
    latents = encode(vae, video)
    mean, std = normalisation(vae, latents)
    stock = (vae.encode(video).latent_dist.mode() - mean) / std
    torch.testing.assert_close(latents, stock, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encode(quick, video), latents, atol=1e-4, rtol=1e-4)
    frames = vae.decode(latents * std + mean).sample
    for one in (vae, quick):
        torch.testing.assert_close(decode(one, latents), frames, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_convolutions_of_few_channels_that_skip_frames_are_the_stock_ones():
    torch.manual_seed(2)
    vae = AutoencoderKLWan(base_dim=2, num_res_blocks=1).eval()
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    quick = quicken(copy.deepcopy(vae))
    torch.testing.assert_close(encode(quick, video), encode(vae, video), atol=1e-4, rtol=1e-4)


def test_gradients_through_the_quicker_layers_are_those_through_the_stock_ones(vae, cases):
    quick = quicken(copy.deepcopy(vae)).train()
    gradients = []
    for one in (vae, quick):
        latents = cases["latents"][:, :, :2].clone().requires_grad_()
        (decode(one, latents) * torch.linspace(-1, 1, 3)[:, None, None, None]).square().sum().backward()
        gradients.append([latents.grad, *(p.grad for p in one.decoder.parameters())])
        one.zero_grad(set_to_none=True)
    for stock, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, stock, atol=1e-3 * stock.abs().max().item(), rtol=1e-3)


@torch.no_grad()
def test_small_frames_go_together_and_large_ones_one_by_one(vae, cases):
    frames = []
    kept = vae.decoder.register_forward_pre_hook(lambda module, args: frames.append(args[0].shape[2]))
    decode(vae, cases["latents"][:, :, [0, 1, 2, 3, 3, 3, 3]])  # 6 x 8
    large = torch.zeros(1, 16, 3, 16, 17)
    decode(vae, large)
    kept.remove()
    assert frames == [1, 5, 1, 1, 1, 1]


@torch.no_grad()
def test_channels_last_in_bfloat16_gives_nearly_the_frames_of_float32(vae, cases):
    latents = cases["latents"]
    low = channels_last(quicken(copy.deepcopy(vae)).to(torch.bfloat16))
    assert all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in low.parameters() if p.ndim == 5)
    frames = decode(low, latents.bfloat16())
    assert frames.dtype == torch.bfloat16
    assert (frames.float() - cases["decoded"]).abs().mean() < 0.02


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("old", [False, True])
def test_other_precisions_run_with_and_without_convolutions_for_them(monkeypatch, cases, vae, dtype, old):
    computed_in.cache_clear()
    if old:
        for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
            monkeypatch.setattr(torch.ops.mkldnn, name, lambda: False)
    quick = quicken(copy.deepcopy(vae)).to(dtype)
    made = encode(quick, cases["video"].to(dtype)), decode(quick, cases["latents"].to(dtype))
    computed_in.cache_clear()
    for ours, exact in zip(made, (cases["latents"], cases["decoded"]), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exact).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("device", "units", "dtype"),
    [("cpu", True, torch.bfloat16), ("cpu", False, None), ("cuda", True, None)],
)
def test_bfloat16_is_the_quicker_one_where_a_cpu_has_units_for_it(monkeypatch, device, units, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": units}, raising=False)
    assert quickest_dtype(device) == dtype


def test_later_frames_do_not_change_earlier_latents(vae, cases):
    torch.testing.assert_close(
        encode(vae, cases["video"][:, :, :5]), cases["latents"][:, :, :2], atol=1e-4, rtol=0
    )


@torch.no_grad()
def test_a_bfloat16_vae_gives_bfloat16_latents_close_to_the_exact_ones(cases):
    low = load_vae_file(GOLDEN / "vae_weights.safetensors", dtype=torch.bfloat16)
    latents = encode(low, cases["video"].bfloat16())
    assert latents.dtype == torch.bfloat16
    assert (latents.float() - cases["latents"]).abs().mean() < 0.02


@torch.no_grad()
def test_tiles_leave_small_frames_as_they_are(vae):
    small = torch.rand(1, 3, 1, 64, 64) * 2 - 1
    assert torch.equal(encode(vae, small, tiled=True), encode(vae, small))


@torch.no_grad()
@pytest.mark.parametrize(("height", "width", "frames"), [(34, 8, 2), (8, 33, 1)])
def test_tiles_make_the_pixels_and_latents_of_the_whole(height, width, frames):
    torch.manual_seed(0)
    vae = quicken(AutoencoderKLWan(base_dim=8, num_res_blocks=1).eval())
    latents = torch.randn(1, 16, frames, height, width)
    torch.testing.assert_close(decode(vae, latents, tiled=True), decode(vae, latents), atol=1e-5, rtol=0)
    video = torch.rand(1, 3, 4 * frames - 3, 8 * height, 8 * width) * 2 - 1
    torch.testing.assert_close(encode(vae, video, tiled=True), encode(vae, video), atol=1e-5, rtol=0)


@torch.no_grad()
def test_tiling_is_enabled_as_diffusers_does_it(monkeypatch):
    vae, tiled = AutoencoderKLWan(base_dim=8, num_res_blocks=1).eval(), []
    for name, size in (("encode_in_tiles", (1, 16, 1, 40, 1)), ("decode_in_tiles", (1, 3, 1, 320, 8))):
        made = torch.zeros(size)
        monkeypatch.setattr(f"kairos.models.vae.{name}", lambda *_, made=made: tiled.append(made) or made)
    vae.enable_tiling()
    encode(vae, torch.zeros(1, 3, 1, 320, 8)), decode(vae, torch.zeros(1, 16, 1, 40, 1))
    assert len(tiled) == 2


@torch.no_grad()
@pytest.mark.parametrize("blocks", [1, 2])
def test_tiles_smaller_than_their_halo_are_exact_too(monkeypatch, blocks):
    monkeypatch.setattr("kairos.models.vae_tiles.TILE", 8)
    torch.manual_seed(1)
    vae = AutoencoderKLWan(base_dim=8, num_res_blocks=blocks).eval()
    latents = torch.randn(1, 16, 2, 33, 4)
    torch.testing.assert_close(decode(vae, latents, tiled=True), decode(vae, latents), atol=1e-5, rtol=0)
    video = torch.rand(1, 3, 5, 264, 32) * 2 - 1
    torch.testing.assert_close(encode(vae, video, tiled=True), encode(vae, video), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 6, 16, 16), r"4n \+ 1 frames, got 6; try 5 or 9"),
        ((1, 3, 0, 16, 16), r"4n \+ 1 frames, got 0; try 1 or 5"),
        ((1, 3, 5, 20, 16), "multiples of 8, got 20 x 16; try 16 x 16"),
        ((1, 3, 5, 16, 4), "multiples of 8, got 16 x 4; try 16 x 8"),
        ((3, 5, 16, 16), r"\(batch, 3, frames, height, width\)"),
        ((1, 4, 5, 16, 16), r"\(batch, 3, frames, height, width\)"),
    ],
)
def test_a_video_of_another_shape_is_refused_with_the_rule(vae, shape, message):
    with pytest.raises(UserError, match=message):
        encode(vae, torch.zeros(shape))


def test_bytes_and_latents_of_another_width_are_refused(vae):
    with pytest.raises(UserError, match="floating point"):
        encode(vae, torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"\(batch, 16, frames, height, width\), got \(1, 8, 1, 2, 2\)"):
        decode(vae, torch.zeros(1, 8, 1, 2, 2))
