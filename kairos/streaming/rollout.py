"""Makes a video chunk after chunk, for as long as one likes, in the memory of one chunk.

A chunk begins as noise. Each step runs its tokens against what the layers keep of the past; after the last
step they are run once more, clean, at t = 0, and what that run keeps is the past of the next chunk. Then the
VAE decodes the chunk with what it kept itself. The frames are those of one pass over all of the video under
the chunk-causal mask.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from kairos.errors import UserError
from kairos.models.transformer import PromptMemory, TransformerState
from kairos.models.vae import SPATIAL, TEMPORAL
from kairos.pipeline import (
    OPENING_FRAMES,
    KairosPipeline,
    check_guidance,
    denoise,
    far_from,
    is_guided,
    repeated,
    whole,
)
from kairos.schedulers import FewStepScheduler, draw_noise
from kairos.schedulers.noise import CPU_FLOATS, Generators, check_generators
from kairos.streaming.decoder import StreamingVAEDecoder
from kairos.streaming.state import RolloutSettings, WorldState
from kairos.weights.fingerprint import fingerprint

logger = logging.getLogger(__name__)


def stream(
    pipeline: KairosPipeline,
    prompt: str | list[str] = "",
    *,
    image: Image.Image | None = None,
    video: np.ndarray | Sequence[Image.Image] | None = None,
    negative_prompt: str | list[str] | None = "",
    height: int | None = None,
    width: int | None = None,
    chunk_frames: int = 3,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    generator: Generators = None,
) -> Rollout:
    """Begin a rollout: `for frames in stream(pipeline, "a red ball rolls to the right"): ...`.

    Args:
        prompt: what happens; a list makes a batch of videos.
        image, video: the first frame, or the first 4n + 1. They are the first frames that come.
        negative_prompt: what guidance leads away from; one text, or one for each video.
        height, width: in pixels, rounded up to multiples of 16.
        chunk_frames: latent frames a chunk, each four frames of video.
        num_inference_steps, guidance_scale: as in the pipeline's call.
        generator: on the CPU, one for each video. Its state is copied; it is not drawn from.

    Raises:
        UserError: for a model that is not chunk-causal and for input that cannot be used.
    """
    check_causal(pipeline)
    defaults = pipeline.config.defaults
    steps = defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
    guidance = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
    check_guidance(guidance)
    given = pipeline._given_frames(image, video, 1 << 62)
    if isinstance(pipeline.scheduler, FewStepScheduler) or not is_guided(defaults, len(given)):
        guidance = 1.0
    settings = RolloutSettings(
        chunk_frames=whole("chunk_frames", chunk_frames),
        num_inference_steps=whole("num_inference_steps", steps),
        guidance_scale=float(guidance),
    )
    height, width = pipeline._rounded_size(height, width)
    longest = max(int(defaults["num_frames"]), TEMPORAL * settings.chunk_frames + 1)
    for warning in far_from(defaults, height=height, width=width, num_frames=longest):
        logger.warning(warning)
    latent_size = height // SPATIAL, width // SPATIAL
    prompts = [prompt] if isinstance(prompt, str) else prompt
    embeds = pipeline.encode_prompt(prompts, image=given[0] if given else None)
    batch = len(embeds[0])
    negative = None
    if settings.branches == 2:
        negative = encoded(pipeline, negative_prompt or "", batch, "negative prompt")
    known = pipeline._encode_frames(given, height, width, pipeline._execution_device, False)
    generators = generator_states(generator, batch)
    if known is not None:
        known = known.repeat(batch, 1, 1, 1, 1)
    if negative is not None and not is_guided(defaults, 1):
        # Guided to the first frame, and from there on as if it had been given.
        known, generators = first_frame(pipeline, settings, latent_size, embeds, negative, generators)
        settings, negative = replace(settings, guidance_scale=1.0), None
    world = WorldState(
        model=model_of(pipeline),
        settings=settings,
        latent_size=latent_size,
        prompt=embeds if negative is None else joined(embeds, negative),
        generators=generators,
        given=known,
    )
    return Rollout(pipeline, world)


def resume(pipeline: KairosPipeline, state: WorldState, *, generator: Generators = None) -> Rollout:
    """Go on from a world: the frames are those of a rollout that never stopped.

    Args:
        state: from a rollout of this model. A fork of it goes on as a batch.
        generator: in place of the state's generators, one for each video.

    Raises:
        UserError: for another model's state.
    """
    check_causal(pipeline)
    check_fits(state, model_of(pipeline))
    if generator is not None:
        state = replace(state, generators=generator_states(generator, state.batch))
    return Rollout(pipeline, state.to(pipeline._execution_device))


class Rollout(Iterator[np.ndarray]):
    """Yields frames (B, F, H, W, 3) in [0, 1], chunk after chunk, without end.

    `state` is the world after the last chunk that came; it can be saved, forked, and set.
    """

    def __init__(self, pipeline: KairosPipeline, state: WorldState) -> None:
        """state: of this pipeline's model, on its device; `stream` and `resume` see to that."""
        self.pipeline = pipeline
        self._state = state

    @property
    def state(self) -> WorldState:
        return self._state

    @state.setter
    def state(self, state: WorldState) -> None:
        check_fits(state, self._state.model)
        self._state = state.to(self.pipeline._execution_device)

    def __next__(self) -> np.ndarray:
        frames, self._state = next_chunk(self.pipeline, self._state)
        return frames.float().div_(2).add_(0.5).permute(0, 2, 3, 4, 1).cpu().numpy()

    def change_prompt(self, prompt: str | list[str]) -> None:
        """From the next chunk on something else happens; one text, or one for each video.

        Raises UserError before the first chunk, and where the texts are not as many as the videos.
        """
        if self.state.transformer is None:
            raise UserError(
                "the prompt can change once there is a first chunk; give the first prompt to stream()"
            )
        batch = self.state.batch
        embeds = encoded(self.pipeline, prompt, batch, "prompt")
        if self.state.settings.branches == 2:
            embeds = joined(embeds, (self.state.prompt[0][batch:], self.state.prompt[1][batch:]))
        self.state = replace(self.state, prompt=embeds)


