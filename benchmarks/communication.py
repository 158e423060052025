"""Bytes that ranks send in a forward, computed and measured, and what they should cost on H100s, computed.

    python benchmarks/communication.py [--ranks 4] [--output FILE.json]

Measured: a random LinearDiT with the released heads and layers, narrow, on gloo ranks of this machine; what
the exchanges count, and what went over the loopback device, where there is a /proc/net/dev to tell. The
latter has TCP's own bytes in it, and those of whatever else talks on this machine.

Computed: the released 4B model at 480p and 720p with 81 frames on 2, 4 and 8 H100s, from work, bytes and
speeds that one GPU has measured or that are published. No machine of several has measured them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from kairos.bench import processor
from kairos.distributed import cost
from kairos.distributed.exchange import spread
from kairos.sizes import (
    EFFICIENCY,
    PEAK_TFLOPS,
    RELEASED_TRANSFORMER,
    Shape,
    clip_shape,
    forward_flops,
    kinds,
)

NARROW = RELEASED_TRANSFORMER | {
    "hidden_size": 320,
    "ffn_dim": 640,
    "num_layers": 8,
    "gated_delta_head_dim": 32,
    "text_dim": 64,
    "freq_dim": 32,
}
LATENTS = (9, 22, 26)  # 1,287 tokens: 3 divides them, 2 and 4 do not
CLIPS = {"480p": (480, 640), "720p": (720, 1280)}
WIDTH = 2
"""Bytes of bfloat16."""

# An H100 SXM.
FLOPS = PEAK_TFLOPS * 1e12 * EFFICIENCY
"""Operations a second, at the share of the peak that one GPU reached."""
LINK_BYTES_S = 450e9 * 0.8
"""What it sends a second: NVLink 4 has 450 GB/s each way (NVIDIA's data sheet), of which 80 % are assumed."""
EXCHANGE_S = 30e-6
"""The least that one exchange takes; assumed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="measure on 2 to N ranks")
    parser.add_argument("--forwards", type=int, default=5)
    parser.add_argument("--output", default="", help="write the results to this JSON")
    options = parser.parse_args()
    if options.ranks < 2 or options.forwards < 1:
        parser.error("nothing to measure: --ranks must be at least 2 and --forwards at least 1")
    from kairos.distributed.launch import launch

    measured = launch(measure, (options.ranks, options.forwards), size=options.ranks)[0]
    results = {
        "date": date.today().isoformat(),
        "hardware": f"{processor()}, gloo over loopback",
        "measured": measured,
        "computed": [computed(name, ranks) for name in CLIPS for ranks in (2, 4, 8)],
    }
    show("A forward, all ranks together, MB (float32, measured)", measured)
    show("A step with guidance on H100s (bfloat16, computed, not measured)", results["computed"])
    if options.output:
        Path(options.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def measure(most: int, forwards: int) -> list[dict[str, Any]]:
    """On every rank: the same forward on 2 to `most` of them, by either route of the delta rule."""
    import torch
    import torch.distributed as dist

    from kairos.distributed.parallel import parallelize
    from kairos.distributed.ranks import join, leave
    from kairos.models.transformer import KairosTransformer3DModel

    join("cpu")
    torch.manual_seed(0)
    model = KairosTransformer3DModel(**NARROW).eval()
    frames, height, width = LATENTS
    latents, prompt = torch.randn(1, 16, *LATENTS), torch.randn(1, 8, NARROW["text_dim"])
    tokens = frames * (height // 2) * (width // 2)
    rows = []
    for ranks in range(2, most + 1):
        for route in ("heads", "tokens"):
            parallel = parallelize(model, None, strips=False, ranks=range(ranks), delta_route=route)
            dist.barrier()
            before = loopback_bytes()
            with torch.no_grad():
                for _ in range(forwards if dist.get_rank() < ranks else 0):
                    model(latents, torch.tensor([500.0]), prompt)
            dist.barrier()
            wire = loopback_bytes()
            counted = torch.tensor(sum(parallel.sent.values()))
            dist.all_reduce(counted)
            parallel.remove()
            computed_bytes = sum(cost.forward_bytes(NARROW, tokens, ranks, width=4, route=route))
            rows.append(
                {
                    "ranks": ranks,
                    "delta rule by": route,
                    "computed": computed_bytes / 1e6,
                    "counted": counted.item() / forwards / 1e6,
                    "on the wire": None if wire is None else (wire - (before or 0)) / forwards / 1e6,
                    "broadcasting": sum(broadcast_bytes(NARROW, tokens, ranks, width=4)) / 1e6,
                }
            )
    leave()
    return rows


def loopback_bytes() -> int | None:
    """Bytes that the loopback device received so far."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return None
    return next(
        (int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:")), None
    )


def computed(name: str, ranks: int) -> dict[str, Any]:
    """Bytes and seconds of a step of the 4B model."""
    shape = clip_shape(RELEASED_TRANSFORMER, *CLIPS[name], 81)
    alone = step_seconds(shape, 1, "context")
    row: dict[str, Any] = {"clip": name, "ranks": ranks}
    for split in ("context", "cfg"):
        seconds = step_seconds(shape, ranks, split)
        row[f"{split} GB"] = step_bytes(shape.tokens, ranks, split) / 1e9
        row[f"{split} s"] = seconds
        row[f"{split} speed-up"] = alone / seconds
    broadcast = broadcast_bytes(RELEASED_TRANSFORMER, shape.tokens, ranks, WIDTH)
    row["broadcasting GB"] = 2 * max(broadcast) / 1e9
    row["one GPU s"] = alone
    return row


def step_seconds(shape: Shape, ranks: int, split: str) -> float:
    """Seconds of one denoising step with guidance, two forwards, in bfloat16: computed, not measured.

    Nothing is assumed to overlap: work, then bytes, then the exchanges' own time.
    """
    config = RELEASED_TRANSFORMER
    halves = 2 if split == "cfg" else 1
    each = ranks // halves
    shares, heads = spread(shape.tokens, each), spread(config["num_attention_heads"], each)
    flops = forward_flops(config, shape)
    token_share, head_share = max(shares) / shape.tokens, max(heads) / sum(heads)
    dim_k = config["gated_delta_head_dim"]
    dim_v = dim_k * config["gated_delta_expand_v"]
    way = cost.delta_route(shares, heads, dim_k, dim_v, WIDTH) if each > 1 else "heads"
    delta = head_share if way == "heads" else token_share * (1 + dim_k / dim_v)
    work = flops["shared"] * token_share + flops["heads"] * head_share + flops["delta"] * delta
    forwards = 2 / halves
    exchanges = forwards * (2 * config["num_layers"] + 1) * (each > 1) + 2 * (halves == 2)
    sent = step_bytes(shape.tokens, ranks, split) if ranks > 1 else 0
    return forwards * work / FLOPS + sent / LINK_BYTES_S + exchanges * EXCHANGE_S


def step_bytes(tokens: int, ranks: int, split: str) -> int:
    """The most that a rank sends in a step with guidance: two forwards, or in "cfg" one and velocities."""
    config = RELEASED_TRANSFORMER
    if split == "context":
        return 2 * max(cost.forward_bytes(config, tokens, ranks, WIDTH))
    # A branch's velocity is float32.
    velocity = 4 * tokens * config["out_channels"] * config["patch_size"][1] * config["patch_size"][2]
    return max(cost.forward_bytes(config, tokens, ranks // 2, WIDTH)) + velocity * (ranks - 1)


def broadcast_bytes(config: Mapping[str, Any], tokens: int, ranks: int, width: int) -> list[int]:
    """Bytes that each rank would send were every one given the whole sequence: the keys and values of all
    tokens in every layer."""
    dim_k = config["num_attention_heads"] * config["gated_delta_head_dim"]
    gated = kinds(config).count("G")
    elements = gated * dim_k * (1 + config["gated_delta_expand_v"])
    elements += (config["num_layers"] - gated) * 2 * config["hidden_size"]
    return [n * elements * width * (ranks - 1) for n in spread(tokens, ranks)]


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """A table in Markdown."""
    lines = [title, "", "| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        cells = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    print("\n".join(lines), end="\n\n")


if __name__ == "__main__":
    main()
