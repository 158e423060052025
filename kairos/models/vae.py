"""Videos to latents and back: diffusers' WAN2.1 VAE with Kairos' conventions around it.

The VAE is causal in time: the first frame stands alone, every four frames after it become one latent frame.
Eight pixels along height and width become one latent. Wan Team, arXiv 2503.20314.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from kairos.errors import UserError

SPATIAL, TEMPORAL = 8, 4
"""Pixels a latent, along height and width and along time."""

TILE, OVERLAP = 32, 8
"""Tiles in latents, 256 pixels wide; neighbours share at least 64 pixels, over which they are blended."""


def encode(vae: AutoencoderKLWan, video: Tensor, *, tiled: bool = False) -> Tensor:
    """The latents of a video: the mode of the posterior, normalised per channel.

    Args:
        video: (B, 3, F, H, W) in [-1, 1] with F = 4k + 1, H and W multiples of 8, in the VAE's dtype.
        tiled: work on tiles of 256 x 256 pixels and blend them, in the memory of one. Smaller frames are
            encoded whole; larger ones come out a little different, for the VAE looks at all of a frame.

    Returns:
        (B, 16, k + 1, H / 8, W / 8) in the dtype of `video`, about zero mean and unit variance.

    Raises:
        UserError: for a video of another shape.
    """
    _check_video(vae, video)

    def mode_of(part: Tensor) -> Tensor:
        return vae.encode(part).latent_dist.mode()

    mode = _by_tiles(mode_of, video, SPATIAL, 1) if tiled else mode_of(video)
    mean, std = normalisation(vae, mode)
    return ((mode.float() - mean) / std).to(video.dtype)


def decode(vae: AutoencoderKLWan, latents: Tensor, *, tiled: bool = False) -> Tensor:
    """The video of normalised latents, as `encode` makes them.

    Args:
        latents: (B, 16, f, h, w) in the VAE's dtype.
        tiled: work on tiles of 32 x 32 latents and blend them, as `encode` does.

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

    def video_of(part: Tensor) -> Tensor:
        return vae.decode(part).sample

    video = _by_tiles(video_of, scaled, 1, SPATIAL) if tiled else video_of(scaled)
    return video.clamp(-1, 1)


def normalisation(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's latents, (1, 16, 1, 1, 1) float32, on the device of `like`."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=like.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


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


def _by_tiles(work: Callable[[Tensor], Tensor], source: Tensor, scale_in: int, scale_out: int) -> Tensor:
    """`work` done on overlapping tiles of `source` (..., H, W), the results blended with linear ramps.

    A latent is `scale_in` elements wide in the source and `scale_out` in the result.
    """
    height, width = (side // scale_in for side in source.shape[-2:])
    if max(height, width) <= TILE:
        return work(source)
    total = weights = torch.zeros(())
    for top in _tile_starts(height):
        for left in _tile_starts(width):
            part = work(
                source[
                    ...,
                    top * scale_in : (top + TILE) * scale_in,
                    left * scale_in : (left + TILE) * scale_in,
                ]
            )
            if total.ndim == 0:
                total = part.new_zeros(
                    *part.shape[:-2], height * scale_out, width * scale_out, dtype=torch.float32
                )
                weights = total.new_zeros(total.shape[-2:])
            rows, columns = (_ramps(length, OVERLAP * scale_out, part.device) for length in part.shape[-2:])
            weight = rows[:, None] * columns
            y, x = top * scale_out, left * scale_out
            total[..., y : y + len(rows), x : x + len(columns)] += part * weight
            weights[y : y + len(rows), x : x + len(columns)] += weight
    return (total / weights).to(source.dtype)


def _tile_starts(extent: int) -> list[int]:
    """Where tiles begin along `extent` latents: evenly spread, the last one ends at the border."""
    if extent <= TILE:
        return [0]
    steps = math.ceil((extent - TILE) / (TILE - OVERLAP))
    return [round(step * (extent - TILE) / steps) for step in range(steps + 1)]


def _ramps(length: int, overlap: int, device: torch.device) -> Tensor:
    """Weights along a tile, (length,): rising over `overlap`, then 1, then falling."""
    distance = torch.arange(length, device=device, dtype=torch.float32) + 0.5
    return torch.minimum(distance, length - distance).div(overlap).clamp(max=1)
