"""Measures a pipeline on the worlds: how true its motion is, and whether its videos show what was asked for.

Every number stands beside two floors: the same measure on the simulator's own frames, and on their
reconstruction by the model's VAE. A run is a function of (model, scenes, clips, split, seed).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kairos.evaluation.measure import caption_agreement, velocity_error
from kairos.models import vae as video_vae
from kairos.pipeline import KairosPipeline, KairosPipelineOutput
from kairos.worlds import Clip, simulate

logger = logging.getLogger(__name__)

Frames = NDArray[np.uint8]
GIVEN_FRAMES = 5


def evaluate(
    pipeline: KairosPipeline,
    *,
    scenes: Sequence[str] = ("uniform", "collision", "parabola"),
    clips: int = 16,
    split: str = "in",
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    keep: Callable[[str, str, int, Frames], None] | None = None,
) -> dict[str, Any]:
    """The measures of each scene, {"scenes": {scene: {measure: {"value", "ci", "floor_truth",
    "floor_vae"}}}}.

    Measures: `velocity_error` of a continuation from five frames (world units per unit of time), `psnr` of
    the VAE (dB), and for text to video the shares `colors`, `count`, `direction`, `all`. `ci` is a 95 %
    bootstrap interval of the mean. `keep(kind, scene, index, frames)` is handed every video: "truth",
    "vae", "continuation" and "t2v".
    """
    size = int(pipeline.config.defaults["height"])
    num_frames = int(pipeline.config.defaults["num_frames"])
    keep = keep or (lambda kind, scene, index, frames: None)
    result: dict[str, Any] = {}
    for scene in scenes:
        errors: list[float] = []
        floors: dict[str, list[float]] = {"truth": [], "vae": [], "psnr": []}
        agreements: dict[str, list[float]] = {"colors": [], "count": [], "direction": [], "all": []}
        for index in range(clips):
            clip = simulate(scene, split=split, seed=seed, index=index, num_frames=num_frames, size=size)
            generator = torch.Generator().manual_seed(seed * 100_003 + index)
            again = reconstruct(pipeline, clip.frames)

            def make(generator: torch.Generator = generator, **given: Any) -> Frames:
                output = pipeline(
                    generator=generator, num_inference_steps=steps, guidance_scale=guidance, **given
                )
                assert isinstance(output, KairosPipelineOutput)
                return to_uint8(output.frames[0])

            continued = make(prompt=clip.caption, video=clip.frames[:GIVEN_FRAMES])
            made = make(prompt=clip.caption)
            errors.append(velocity_error(continued, clip, GIVEN_FRAMES))
            floors["truth"].append(velocity_error(clip.frames, clip, GIVEN_FRAMES))
            floors["vae"].append(velocity_error(again, clip, GIVEN_FRAMES))
            floors["psnr"].append(psnr(again, clip))
            agreement = caption_agreement(made, clip.parameters["said"])
            for name, right in (agreement | {"all": all(agreement.values())}).items():
                agreements[name].append(float(right))
            for kind, frames in (
                ("truth", clip.frames),
                ("vae", again),
                ("continuation", continued),
                ("t2v", made),
            ):
                keep(kind, scene, index, frames)
        result[scene] = {
            "velocity_error": summary(errors, seed)
            | {"floor_truth": mean(floors["truth"]), "floor_vae": mean(floors["vae"])},
            "psnr": summary(floors["psnr"], seed),
            **{name: summary(values, seed) for name, values in agreements.items()},
        }
        logger.info(
            "%s: %s", scene, {name: round(entry["value"], 4) for name, entry in result[scene].items()}
        )
    return {"split": split, "seed": seed, "clips": clips, "given_frames": GIVEN_FRAMES, "scenes": result}


@torch.no_grad()
def reconstruct(pipeline: KairosPipeline, frames: Frames) -> Frames:
    """What the pipeline's VAE makes of a video (F, H, W, 3)."""
    vae = pipeline.vae
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].to(vae.device, vae.dtype) / 127.5 - 1
    again = video_vae.decode(vae, video_vae.encode(vae, video))
    return to_uint8((again[0].float().permute(1, 2, 3, 0) / 2 + 0.5).cpu().numpy())


def to_uint8(frames: NDArray[np.floating]) -> Frames:
    return (frames * 255).round().clip(0, 255).astype(np.uint8)


def psnr(frames: Frames, clip: Clip) -> float:
    """Peak signal to noise ratio in dB of `frames` against the clip's."""
    error = float(np.mean((frames.astype(np.float64) - clip.frames) ** 2))
    return 10 * math.log10(255**2 / max(error, 1e-9))


def mean(values: Sequence[float]) -> float:
    """The mean of what could be measured."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def summary(values: Sequence[float], seed: int, resamples: int = 1000) -> dict[str, Any]:
    """The mean with its 95 % bootstrap interval."""
    known = np.array([value for value in values if math.isfinite(value)])
    if not len(known):
        return {"value": float("nan"), "ci": [float("nan")] * 2}
    draws = np.random.default_rng(seed).choice(known, (resamples, len(known))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"value": float(known.mean()), "ci": [float(low), float(high)]}
