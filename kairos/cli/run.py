"""Jobs to files: load the model once, make each video, write it with its request inside."""

import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kairos import __version__, presets
from kairos.cli.clock import Clock
from kairos.cli.console import err, out, waiting
from kairos.cli.jobs import Job, prepare_output
from kairos.cli.machine import (
    DTYPES,
    device_and_dtype,
    dtype_named,
    explained_memory,
    free_gb,
    import_libraries,
    peak_memory,
)
from kairos.cli.resolve import as_used, check_request, check_template, start_of_video
from kairos.errors import UserError
from kairos.memory import QUANTIZED
from kairos.request import Request, check_text

if TYPE_CHECKING:
    from kairos.conditioning.rewrite import Rewriter
    from kairos.memory import Plan
    from kairos.pipeline import KairosPipeline

logger = logging.getLogger(__name__)

MAX_SCALE = 64


@dataclass(frozen=True)
class RunOptions:
    """How to run, as the command line says it."""

    model: str = presets.DEFAULT
    weights: str | None = None
    loras: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    scale: int | None = None
    rewrite: str | None = None
    free_encoder: bool = False
    compiled: bool = False
    vae_dtype: str = "auto"
    step_cache: float | None = None
    memory: str | None = None
    quantize: str | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        texts = {"model": self.model, "weights": self.weights, "rewrite": self.rewrite}
        for name, text in (texts | {"lora": "".join(self.loras)}).items():
            check_text(name, text or "")  # they stand in the video's metadata
        if self.weights == "":
            raise UserError("weights must name a file or a folder; leave it out for the model's own")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.vae_dtype not in DTYPES:
            raise UserError(f"vae_dtype must be one of {', '.join(DTYPES)}, got {self.vae_dtype!r}")
        if self.quantize is not None and self.quantize not in QUANTIZED:
            raise UserError(f"quantize must be one of {', '.join(QUANTIZED)}, got {self.quantize!r}")
        if self.memory is not None and self.memory != "auto":
            try:
                enough = 0 < float(self.memory) < float("inf")
            except ValueError:
                enough = False
            if not enough:
                raise UserError(f"memory must be auto or a number of GB above 0, got {self.memory!r}")
        if self.scale is not None and not 1 <= self.scale <= MAX_SCALE:
            raise UserError(f"scale must be a whole number from 1 to {MAX_SCALE}, got {self.scale}")
        if self.compiled and self.memory is not None:
            raise UserError("--compile wants the model to stay on the device; leave out --memory")
        if self.step_cache is not None and not self.step_cache > 0:
            raise UserError(f"step_cache must be above 0, such as 0.1, got {self.step_cache}")


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to make videos: what they say of it, how it is run, and where the time goes."""

    pipeline: "KairosPipeline"
    about: dict[str, Any]
    options: RunOptions
    clock: Clock = field(default_factory=Clock)


def run(jobs: Sequence[Job], options: RunOptions) -> None:
    """Make every job's video. All that can be checked without the model is checked before it is loaded."""
    clock = Clock()
    with clock.stage("check"):
        check_model(options)
        defaults = presets.defaults_of(options.model)
        for job in jobs:
            check_request(job.request, defaults, options.scale)
            prepare_output(job)
    with clock.stage("import"):
        import_libraries()
        device, dtype = device_and_dtype(options.device, options.dtype)
    plan = None
    if options.memory is not None:
        # With nowhere to offload to, the encoder stays until the last prompt of a list.
        again = device.type == "cpu" and len(jobs) > 1
        plan = planned([job.request for job in jobs], options, device, rolling=again)
        dtype = dtype_named(plan.dtype)
    for job in jobs:
        check_template(job.request)
    if options.rewrite is not None:
        with clock.stage("rewrite"), waiting("rewriting prompts"):
            from kairos.conditioning.rewrite import Rewriter

            with Rewriter(options.rewrite) as rewriter:
                jobs = [rewritten(job, rewriter) for job in jobs]
    with explained_memory("a smaller size, fewer frames, --memory GB, --tiled or --free-encoder"):
        with clock.stage("load"), waiting(f"loading {options.model}"):
            loaded = replace(load(options, device, dtype, plan), clock=clock)
        if options.verbose:
            _watch(clock, loaded.pipeline)
        for job in jobs:
            after_encoding = encoder_after(options, device, plan, last=job is jobs[-1])
            if plan is not None and plan.tiled:
                job = replace(job, request=replace(job.request, tiled=True))
            make_job(job, loaded, after_encoding)
    if options.verbose:
        err.print(clock.table())
        err.print(f"peak memory: {peak_memory()}")


