"""Jobs to files: load the model once, make each video, write it with its request inside."""

import gc
import logging
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kairos import __version__, presets
from kairos.cli.clock import Clock
from kairos.cli.console import err, hush, out, waiting
from kairos.data.files import prepare_file
from kairos.errors import MachineError, UserError, one_line
from kairos.memory import QUANTIZED
from kairos.request import Request, check_text, did_you_mean

if TYPE_CHECKING:
    from kairos.cli.generate import Job
    from kairos.conditioning.rewrite import Rewriter
    from kairos.memory import Plan
    from kairos.pipeline import KairosPipeline

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
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


def run(jobs: Sequence["Job"], options: RunOptions) -> None:
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
        device, dtype = device_and_dtype(options)
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
            pipeline, about = load(options, device, dtype, plan)
        if options.verbose:
            _watch(clock, pipeline)
        for job in jobs:
            after_encoding = "keep"
            if plan is not None and (device.type == "cpu" or options.free_encoder):
                # Where there are hooks, they move it.
                after_encoding = "free" if job is jobs[-1] else "keep"
            elif options.free_encoder:
                after_encoding = "free" if job is jobs[-1] else "cpu"
            if plan is not None and plan.tiled:
                job = replace(job, request=replace(job.request, tiled=True))
            make_job(job, pipeline, about, options, clock, after_encoding)
    if options.verbose:
        err.print(clock.table())
        err.print(f"peak memory: {peak_memory()}")


def load(
    options: RunOptions, device: Any, dtype: Any, plan: "Plan | None" = None
) -> tuple["KairosPipeline", dict[str, Any]]:
    """The model with its LoRAs, where the plan puts it, and what its videos say of it."""
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
    return pipeline, about


def vae_precision(options: RunOptions, device: Any) -> Any:
    """The VAE's dtype; None leaves its own, as "auto" does where nothing is quicker or --dtype is given.

    float16 does not hold what is inside this VAE: there it is float32.
    """
    from kairos.models.vae import quickest_dtype

    if options.vae_dtype != "auto" or options.dtype == "float16":
        return dtype_named("float32" if options.vae_dtype == "auto" else options.vae_dtype)
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
    """The plan in which every request fits, `videos` of each at once; as `kairos plan` prints it."""
    from kairos import memory
    from kairos.model_info import for_planning, info

    kind = "cpu" if device.type == "cpu" else "cuda"
    budget_gb = free_gb(device) if options.memory == "auto" else float(options.memory or 0)
    about = info(options.model)
    clips = [
        memory.clip_of(
            about.defaults,
            about.scheduler,
            request.height,
            request.width,
            request.num_frames,
            request.num_inference_steps,
            request.guidance_scale,
        )
        for request in requests
    ]
    model = for_planning(about, kind, options.dtype)
    if (precision := vae_precision(options, device)) is not None:
        model = replace(model, vae_dtype=str(precision).removeprefix("torch."))
    tiled = all(request.tiled for request in requests)
    clips = [replace(clip, rolling=rolling, tileable=tileable, videos=videos) for clip in clips]
    plan = memory.plan(model, clips, budget_gb, device=kind, quantize=options.quantize, tiled=tiled)
    logger.log(logging.WARNING if kind == "cpu" else logging.INFO, "memory: %s", plan.line())
    return plan


def free_gb(device: Any) -> float:
    """What the device's memory has free, in GB; of the machine's, what programs can have."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    try:
        said = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(said.split("MemAvailable:")[1].split()[0]) * 1024 / 1e9
    except (OSError, IndexError, ValueError):
        raise UserError("--memory auto cannot tell how much memory is free; give it in GB") from None


def make_job(
    job: "Job",
    pipeline: "KairosPipeline",
    about: dict[str, Any],
    options: RunOptions,
    clock: Clock,
    after_encoding: str = "keep",
    *,
    write: bool = True,
) -> None:
    """Sample the job's video and write it; one of several ranks that make one video only samples."""
    from kairos.data.media import write_video

    request = resolved(as_used(job.request, pipeline), pipeline.config.defaults)
    with clock.stage("sample"):
        frames = make(pipeline, request, after_encoding, options.step_cache)
    if not write:
        return
    made_frames, height, width, _ = frames.shape  # rounded up
    request = replace(request, height=height, width=width, num_frames=made_frames)
    with clock.stage("write"):
        made_from = {"request": replace(request, output="").to_dict(), "mode": request.mode}
        assert request.fps
        write_video(job.path, frames, request.fps, made_from | about | job.remarks, options.scale)
    _report(job.path, frames.shape, request.fps, options.scale)


