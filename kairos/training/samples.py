"""Clips that a model makes while it is being trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kairos.data.media import write_video
from kairos.models.vae import decode
from kairos.pipeline import chunk_ends, denoise, draw_noise
from kairos.schedulers import FewStepScheduler, FlowMatchScheduler
from kairos.training.cache import ClipSet, Encoders
from kairos.training.flow import latents_a_token
from kairos.training.parallel import Processes


@torch.no_grad()
def sample_latents(
    model: Any,
    clips: ClipSet,
    rows: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    guide_continuation: bool = True,
    few_step: FewStepScheduler | None = None,
    known_frames: int = 0,
    last_step_alone: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Latents (B, 16, F, h, w) for the captions of `rows`, the first `known_frames` given.

    `guide_continuation`: whether guidance leads what follows frames that are there, too.
    `last_step_alone`: take the last step only, of the clips' own latents under as much noise as it meets.
    """
    truth = clips.latents(rows)
    scheduler = few_step or FlowMatchScheduler()
    keys = [clips.keys[row] for row in rows] if known_frames else None
    embeds, mask = clips.embeddings([clips.captions[row] for row in rows], keys)
    empty = clips.embeddings([""] * len(rows))
    positive = embeds.to(device), mask.to(device)
    negative = None
    if guidance_scale > 1 and few_step is None:
        negative = empty[0].to(device), empty[1].to(device)
    known = truth[:, :, :known_frames].to(device) if known_frames else None
    generator = torch.Generator().manual_seed(seed)
    latents = draw_noise(tuple(truth.shape), generator).to(device)
    tokens = truth.shape[3] * truth.shape[4] // latents_a_token(model)
    training = model.training
    model.eval()
    for end in chunk_ends(model, truth.shape[2], known_frames):
        scheduler.set_timesteps(steps, latent_frames=end, tokens_per_frame=tokens, device=device)
        if last_step_alone:
            scheduler.sigmas, scheduler.timesteps = scheduler.sigmas[-2:], scheduler.timesteps[-1:]
            sigma = float(scheduler.sigmas[0])
            latents[:, :, :end].lerp_(truth[:, :, :end].to(device), 1 - sigma)
        latents[:, :, :end] = known = denoise(
            model,
            scheduler,
            latents[:, :, :end],
            positive=positive,
            negative=negative if known is None or guide_continuation else None,
            guidance_scale=guidance_scale,
            known=known,
            generator=generator,
        )
    model.train(training)
    return latents


def sampling_of(scheduler: FlowMatchScheduler, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `sample_latents`: how a pipeline of this scheduler and these defaults samples."""
    return {
        "steps": int(defaults["num_inference_steps"]),
        "guidance_scale": float(defaults["guidance_scale"]),
        "guide_continuation": bool(defaults.get("guide_continuation", True)),
        "few_step": scheduler if isinstance(scheduler, FewStepScheduler) else None,
    }


def motion(latents: Tensor) -> float:
    """How much a clip (B, 16, F, h, w) moves: the mean change from one latent frame to the next.

    The first frame, one frame of pixels where the others are four, is left out where there are enough.
    """
    frames = latents[:, :, 1:] if latents.shape[2] > 2 else latents
    return float(frames.diff(dim=2).abs().mean())


class SampleVideos:
    """Writes `samples/step-*.mp4` for the captions of the first clips; the noise is always the same."""

    def __init__(
        self,
        clips: ClipSet,
        encoders: Encoders,
        here: Processes,
        scheduler: FlowMatchScheduler,
        defaults: Mapping[str, Any],
        *,
        count: int = 4,
        fps: float = 16,
        precision: str = "float32",
    ) -> None:
        """scheduler, defaults: of the pipeline that the model is for."""
        self.clips, self.encoders, self.here, self.fps = clips, encoders, here, fps
        self.precision = precision
        self.rows = list(range(min(count, len(clips))))
        self.options = sampling_of(scheduler, defaults)
        names = ("num_inference_steps", "guidance_scale")
        self.sampler = {"sampler": type(scheduler).__name__, **{name: defaults[name] for name in names}}

    def __call__(self, model: Any, output: Path, step: int) -> list[NDArray[np.uint8]]:
        """The videos, (F, H, W, 3); a captionless data set gives clips that go on from their first frame."""
        told = self.clips.latent_frames == 1 or any(self.clips.captions[row] for row in self.rows)
        known = 0 if told else 1
        with self.here.autocast(self.precision):
            latents = sample_latents(
                model, self.clips, self.rows, known_frames=known, device=self.here.device, **self.options
            )
        if not self.here.first:
            return []
        vae = self.encoders.vae.to(self.here.device)
        videos = []
        for number, one in enumerate(latents.split(1)):
            with torch.no_grad():
                pixels = decode(vae, one.to(vae.device, vae.dtype))[0].float().permute(1, 2, 3, 0)
            frames = ((pixels / 2 + 0.5) * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
            folder = output / "samples"
            folder.mkdir(exist_ok=True)
            said = {"stage": output.name, "step": step, "caption": self.clips.captions[self.rows[number]]}
            metadata = {"sample": said | {"given_frames": known} | self.sampler}
            write_video(folder / f"step-{step:07d}-{number}.mp4", frames, self.fps, metadata)
            videos.append(frames)
        return videos
