"""What the suite measures: anything that goes on with a video. Adapters for Kairos and for diffusers.

    def model(prompt: str, first_frames: Frames, num_frames: int) -> Frames: ...

takes a caption, the first k frames (k, H, W, 3) uint8 (k = 0: from the caption alone), and the number of
frames in all, and returns (num_frames, H, W, 3) uint8 that begin with the given ones. It draws its noise from
torch's own generator, or from one seeded with `torch.initial_seed()`: the suite seeds it before each call.

A model may have more: `identity`, a name for its weights and settings, without which it is measured anew in
every run; `from_text`, True where it can do without any frame (else it is not asked to); `batch`, for many
videos at once; `reconstruct`, for the floor of its VAE; `surprise`, for violation of expectation; `rolls` and
`rollout`, for drift.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from kairos.conditioning import TEMPLATES
from kairos.data.media import Frames, to_uint8
from kairos.errors import UserError
from kairos.evaluation.reading import averaged
from kairos.models import vae as video_vae
from kairos.models.vae import SPATIAL, TEMPORAL
from kairos.pipeline import KairosPipeline, chunk_ends, denoise, draw_noise, is_guided
from kairos.schedulers import FewStepScheduler, shift_for
from kairos.streaming import stream
from kairos.streaming.rollout import joined
from kairos.weights.fingerprint import fingerprint

logger = logging.getLogger(__name__)

SURPRISE_SIGMAS = (0.2, 0.4, 0.6, 0.8)
"""Before the shift of the clip's shape."""
TEMPORAL_UNITS = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
"""What diffusers' pipelines call the frames that their VAE makes one latent frame of."""


class VideoModel(Protocol):
    """What can be measured; see above for what else a model may have."""

    def __call__(self, prompt: str, first_frames: Frames, num_frames: int, /) -> Frames: ...


def generate(
    model: VideoModel, prompts: Sequence[str], first: Frames, num_frames: int, seeds: Sequence[int]
) -> Frames:
    """Videos (B, F, H, W, 3) of a model: at once where it has `batch`, else one by one, each from its seed.

    first: (B, k, H, W, 3). Raises UserError where the model returns something else than was asked for.
    """
    if hasattr(model, "batch"):
        videos = np.asarray(model.batch(prompts, first, num_frames, seeds))
    else:
        made = []
        for prompt, given, seed in zip(prompts, first, seeds, strict=True):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                made.append(np.asarray(model(prompt, given, num_frames)))
        if any(video.shape != made[0].shape for video in made):
            raise UserError(f"the model's videos have different shapes: {made[0].shape} and others")
        videos = np.stack(made)
    wanted = (len(prompts), num_frames, *first.shape[2:])
    if videos.shape != wanted or videos.dtype != np.uint8:
        raise UserError(f"the model must return uint8 {wanted[1:]}, got {videos.dtype} {videos.shape[1:]}")
    return videos