def as_used(request: Request, pipeline: "KairosPipeline") -> Request:
    """The request without what changes nothing in this model; what of that was asked for is said."""
    defaults = pipeline.config.defaults
    steps, own_steps = request.num_inference_steps, int(defaults["num_inference_steps"])
    if is_few_step(pipeline) and (taken := len(pipeline.scheduler.timesteps)) != (steps or own_steps):
        if steps is not None:
            logger.warning("this model samples in %d steps, whatever is asked for", taken)
        request = replace(request, num_inference_steps=taken)
    guidance = defaults["guidance_scale"] if request.guidance_scale is None else request.guidance_scale
    if guidance > 1 and not is_guided(request, pipeline):
        if request.guidance_scale is not None:
            where = "" if is_few_step(pipeline) else "goes on from given frames and "
            logger.warning("this model %ssamples without guidance, whatever is asked for", where)
        request = replace(request, guidance_scale=(guidance := 1.0))
    if guidance <= 1 and request.negative_prompt:
        logger.warning("without guidance a negative prompt changes nothing")
        request = replace(request, negative_prompt="")
    return request


def is_few_step(pipeline: "KairosPipeline") -> bool:
    from kairos.schedulers import FewStepScheduler

    return isinstance(pipeline.scheduler, FewStepScheduler)


def is_guided(request: Request, pipeline: "KairosPipeline") -> bool:
    """Whether guidance leads any of the request's frames."""
    import kairos.pipeline

    defaults = pipeline.config.defaults
    guidance = defaults["guidance_scale"] if request.guidance_scale is None else request.guidance_scale
    known_frames = int(bool(request.input_image or request.input_video))
    return guidance > 1 and not is_few_step(pipeline) and kairos.pipeline.is_guided(defaults, known_frames)


def check_inputs(request: Request) -> None:
    """Read the request's image or the video's first frame, to fail now and not after the model is loaded."""
    from kairos.data.media import read_image, read_video

    if request.input_image:
        read_image(request.input_image)
    if request.input_video:
        read_video(request.input_video, max_frames=1)


def check_request(request: Request, defaults: Mapping[str, Any], scale: int | None) -> None:
    """What a model with these defaults would find wrong with a request for a clip, the files it names too."""
    from kairos.data.media import shown_size

    request = resolved(request, defaults)
    assert request.height and request.width
    shown_size(request.height, request.width, scale)
    if request.input_video:
        start_of_video(request)
    else:
        check_inputs(request)


def prepare_output(job: "Job") -> None:
    """Try that the job's file can be written, and refuse one that the job is made from."""
    prepare_file(job.path)
    keep_inputs(job.path, job.request.input_image, job.request.input_video)


def keep_inputs(output: Path, *inputs: str) -> None:
    """Refuse to write over what is read."""
    for name in inputs:
        if name and output.exists() and output.samefile(name):
            raise UserError(f"{output} would be written over what it is made from; choose another name")


def check_template(request: Request) -> None:
    """Refuse a prompt template that there is not."""
    from kairos.conditioning import TEMPLATES

    if request.template and request.template not in TEMPLATES:
        raise UserError(f"no prompt template {request.template!r}{did_you_mean(request.template, TEMPLATES)}")


def check_model(options: RunOptions) -> None:
    """Fail now for a model that is not known or not downloaded, and for weights that are not there."""
    preset, folder = presets.locate(options.model)
    if preset is not None and preset.kind == "released":
        presets.local_files(preset, folder, own_weights=options.weights is None)
    if options.weights is not None and not Path(options.weights).exists():
        raise UserError(f"weights not found: {options.weights}")
    for lora in options.loras:
        from kairos.weights.lora import parse_lora

        parse_lora(lora)


