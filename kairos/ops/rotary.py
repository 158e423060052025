"""Rotary positions for video tokens (RoFormer, arXiv 2104.09864), split over frame, row and column.

Angles are made in float64 from integer positions, so frame 1,000,000 of a rollout is as exact as frame 1; the
rotation itself is float32, of adjacent channel pairs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def rotary_table(
    frames: int,
    height: int,
    width: int,
    head_dim: int,
    *,
    first_frame: int = 0,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (N, 1, head_dim), float32, of N = frames * height * width tokens, frame-major.

    Of the head_dim / 2 pairs a third each turn with the row and the column, and the rest with the frame. Both
    channels of a pair hold its cosine; the first holds minus the sine. `first_frame` is the absolute index of
    the first frame. The tables of the last few shapes are kept, so that a clip's is made once and not at
    each step: do not change them.
    """
    # What a compiler traces with holds no numbers, and is not to be kept.
    table = _table.__wrapped__ if torch.compiler.is_compiling() else _table
    return table(frames, height, width, head_dim, first_frame, device, torch.is_inference_mode_enabled())


@lru_cache(maxsize=8)
def _table(
    frames: int,
    height: int,
    width: int,
    head_dim: int,
    first_frame: int,
    device: torch.device | None,
    inference_mode: bool,
) -> tuple[Tensor, Tensor]:
    """`inference_mode` is part of the key: tensors made in it cannot be trained with."""
    pairs = head_dim // 2
    pairs_y = pairs_x = pairs // 3
    pairs_f = pairs - pairs_y - pairs_x
    angles = torch.cat(
        [
            _angles(first_frame, frames, pairs_f)[:, None, None].expand(-1, height, width, -1),
            _angles(0, height, pairs_y)[None, :, None].expand(frames, -1, width, -1),
            _angles(0, width, pairs_x)[None, None, :].expand(frames, height, -1, -1),
        ],
        dim=-1,
    ).reshape(frames * height * width, 1, pairs)
    cos = angles.cos().repeat_interleave(2, -1)
    sin = torch.stack((-angles.sin(), angles.sin()), dim=-1).flatten(-2)
    return cos.float().to(device), sin.float().to(device)


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the adjacent channel pairs of x (B, N, H, head_dim) by the table's angles, in float32."""
    cos, sin = table
    x = x.float()
    pairs = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # compilers know no complex numbers, and make one pass of this
        return torch.addcmul(x * cos, pairs.flip(-1).flatten(-2), sin)
    turned = torch.view_as_complex(pairs) * torch.complex(cos[..., ::2], sin[..., 1::2])
    return torch.view_as_real(turned).flatten(-2)


def _angles(first: int, count: int, pairs: int) -> Tensor:
    """position * 10000^(-2i / (2 pairs)), (count, pairs), float64, for positions first, first + 1, ..."""
    positions = torch.arange(first, first + count, dtype=torch.float64, device="cpu")
    frequencies = 10000.0 ** -(torch.arange(pairs, dtype=torch.float64, device="cpu") / max(pairs, 1))
    return torch.outer(positions, frequencies)