@torch.no_grad()
def next_chunk(pipeline: KairosPipeline, state: WorldState) -> tuple[Tensor, WorldState]:
    """The frames (B, 3, F, H, W) in [-1, 1] that come next, and the world after them."""
    generators = [torch.Generator().set_state(saved.clone()) for saved in state.generators]
    latents = denoise_chunk(pipeline, state, generators) if state.given is None else state.given
    _, transformer = run(pipeline, state, latents, torch.zeros((), **CPU_FLOATS))
    decoder = StreamingVAEDecoder(pipeline.vae, state.decoder)
    frames = decoder.decode(latents)
    after = replace(
        state,
        given=None,
        generators=torch.stack([generator.get_state() for generator in generators]),
        transformer=transformer,
        decoder=decoder.features,
    )
    return frames, after


def denoise_chunk(pipeline: KairosPipeline, state: WorldState, generators: list[torch.Generator]) -> Tensor:
    """The latents (B, 16, frames, h, w), float32, of the next chunk: the first two are of one frame each."""
    settings, config, scheduler = state.settings, pipeline.transformer.config, copy(pipeline.scheduler)
    height, width = state.latent_size
    opening = state.frames < OPENING_FRAMES
    shape = (state.batch, config.in_channels, 1 if opening else settings.chunk_frames, height, width)
    latents = draw_noise(shape, generators).to(state.prompt[0].device)
    # The shift is that of the clips which the model was trained on, however short the chunk.
    scheduler.set_timesteps(
        settings.num_inference_steps,
        latent_frames=state.frames + 1
        if opening
        else (int(pipeline.config.defaults["num_frames"]) - 1) // 4 + 1,
        tokens_per_frame=height * width // (config.patch_size[1] * config.patch_size[2]),
        device=latents.device,
    )
    memory = PromptMemory()
    for time in scheduler.timesteps:
        velocity, _ = run(pipeline, state, latents, time, memory)
        if settings.branches == 2:
            positive, negative = velocity.chunk(2)
            velocity = negative + settings.guidance_scale * (positive - negative)
        (latents,) = scheduler.step(velocity, time, latents, generator=generators, return_dict=False)
    return latents