class KairosModel:
    """A Kairos pipeline, many clips at a time."""

    from_text = True

    def __init__(
        self, pipeline: KairosPipeline, *, steps: int | None = None, guidance: float | None = None
    ) -> None:
        """steps, guidance: None takes the pipeline's own."""
        defaults = pipeline.config.defaults
        self.pipeline = pipeline
        self.steps = int(defaults["num_inference_steps"] if steps is None else steps)
        self.guidance = float(defaults["guidance_scale"] if guidance is None else guidance)
        if isinstance(pipeline.scheduler, FewStepScheduler):
            self.steps, self.guidance = len(pipeline.scheduler.timesteps), 1.0
            if (steps or self.steps) != self.steps or (guidance or 1) != 1:
                logger.warning(
                    "this model samples in %d steps without guidance, whatever is asked for", self.steps
                )
        parts = {name: getattr(pipeline, name) for name in ("transformer", "vae", "text_encoder")}
        sampler = sampler_of(pipeline)
        self.identity = f"{fingerprint(parts)}-{sampler}-{self.steps}-{self.guidance:g}"
        if pipeline.transformer.dtype != torch.float32:
            self.identity += f"-{str(pipeline.transformer.dtype).removeprefix('torch.')}"

    def __call__(self, prompt: str, first_frames: Frames, num_frames: int) -> Frames:
        return self.batch([prompt], first_frames[None], num_frames, [torch.initial_seed()])[0]

    @torch.no_grad()
    def batch(self, prompts: Sequence[str], first: Frames, num_frames: int, seeds: Sequence[int]) -> Frames:
        """Videos (B, F, H, W, 3) that begin with `first` (B, k, H, W, 3), k = 0 or 4n + 1."""
        pipe, (height, width) = self.pipeline, first.shape[2:4]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        positive = self._prompts(prompts, first)
        defaults = pipe.config.defaults
        guided = self.guidance > 1 and is_guided(defaults, first.shape[1])
        negative = pipe.encode_prompt([""] * len(prompts)) if guided else None
        known = self._encode(first) if first.shape[1] else None
        latent_frames = (num_frames - 1) // TEMPORAL + 1
        shape = (
            len(prompts),
            pipe.transformer.config.in_channels,
            latent_frames,
            height // SPATIAL,
            width // SPATIAL,
        )
        latents = draw_noise(shape, generators).to(pipe._execution_device)
        scheduler = copy(pipe.scheduler)  # of this call alone, whatever other threads make meanwhile
        for end in chunk_ends(pipe.transformer, latent_frames, 0 if known is None else known.shape[2]):
            scheduler.set_timesteps(
                self.steps,
                latent_frames=end,
                tokens_per_frame=self._tokens(height, width),
                device=latents.device,
            )
            latents[:, :, :end] = known = denoise(
                pipe.transformer,
                scheduler,
                latents[:, :, :end],
                positive=positive,
                negative=negative if is_guided(defaults, 0 if known is None else known.shape[2]) else None,
                guidance_scale=self.guidance,
                known=known,
                generator=generators,
            )
        return self._decode(latents)

    @torch.no_grad()
    def reconstruct(self, videos: Frames) -> Frames:
        """What the VAE makes of videos (B, F, H, W, 3)."""
        return self._decode(self._encode(videos))

    @torch.no_grad()
    def surprise(self, prompts: Sequence[str], videos: Frames, given: int, seeds: Sequence[int]) -> Tensor:
        """The flow-matching loss (B,) of videos after their `given` frames, the same noise for one seed."""
        pipe = self.pipeline
        latents = self._encode(videos)
        frames, past = latents.shape[2], (given - 1) // TEMPORAL + 1
        embeds, mask = self._prompts(prompts, videos[:, :given])
        shift = shift_for(frames, self._tokens(*videos.shape[2:4]))
        losses = torch.zeros(len(prompts), device=latents.device)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for even in SURPRISE_SIGMAS:
            sigma = shift * even / (1 + (shift - 1) * even)
            noise = draw_noise(latents.shape, generators).to(latents)
            noisy = (1 - sigma) * latents + sigma * noise
            noisy[:, :, :past] = latents[:, :, :past]
            timestep = torch.full((len(prompts), frames), 1000 * sigma, device=latents.device)
            timestep[:, :past] = 0
            (velocity,) = pipe.transformer(
                noisy.to(pipe.transformer.dtype),
                timestep,
                embeds.to(pipe.transformer.dtype),
                encoder_attention_mask=mask,
                chunk_frames=(past, frames - past) if pipe.transformer.config.causal == "chunk" else None,
                return_dict=False,
            )
            error = (velocity.float() - (noise - latents)).square()
            losses += error[:, :, past:].mean((1, 2, 3, 4)) / len(SURPRISE_SIGMAS)
        return losses.cpu()

    @property
    def rolls(self) -> bool:
        """Whether it can be rolled out without end."""
        return self.pipeline.transformer.config.causal == "chunk"

    @torch.no_grad()
    def rollout(self, prompts: Sequence[str], first: Frames, num_frames: int, seeds: Sequence[int]) -> Frames:
        """Videos of any length that begin with `first`, chunk after chunk by `kairos.streaming`."""
        rollout = stream(
            self.pipeline,
            list(prompts),
            video=first[0],
            height=first.shape[2],
            width=first.shape[3],
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        rollout.state = replace(rollout.state, given=self._encode(first))
        parts: list[NDArray[np.floating]] = []
        while sum(part.shape[1] for part in parts) < num_frames:
            parts.append(next(rollout))
        return to_uint8(np.concatenate(parts, 1)[:, :num_frames])

    def _prompts(self, prompts: Sequence[str], first: Frames) -> tuple[Tensor, Tensor]:
        """Embeddings and mask; with the first picture where the template asks for it."""
        pipe = self.pipeline
        if not (first.shape[1] and TEMPLATES[pipe.config.prompt_template].image_in_prompt):
            return pipe.encode_prompt(list(prompts))
        embeds = pipe.encode_prompt([prompts[0]], image=Image.fromarray(first[0, 0]))
        for prompt, frames in zip(prompts[1:], first[1:], strict=True):
            embeds = joined(embeds, pipe.encode_prompt([prompt], image=Image.fromarray(frames[0])))
        return embeds

    def _tokens(self, height: int, width: int) -> int:
        patch = self.pipeline.transformer.config.patch_size
        return (height // SPATIAL // patch[1]) * (width // SPATIAL // patch[2])

    def _encode(self, videos: Frames) -> Tensor:
        vae = self.pipeline.vae
        tensor = torch.from_numpy(videos).permute(0, 4, 1, 2, 3).to(vae.device, vae.dtype) / 127.5 - 1
        return video_vae.encode(vae, tensor).float()

    def _decode(self, latents: Tensor) -> Frames:
        vae = self.pipeline.vae
        videos = video_vae.decode(vae, latents.to(vae.dtype)).float() / 2 + 0.5
        return to_uint8(videos.permute(0, 2, 3, 4, 1).cpu().numpy())


class DiffusersModel:
    """Any image-to-video pipeline of diffusers.

    The pipeline gets what its call knows of: `prompt`, `height`, `width`, `num_frames` (or `frames`),
    `generator`, and the given frames as `video` where it takes image and video (then the video is the start
    to go on from), or the last of them as `image`; what it makes of that image follows the frames before it.
    The square world is scaled to the smaller side of the pipeline's picture, its borders repeated to fill the
    rest.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        frames_unit: int | None = None,
        given: str | None = None,
        from_text: bool = False,
        name: str | None = None,
        **options: Any,
    ) -> None:
        """height, width: of the pipeline's picture; None: the world's own size. frames_unit: it makes
        `frames_unit` n + 1 frames, what is too much is cut off; None: what its VAE makes one latent frame of,
        else 4. given: "image" or "video" to choose. from_text: whether it can do without either, which its
        call does not tell. options: more arguments of the call, such as guidance_scale. name: the identity in
        results, beside a fingerprint of the weights."""
        self.pipeline, self.options = pipeline, options
        self.height, self.width, self.from_text = height, width, from_text
        units = (getattr(pipeline, name, None) for name in TEMPORAL_UNITS)
        self.frames_unit = frames_unit or next((int(unit) for unit in units if unit), TEMPORAL)
        parameters = inspect.signature(pipeline.__call__).parameters
        self.known = set(parameters)
        self.takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        if not self.takes_any and (unknown := sorted(set(options) - self.known)):
            raise UserError(
                f"{type(pipeline).__name__} takes no {', '.join(unknown)}; it takes {', '.join(parameters)}"
            )
        self.given = given or (
            "video" if {"image", "video"} <= self.known or "image" not in self.known else "image"
        )
        if self.given not in ("image", "video"):
            raise UserError(f'given must be "image" or "video", got {self.given!r}')
        if self.given not in self.known:
            raise UserError(f"{type(pipeline).__name__} takes no {self.given}: it cannot go on with a video")
        chosen = ",".join(f"{key}={value}" for key, value in sorted(options.items()))
        called = f"{name or type(pipeline).__name__}-{weights_of(pipeline)}-{sampler_of(pipeline)}"
        self.identity = f"{called}-{height}x{width}-{self.frames_unit}-{self.given}-{chosen}"

    def __call__(self, prompt: str, first_frames: Frames, num_frames: int) -> Frames:
        size = first_frames.shape[1:3]
        kept = first_frames[:0]
        call: dict[str, Any] = {"output_type": "np", "prompt": prompt}
        if len(first_frames):
            canvas = [Image.fromarray(frame) for frame in self._fitted(first_frames)]
            if self.given == "image":
                kept = first_frames[:-1]
                call["image"] = canvas[-1]
            else:
                call["video"] = canvas
        wanted = num_frames - len(kept)
        count = "frames" if "frames" in self.known else "num_frames"
        call[count] = -(-(wanted - 1) // self.frames_unit) * self.frames_unit + 1
        call["height"], call["width"] = self.height or size[0], self.width or size[1]
        call["generator"] = torch.Generator().manual_seed(torch.initial_seed())
        call |= self.options
        if not self.takes_any:
            call = {key: value for key, value in call.items() if key in self.known}
        made = frames_of(self.pipeline(**call))
        if len(made) < wanted:
            raise UserError(
                f"{type(self.pipeline).__name__} makes {len(made)} frames, {wanted} are needed; evaluate "
                f"fewer, or give frames_unit, if it makes other numbers than {self.frames_unit} n + 1"
            )
        return np.concatenate([kept, self._cropped(made[:wanted], size)])

    def _fitted(self, frames: Frames) -> Frames:
        """The world in the middle of the pipeline's picture, its borders repeated outwards."""
        height, width = self.height or frames.shape[1], self.width or frames.shape[2]
        side = min(height, width)
        scaled = resized(frames, side, side)
        top, left = (height - side) // 2, (width - side) // 2
        edges = ((0, 0), (top, height - side - top), (left, width - side - left), (0, 0))
        return np.pad(scaled, edges, mode="edge")

    def _cropped(self, frames: Frames, size: tuple[int, int]) -> Frames:
        """The world out of the pipeline's picture, at its own size."""
        height, width = frames.shape[1:3]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return resized(frames[:, top : top + side, left : left + side], *size)


def weights_of(pipeline: Any) -> str:
    """A fingerprint of a diffusers pipeline's weights, but for those that an offload keeps elsewhere."""
    parts: dict[str, Any] = getattr(pipeline, "components", {})
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    here = {name: part for name, part in modules.items() if not any(p.is_meta for p in part.parameters())}
    return fingerprint(here)


def sampler_of(pipeline: Any) -> str:
    """A short name for a pipeline's scheduler and its settings; "none" where it has none."""
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None:
        return "none"
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    said = type(scheduler).__name__ + json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:8]


def frames_of(output: Any) -> Frames:
    """The first video of what a diffusers pipeline returns: arrays, tensors or lists of pictures."""
    videos = output.frames if hasattr(output, "frames") else output[0]
    video = videos[0]
    if isinstance(video, torch.Tensor):
        video = video.float().cpu().numpy()
        if video.shape[-1] != 3:
            video = video.transpose(0, 2, 3, 1)
    frames = np.stack([np.asarray(frame) for frame in video])
    return frames if frames.dtype == np.uint8 else to_uint8(frames)


def resized(frames: Frames, height: int, width: int) -> Frames:
    """Frames at another size: averaged where they shrink, cubic where they grow."""
    if frames.shape[1:3] == (height, width):
        return frames
    if height < frames.shape[1]:
        return averaged(frames, height, width)
    cubic = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height), cubic)) for frame in frames])
