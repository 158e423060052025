"""A rollout to a file: chunk after chunk to the video, and what each has drifted to the JSON beside it."""

import json
import logging
import math
import os
import time
from collections import deque
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from rich.text import Text

from kairos.cli.console import err, out, waiting
from kairos.cli.jobs import keep_inputs
from kairos.cli.machine import device_and_dtype, dtype_named, explained_memory, import_libraries
from kairos.cli.resolve import as_used, check_inputs
from kairos.cli.run import RunOptions, check_model, load, pixels, planned
from kairos.data.files import prepare_file
from kairos.data.growing_video import GrowingFile, GrowingVideo, frame_count
from kairos.data.media import fill_frame, read_image, shown_size, video_frames
from kairos.errors import UserError
from kairos.model_info import ModelInfo, info
from kairos.request import Request, check_text

if TYPE_CHECKING:
    import torch

    from kairos.pipeline import KairosPipeline
    from kairos.streaming import Drift, OverlappingRollout, Rollout, WorldState

logger = logging.getLogger(__name__)

GRID_GAP = 2  # pixels between the videos of a grid
CHUNK_FRAMES = 3  # latent ones, of a chunk-causal model


@dataclass(frozen=True)
class RolloutJob:
    """What to roll out, as the command line says it."""

    output: Path
    request: Request | None
    """How it begins; None where a state does."""
    changes: tuple[tuple[float, str], ...] = ()
    """Seconds of this video and prompts, in their order."""
    seconds: float | None = None
    """None: for ever."""
    chunk_frames: int | None = None
    seed: int | None = None
    futures: int | None = None
    save_state: Path | None = None
    from_state: Path | None = None
    stop_on_drift: bool = False

    def __post_init__(self) -> None:
        for name in ("save_state", "from_state"):
            check_text(name, str(getattr(self, name) or ""))  # they stand in the video's metadata
        for written in (self.output, self.drift_log):
            if self.save_state and os.path.realpath(self.save_state) == os.path.realpath(written):
                raise UserError(f"--save-state {self.save_state} would replace {written}; name another file")

    @property
    def drift_log(self) -> Path:
        """The JSON beside the video."""
        return self.output.with_suffix(".drift.json")

    def to_dict(self) -> dict[str, Any]:
        """The options that are no part of the request, as the command line names them."""
        said = {
            "seconds": self.seconds,
            "forever": self.seconds is None,
            "stop_on_drift": self.stop_on_drift,
            "chunk_frames": self.chunk_frames,
            "futures": self.futures,
            "save_state": self.save_state and str(self.save_state),
            "from_state": self.from_state and str(self.from_state),
            "seed": self.seed if self.request is None else None,  # it is part of the request
            "prompt_at": [f"{plain(second)}s {prompt}" for second, prompt in self.changes],
        }
        return {name: value for name, value in said.items() if value not in (None, False, [])}


def roll(job: RolloutJob, options: RunOptions) -> None:
    """Make the video. All that can be checked without the model is checked before it is loaded."""
    if job.request is not None:
        check_inputs(job.request)
    check_model(options)
    model = info(options.model)
    if model.causal != "chunk":
        check_stateless(job, options.model)
    for path in (job.output, job.drift_log, job.save_state):
        if path is not None:
            prepare_file(path)
    import_libraries()
    from kairos.models.vae import SPATIAL
    from kairos.streaming import WorldState

    world = WorldState.load(job.from_state) if job.from_state is not None else None
    check_outputs(job)
    size, videos = job.request, job.futures or 1
    if size is None:
        assert world is not None
        height, width = (SPATIAL * side for side in world.latent_size)
        videos *= world.batch
        size = Request(
            prompt="goes on",
            height=height,
            width=width,
            num_inference_steps=world.settings.num_inference_steps,
            guidance_scale=world.settings.guidance_scale,
        )
    size = size.completed(model.defaults)
    assert size.height and size.width
    shown_size(*grid_size(videos, size.height, size.width), options.scale)
    device, dtype = device_and_dtype(options.device, options.dtype)
    plan = None
    if options.memory is not None:
        tileable = model.causal != "chunk"
        size = replace(size, num_frames=longest_clip(job, world, model))
        plan = planned([size], options, device, rolling=True, tileable=tileable, videos=videos)
        dtype = dtype_named(plan.dtype)
    with explained_memory("a smaller size, fewer --futures or --memory GB"):
        with waiting(f"loading {options.model}"):
            loaded = load(options, device, dtype, plan)
        pipeline = loaded.pipeline
        pipeline.set_progress_bar_config(disable=True)
        fps = pipeline.config.defaults["fps"]
        said = {"rollout": job.to_dict()} | loaded.about
        if job.request is not None:
            request = as_used(job.request, pipeline)
            job = replace(job, request=request)
            said = {"request": request.to_dict()} | said
        rollout = begin(job, pipeline, world, options.model, tiled=plan is not None and plan.tiled)
        video = GrowingVideo(job.output, fps, said, options.scale)
        write(job, rollout, video)