@torch.no_grad()
def first_frame(
    pipeline: KairosPipeline,
    settings: RolloutSettings,
    latent_size: tuple[int, int],
    positive: tuple[Tensor, Tensor],
    negative: tuple[Tensor, Tensor],
    states: Tensor,
) -> tuple[Tensor, Tensor]:
    """The latents (B, 16, 1, h, w) of a first frame that guidance leads; the generators' states after it."""
    generators = [torch.Generator().set_state(saved.clone()) for saved in states]
    config, device = pipeline.transformer.config, pipeline._execution_device
    tokens = latent_size[0] * latent_size[1] // (config.patch_size[1] * config.patch_size[2])
    scheduler = copy(pipeline.scheduler)
    scheduler.set_timesteps(
        settings.num_inference_steps, latent_frames=1, tokens_per_frame=tokens, device=device
    )
    latents = denoise(
        pipeline.transformer,
        scheduler,
        draw_noise((len(generators), config.in_channels, 1, *latent_size), generators).to(device),
        positive=repeated(positive, 1, device),
        negative=repeated(negative, 1, device),
        guidance_scale=settings.guidance_scale,
        generator=generators,
    )
    return latents, torch.stack([generator.get_state() for generator in generators])


def run(
    pipeline: KairosPipeline,
    state: WorldState,
    latents: Tensor,
    time: Tensor,
    memory: PromptMemory | None = None,
) -> tuple[Tensor, TransformerState]:
    """Latents (B, 16, F, h, w) at one time, after the past: each branch's velocity, and the new past."""
    model = pipeline.transformer
    embeds, mask = state.prompt
    dtype = model.patch_embedding.weight.dtype  # model.dtype asks every parameter
    velocity, after = model(
        latents.repeat(state.settings.branches, 1, 1, 1, 1).to(dtype),
        time.to(latents.device).expand(len(embeds)),
        embeds.to(dtype),
        encoder_attention_mask=mask,
        state=state.transformer,
        return_state=True,
        prompt_memory=memory,
        return_dict=False,
    )
    return velocity.float(), after


def encoded(
    pipeline: KairosPipeline, prompt: str | list[str], batch: int, kind: str
) -> tuple[Tensor, Tensor]:
    """Embeddings and mask of one text for all of `batch` videos, or of one for each."""
    embeds, mask = pipeline.encode_prompt([prompt] * batch if isinstance(prompt, str) else prompt)
    if len(embeds) != batch:
        raise UserError(f"give one {kind}, or one for each of the {batch} videos, got {len(embeds)}")
    return embeds, mask


def joined(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two batches of prompts as one: embeddings and masks, the shorter filled up with masked zeros."""
    length = max(first[0].shape[1], second[0].shape[1])
    embeds, masks = [], []
    for embed, mask in (first, second):
        missing = length - embed.shape[1]
        embeds.append(F.pad(embed, (0, 0, 0, missing)))
        masks.append(F.pad(mask, (0, missing)))
    return torch.cat(embeds), torch.cat(masks)


def generator_states(generator: Generators, batch: int) -> Tensor:
    """The states of the generators of `batch` videos, (batch, bytes); fresh ones where none is given."""
    if generator is None:
        seeds = torch.randint(1 << 62, (batch,)).tolist()
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    generators = list(generator) if isinstance(generator, list | tuple) else [generator]
    check_generators(generators)
    if len(generators) != batch:
        raise UserError(f"give a generator for each of the {batch} videos, got {len(generators)}")
    return torch.stack([g.get_state() for g in generators])


def model_of(pipeline: KairosPipeline) -> str:
    """What a state must fit: the LinearDiT and the VAE. The text encoder has done its part."""
    return fingerprint({"transformer": pipeline.transformer, "vae": pipeline.vae})


def check_fits(state: WorldState, model: str) -> None:
    if not isinstance(state, WorldState):
        raise UserError(f"a rollout goes on from a WorldState, such as WorldState.load reads, got {state!r}")
    if state.model != model:
        named = repr(state.model_name) if state.model_name else "kairos show of its video names it"
        raise UserError(
            f"the world state belongs to model {state.model}, this one is {model}; "
            f"load the one that it was begun with ({named})"
        )


def check_causal(pipeline: KairosPipeline) -> None:
    if pipeline.transformer.config.causal != "chunk":
        raise UserError('a rollout needs a model made with causal="chunk"; this one looks into the future')
