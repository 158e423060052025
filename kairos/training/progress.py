"""What one sees of a training: a line every so often, TensorBoard scalars, and sample videos."""

from __future__ import annotations

import io
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kairos.errors import UserError
from kairos.process import peak_gb
from kairos.training.parallel import Processes
from kairos.training.precision import has_bfloat16
from kairos.training.stage import Stage

logger = logging.getLogger(__name__)

SMOOTHED_STEPS = 50
READ_TOGETHER = 20


class Progress:
    """Counts steps, clips and seconds of one run; every process feeds it, the first one speaks."""

    def __init__(self, output: Path, stage: Stage, parameters: int, step: int, here: Processes) -> None:
        self.stage, self.here, self.output = stage, here, output
        self.seconds = {"forward": 0.0, "backward": 0.0}
        self.writer: Any = None
        self._losses: list[Tensor] = []
        self._waiting: list[tuple[int, Tensor, Tensor, float]] = []
        self._clips = self._since_clips = 0
        self._average: float | None = None
        self._extra: dict[str, float] = {}
        self._began = self._reported = time.monotonic()
        self._first = self._reported_step = step
        if here.first:
            logger.info(
                "%s: %.2f M parameters in training, step %d of %d on %d %s",
                stage.name,
                parameters / 1e6,
                step,
                stage.steps,
                here.world,
                here.device.type,
            )
            if stage.precision == "bfloat16" and not has_bfloat16(here.device.type):
                logger.info("%s: in float32, for this processor has no products in bfloat16", stage.name)

    def __enter__(self) -> Progress:
        if self.here.first:
            self._shown = threading.excepthook
            threading.excepthook = self._show  # before there is a thread
            try:
                self.writer = open_writer(self.output / "tensorboard")
            except BaseException:
                threading.excepthook = self._shown
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()
            threading.excepthook = self._shown  # where that fails, the thread may have yet to say it

    def _show(self, failed: threading.ExceptHookArgs) -> None:
        """What a thread fails at. TensorBoard's writer raises it again where it is written to."""
        if not type(failed.thread).__module__.startswith("tensorboard"):
            self._shown(failed)

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began

    def add(self, loss: Tensor, clips: int) -> None:
        self._losses.append(loss.detach())
        self._clips += clips * self.here.world

    def step(self, step: int, norm: Tensor, rate: float, more: Callable[[], dict[str, float]]) -> None:
        """After each step. `more` gives further numbers, often none."""
        self._waiting.append((step, torch.stack(self._losses).mean(), norm.detach(), rate))
        self._losses.clear()
        extra = more()
        self._extra |= extra
        now = time.monotonic()
        last = step == self.stage.steps
        # Reading a number waits for all that a GPU has to do, so there it is put off; on all ranks alike.
        at_once = self.here.device.type == "cpu" or self._average is None or last
        if at_once or len(self._waiting) >= READ_TOGETHER:
            self.catch_up()
        if not self.here.first:
            return
        if self.writer is not None:
            for name, value in extra.items():
                self.writer.add_scalar(name, value, step)
        if now - self._reported < self.stage.report_every_s and not last:
            return
        seconds, steps = max(now - self._reported, 1e-9), step - self._reported_step
        clips = self._clips - self._since_clips
        logger.info(
            "step %d/%d: loss %.4f, %.2f steps/s, %.1f clips/s, %s, %s left%s",
            step,
            self.stage.steps,
            self._average,
            steps / seconds,
            clips / seconds,
            memory(self.here.device),
            duration((self.stage.steps - step) * seconds / max(steps, 1)),
            "".join(f", {name} {value:.3f}" for name, value in self._extra.items()),
        )
        self._extra = {}
        self._reported, self._reported_step, self._since_clips = now, step, self._clips
        if last:
            logger.info("%s: %s", self.stage.name, json.dumps(self.summary(step)))

    def catch_up(self) -> None:
        """Read the numbers of the steps that were put off: all ranks at once.

        Raises UserError for one that is not finite: no checkpoint is written of what comes of it.
        """
        if not self._waiting:
            return
        steps, losses, norms, rates = zip(*self._waiting, strict=True)
        self._waiting.clear()
        read = self.here.means(torch.stack(losses)), torch.stack(norms).tolist()
        for step, loss, norm, rate in zip(steps, *read, rates, strict=True):
            if not math.isfinite(loss + norm):
                raise UserError(
                    f"stage {self.stage.name}: step {step} has loss {loss} and a gradient of norm {norm}; go "
                    "on from the last checkpoint with lower rates, or with precision: float32"
                )
            average = self._average
            self._average = loss if average is None else average + (loss - average) / SMOOTHED_STEPS
            scalars = {"loss": loss, "gradient_norm": norm, "learning_rate_share": rate}
            if self.writer is not None:
                for name, value in scalars.items():
                    self.writer.add_scalar(name, value, step)

    def summary(self, step: int) -> dict[str, float]:
        """Pace of the run, and the share of its time that was not forward or backward."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        return {
            "steps": step - self._first,
            "seconds": round(seconds, 2),
            "clips_per_s": round(self._clips / seconds, 2),
            "outside_forward_and_backward": round(1 - sum(self.seconds.values()) / seconds, 4),
        }

    def show(self, videos: Sequence[NDArray[np.uint8]] | None, step: int) -> None:
        """Sample videos, (F, H, W, 3), in TensorBoard as moving pictures."""
        if self.writer is None or not videos:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        row = np.concatenate(list(videos), axis=2)
        frames = [Image.fromarray(frame) for frame in row]
        buffer = io.BytesIO()
        frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:], duration=62, loop=0)
        picture = Summary.Image(height=row.shape[1], width=row.shape[2], colorspace=3)
        picture.encoded_image_string = buffer.getvalue()
        summary = Summary(value=[Summary.Value(tag="samples", image=picture)])
        self.writer._get_file_writer().add_summary(summary, step)


def open_writer(folder: Path) -> Any:
    """TensorBoard's writer."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError('training needs more packages; pip install "kairos-world[train]"') from None
    return SummaryWriter(str(folder))


def memory(device: torch.device) -> str:
    """What this process holds now on its GPU, or has held at most on the machine."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"
    return "memory unknown" if (peak := peak_gb()) is None else f"{peak:.2f} GB"


def duration(seconds: float) -> str:
    """3725 -> 1 h 02 min; 65 -> 1 min 05 s; 0.0123 -> 0.012 s."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
