"""Each operation against the plain way of doing it, in one run, on a CPU: medians, spread and their ratio.

    python benchmarks/operations.py [gated-delta] [windowed] [vae] [--runs 7] [--threads 2] [--output FILE]

gated-delta   the WY form in segments against transformers' torch_chunk_gated_delta_rule, 20,000 tokens
windowed      blocks of frames against one dense mask, 64 tokens a frame, 200 frames
vae           decoding 33 frames of 128 x 128 at base_dim 16 against the stock AutoencoderKLWan

Ours and theirs are timed in turn, after two warm-ups each, so that what else the machine does falls on both.
The inputs are random, and the largest difference of the results stands beside the times.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
from torch import Tensor

from kairos.bench import processor

Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def gated_delta() -> Pair:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    from kairos.ops.gated_delta import gated_delta_rule

    heads, dim_k, dim_v, tokens = 4, 32, 64, 20_000
    q, k = torch.nn.functional.normalize(torch.randn(2, 1, tokens, heads, dim_k), dim=-1)
    v = torch.randn(1, tokens, heads, dim_v)
    g, beta = -torch.rand(1, tokens, heads), torch.rand(1, tokens, heads)
    return (
        lambda: gated_delta_rule(q * dim_k**-0.5, k, v, g, beta)[0],
        lambda: torch_chunk_gated_delta_rule(q, k, v, g, beta)[0],  # scales q itself
    )


def windowed() -> Pair:
    from kairos.ops.windowed_attention import windowed_attention

    q, k, v = torch.randn(3, 1, 200 * 64, 4, 32)
    return (
        lambda: windowed_attention(q, k, v, tokens_per_frame=64),
        lambda: windowed_attention(q, k, v, tokens_per_frame=64, backend="reference"),
    )


def vae() -> Pair:
    from kairos.models.vae import decode_next
    from kairos.models.vae_layers import quicken
    from kairos.training.vae import build_vae

    stock = build_vae(16).eval()
    quick = quicken(copy.deepcopy(stock))
    latents = torch.randn(1, 16, 9, 16, 16)
    return (
        lambda: decode_next(quick, quick.post_quant_conv(latents), None)[0].clamp(-1, 1),
        lambda: stock.decode(latents).sample,
    )


OPERATIONS: dict[str, Callable[[], Pair]] = {"gated-delta": gated_delta, "windowed": windowed, "vae": vae}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("operations", nargs="*", help=f"of {', '.join(OPERATIONS)}; default: all")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="", help="write the results to this JSON")
    options = parser.parse_args()
    if unknown := set(options.operations) - set(OPERATIONS):
        parser.error(f"unknown operation {', '.join(sorted(unknown))}; choose from {', '.join(OPERATIONS)}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        results = {
            name: compare(OPERATIONS[name](), options.runs) for name in options.operations or OPERATIONS
        }
    summary = {
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{processor()}, {options.threads} threads, float32",
        "torch": torch.__version__,
        "operations": results,
    }
    text = json.dumps(summary, indent=1) + "\n"
    sys.stdout.write(text)
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            file.write(text)


def compare(pair: Pair, runs: int) -> dict[str, Any]:
    """Times of both in turn."""
    difference = max((pair[0]() - pair[1]()).abs().max().item() for _ in range(2))  # also the warm-ups
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for function, taken in zip(pair, times, strict=True):
            since = time.perf_counter()
            function()
            taken.append(time.perf_counter() - since)
    ours, theirs = (statistics.median(taken) for taken in times)
    return {
        "ours_s": round(ours, 4),
        "theirs_s": round(theirs, 4),
        "spread_s": [round(max(taken) - min(taken), 4) for taken in times],
        "ratio": round(theirs / ours, 2),
        "largest_difference": difference,
    }


if __name__ == "__main__":
    main()
