"""Training throughput of kairos-tiny: the system against a plain loop, in one run.

    python benchmarks/training.py [--steps 20] [--threads 2] [--output results.json]

The plain loop simulates and encodes its clips as it goes, works in float32 and has no buckets: what one
writes first. The system reads the cache and works in bfloat16. Both draw the same tasks and train the same
model with the same optimizer; clips/s count the clips of all batches. Also measured: the share of the
system's time outside forward and backward.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from kairos.bench import processor
from kairos.models.transformer import KairosTransformer3DModel
from kairos.models.vae import encode
from kairos.training.batches import draw_batch
from kairos.training.cache import build_cache, description, load_clips
from kairos.training.checkpoint import trained_parameters
from kairos.training.flow import flow_loss
from kairos.training.loop import build_optimizer, update_ema
from kairos.training.materials import load_encoders
from kairos.training.recipe import read_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "kairos-tiny-teacher.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each loop")
    parser.add_argument("--plain-steps", type=int, default=3, help="measured steps of the plain loop")
    parser.add_argument("--clips", type=int, default=64, help="in the cache")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="", help="write the results to this JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = replace(read_recipe(RECIPE), base="kairos-tiny-teacher", vae=(), conditioner=None)
    stage = replace(recipe.stages[0], seed=1, batch_size=options.batch_size)
    source, (bucket,) = replace(recipe.source(stage), clips=options.clips), stage.buckets  # type: ignore[type-var]
    encoders = load_encoders(recipe)
    with tempfile.TemporaryDirectory() as folder:
        what = description(source, [bucket])
        build_cache(Path(folder), source, [bucket], encoders, described=what)
        sets = load_clips(Path(folder), [bucket], encoders, described=what)
        captions = dict(zip(sets[0].keys, sets[0].captions, strict=True))

        def cached(step: int) -> Any:
            return draw_batch(sets, stage, step, causal=True)

        def plain(step: int) -> Any:
            """The same batch, its clips simulated and encoded, its prompts embedded, on the spot."""
            batch = cached(step)
            needed = (batch.sample.shape[2] - 1) * 4 + 1
            made = []
            for key in batch.keys:
                index = int(key.split("/")[3])
                pixels = source._reference(bucket, index).read()[:needed]
                frames = torch.from_numpy(pixels).permute(3, 0, 1, 2)[None]
                with torch.no_grad():
                    made.append(encode(encoders.vae.float(), frames.float() / 127.5 - 1))
            sample = torch.cat(made)
            encoders.embed([captions[key] for key in batch.keys])
            return replace(batch, sample=sample)

        # One after the other and back, so that a busy machine is busy for both.
        system = measure(recipe, stage, cached, options.steps // 2, bfloat16=True)
        slow = measure(recipe, stage, plain, options.plain_steps, bfloat16=False)
        again = measure(recipe, stage, cached, options.steps // 2, bfloat16=True)
    clips, seconds, inside = (a + b for a, b in zip(system, again, strict=True))
    result = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {options.threads} threads",
        "torch": torch.__version__,
        "command": " ".join(["python", *sys.argv]),
        "system_clips_per_s": round(clips / seconds, 2),
        "plain_clips_per_s": round(slow[0] / slow[1], 2),
        "ratio": round(clips / seconds / (slow[0] / slow[1]), 2),
        "outside_forward_and_backward": round(1 - inside / seconds, 4),
    }
    text = json.dumps(result, indent=1) + "\n"
    sys.stdout.write(text)
    if options.output:
        Path(options.output).write_text(text, encoding="utf-8")


def measure(recipe: Any, stage: Any, draw: Any, steps: int, *, bfloat16: bool) -> tuple[int, float, float]:
    """Clips, seconds, and seconds in forward and backward, of `steps` steps after one to warm up."""
    torch.manual_seed(0)
    model = KairosTransformer3DModel(**recipe.model)
    trained = trained_parameters(model)
    ema = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = build_optimizer(model, stage)
    clips, inside, began = 0, 0.0, 0.0
    for step in range(steps + 1):
        if step == 1:
            clips, inside, began = 0, 0.0, time.perf_counter()
        batch = draw(step)
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = flow_loss(model, batch)
        loss.backward()
        inside += time.perf_counter() - start
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, trained, 0.999)
        clips += len(batch)
    return clips, time.perf_counter() - began, inside


if __name__ == "__main__":
    main()