def check_outputs(job: RolloutJob) -> None:
    """Refuse to write over what is read; but a state may go on in its own file."""
    request = job.request or Request(prompt="goes on")
    for written in (job.output, job.drift_log):
        keep_inputs(written, request.input_image, request.input_video, str(job.from_state or ""))
    if job.save_state is not None:
        keep_inputs(job.save_state, request.input_image, request.input_video)


def longest_clip(job: RolloutJob, world: "WorldState | None", model: ModelInfo) -> int:
    """The most frames, 4n + 1, that are made or taken in at once, and no fewer than the model's own."""
    from kairos.streaming.overlap import MOST_OVERLAP

    exact, given = model.causal == "chunk", 1
    chunk_frames = job.chunk_frames or (CHUNK_FRAMES if exact else 0)
    if world is not None:
        chunk_frames = world.settings.chunk_frames
    if exact and job.request is not None and job.request.input_video:
        frames, fps = frame_count(job.request.input_video)
        given = math.ceil(frames / fps * model.defaults["fps"])
    chunk = 4 * chunk_frames + (1 if exact else MOST_OVERLAP)
    return max(int(model.defaults["num_frames"]), chunk, (given - 1) // 4 * 4 + 1)


def check_stateless(job: RolloutJob, model: str) -> None:
    """Refuse what a model that sees whole clips cannot do."""
    for option in ("from_state", "save_state", "futures"):
        if getattr(job, option) is not None:
            flag = f"--{option.replace('_', '-')}"
            raise UserError(f"{flag} needs a chunk-causal model, such as kairos-tiny; {model} is none")


def begin(
    job: RolloutJob, pipeline: "KairosPipeline", world: "WorldState | None", model: str, *, tiled: bool
) -> "Rollout | OverlappingRollout":
    """The rollout before its first chunk: exact for a chunk-causal model, by overlapping clips for others."""
    from kairos.streaming import OverlappingRollout, resume, stream

    if world is not None:
        if job.futures is not None:
            world = forked(world, job.futures, job.seed)
        new_noise = None if job.seed is None else generators(job.seed, world.batch)
        return resume(pipeline, world, generator=new_noise)
    request = job.request
    assert request is not None
    height, width = pipeline._rounded_size(request.height, request.width)
    options: dict[str, Any] = {
        "image": read_image(request.input_image) if request.input_image else None,
        "negative_prompt": request.negative_prompt,
        "height": height,
        "width": width,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "generator": generators(request.seed, 1)[0],
    }
    if pipeline.transformer.config.causal == "chunk":
        given = whole_video(request, pipeline, height, width) if request.input_video else None
        options |= {"video": given, "chunk_frames": job.chunk_frames or CHUNK_FRAMES}
        rollout = stream(pipeline, request.prompt, **options)
        rollout.state = replace(rollout.state, model_name=model)
        return rollout
    overlapping = OverlappingRollout(
        pipeline, request.prompt, chunk_frames=job.chunk_frames, tiled=tiled, **options
    )
    if request.input_video:
        overlapping.begin_with(end_of_video(request, pipeline, overlapping.overlap))
    logger.warning(
        "%s sees whole clips, so this is an approximation: each clip goes on from the last %d frames and "
        "forgets what was before",
        model,
        overlapping.overlap,
    )
    return overlapping


def write(job: RolloutJob, rollout: "Rollout | OverlappingRollout", video: GrowingVideo) -> None:
    """Chunk after chunk to the file, until the length is reached, the drift too large, or Ctrl-C."""
    from kairos.streaming import Rollout

    log = DriftLog(job.drift_log, video.fps)
    changes = job.changes
    world = None
    began = time.perf_counter()
    try:
        with err.status("the first chunk") if err.is_terminal else nullcontext() as status:
            while job.seconds is None or video.frames / video.fps < job.seconds:
                due = [change for change in changes if change[0] <= video.frames / video.fps]
                changes = changes[len(due) :]
                for second, _ in due[:-1]:
                    missed = "--prompt-at %ss changed nothing: the next one came before the next chunk"
                    logger.warning(missed, plain(second))
                for _, prompt in due[-1:]:
                    rollout.change_prompt(prompt)
                frames = next(rollout)
                if job.futures and not video.frames and job.from_state is None:
                    assert isinstance(rollout, Rollout)
                    rollout.state = forked(rollout.state, job.futures, job.seed)
                    frames = frames.repeat(job.futures, axis=0)
                video.write(pixels(grid(frames)))
                world = rollout.state if isinstance(rollout, Rollout) else None
                line, drifted = log.add(frames)
                rate = video.frames / (time.perf_counter() - began)
                line = f"{video.frames / video.fps:.1f} s, {rate:.1f} frames a second; {line}"
                logger.info("%s", line)
                if status is not None:
                    status.update(Text(line))
                if drifted and job.stop_on_drift:
                    logger.warning("stopped, for the video has drifted: %s", drifted)
                    break
    except Exception:
        with suppress(Exception):  # the first failure is the one to tell
            save(world, job.save_state)
        raise
    except KeyboardInterrupt:
        save(world, job.save_state)
        report(video)
        raise
    save(world, job.save_state)
    report(video)
    for second, _ in changes:
        logger.warning("no chunk begins after --prompt-at %ss, which changed nothing", plain(second))


def plain(second: float) -> str:
    """A number as --prompt-at takes it: all of its digits, and no exponent."""
    return np.format_float_positional(second, trim="-")


class DriftLog:
    """Measures every chunk of every video, and keeps it in a JSON that is whole after each chunk."""

    _END = "\n]}\n"

    def __init__(self, path: Path, fps: float) -> None:
        from kairos.streaming import DriftLimits

        self.limits = DriftLimits()
        self._file = GrowingFile(path)
        self._fps, self._chunks, self._frames = fps, 0, 0
        self._meters: list[Any] = []

    def add(self, frames: np.ndarray) -> tuple[str, str | None]:
        """Take a chunk, (B, F, H, W, 3) in [0, 1]: the line to show, and the limit that is passed, if any."""
        from kairos.streaming import DriftMeter

        self._meters = self._meters or [DriftMeter() for _ in frames]
        drifts = [meter.measure(video) for meter, video in zip(self._meters, frames, strict=True)]
        record = json.dumps(
            {
                "chunk": self._chunks,
                "start_s": round(self._frames / self._fps, 4),
                "frames": frames.shape[1],
                "videos": [drift.to_dict() for drift in drifts],
            }
        )
        if self._chunks:
            self._file.append(f",\n{record}{self._END}".encode(), instead_of=len(self._END))
        else:
            head = {"fps": self._fps, "limits": asdict(self.limits)}
            self._file.append(f'{json.dumps(head)[:-1]}, "chunks": [\n{record}{self._END}'.encode())
        self._chunks += 1
        self._frames += frames.shape[1]
        broken = [limit for drift in drifts if (limit := self.limits.broken_by(drift))]
        return shown(drifts), broken[0] if broken else None


def shown(drifts: "list[Drift]") -> str:
    """The measures in a line; of several videos, each one's mean."""
    measures = [drift.to_dict() for drift in drifts]
    names = ("colour", "contrast", "sharpness", "motion", "fidelity")
    return ", ".join(f"{name} {np.mean([m[name] for m in measures]):.3f}" for name in names)


def grid(videos: np.ndarray) -> np.ndarray:
    """Videos (B, F, H, W, 3) in [0, 1] side by side, as near to a square as can be, black where none is."""
    count, frames, height, width, _ = videos.shape
    if count == 1:
        return videos[0]
    columns = grid_columns(count)
    sheet = np.zeros((frames, *grid_size(count, height, width), 3), videos.dtype)
    for index, video in enumerate(videos):
        top, left = index // columns * (height + GRID_GAP), index % columns * (width + GRID_GAP)
        sheet[:, top : top + height, left : left + width] = video
    return sheet


def grid_columns(count: int) -> int:
    return int(np.ceil(np.sqrt(count)))


def grid_size(count: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of the grid of `count` videos."""
    columns = grid_columns(count)
    rows = -(-count // columns)
    return rows * (height + GRID_GAP) - GRID_GAP, columns * (width + GRID_GAP) - GRID_GAP


def whole_video(request: Request, pipeline: "KairosPipeline", height: int, width: int) -> list[Image.Image]:
    """The frames of the given video but for up to three at its start, 4n + 1, at the model's rate.

    Scaled as they are read, for at their own size they might not fit in memory; but not the first, which
    may become a part of the prompt.
    """
    images = map(Image.fromarray, video_frames(request.input_video, pipeline.config.defaults["fps"]))
    frames = [image if index < 4 else fill_frame(image, height, width) for index, image in enumerate(images)]
    return frames[(len(frames) - 1) % 4 :]


def end_of_video(request: Request, pipeline: "KairosPipeline", most: int) -> np.ndarray:
    """The last frames of the given video, at most so many, (k, H, W, 3) uint8, k = 4n + 1, at the model's
    rate."""
    fps = pipeline.config.defaults["fps"]
    frames = deque(video_frames(request.input_video, fps), maxlen=most)
    return np.stack(list(frames)[(len(frames) - 1) % 4 :])


def generators(seed: int | None, count: int) -> "list[torch.Generator]":
    """One for each video, from the seeds `seed`, `seed` + 1, ..."""
    import torch

    return [torch.Generator("cpu").manual_seed((seed or 0) + index) for index in range(count)]


def forked(world: "WorldState", futures: int, seed: int | None) -> "WorldState":
    """The first future of each video goes on with its own noise; of the others, number k of all has the seed
    `seed` + k."""
    import torch

    world = world.fork(futures)
    fresh = torch.stack([generator.get_state() for generator in generators(seed, world.batch)])
    first = torch.arange(world.batch) % futures == 0
    return replace(world, generators=torch.where(first[:, None], world.generators, fresh))


def save(world: "WorldState | None", path: Path | None) -> None:
    if world is not None and path is not None:
        world.save(path)


def report(video: GrowingVideo) -> None:
    if video.frames:
        length = f"{video.frames} frames, {video.frames / video.fps:.1f} s at {video.fps:g} fps"
        out.print(f"{video.file.path}: {length}")