def load(options: RunOptions, device: Any, dtype: Any, plan: "Plan | None" = None) -> Loaded:
    """The model with its LoRAs, where the plan puts it."""
    from kairos.models.compiled import compile_blocks, compile_decoder
    from kairos.models.vae_layers import channels_last, computed_in
    from kairos.weights.lora import apply_loras, parse_lora

    if device.type == "cpu" and computed_in(dtype) not in (dtype, None):
        slow = "this processor has no products in %s, and takes tens of times as long for them as in float32"
        logger.warning(slow, str(dtype).removeprefix("torch."))
    later = plan is not None or options.quantize is not None  # whole, it might not fit on the device
    pipeline = presets.load_pipeline(
        options.model, device="cpu" if later else device, dtype=dtype, weights=options.weights
    )
    apply_loras(pipeline.transformer, [parse_lora(lora) for lora in options.loras])
    about = describe(pipeline, options, dtype)
    if (precision := vae_precision(options, device)) is not None:
        pipeline.vae.to(dtype=precision)
    # By the dtype alone, however it was chosen: another layout rounds in another way.
    if device.type in ("cpu", "cuda") and str(pipeline.vae.dtype) == "torch.bfloat16":
        channels_last(pipeline.vae)
    about["vae_dtype"] = str(pipeline.vae.dtype).removeprefix("torch.")
    if later:
        from kairos.placement import place, quantize

        if options.quantize is not None:
            quantize(pipeline, options.quantize)
        pipeline = pipeline.to(device) if plan is None else place(pipeline, plan, device)
    if options.compiled:
        compile_blocks(pipeline.transformer)
        if pipeline.device.type == "cuda":
            compile_decoder(pipeline.vae)
    return Loaded(pipeline, about, options)


def encoder_after(options: RunOptions, device: Any, plan: "Plan | None" = None, *, last: bool) -> str:
    """What becomes of the text encoder once a prompt is encoded, the `last` one or another; see
    KairosPipeline."""
    if plan is not None and (device.type == "cpu" or options.free_encoder):
        return "free" if last else "keep"  # where there are hooks, they move it
    if options.free_encoder:
        return "free" if last else "cpu"
    return "keep"


def vae_precision(options: RunOptions, device: Any) -> Any:
    """The VAE's dtype; None leaves its own, as "auto" does where nothing is quicker or --dtype is given."""
    from kairos.models.vae import quickest_dtype

    if options.vae_dtype != "auto":
        return dtype_named(options.vae_dtype)
    return quickest_dtype(device) if options.dtype == "auto" else None


def planned(
    requests: Sequence[Request],
    options: RunOptions,
    device: Any,
    *,
    rolling: bool = False,
    tileable: bool = True,
    videos: int = 1,
) -> "Plan":
    """The plan in which every request fits, `videos` of each at once: that of `kairos plan`, in the VAE's
    precision here."""
    from kairos import memory
    from kairos.model_info import for_planning, info

    kind = "cpu" if device.type == "cpu" else "cuda"
    budget_gb = free_gb(device) if options.memory == "auto" else float(options.memory or 0)
    about = info(options.model)
    clips = [memory.clip_of(about.defaults, about.scheduler, request) for request in requests]
    model = for_planning(about, kind, options.dtype)
    if (precision := vae_precision(options, device)) is not None:
        model = replace(model, vae_dtype=str(precision).removeprefix("torch."))
    tiled = all(request.tiled for request in requests)
    clips = [replace(clip, rolling=rolling, tileable=tileable, videos=videos) for clip in clips]
    plan = memory.plan(model, clips, budget_gb, device=kind, quantize=options.quantize, tiled=tiled)
    logger.log(logging.WARNING if kind == "cpu" else logging.INFO, "memory: %s", plan.line())
    return plan


def make_job(job: Job, loaded: Loaded, after_encoding: str = "keep", *, write: bool = True) -> None:
    """Sample the job's video and write it; one of several ranks that make one video only samples."""
    from kairos.data.media import write_video

    pipeline, scale = loaded.pipeline, loaded.options.scale
    request = as_used(job.request, pipeline).completed(pipeline.config.defaults)
    with loaded.clock.stage("sample"):
        frames = make(pipeline, request, after_encoding, loaded.options.step_cache)
    if not write:
        return
    made_frames, height, width, _ = frames.shape  # rounded up
    request = replace(request, height=height, width=width, num_frames=made_frames)
    with loaded.clock.stage("write"):
        made_from = {"request": replace(request, output="").to_dict(), "mode": request.mode}
        assert request.fps
        write_video(job.path, frames, request.fps, made_from | loaded.about | job.remarks, scale)
    _report(job.path, frames.shape, request.fps, scale)


