"""What splitting a video costs: the bytes that ranks send. Tests hold them against what is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kairos.distributed.exchange import spread
from kairos.sizes import kinds

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
    tokens: Sequence[int], heads: Sequence[int], head_dim: int, width: int, batch: int
) -> list[int]:
    """Bytes that each rank sends for one windowed attention layer: q, k, v to heads, the result back."""
    all_tokens, all_heads = sum(tokens), sum(heads)
    return [
        batch * head_dim * width * (3 * n * (all_heads - h) + (all_tokens - n) * h)
        for n, h in zip(tokens, heads, strict=True)
    ]


def delta_route(tokens: Sequence[int], heads: Sequence[int], dim_k: int, dim_v: int, width: int) -> str:
    """ "heads" or "tokens": where the rank that sends most sends less. Too few tokens have to go to heads."""
    if min(tokens) < CONV_CONTEXT:  # a convolution would reach two ranks back
        return "heads"
    return min(("heads", "tokens"), key=lambda way: max(delta_bytes(way, tokens, heads, dim_k, dim_v, width)))


def forward_bytes(
    config: Mapping[str, Any], tokens: int, ranks: int, width: int, batch: int = 1, route: str = "auto"
) -> list[int]:
    """Bytes that each rank sends in one forward of the LinearDiT with its tokens over `ranks` ranks.

    width: bytes of an element. route: of the gated delta layers, see `ContextParallel`.
    """
    shares, heads = spread(tokens, ranks), spread(config["num_attention_heads"], ranks)
    if ranks == 1 or min(shares) == 0:
        return [0] * ranks
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    dim_k = config["gated_delta_head_dim"]
    dim_v = dim_k * config["gated_delta_expand_v"]
    by_bytes = delta_route(shares, heads, dim_k, dim_v, width)
    way = by_bytes if route == "auto" or min(shares) < CONV_CONTEXT else route
    delta = delta_bytes(way, shares, heads, dim_k, dim_v, width, batch)
    attention = attention_bytes(shares, heads, head_dim, width, batch)
    patch = config["patch_size"][1] * config["patch_size"][2]
    gathered = batch * max(shares) * config["out_channels"] * patch * width * (ranks - 1)
    gated = kinds(config).count("G")
    ungated = config["num_layers"] - gated
    return [gated * d + ungated * a + gathered for d, a in zip(delta, attention, strict=True)]
