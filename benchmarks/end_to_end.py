"""A video of kairos-tiny from a cold start, second by second, and the same by stock parts.

    python benchmarks/end_to_end.py [--runs 3] [--threads 1] [--output FILE]

Every run is a process of its own, ours and stock in turn. "Stock" is the same model, request and weights with
what one would take from the shelf: diffusers' AutoencoderKLWan as it is, attention under one dense mask (made
once), transformers' torch_chunk_gated_delta_rule, torch's depthwise convolution, the prompt's keys and values
at every step, and rotary positions in complex128 as the released reference has them (tables made once).

"compute" is the prompt, the steps and the frames. Seconds are processor time where `--clock cpu` says so:
fairer on a machine that does other work too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from kairos.bench import processor

COMPUTE = ("prompt", "steps", "frames")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--output", default="", help="write the results to this JSON")
    parser.add_argument("--one", choices=("ours", "stock"), help=argparse.SUPPRESS)
    parser.add_argument("--frames", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        made = one_video(options.one, options.threads, options.clock, options.frames)
        sys.stdout.write(json.dumps(made) + "\n")
        return
    found: dict[str, list[dict[str, float]]] = {"ours": [], "stock": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.runs):
            for kind, runs in found.items():
                arguments = ["--one", kind, "--threads", str(options.threads), "--clock", options.clock]
                command = [sys.executable, __file__, *arguments, "--frames", f"{folder}/{kind}.npy"]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
        difference = largest_difference(folder)
    seconds = {kind: {stage: middle(runs, stage) for stage in runs[0]} for kind, runs in found.items()}
    compute = {kind: sum(stages[stage] for stage in COMPUTE) for kind, stages in seconds.items()}
    summary = {
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{processor()}, {options.threads} threads, float32",
        "clock": options.clock,
        "seconds": seconds,
        "compute_s": compute,
        "stock_to_ours": round(compute["stock"] / compute["ours"], 2),
        "of_each_stage": {s: round(seconds["stock"][s] / seconds["ours"][s], 2) for s in COMPUTE},
        "largest_difference_of_pixels": difference,
    }
    text = json.dumps(summary, indent=1) + "\n"
    sys.stdout.write(text)
    if options.output:
        Path(options.output).write_text(text, encoding="utf-8")


def middle(runs: list[dict[str, float]], stage: str) -> float:
    return round(statistics.median(run[stage] for run in runs), 4)


def largest_difference(folder: str) -> float:
    import numpy as np

    ours, stock = (np.load(f"{folder}/{kind}.npy") for kind in ("ours", "stock"))
    return float(np.abs(ours - stock).max())


def one_video(kind: str, threads: int, clock: str, frames_file: str) -> dict[str, float]:
    """The seconds of each stage of one video, in a process that has done nothing yet."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        since = now()
        yield
        seconds[name] = now() - since

    with stage("imports"):
        if kind == "ours":  # as the commands do
            from kairos.cli.machine import import_libraries
            from kairos.process import keep_freed_memory

            keep_freed_memory()
            import_libraries()
        import numpy as np
        import torch

        from kairos import pipeline as pipeline_module
        from kairos.data.media import to_uint8, write_video
        from kairos.presets import load_pipeline

        torch.set_num_threads(threads)
    if kind == "stock":
        take_stock(pipeline_module)
    with stage("loading"):
        pipeline = load_pipeline("kairos-tiny")
        pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        with stage("prompt"):
            positive = pipeline.encode_prompt(["a red ball rolls to the right"])
            negative = pipeline.encode_prompt([""])
        with stage("steps"):
            latents = pipeline(
                prompt_embeds=positive,
                negative_prompt_embeds=negative,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            ).frames
        with stage("frames"):
            frames = pipeline._decode(latents, "np", False)[0]
    with stage("writing"), tempfile.TemporaryDirectory() as folder:
        write_video(Path(folder) / "video.mp4", to_uint8(frames), 16, {})
    np.save(frames_file, frames)
    return seconds


def take_stock(pipeline_module: Any) -> None:
    """Put the parts from the shelf in the place of ours."""
    import torch
    import torch.nn.functional as F
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    from kairos.models import attention, gated_delta_net, tiles
    from kairos.models import vae as video_vae
    from kairos.ops import rotary
    from kairos.ops import windowed_attention as windows

    class Forgets:
        layers = property(lambda self: [], lambda self, value: None)

    def gated_delta_rule(q: Any, k: Any, v: Any, g: Any, beta: Any, *, initial_state: Any = None) -> Any:
        q = q * q.shape[-1] ** 0.5  # it scales by itself
        return torch_chunk_gated_delta_rule(
            q, k, v, g, beta, initial_state=initial_state, output_final_state=True
        )

    def short_conv(conv: Any, x: Any, past: Any, heads: slice = slice(None)) -> Any:
        head_dim, x = x.shape[-1], x.flatten(2).mT
        x = F.pad(x, (3, 0)) if past is None else torch.cat((past, x), dim=-1)
        out = F.silu(F.conv1d(x, conv.weight, groups=len(conv.weight)))
        return out.mT.unflatten(-1, (-1, head_dim)), x[..., -3:]

    @lru_cache
    def mask_of(layout: Any) -> Any:
        query = torch.arange(layout.frames * layout.tokens) + layout.first * layout.tokens
        key = torch.arange(len(layout.chunks) * layout.tokens)
        return layout.sees(query[:, None], key[None, :], torch.tensor(layout.chunks))

    def dense(q: Any, k: Any, v: Any, layout: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_of(layout)).transpose(1, 2)

    turns: dict[int, Any] = {}

    def apply_rotary(x: Any, table: Any) -> Any:
        cos, sin = table
        if id(cos) not in turns:
            turns[id(cos)] = cos, torch.complex(cos[..., ::2].double(), sin[..., 1::2].double())
        turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turns[id(cos)][1]
        return torch.view_as_real(turned).flatten(-2).float()

    assert rotary.apply_rotary is attention.apply_rotary
    pipeline_module.quicken = lambda vae: vae
    video_vae._decode_whole = lambda vae, latents: vae.decode(latents).sample
    pipeline_module.PromptMemory = Forgets
    attention.apply_rotary = apply_rotary
    gated_delta_net.gated_delta_rule = gated_delta_rule
    gated_delta_net.ShortConv.forward = short_conv  # type: ignore[method-assign]
    windows_module = sys.modules[windows.__module__] if callable(windows) else windows
    windows_module.ROUTES["blocked"] = windows_module.ROUTES["reference"] = dense
    tiles.TILE = 1 << 40


if __name__ == "__main__":
    main()
