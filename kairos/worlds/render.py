"""Draws a world in NumPy: every shape by its signed distance, so edges are smooth and sub-pixel places are
true.

Colours are mixed linearly in pixel values: a pixel is background + coverage * (colour - background), which
makes the centroid of the colour mask the place of the shape (`kairos.worlds.measure` stands on that).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kairos.worlds.palette import BACKGROUND, GROUND, GROUND_LINE

RGB = tuple[int, int, int]
Floats = NDArray[np.float64]


class Shape(Protocol):
    """Something to draw: its colour, and its distance function at world points."""

    color: RGB

    def box(self) -> tuple[Floats, float]:
        """Centres (F, 2) and the half side of a square around them that holds the shape, in world units."""
        ...

    def distance(self, x: Floats, y: Floats) -> Floats:
        """Signed distance in world units, negative inside, of points x (F, 1, P) and y (F, P, 1): (F, P,
        P)."""
        ...


@dataclass(frozen=True)
class Disc:
    """A ball: centres (F, 2) and one radius, in world units."""

    centers: Floats
    radius: float
    color: RGB

    def box(self) -> tuple[Floats, float]:
        return self.centers, self.radius

    def distance(self, x: Floats, y: Floats) -> Floats:
        return (
            np.sqrt((x - self.centers[:, 0, None, None]) ** 2 + (y - self.centers[:, 1, None, None]) ** 2)
            - self.radius
        )


def draw(
    shapes: Sequence[Shape], *, num_frames: int, size: int, world: float, floor: float | None
) -> NDArray[np.uint8]:
    """Frames (F, size, size, 3) uint8 of a square world; `shapes` from back to front; `floor` a height or
    None."""
    frames = np.empty((num_frames, size, size, 3), np.uint8)
    frames[:] = _backdrop(size, world, floor)
    for shape in shapes:
        _paint(frames, shape, size / world)
    return frames


def _backdrop(size: int, world: float, floor: float | None) -> NDArray[np.uint8]:
    """(size, 1, 3): plain, or with the ground below `floor` under a dark line as thick as a 64th of the
    picture."""
    rows = np.full((size, 1, 3), BACKGROUND, np.float64)
    if floor is not None:
        scale = size / world
        below = floor * scale - (size - np.arange(size) - 0.5)
        for color, depth in ((GROUND_LINE, below), (GROUND, below - size / 64)):
            coverage = np.clip(0.5 + depth, 0, 1)[:, None, None]
            rows += coverage * (np.array(color) - rows)
    return np.rint(rows).astype(np.uint8)


def _paint(frames: NDArray[np.uint8], shape: Shape, scale: float) -> None:
    """Mix one shape into the frames, working on the square of pixels around it only."""
    size = frames.shape[1]
    centers, half = shape.box()
    first = np.floor(
        np.stack([centers[:, 0], size / scale - centers[:, 1]], 1) * scale - half * scale - 1
    ).astype(np.int64)
    side = np.arange(int(np.ceil(2 * half * scale)) + 3)
    columns, rows = first[:, :1] + side, first[:, 1:] + side
    distance = shape.distance((columns[:, None, :] + 0.5) / scale, (size - rows[:, :, None] - 0.5) / scale)
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    frame, row, column = np.nonzero(inside & (distance * scale < 0.5))
    coverage = np.clip(0.5 - distance[frame, row, column] * scale, 0, 1)[:, None]
    place = (frame, rows[frame, row], columns[frame, column])
    behind = frames[place].astype(np.float64)
    frames[place] = np.rint(behind + coverage * (np.array(shape.color, np.float64) - behind)).astype(np.uint8)
