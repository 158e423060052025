"""What the stages see of a clip: small arrays, made in one decoding of it."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from kairos.curation.settings import check_positive

Array = NDArray[Any]

VIEWS = ("grey", "vectors", "samples", "labels")
GREY_SIDE = 256
"""Pixels of the longer side of the grey view; smaller clips are not enlarged."""
SAMPLES = 8
BLOCK = 16
"""Pixels of the side of a cell of the motion field."""


@dataclass(frozen=True)
class Views:
    """One clip as the stages see it; what was not asked for is empty."""

    fps: float
    frames: int
    height: int
    width: int
    grey: Array = field(default_factory=lambda: np.zeros((0, 0, 0), np.uint8))
    """(F, h, w) uint8, every frame, the longer side GREY_SIDE at most."""
    vectors: Array = field(default_factory=lambda: np.zeros((0, 0, 0, 2), np.float32))
    """(F - 1, H / 16, W / 16, 2) float32: the codec's motion vectors, pixels from frame to frame."""
    samples: Array = field(default_factory=lambda: np.zeros((0, 0, 0, 3), np.uint8))
    """(8 or fewer, H, W, 3) uint8 RGB: whole frames at even distances."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """What came with the source: caption, domain, events, and its name as `source`."""
    scores: dict[str, Any] = field(default_factory=dict)
    """What earlier stages gave."""


@dataclass(frozen=True)
class Stage:
    """What scores a clip: its fields are its settings, and numbers, above 0 but for those that `may_be_0`."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    inputs: ClassVar[tuple[str, ...]]
    outputs: ClassVar[tuple[str, ...]]
    may_be_0: ClassVar[tuple[str, ...]] = ()
    scores_clips: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self, but=self.may_be_0)

    def measure(self, views: Views) -> dict[str, Any]:
        raise NotImplementedError


def read_views(file: Path, wanted: Collection[str], labels: Mapping[str, Any]) -> tuple[Views, float]:
    """Decode a clip once, and the seconds that it took. Raises av.error.FFmpegError for a broken file."""
    import cv2

    started = time.process_time()
    grey: list[Array] = []
    vectors: list[Array] = []
    samples: list[Array] = []
    reformatter = VideoReformatter()
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        if "vectors" in wanted:
            stream.codec_context.options = {"flags2": "+export_mvs"}
        count = stream.frames
        shown = set(np.linspace(0, count - 1, min(SAMPLES, count)).round().astype(int).tolist())
        for index, frame in enumerate(container.decode(stream)):
            if "grey" in wanted:
                plane = np.frombuffer(frame.planes[0], np.uint8).reshape(-1, frame.planes[0].line_size)
                luma = plane[: frame.height, : frame.width]
                scale = min(1.0, GREY_SIDE / max(luma.shape))
                size = tuple(max(1, round(side * scale)) for side in luma.shape[::-1])
                grey.append(
                    cv2.resize(luma, size, interpolation=cv2.INTER_AREA) if scale < 1 else luma.copy()
                )
            if "vectors" in wanted and index:
                vectors.append(_field(frame))
            if "samples" in wanted and index in shown:
                samples.append(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())
        found = (("grey", grey), ("vectors", vectors), ("samples", samples))
        stacked: dict[str, Any] = {name: np.stack(arrays) for name, arrays in found if arrays}
        context = stream.codec_context
        views = Views(
            fps=float(stream.average_rate or 1),
            frames=count,
            height=context.height,
            width=context.width,
            labels=labels,
            **stacked,
        )
    return views, time.process_time() - started


def _field(frame: Any) -> Array:
    """(H / 16, W / 16, 2) mean motion of the blocks of a P-frame; those without a vector stand still."""
    rows, columns = frame.height // BLOCK, frame.width // BLOCK
    total = np.zeros((rows, columns, 2), np.float32)
    weight = np.full((rows, columns, 1), 1e-6, np.float32)
    side = frame.side_data.get("MOTION_VECTORS")
    if side is not None:
        found = side.to_ndarray()
        area = (found["w"].astype(np.float32) * found["h"])[:, None]
        row = np.clip(found["dst_y"] // BLOCK, 0, rows - 1)
        column = np.clip(found["dst_x"] // BLOCK, 0, columns - 1)
        moved = -np.stack([found["motion_x"], found["motion_y"]], -1) / found["motion_scale"][:, None]
        np.add.at(total, (row, column), area * moved.astype(np.float32))
        np.add.at(weight, (row, column), area)
    return total / weight