def rewritten(job: "Job", rewriter: "Rewriter") -> "Job":
    """The job with its prompt written out by a second model; the video remembers the words it came from."""
    request = job.request
    prompt = rewriter(request.prompt, with_image=bool(request.input_image or request.input_video))
    remarks = job.remarks | {"rewritten": {"from": request.prompt, "by": rewriter.source}}
    return replace(job, request=replace(request, prompt=prompt), remarks=remarks)


def resolved(request: Request, defaults: Mapping[str, Any]) -> Request:
    """The request with every value that it left to the model."""
    return replace(
        request,
        height=request.height or int(defaults["height"]),
        width=request.width or int(defaults["width"]),
        num_frames=request.num_frames or int(defaults["num_frames"]),
        num_inference_steps=request.num_inference_steps or int(defaults["num_inference_steps"]),
        guidance_scale=defaults["guidance_scale"]
        if request.guidance_scale is None
        else request.guidance_scale,
        fps=request.fps or defaults["fps"],
    )


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


def start_of_video(request: Request) -> Any:
    """The frames that a continuation begins with, (k, H, W, 3) uint8, k = 4n + 1.

    As many as asked for; else as many as the file has, up to half of the result.
    """
    from kairos.data.media import read_video

    assert request.num_frames is not None
    wanted = request.input_frames or (request.num_frames + 1) // 2
    frames = read_video(request.input_video, fps=request.fps, max_frames=wanted)
    if request.input_frames and len(frames) < wanted:
        there = f"{len(frames)} at {request.fps:g} fps"
        raise UserError(f"{wanted} frames of {request.input_video} are asked for, and it has {there}")
    return frames[: (len(frames) - 1) // 4 * 4 + 1]


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


def device_and_dtype(options: RunOptions) -> tuple[Any, Any]:
    import torch

    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(
            f"device {options.device!r} cannot be used: {one_line(error)}; try --device cpu"
        ) from error
    if options.dtype == "auto":
        return device, torch.float32 if device.type == "cpu" else torch.bfloat16
    return device, getattr(torch, options.dtype)


def dtype_named(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _watch(clock: Clock, pipeline: "KairosPipeline") -> None:
    """Have the clock tell the pipeline's parts apart."""
    import torch

    device = pipeline.device
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
    clock.watch(pipeline.text_encoder, "encode prompt", synchronize)
    clock.watch(pipeline.vae.encoder, "encode frames", synchronize)
    clock.watch(pipeline.transformer, "denoise", synchronize)
    clock.watch(pipeline.vae.decoder, "decode frames", synchronize)


def peak_memory() -> str:
    """The most memory that this process has held so far, on the machine and on the GPU."""
    import torch

    try:
        import resource
    except ImportError:  # Windows
        said = "unknown"
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        said = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"
    if torch.cuda.is_available():
        said += f", {torch.cuda.max_memory_allocated() / 1e9:.2f} GB on the GPU"
    return said


def import_libraries() -> None:
    """Import what a model runs on, and have it say nothing of its insides.

    Thousands of modules are most of a cold start. Hardly any of what they make is garbage, and Python's
    collector would go through all of it again and again: it rests meanwhile, and leaves it alone later.
    """
    hush()
    first, collects = "kairos.pipeline" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        import kairos.pipeline  # noqa: F401, for the rest that it imports
    finally:
        if collects:
            gc.enable()
    if first:
        gc.freeze()
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _report(path: Path, shape: tuple[int, ...], fps: float, scale: int | None) -> None:
    from kairos.data.media import shown_size

    frames, height, width, _ = shape
    shown_height, shown_width = shown_size(height, width, scale)
    shown = f", shown at {shown_height} x {shown_width}" if shown_height > height else ""
    out.print(f"{path}: {frames} frames of {height} x {width} at {fps:g} fps{shown}")


@contextmanager
def explained_memory(
    less: str = "a smaller size, fewer frames, --tiled or --free-encoder",
) -> Iterator[None]:
    """Too little memory, on whichever device, is the machine's failure and not a bug. `less`: what would need
    less of it."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise MachineError(f"compiling failed: {reason}; leave out --compile") from error
        if type(error).__name__ != "OutOfMemoryError" and "DefaultCPUAllocator" not in str(error):
            raise
        raise MachineError(f"not enough memory on the device; try {less}") from error
