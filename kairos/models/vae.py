"""Videos to latents and back: diffusers' WAN2.1 VAE with Kairos' conventions around it.

The VAE is causal in time: the first frame stands alone, every four frames after it become one latent frame.
Eight pixels along height and width become one latent. Wan Team, arXiv 2503.20314.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from kairos.errors import UserError
from kairos.models.vae_tiles import TILE, decode_in_tiles, encode_in_tiles

SPATIAL, TEMPORAL = 8, 4
"""Pixels a latent, along height and width and along time."""


def encode(vae: AutoencoderKLWan, video: Tensor, *, tiled: bool = False) -> Tensor:
    """The latents of a video: the mode of the posterior, normalised per channel.

    Args:
        video: (B, 3, F, H, W) in [-1, 1] with F = 4k + 1, H and W multiples of 8, in the VAE's dtype.
        tiled: work on tiles of 256 x 256 pixels, with the result of the whole: less memory, more work.
            Smaller frames are encoded whole.

    Returns:
        (B, 16, k + 1, H / 8, W / 8) in the dtype of `video`, about zero mean and unit variance.

    Raises:
        UserError: for a video of another shape.
    """
    _check_video(vae, video)

    if tiled and _can_be_tiled(vae, max(video.shape[-2:]) // SPATIAL):
        mode = encode_in_tiles(vae, video)
    else:
        mode = vae.encode(video).latent_dist.mode()
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

    if tiled and _can_be_tiled(vae, max(latents.shape[-2:])):
        video = decode_in_tiles(vae, scaled)
    else:
        video = vae.decode(scaled).sample
    return video.clamp(-1, 1)


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
