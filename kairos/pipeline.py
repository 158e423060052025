"""The pipeline: a prompt, an image or the start of a video in; frames out.

Prompt -> embeddings -> noise -> for each sigma, guidance around the LinearDiT -> latents -> frames.
One pipeline for the released 4B model and for kairos-tiny, for base and distilled models: they differ by
their components and by `defaults`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from kairos.conditioning import TEMPLATES, PromptTemplate, encode_prompts
from kairos.data.media import as_rgb, fill_frame, to_uint8
from kairos.errors import UserError, listed
from kairos.models import vae as video_vae
from kairos.models.step_cache import StepCache
from kairos.models.transformer import KairosTransformer3DModel, PromptMemory
from kairos.models.vae import SPATIAL, TEMPORAL
from kairos.models.vae_layers import quicken
from kairos.presets import all_defaults
from kairos.schedulers import FewStepScheduler, FlowMatchScheduler, draw_noise

if TYPE_CHECKING:
    from kairos.streaming import Rollout

logger = logging.getLogger(__name__)

Branches = Callable[[Sequence[Callable[[], Tensor]], Tensor], list[Tensor]]
"""Computes the velocities of guidance; see `one_after_the_other`."""


@dataclass
class KairosPipelineOutput(BaseOutput):
    """`frames`: (B, F, H, W, 3) in [0, 1] as NumPy; (B, F, 3, H, W) as a tensor; lists of PIL images; or
    latents."""

    frames: Any


class KairosPipeline(DiffusionPipeline):
    """Text to video, image to video, both, and continuation of a video.

    Components: `transformer`, `vae`, `text_encoder` with `tokenizer` (and `processor`, where images go into
    the prompt), `scheduler`. `prompt_template` names one of `kairos.conditioning.TEMPLATES`; `defaults`
    holds what a call does not say: height, width, num_frames, fps, num_inference_steps, guidance_scale; and
    `guide_continuation`, whether guidance leads what follows frames that are there (true if it is not said).
    Without a text encoder, calls take `prompt_embeds`. float16 does not hold what is inside the VAE: one that
    comes in it becomes float32.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["processor", "text_encoder", "tokenizer"]

    transformer: KairosTransformer3DModel
    vae: AutoencoderKLWan
    text_encoder: Qwen2_5_VLForConditionalGeneration | None
    tokenizer: PreTrainedTokenizerBase | None
    scheduler: FlowMatchScheduler | FewStepScheduler

    def __init__(
        self,
        transformer: KairosTransformer3DModel,
        vae: AutoencoderKLWan,
        text_encoder: Qwen2_5_VLForConditionalGeneration | None,
        tokenizer: PreTrainedTokenizerBase | None,
        scheduler: FlowMatchScheduler | FewStepScheduler,
        processor: Any = None,
        prompt_template: str = "2025-12",
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, part in (("transformer", transformer), ("vae", vae)):
            if part is None:
                raise UserError(f"a pipeline needs a {name}, got None; load the model again, whole")
        if vae.dtype == torch.float16:
            vae.float()
        align(transformer)
        align(vae)  # but not the text encoder, which is large: it may stay in its mapped file
        self.register_modules(
            transformer=transformer,
            vae=quicken(vae),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            processor=processor,
        )
        if prompt_template not in TEMPLATES:
            raise UserError(f"prompt_template must be one of {', '.join(TEMPLATES)}, got {prompt_template!r}")
        self.branches: Branches = one_after_the_other
        self.register_to_config(prompt_template=prompt_template, defaults=all_defaults(defaults or {}))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler" and not isinstance(value, FlowMatchScheduler):
            raise UserError(
                "the scheduler must be a FlowMatchScheduler or a FewStepScheduler, whose sigmas are those of "
                f"these models, got {type(value).__name__}"
            )
        super().__setattr__(name, value)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] = "",
        image: Image.Image | None = None,
        video: np.ndarray | Sequence[Image.Image] | None = None,
        *,
        negative_prompt: str | None = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: tuple[Tensor, Tensor] | None = None,
        negative_prompt_embeds: tuple[Tensor, Tensor] | None = None,
        output_type: str = "np",
        tiled: bool = False,
        after_encoding: str = "keep",
        step_cache: float | None = None,
        callback_on_step_end: Callable[[KairosPipeline, int, Tensor, dict], dict | None] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Make videos.

        Args:
            prompt: what happens; "" leaves it to the image or video.
            image: the first frame, any size: scaled and cropped at the centre to height x width.
            video: the first k frames, k = 4n + 1, as PIL images or (k, H, W, 3): uint8, or in [0, 1] as
                this returns them.
            negative_prompt: what guidance leads away from.
            height, width: in pixels, rounded up to multiples of 16.
            num_frames: rounded up to 4n + 1, the given frames included.
            num_inference_steps: a few-step scheduler has its own and ignores it.
            guidance_scale: 1 or less turns guidance off. Models whose defaults say so (`guide_continuation`:
                false) are guided to their first frame only.
            generator: on the CPU, so that one seed gives one video on every device; or one for each video.
            latents: the starting noise, (B, 16, F, h, w), instead of the generator's.
            prompt_embeds, negative_prompt_embeds: (embeddings (B, T, C), mask (B, T)) instead of the texts.
            output_type: "np", "pt", "pil" or "latent".
            tiled: encode and decode in tiles, for frames too large for the memory.
            after_encoding: what becomes of the text encoder: "keep", "cpu" (moved off the device), "free"
                (dropped).
            step_cache: leave out most of a step that is like the one before, up to this change of the first
                block (see `kairos.models.step_cache`). None, the default, computes every step in full.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ..., "total": ...}). A
                chunk-causal model makes the video in up to three chunks, each with all its steps: `step`
                counts on through them, up to `total`, and the latents are those up to the chunk's end. What
                it may answer: {"latents": new ones}; {"interrupt": True} to end the sampling there, with the
                latents as they are. Nothing else ends a call: a pipeline may have several at once.

        Returns:
            A KairosPipelineOutput; with `return_dict` false a tuple of its frames alone.

        Raises:
            UserError: for input that cannot be used, with the rule and the fix.
        """
        defaults = self.config.defaults
        height, width = self._rounded_size(height, width)
        num_frames = self._rounded_frames(num_frames)
        steps = whole(
            "num_inference_steps",
            defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps,
        )
        guidance = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        check_guidance(guidance)
        if isinstance(self.scheduler, FewStepScheduler):
            guidance = 1.0
        if output_type not in ("np", "pt", "pil", "latent"):
            raise UserError(f'output_type must be "np", "pt", "pil" or "latent", got {output_type!r}')
        if after_encoding not in ("keep", "cpu", "free"):
            raise UserError(f'after_encoding must be "keep", "cpu" or "free", got {after_encoding!r}')
        if step_cache is not None and not (is_number(step_cache) and step_cache > 0):
            raise UserError(f"step_cache must be above 0, such as 0.1, got {step_cache!r}")
        num_videos_per_prompt = whole("num_videos_per_prompt", num_videos_per_prompt)
        if prompt_embeds is not None and prompt:
            raise UserError("prompt and prompt_embeds exclude each other: the embeddings are the prompt's")
        if negative_prompt_embeds is not None and negative_prompt:
            raise UserError("negative_prompt and negative_prompt_embeds exclude each other")
        for pair in (prompt_embeds, negative_prompt_embeds):
            if pair is not None:
                check_embeds(pair, self.transformer.config.text_dim)
        for warning in far_from(defaults, height=height, width=width, num_frames=num_frames):
            logger.warning(warning)
        given = self._given_frames(image, video, num_frames)
        device = self._execution_device
        self.maybe_free_model_hooks()  # a call that failed may have left a part on the device

        # 1. Prompts to embeddings; the image is part of the positive prompt where the template says so.
        picture = given[0] if given else None
        positive = prompt_embeds
        if positive is None:
            positive = self.encode_prompt(prompt, image=picture)
        negative = None
        if guidance > 1 and is_guided(defaults, len(given)):
            negative = negative_prompt_embeds
            if negative is None:
                negative = self.encode_prompt(negative_prompt or "")
            if len(negative[0]) == 1:
                negative = repeated(negative, len(positive[0]), device)
            elif len(negative[0]) != len(positive[0]):
                raise UserError(
                    f"give one negative prompt, or one for each of the {len(positive[0])} prompts, "
                    f"got {len(negative[0])}"
                )
        self._release_text_encoder(after_encoding)
        positive = repeated(positive, num_videos_per_prompt, device)
        negative = negative and repeated(negative, num_videos_per_prompt, device)
        batch = len(positive[0])

        # 2. The clean frames and the noise.
        known = self._encode_frames(given, height, width, device, tiled)
        known_frames = 0 if known is None else known.shape[2]
        shape = (
            batch,
            self.transformer.config.in_channels,
            (num_frames - 1) // TEMPORAL + 1,
            height // SPATIAL,
            width // SPATIAL,
        )
        if latents is None:
            latents = draw_noise(shape, generator)
        elif not isinstance(latents, Tensor) or latents.shape != shape:
            raise UserError(f"latents must have the shape {shape}, as a tensor, got {described(latents)}")
        latents = latents.to(device, torch.float32, copy=True)  # written to below; the caller's stay

        # 3. Denoise, chunk by chunk, and 4. decode.
        chunks = chunk_ends(self.transformer, shape[2], known_frames)
        patch = self.transformer.config.patch_size
        tokens = shape[3] * shape[4] // (patch[1] * patch[2])

        scheduler = copy(self.scheduler)  # of this call alone, whatever other threads make meanwhile

        def set_timesteps(latent_frames: int) -> int:
            scheduler.set_timesteps(
                steps, latent_frames=latent_frames, tokens_per_frame=tokens, device=device
            )
            return len(scheduler.timesteps)

        total = len(chunks) * set_timesteps(shape[2])
        with self.progress_bar(total=total) as progress:
            taken, interrupted = 0, False

            def after_step(timestep: Tensor, chunk: Tensor) -> tuple[Tensor, bool]:
                nonlocal taken, interrupted
                if callback_on_step_end is not None:
                    told = {"latents": chunk, "total": total}
                    answer = callback_on_step_end(self, taken, timestep, told)
                    chunk, interrupted = after_answer(answer, chunk)
                taken += 1
                progress.update()
                return chunk, interrupted

            for end in chunks:
                set_timesteps(end)
                latents[:, :, :end] = known = denoise(
                    self.transformer,
                    scheduler,
                    latents[:, :, :end],
                    positive=positive,
                    negative=negative if is_guided(defaults, known_frames) else None,
                    guidance_scale=guidance,
                    known=known,
                    generator=generator,
                    after_step=after_step,
                    branches=self.branches,
                    step_cache=step_cache,
                )
                known_frames = end
                if interrupted:
                    break
        frames = self._decode(latents, output_type, tiled)
        self.maybe_free_model_hooks()
        return KairosPipelineOutput(frames=frames) if return_dict else (frames,)

    @property
    def device(self) -> torch.device:
        """Where the LinearDiT is; the text encoder may be away."""
        return self.transformer.device

    def stream(self, prompt: str | list[str] = "", **options: Any) -> Rollout:
        """Begin a video without end: `for frames in pipeline.stream("a ball", image=image): ...`.

        See `kairos.streaming.stream` for the options, and `kairos.streaming.resume` to go on from a saved
        world.
        """
        from kairos.streaming import stream

        return stream(self, prompt, **options)

    def encode_prompt(
        self, prompts: str | list[str], image: Image.Image | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, T, C) and their mask (B, T) of `prompts`, from the cache where they are known."""
        texts = [prompts] if isinstance(prompts, str) else prompts
        if not (isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts)):
            raise UserError(f"a prompt must be a text or a list of texts, got {prompts!r}")
        if self.text_encoder is None or self.tokenizer is None:
            raise UserError("the text encoder was freed; load the pipeline again or pass prompt_embeds")
        template: PromptTemplate = TEMPLATES[self.config.prompt_template]
        return encode_prompts(
            self.text_encoder,
            self.tokenizer,
            list(texts),
            template=template,
            processor=self.processor,
            images=[image] * len(texts) if image is not None and template.image_in_prompt else None,
            device=self._execution_device,
            dtype=self.transformer.dtype,
        )

    @classmethod
    def from_original(
        cls,
        *,
        dit: str | Path,
        vae: str | Path,
        text_encoder: str | Path,
        few_step: bool = False,
        prompt_template: str = "2026",
        dtype: torch.dtype = torch.bfloat16,
        defaults: Mapping[str, Any] | None = None,
        **transformer_config: Any,
    ) -> KairosPipeline:
        """Build the pipeline from the released files.

        Args:
            dit: the LinearDiT's safetensors file, or a folder of them.
            vae: Wan2.1_VAE.pth, or a folder in diffusers' layout.
            text_encoder: a Qwen2.5-VL folder in transformers' layout (or with `text_encoder/` and
                `tokenizer/` in it).
            few_step: a distilled checkpoint: four steps, no guidance.
            transformer_config: what the file does not tell, such as `dilation`.
        """
        from kairos.conditioning import load_text_encoder
        from kairos.weights import load_transformer_file, load_vae_file

        encoder, tokenizer, processor = load_text_encoder(text_encoder, dtype=dtype)
        return cls(
            transformer=load_transformer_file(dit, dtype=dtype, **transformer_config),
            vae=load_vae_file(vae),
            text_encoder=encoder,
            tokenizer=tokenizer,
            processor=processor,
            scheduler=FewStepScheduler() if few_step else FlowMatchScheduler(),
            prompt_template=prompt_template,
            defaults=defaults,
        )

    def _rounded_size(self, height: float | None, width: float | None) -> tuple[int, int]:
        """Height and width, by default the model's, rounded up to whole patches of latents, and said so."""
        height = self.config.defaults["height"] if height is None else height
        width = self.config.defaults["width"] if width is None else width
        patch = self.transformer.config.patch_size
        unit_y, unit_x = SPATIAL * patch[1], SPATIAL * patch[2]
        if not all(is_number(side) and 1 <= side < math.inf for side in (height, width)):
            raise UserError(f"height and width must be positive numbers, got {height!r} x {width!r}")
        rounded = int(-(-height // unit_y) * unit_y), int(-(-width // unit_x) * unit_x)
        if rounded != (height, width):
            logger.warning("%s x %s is rounded up to %d x %d", height, width, *rounded)
        return rounded

    def _rounded_frames(self, num_frames: float | None) -> int:
        """The number of frames, by default the model's, rounded up to 4n + 1, and said so."""
        own = self.config.defaults["num_frames"]
        num_frames = own if num_frames is None else num_frames
        if not (is_number(num_frames) and 1 <= num_frames < math.inf):
            raise UserError(f"num_frames must be a number of at least 1, got {num_frames!r}; try {own}")
        rounded = int(-(-(num_frames - 1) // TEMPORAL) * TEMPORAL + 1)
        if rounded != num_frames:
            logger.warning("%s frames are rounded up to %d", num_frames, rounded)
        return rounded

    @staticmethod
    def _given_frames(image: Any, video: Any, num_frames: int) -> list[Image.Image]:
        """The frames that the video begins with: none, the image, or those of `video`."""
        if image is not None and video is not None:
            raise UserError("image and video exclude each other: the video's first frame is the image")
        if video is None:
            if image is not None and num_frames == 1:
                raise UserError("num_frames counts the image too, so it must be 5 or more, got 1")
            if not isinstance(image, Image.Image | None):
                raise UserError(f"image must be a PIL image, got {type(image).__name__}")
            return [] if image is None else pictures([image])
        given = pictures(video)
        if len(given) % TEMPORAL != 1:
            fewer = (len(given) - 1) // TEMPORAL * TEMPORAL + 1
            fix = f"; give its first {fewer}" if given else ""
            raise UserError(f"a given video must have 4n + 1 frames, got {len(given)}{fix}")
        if len(given) >= num_frames:
            raise UserError(
                f"the given video has {len(given)} frames, so num_frames must be larger, got {num_frames}"
            )
        return given

    @torch.no_grad()
    def _encode_frames(
        self, given: list[Image.Image], height: int, width: int, device: torch.device, tiled: bool
    ) -> Tensor | None:
        """The latents (1, 16, f, h, w) of the given frames, or None."""
        if not given:
            return None
        pixels = np.stack([np.asarray(fill_frame(frame, height, width)) for frame in given])
        video = torch.from_numpy(pixels).permute(3, 0, 1, 2)[None].to(device, self.vae.dtype) / 127.5 - 1
        # This is not the VAE's turn in `model_cpu_offload_seq`, and its hook sends away the LinearDiT alone:
        # whatever else is offloaded makes room for it, and it for what follows.
        self.maybe_free_model_hooks()
        latents = video_vae.encode(self.vae, video, tiled=tiled).float()
        self.maybe_free_model_hooks()
        return latents

    def _decode(self, latents: Tensor, output_type: str, tiled: bool) -> Any:
        if output_type == "latent":
            return latents
        # One video at a time: a batch would need its memory all at once.
        frames = torch.cat(
            [video_vae.decode(self.vae, one.to(self.vae.dtype), tiled=tiled) for one in latents.split(1)]
        )
        frames = frames.float().div_(2).add_(0.5).clamp_(0, 1).transpose(1, 2).cpu()
        if self.vae.dtype == torch.float16 and not frames.isfinite().all():
            raise UserError(
                "the frames are no finite numbers: float16 does not hold what is inside the VAE; "
                "give it more with pipeline.vae.to(torch.float32)"
            )
        if output_type == "pt":
            return frames
        array = frames.permute(0, 1, 3, 4, 2).numpy()
        if output_type == "np":
            return array
        return [[Image.fromarray(frame) for frame in to_uint8(video)] for video in array]

    def _release_text_encoder(self, after_encoding: str) -> None:
        if after_encoding == "cpu" and self.text_encoder is not None:
            self.text_encoder.to("cpu")  # type: ignore[arg-type]
        elif after_encoding == "free":
            self.register_modules(text_encoder=None)
        if after_encoding != "keep" and torch.cuda.is_available():
            torch.cuda.empty_cache()


def pictures(video: Any) -> list[Image.Image]:
    """The frames of a given video: PIL images, or (k, H, W, 3), uint8 or in [0, 1]."""
    if isinstance(video, Sequence) and all(isinstance(frame, Image.Image) for frame in video):
        frames = [as_rgb(frame) for frame in video]
    else:
        try:
            array = np.asarray(video)
        except (ValueError, TypeError):
            raise UserError("a given video must be arrays of one shape, or PIL images") from None
        is_float = np.issubdtype(array.dtype, np.floating)
        if array.ndim != 4 or array.shape[-1] != 3 or not (is_float or array.dtype == np.uint8):
            raise UserError(
                "a given video must be PIL images, or (k, H, W, 3) as uint8 or in [0, 1], "
                f"got {array.shape} {array.dtype}"
            )
        if is_float and not (array.min(initial=0) >= 0 and array.max(initial=0) <= 1):
            raise UserError("a given video that is not uint8 must be in [0, 1]")
        frames = [Image.fromarray(frame) for frame in (to_uint8(array) if is_float else array)]
    if any(min(frame.size) < 1 for frame in frames):
        raise UserError("a given frame has no pixels")
    return frames


def align(module: torch.nn.Module) -> None:
    """Have weights begin where torch's own memory does. In a mapped file they begin anywhere, and products of
    tensors that are not aligned differ in their last bit."""
    for weight in module.parameters():
        plain = type(weight) is torch.nn.Parameter and weight.device.type == "cpu"
        if plain and weight.data_ptr() % ALIGNMENT:
            weight.data = weight.data.clone()


def is_number(value: Any) -> bool:
    """Whether it is a number, NumPy's and a tensor's too, and not nan."""
    try:
        return not math.isnan(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of a tensor with several
        return False


def whole(name: str, value: Any) -> int:
    """A whole number of at least 1. Raises UserError, by its name."""
    if not is_number(value) or value % 1 != 0:
        raise UserError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise UserError(f"{name} must be at least 1, got {value!r}")
    return int(value)


def check_guidance(scale: Any) -> None:
    """Refuse what is no number, and what all models make noise of."""
    if not (is_number(scale) and scale <= MAX_GUIDANCE):
        raise UserError(f"guidance_scale must be a number, at most {MAX_GUIDANCE}, got {scale!r}")


def described(value: Any) -> str:
    """The shape of a tensor, or those of several; of another thing what it is."""
    if isinstance(value, tuple | list):
        return f"({', '.join(map(described, value))})"
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def check_embeds(pair: Any, width: int) -> None:
    """Refuse what is not a pair of embeddings (B, T, width) and their mask (B, T)."""
    if isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(part, Tensor) for part in pair):
        embeds, mask = pair
        if embeds.ndim == 3 and embeds.shape[2] == width and embeds.shape[:2] == mask.shape:
            return
    raise UserError(
        f"prompt embeddings must be a pair of tensors, embeddings (B, T, {width}) and their mask (B, T), "
        f"got {described(pair)}"
    )


def after_answer(answer: Any, latents: Tensor) -> tuple[Tensor, bool]:
    """The latents after what a callback answered to them, and whether the sampling ends there."""
    if not isinstance(answer, Mapping):
        if answer is not None and not (isinstance(answer, bool | int | list) and not answer):
            raise UserError(f"callback_on_step_end must answer a dictionary or None, got {answer!r}")
        return latents, False
    if answer and not {"latents", "interrupt", "total"} & set(answer):
        said = listed([str(key) for key in answer])
        raise UserError(f"callback_on_step_end may answer latents and interrupt, got {said}")
    own = answer.get("latents", latents)
    if not isinstance(own, Tensor) or own.shape != latents.shape:
        raise UserError(
            f"the latents that callback_on_step_end answers must be a tensor {tuple(latents.shape)}, "
            f"got {described(own)}"
        )
    return own.to(latents), bool(answer.get("interrupt", False))


MAX_GUIDANCE = 100
"""As in requests."""
ALIGNMENT = 64
"""Bytes at whose multiples torch's own memory begins."""
OPENING_FRAMES = 2
"""Latent frames that a chunk-causal model makes one by one, before it makes several at once."""


def is_guided(defaults: Mapping[str, Any], known_frames: int) -> bool:
    """Whether guidance leads what comes next. A model may need it for the first frame alone: there the prompt
    decides, and later the frames say more than the prompt does."""
    return known_frames == 0 or bool(defaults.get("guide_continuation", True))


def far_from(made_for: Mapping[str, float], *, height: int, width: int, num_frames: int) -> list[str]:
    """What to warn of: a size and a length far from what the model was made for, a pipeline's `defaults`."""
    own_height, own_width, own_frames = (int(made_for[name]) for name in ("height", "width", "num_frames"))
    own = f"{own_height} x {own_width}"
    warnings = []
    area = height * width / (own_height * own_width)
    if not 0.5 <= area <= 2:
        warnings.append(
            f"{height} x {width} is {area:.2g} times the area this model was made for ({own}); "
            "expect a worse video"
        )
    elif not 0.5 <= (height / width) / (own_height / own_width) <= 2:
        warnings.append(f"{height} x {width} has another shape than this model was made for ({own})")
    if num_frames > 1.5 * own_frames or num_frames < own_frames / 4:
        many = "many more" if num_frames > own_frames else "far fewer"
        warnings.append(f"{num_frames} frames are {many} than this model was made for ({own_frames})")
    return warnings


def denoise(
    transformer: KairosTransformer3DModel,
    scheduler: FlowMatchScheduler | FewStepScheduler,
    latents: Tensor,
    *,
    positive: tuple[Tensor, Tensor],
    negative: tuple[Tensor, Tensor] | None = None,
    guidance_scale: float = 1.0,
    known: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    after_step: Callable[[Tensor, Tensor], tuple[Tensor, bool]] | None = None,
    branches: Branches | None = None,
    step_cache: float | None = None,
) -> Tensor:
    """Noise to latents (B, 16, F, h, w), float32, along the scheduler's timesteps.

    The first frames stay as `known` (1 or B, 16, f, h, w), at t = 0; a chunk-causal model sees them as the
    past. `after_step(timestep, latents)` may change the latents and says whether to stop. `branches` computes
    the velocities of guidance, with the prompt first; the default is one after the other. `step_cache` is the
    threshold of a cache for each of them.
    """
    branches = branches or one_after_the_other
    dtype = transformer.dtype  # it asks every parameter: not at every step
    batch, _, frames = latents.shape[:3]
    known_frames = 0 if known is None else known.shape[2]
    chunk_frames = None
    if transformer.config.causal == "chunk" and known_frames:
        chunk_frames = (known_frames, frames - known_frames)

    def velocity(
        prompt: tuple[Tensor, Tensor],
        memory: PromptMemory,
        cache: StepCache | None,
        latents: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        embeds, mask = prompt
        (output,) = transformer(
            latents.to(dtype),
            timestep,
            embeds.to(dtype),
            encoder_attention_mask=mask,
            chunk_frames=chunk_frames,
            prompt_memory=memory,
            step_cache=cache,
            return_dict=False,
        )
        return output.float()

    prompts = [
        (prompt, PromptMemory(), None if step_cache is None else StepCache(step_cache))
        for prompt in (positive, negative)
        if prompt is not None
    ]
    latents = latents.clone()
    for time in scheduler.timesteps:
        if known is not None:
            latents[:, :, :known_frames] = known
        timestep = time.expand(batch)
        if known_frames:
            timestep = time.expand(batch, frames).clone()
            timestep[:, :known_frames] = 0
        prediction, *unguided = branches(
            [partial(velocity, *prompt, latents, timestep) for prompt in prompts], latents
        )
        for plain in unguided:
            prediction = plain + guidance_scale * (prediction - plain)
        latents = scheduler.step(prediction, time, latents, generator=generator, return_dict=False)[0]
        if after_step is not None:
            latents, stop = after_step(time, latents)
            if stop:
                break
    for _, _, cache in prompts:
        if cache is not None:
            logger.info("step cache: %d of %d steps left out", cache.skipped, cache.skipped + cache.computed)
    if known is not None:
        latents[:, :, :known_frames] = known
    return latents


def one_after_the_other(velocities: Sequence[Callable[[], Tensor]], like: Tensor) -> list[Tensor]:
    """Each velocity, in the shape of `like`, computed here."""
    return [velocity() for velocity in velocities]


def repeated(branch: tuple[Tensor, Tensor], times: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Embeddings and mask with each prompt `times` times in a row, on `device`."""
    embeds, mask = (tensor.repeat_interleave(times, 0).to(device) for tensor in branch)
    return embeds, mask


def chunk_ends(transformer: KairosTransformer3DModel, frames: int, known_frames: int) -> list[int]:
    """Where the chunks end that are made one after the other, in latent frames.

    All at once; but a chunk-causal model makes the first latent frame by itself, which settles what there is
    and where, and the second, which settles how it moves. The rest follows from them.
    """
    alone = range(1, OPENING_FRAMES + 1) if transformer.config.causal == "chunk" else ()
    return [*(end for end in alone if known_frames < end < frames), frames]