def check_model(options: RunOptions) -> None:
    """Fail now for a model that is not known or not downloaded, and for weights that are not there."""
    if (model := presets.locate(options.model)).released:
        presets.local_files(model.released, model.folder, own_weights=options.weights is None)
    if options.weights is not None and not Path(options.weights).exists():
        raise UserError(f"weights not found: {options.weights}")
    for lora in options.loras:
        from kairos.weights.lora import parse_lora

        parse_lora(lora)


def rewritten(job: Job, rewriter: "Rewriter") -> Job:
    """The job with its prompt written out by a second model; the video remembers the words it came from."""
    request = job.request
    prompt = rewriter(request.prompt, with_image=bool(request.input_image or request.input_video))
    remarks = job.remarks | {"rewritten": {"from": request.prompt, "by": rewriter.source}}
    return replace(job, request=replace(request, prompt=prompt), remarks=remarks)


def make(
    pipeline: "KairosPipeline",
    request: Request,
    after_encoding: str = "keep",
    step_cache: float | None = None,
) -> Any:
    """The request's frames, (F, H, W, 3) uint8. For the last two see KairosPipeline."""
    import torch

    from kairos.data.media import read_image

    own_template = pipeline.config.prompt_template
    pipeline.set_progress_bar_config(desc="denoising", leave=False, disable=not err.is_terminal)
    if request.template:
        pipeline.register_to_config(prompt_template=request.template)
    try:
        made: Any = pipeline(
            request.prompt,
            image=read_image(request.input_image) if request.input_image else None,
            video=start_of_video(request) if request.input_video else None,
            negative_prompt=request.negative_prompt,
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            tiled=request.tiled,
            after_encoding=after_encoding,
            step_cache=step_cache,
            output_type="np",
        )
    finally:
        pipeline.register_to_config(prompt_template=own_template)
    return pixels(made.frames[0])


def pixels(frames: Any) -> Any:
    """Frames in [0, 1] as uint8. Raises UserError where they are no numbers."""
    import numpy as np

    from kairos.data.media import to_uint8

    if not np.isfinite(frames).all():
        raise UserError("the frames are no finite numbers: this precision does not hold them; try bfloat16")
    return to_uint8(frames)


def describe(pipeline: "KairosPipeline", options: RunOptions, dtype: Any) -> dict[str, Any]:
    """What a video's metadata says besides its request: enough to make it again, not when and where."""
    from kairos.weights.fingerprint import fingerprint

    modules = {
        "transformer": pipeline.transformer,
        "vae": pipeline.vae,
        "text_encoder": pipeline.text_encoder,
    }
    libraries = ("torch", "diffusers", "transformers")
    return {
        "model": {"name": options.model, "hash": fingerprint(modules)},
        "dtype": str(dtype).removeprefix("torch."),
        **{name: value for name, value in said_of(options).items() if value is not None},
        "versions": {
            "kairos": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in libraries},
        },
    }


def said_of(options: RunOptions) -> dict[str, Any]:
    """The options that change the frames, as a video's metadata says them; None is not said there."""
    return {
        "quantize": options.quantize,
        "weights": options.weights,
        "loras": list(options.loras) or None,
        "scale": options.scale,
        "step_cache": options.step_cache,
        "compiled": options.compiled or None,
    }


def _watch(clock: Clock, pipeline: "KairosPipeline") -> None:
    """Have the clock tell the pipeline's parts apart."""
    import torch

    device, encoder = pipeline._execution_device, pipeline.text_encoder  # not where offloaded parts lie
    assert encoder is not None
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
    clock.watch(encoder.model, "encode prompt", synchronize)
    clock.watch(pipeline.vae.encoder, "encode frames", synchronize)
    clock.watch(pipeline.transformer, "denoise", synchronize)
    clock.watch(pipeline.vae.decoder, "decode frames", synchronize)


def _report(path: Path, shape: tuple[int, ...], fps: float, scale: int | None) -> None:
    from kairos.data.media import shown_size

    frames, height, width, _ = shape
    shown_height, shown_width = shown_size(height, width, scale)
    shown = f", shown at {shown_height} x {shown_width}" if shown_height > height else ""
    out.print(f"{path}: {frames} frames of {height} x {width} at {fps:g} fps{shown}")
