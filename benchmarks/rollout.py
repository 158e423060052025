"""Time of a chunk and peak memory of a rollout after 10, 100 and 1,000 chunks, and of one pass beside it.

    python benchmarks/rollout.py [--lengths 10,100,1000] [--one-pass 10,40] [--steps 4] [--output FILE.json]

One process rolls out to the last length, notes its peak resident memory (the model's included) at each, and
keeps the world there. Then the next chunk of each world is made in turn, over and over, and timed: what else
the machine does falls on all lengths alike. A chunk's time is the median of those. `--one-pass` makes the
first frame and then all others at once, as `pipeline(...)` does, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import date
from typing import Any

from kairos.bench import processor
from kairos.process import peak_gb

PROMPT = "a red ball rolls to the right"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="kairos-tiny")
    parser.add_argument("--lengths", default="10,100,1000", help="in chunks")
    parser.add_argument("--one-pass", default="", help="lengths, in chunks, to make in one pass as well")
    parser.add_argument("--chunk-frames", type=int, default=3, help="latent frames a chunk")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps; default: the model's")
    parser.add_argument("--rounds", type=int, default=25, help="timed chunks at each length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="", help="write the results to this JSON")
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, for a spread, got {options.rounds}")
    if options.run:
        measured = one_pass(int(options.run), options) if options.run != "stream" else stream(options)
        sys.stdout.write(json.dumps(measured) + "\n")
        return
    streamed = in_a_process("stream")
    summary = {
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{processor()}, {options.threads} threads",
        "rollout": streamed,
        "last_to_first": {
            name: round(streamed[-1][name] / streamed[0][name], 4)
            for name in ("chunk_s", "peak_mb", "state_mb")
        },
        "one_pass": [row for length in options.one_pass.split(",") if length for row in in_a_process(length)],
    }
    text = json.dumps(summary, indent=1) + "\n"
    sys.stdout.write(text)
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            file.write(text)


def in_a_process(run: str) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, *sys.argv[1:], "--run", run]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def load(options: argparse.Namespace) -> Any:
    import torch

    from kairos.presets import load_pipeline

    torch.set_num_threads(options.threads)
    pipeline = load_pipeline(options.model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stream(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All lengths, in this process."""
    import torch

    from kairos.streaming import resume

    pipeline = load(options)
    rollout = pipeline.stream(
        PROMPT,
        chunk_frames=options.chunk_frames,
        num_inference_steps=options.steps,
        generator=torch.Generator().manual_seed(0),
    )
    next(rollout)  # the first frame, a chunk of its own
    rows, worlds, made = [], [], 0
    for length in map(int, options.lengths.split(",")):
        while made < length:
            next(rollout)
            made += 1
        worlds.append(rollout.state)
        size_mb = round(rollout.state.nbytes / 1e6, 4)
        rows.append({"chunks": length, "peak_mb": peak_mb(), "state_mb": size_mb, "times": []})
    for _ in range(options.rounds):
        for row, world in zip(rows, worlds, strict=True):
            again = resume(pipeline, world)
            since = time.perf_counter()
            next(again)
            row["times"].append(time.perf_counter() - since)
    for row in rows:
        times = row.pop("times")
        row["chunk_s"] = round(statistics.median(times), 4)
        row["spread_s"] = round(statistics.quantiles(times, n=4)[2] - statistics.quantiles(times, n=4)[0], 4)
        row["frames_per_second"] = round(4 * options.chunk_frames / row["chunk_s"], 2)
    return rows


def one_pass(chunks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One length at once, in this process."""
    import torch

    pipeline = load(options)
    since = time.perf_counter()
    pipeline(
        PROMPT,
        num_frames=1 + 4 * options.chunk_frames * chunks,
        num_inference_steps=options.steps,
        generator=torch.Generator().manual_seed(0),
    )
    taken = (time.perf_counter() - since) / chunks
    return [{"chunks": chunks, "peak_mb": peak_mb(), "seconds_per_chunk": round(taken, 4)}]


def peak_mb() -> float:
    return round(1e3 * (peak_gb() or 0.0), 1)


if __name__ == "__main__":
    main()
