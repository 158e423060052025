"""What splitting a video costs: bytes that ranks send, and from them how long a step should take.

The bytes are exact (tests hold them against what is sent); the seconds are computed from published speeds, not
measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONV_CONTEXT = 3
"""Tokens that the gated delta layers' convolutions look back."""


def delta_bytes(
    way: str, tokens: Sequence[int], heads: Sequence[int], dim_k: int, dim_v: int, width: int, batch: int = 1
) -> list[int]:
    """Bytes that each rank sends for one gated delta layer, by heads or by tokens.

    tokens, heads: the ranks' shares; dim_k, dim_v: channels of a head; width: bytes of an element. Gates,
    transitions and states are float32.
    """
    ranks, all_tokens, all_heads = len(tokens), sum(tokens), sum(heads)
    if way == "heads":
        there = (2 * dim_k + dim_v) * width + 2 * 4
        return [
            batch * (n * (all_heads - h) * there + (all_tokens - n) * h * dim_v * width)
            for n, h in zip(tokens, heads, strict=True)
        ]
    states = 4 * dim_k * (dim_k + dim_v) * all_heads * (ranks - 1)
    tail = CONV_CONTEXT * all_heads * (2 * dim_k + dim_v) * width
    return [batch * (states + tail * (rank + 1 < ranks)) for rank in range(ranks)]


def attention_bytes(
    tokens: Sequence[int], heads: Sequence[int], head_dim: int, width: int, batch: int = 1
) -> list[int]:
    """Bytes that each rank sends for one windowed attention layer: q, k, v to heads, the result back."""
    all_tokens, all_heads = sum(tokens), sum(heads)
    return [
        batch * head_dim * width * (3 * n * (all_heads - h) + (all_tokens - n) * h)
        for n, h in zip(tokens, heads, strict=True)
    ]
