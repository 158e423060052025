"""Videos to latents and back: diffusers' WAN2.1 VAE with Kairos' conventions around it.

The VAE is causal in time: the first frame stands alone, every four frames after it become one latent frame.
Eight pixels along height and width become one latent. Wan Team, arXiv 2503.20314.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from kairos.errors import UserError
from kairos.models.vae_tiles import TILE, Memory, decode_in_tiles, encode_in_tiles, no_memory

SPATIAL, TEMPORAL = 8, 4
"""Pixels a latent, along height and width and along time."""
AT_ONCE = 256
"""Latents that go through the VAE together: a frame of them, or several small ones. On a CPU those of all
clips count, so that what is at work stays in its cache; a GPU is given every clip's."""


def encode(vae: AutoencoderKLWan, video: Tensor, *, tiled: bool = False) -> Tensor:
    """The latents of a video: the mode of the posterior, normalised per channel.

    Args:
        video: (B, 3, F, H, W) in [-1, 1] with F = 4k + 1, H and W multiples of 8, in the VAE's dtype.
        tiled: work on tiles of 256 x 256 pixels, with the result of the whole: less memory, more work.
            Smaller frames are encoded whole. `vae.enable_tiling()` asks for it too, whatever its sizes.

    Returns:
        (B, 16, k + 1, H / 8, W / 8) in the dtype of `video`, about zero mean and unit variance.

    Raises:
        UserError: for a video of another shape.
    """
    _check_video(vae, video)

    if (tiled or vae.use_tiling) and _can_be_tiled(vae, max(video.shape[-2:]) // SPATIAL):
        mode = encode_in_tiles(vae, video)
    else:
        mode = _encode_whole(vae, video)
    mean, std = normalisation(vae, mode)
    return ((mode.float() - mean) / std).to(video.dtype)


def decode(vae: AutoencoderKLWan, latents: Tensor, *, tiled: bool = False) -> Tensor:
    """The video of normalised latents, as `encode` makes them.

    Args:
        latents: (B, 16, f, h, w) in the VAE's dtype.
        tiled: work on tiles of 32 x 32 latents, as `encode` does.

    Returns:
        (B, 3, 4 (f - 1) + 1, 8 h, 8 w) in [-1, 1].

    Raises:
        UserError: for latents of another shape.
    """
    if latents.ndim != 5 or latents.shape[1] != vae.config.z_dim or 0 in latents.shape:
        raise UserError(
            f"latents must be (batch, {vae.config.z_dim}, frames, height, width), got {tuple(latents.shape)}"
        )
    mean, std = normalisation(vae, latents)
    scaled = (latents.float() * std + mean).to(latents.dtype)

    if (tiled or vae.use_tiling) and _can_be_tiled(vae, max(latents.shape[-2:])):
        video = decode_in_tiles(vae, scaled)
    else:
        video = _decode_whole(vae, scaled)
    return video.clamp(-1, 1)


def decode_next(vae: AutoencoderKLWan, latents: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
    """The frames (B, 3, F, H, W) of the latents (B, 16, f, h, w) that come next, before they are clamped, and
    the decoder's memory after them. The latents are the VAE's own, not normalised; without a memory they are
    the first.

    Small ones go several frames at a time, since a call costs what it costs.
    """
    decoder: Any = vae.decoder
    at_once = _frames_at_once(latents)
    parts = latents.split(at_once, dim=2)
    if memory is None:  # the first frame is one by itself
        memory = no_memory(decoder)
        parts = latents[:, :, :1], *latents[:, :, 1:].split(at_once, dim=2)
    memory = list(memory)
    frames = [decoder(part, feat_cache=memory, feat_idx=[0]) for part in parts if part.shape[2]]
    return torch.cat(frames, dim=2), memory


@apply_forward_hook
def _decode_whole(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """As `vae.decode(latents).sample`, before it is clamped."""
    return decode_next(vae, vae.post_quant_conv(latents), None)[0]


@apply_forward_hook
def _encode_whole(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """As `vae.encode(video).latent_dist.mode()`."""
    encoder: Any = vae.encoder
    memory = no_memory(encoder)
    at_once = TEMPORAL * _frames_at_once(video[..., ::SPATIAL, ::SPATIAL])
    parts = video[:, :, :1], *video[:, :, 1:].split(at_once, dim=2)
    maps = [encoder(part, feat_cache=memory, feat_idx=[0]) for part in parts if part.shape[2]]
    return vae.quant_conv(torch.cat(maps, dim=2)).chunk(2, dim=1)[0]


def _frames_at_once(latents: Tensor) -> int:
    """How many frames of latents (B, C, F, h, w) go through the VAE together."""
    together = latents[:, 0, 0] if latents.device.type == "cpu" else latents[0, 0, 0]
    return max(1, AT_ONCE // together.numel())


def quickest_dtype(device: torch.device | str) -> torch.dtype | None:
    """bfloat16 on a CPU that has units for its products (AMX), where float32 takes two to five times as long.

    None elsewhere: the VAE's own. docs/performance.md has what it changes.
    """
    has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.13 has it
    return torch.bfloat16 if torch.device(device).type == "cpu" and has.get("amx_bf16") else None


def normalisation(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's latents, (1, 16, 1, 1, 1) float32, on the device of `like`."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=like.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def _can_be_tiled(vae: AutoencoderKLWan, side: int) -> bool:
    """Whether tiles save memory: not for small pictures, nor where each of several ranks has but a strip."""
    return side > TILE and not getattr(vae, "in_strips", False)


def _check_video(vae: AutoencoderKLWan, video: Tensor) -> None:
    channels = vae.config.in_channels
    if video.ndim != 5 or video.shape[1] != channels or not video.is_floating_point():
        raise UserError(
            f"video must be floating point, (batch, {channels}, frames, height, width) in [-1, 1], "
            f"got {tuple(video.shape)} {video.dtype}"
        )
    frames, height, width = video.shape[2:]
    if frames % TEMPORAL != 1:
        below = max((frames - 1) // TEMPORAL, 0) * TEMPORAL + 1
        raise UserError(f"video must have 4n + 1 frames, got {frames}; try {below} or {below + TEMPORAL}")
    if height < SPATIAL or width < SPATIAL or height % SPATIAL or width % SPATIAL:
        nearest = " x ".join(str(max(round(side / SPATIAL), 1) * SPATIAL) for side in (height, width))
        raise UserError(
            f"height and width must be multiples of {SPATIAL}, got {height} x {width}; try {nearest}"
        )
