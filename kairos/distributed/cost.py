"""What splitting a video costs: the bytes that ranks send, and from them how long a step should take.

The bytes are exact: tests hold them against what is sent. The seconds are computed, from work, bytes and
speeds measured on one GPU or published; no machine of several has measured them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kairos.distributed.exchange import spread
from kairos.sizes import EFFICIENCY, PEAK_TFLOPS, Shape, forward_flops, kinds

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


def delta_route(tokens: Sequence[int], heads: Sequence[int], dim_k: int, dim_v: int, width: int) -> str:
    """ "heads" or "tokens": where the rank that sends most sends less. Too few tokens have to go to heads."""
    if min(tokens) < CONV_CONTEXT:  # a convolution would reach two ranks back
        return "heads"
    return min(("heads", "tokens"), key=lambda way: max(delta_bytes(way, tokens, heads, dim_k, dim_v, width)))


def forward_bytes(
    config: Mapping[str, Any], tokens: int, ranks: int, width: int = 2, batch: int = 1, route: str = "auto"
) -> list[int]:
    """Bytes that each rank sends in one forward of the LinearDiT with its tokens over `ranks` ranks.

    route: of the gated delta layers, see `ContextParallel`.
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


def broadcast_bytes(config: Mapping[str, Any], tokens: int, ranks: int, width: int = 2) -> list[int]:
    """The same were every rank given the whole sequence: the keys and values of all tokens in every layer."""
    dim_k = config["num_attention_heads"] * config["gated_delta_head_dim"]
    gated = kinds(config).count("G")
    elements = gated * dim_k * (1 + config["gated_delta_expand_v"])
    elements += (config["num_layers"] - gated) * 2 * config["hidden_size"]
    return [n * elements * width * (ranks - 1) for n in spread(tokens, ranks)]


@dataclass(frozen=True)
class Machine:
    """What a step's time is computed from.

    flops: operations a second of a GPU at the efficiency that is assumed; link_bytes_s: what a GPU sends a
    second to the others; exchange_s: the least that one exchange takes.
    """

    flops: float
    link_bytes_s: float
    exchange_s: float


H100 = Machine(flops=PEAK_TFLOPS * 1e12 * EFFICIENCY, link_bytes_s=450e9 * 0.8, exchange_s=30e-6)
"""H100 SXM: the share of its peak that one GPU reached, and NVLink 4 at 450 GB/s each way (NVIDIA's data
sheet), of which 80 % are assumed; 30 us for an exchange is assumed too."""


def step_bytes(
    config: Mapping[str, Any], tokens: int, ranks: int, *, split: str = "context", width: int = 2
) -> int:
    """The most that a rank sends in a step with guidance: two forwards, or in "cfg" one and a velocity."""
    if split == "context":
        return 2 * max(forward_bytes(config, tokens, ranks, width))
    each = ranks // 2
    return max(forward_bytes(config, tokens, each, width)) + velocity_bytes(config, tokens) * (ranks - 1)


def velocity_bytes(config: Mapping[str, Any], tokens: int) -> int:
    """Bytes of one branch's velocity, float32."""
    return 4 * tokens * config["out_channels"] * config["patch_size"][1] * config["patch_size"][2]


def step_seconds(
    config: Mapping[str, Any], shape: Shape, ranks: int, *, split: str = "context", machine: Machine = H100
) -> float:
    """Seconds of one denoising step with guidance, two forwards, in bfloat16: computed, not measured.

    Nothing is assumed to overlap: work, then bytes, then the exchanges' own time.
    """
    halves = 2 if split == "cfg" else 1
    each = ranks // halves
    shares, heads = spread(shape.tokens, each), spread(config["num_attention_heads"], each)
    flops = forward_flops(config, shape)
    token_share, head_share = max(shares) / shape.tokens, max(heads) / sum(heads)
    dim_k = config["gated_delta_head_dim"]
    dim_v = dim_k * config["gated_delta_expand_v"]
    way = delta_route(shares, heads, dim_k, dim_v, 2) if each > 1 else "heads"
    delta = head_share if way == "heads" else token_share * (1 + dim_k / dim_v)
    work = flops["shared"] * token_share + flops["heads"] * head_share + flops["delta"] * delta
    forwards = 2 / halves
    exchanges = forwards * (2 * config["num_layers"] + 1) * (each > 1) + 2 * (halves == 2)
    sent = step_bytes(config, shape.tokens, ranks, split=split) if ranks > 1 else 0
    return forwards * work / machine.flops + sent / machine.link_bytes_s + exchanges * machine.exchange_s
