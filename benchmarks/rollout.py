"""Time of a chunk and peak memory of a rollout, at 10, 100 and 1,000 chunks, and of one pass of their length.

    python benchmarks/rollout.py [--model kairos-tiny] [--lengths 10,100] [--thousand] [--one-pass 10,40]

Each length is a process of its own, since a process never forgets its peak. A chunk's time is the median of
the last half, so the first lengths are long enough for every window to be full; memory is the process's peak
resident size, the model's included. What should be flat is compared from the last length to the first.
`--one-pass` makes the first frame and then all others at once, as `pipeline(...)` does, for comparison.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from itertools import islice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="kairos-tiny")
    parser.add_argument("--lengths", default="10,100", help="in chunks")
    parser.add_argument("--thousand", action="store_true", help="1,000 chunks as well")
    parser.add_argument("--one-pass", default="", help="lengths, in chunks, to make in one pass as well")
    parser.add_argument("--chunk-frames", type=int, default=3, help="latent frames a chunk")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps; default: the model's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="", help="write the results to this JSON")
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        kind, chunks = options.run.split(":")
        sys.stdout.write(json.dumps(measure(kind, int(chunks), options)) + "\n")
        return
    lengths = [int(length) for length in options.lengths.split(",")] + [1000] * options.thousand
    wanted = [f"stream:{length}" for length in lengths]
    wanted += [f"one-pass:{length}" for length in options.one_pass.split(",") if length]
    results = [in_a_process(run) for run in wanted]
    streamed = [result for result in results if result["kind"] == "stream"]
    summary = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.processor() or platform.machine()}, {options.threads} threads",
        "runs": results,
        "last_to_first": {
            name: round(streamed[-1][name] / streamed[0][name], 4) for name in ("chunk_s", "peak_mb")
        },
    }
    text = json.dumps(summary, indent=1) + "\n"
    sys.stdout.write(text)
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            file.write(text)


def in_a_process(run: str) -> dict[str, float | int | str]:
    command = [sys.executable, __file__, *sys.argv[1:], "--run", run]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(kind: str, chunks: int, options: argparse.Namespace) -> dict[str, float | int | str]:
    """One length, in this process."""
    import torch

    from kairos.presets import load_pipeline

    torch.set_num_threads(options.threads)
    pipeline = load_pipeline(options.model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompt, generator = "a red ball rolls to the right", torch.Generator().manual_seed(0)
    result: dict[str, float | int | str] = {"kind": kind, "chunks": chunks}
    frames = 4 * options.chunk_frames
    if kind == "stream":
        rollout = pipeline.stream(
            prompt,
            chunk_frames=options.chunk_frames,
            num_inference_steps=options.steps,
            generator=generator,
        )
        next(rollout)  # the first frame, a chunk of its own
        times = []
        since = time.perf_counter()
        for _ in islice(rollout, chunks):
            times.append(time.perf_counter() - since)
            since = time.perf_counter()
        chunk_s = statistics.median(times[len(times) // 2 :])
        result["state_mb"] = round(rollout.state.nbytes / 1e6, 3)
    else:
        began = time.perf_counter()
        pipeline(
            prompt,
            num_frames=1 + frames * chunks,
            num_inference_steps=options.steps,
            generator=generator,
        )
        chunk_s = (time.perf_counter() - began) / chunks
    unit = 1 if sys.platform == "darwin" else 1024
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    return result | {
        "chunk_s": round(chunk_s, 4),
        "frames_per_second": round(frames / chunk_s, 2),
        "peak_mb": round(peak_mb, 1),
    }


if __name__ == "__main__":
    main()
