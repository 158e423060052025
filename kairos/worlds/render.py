"""Draws a world in NumPy: every shape by its signed distance, so edges are smooth and places sub-pixel.

Colours are mixed linearly in pixel values: a pixel is background + coverage * (colour - background), which
makes the centroid of the colour mask the place of the shape (`kairos.evaluation.reading` stands on that).
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

    @property
    def color(self) -> RGB: ...

    def box(self) -> tuple[Floats, float]:
        """Centres (F, 2) and the half side of a square around them that holds the shape, in world units."""
        ...

    def distance(self, x: Floats, y: Floats) -> Floats:
        """Signed distance (F, P, P), negative inside, in world units, of points x (F, 1, P), y (F, P, 1)."""
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
        across, up = x - self.centers[:, 0, None, None], y - self.centers[:, 1, None, None]
        return np.sqrt(across**2 + up**2) - self.radius


@dataclass(frozen=True)
class Box:
    """An upright rectangle: centres (F, 2) and half its width and height."""

    centers: Floats
    half: tuple[float, float]
    color: RGB

    def box(self) -> tuple[Floats, float]:
        return self.centers, max(self.half)

    def distance(self, x: Floats, y: Floats) -> Floats:
        across = np.abs(x - self.centers[:, 0, None, None]) - self.half[0]
        up = np.abs(y - self.centers[:, 1, None, None]) - self.half[1]
        return np.maximum(across, up)  # exact but for the outside of the corners


@dataclass(frozen=True)
class Rod:
    """A straight rod with round ends, between the points `first` and `second`, (F, 2) each."""

    first: Floats
    second: Floats
    radius: float
    color: RGB

    def box(self) -> tuple[Floats, float]:
        longest = np.abs(self.second - self.first).max() / 2
        return (self.first + self.second) / 2, float(longest) + self.radius

    def distance(self, x: Floats, y: Floats) -> Floats:
        along = self.second - self.first
        across, up = x - self.first[:, 0, None, None], y - self.first[:, 1, None, None]
        run, rise = along[:, 0, None, None], along[:, 1, None, None]
        share = np.clip((across * run + up * rise) / (run**2 + rise**2), 0, 1)
        return np.sqrt((across - share * run) ** 2 + (up - share * rise) ** 2) - self.radius


@dataclass(frozen=True)
class Wedge:
    """A ramp on the floor, through `num_frames` frames: from its foot (x, y) it rises to one side.

    `slope` is the rise for each unit of x, positive where the ramp rises to the right.
    """

    foot: tuple[float, float]
    slope: float
    world: float
    num_frames: int
    color: RGB

    def box(self) -> tuple[Floats, float]:
        return np.full((self.num_frames, 2), self.world / 2), self.world / 2

    def distance(self, x: Floats, y: Floats) -> Floats:
        above = y - self.foot[1] - self.slope * (x - self.foot[0])
        return np.maximum(above / np.sqrt(1 + self.slope**2), self.foot[1] - y)


def draw(
    shapes: Sequence[Shape], *, num_frames: int, size: int, world: float, floor: float | None
) -> NDArray[np.uint8]:
    """Frames (F, size, size, 3) uint8 of a square world; `shapes` from back to front. `floor`: a height."""
    frames = np.empty((num_frames, size, size, 3), np.uint8)
    frames[:] = _backdrop(size, world, floor)
    for shape in shapes:
        _paint(frames, shape, size / world)
    return frames


def _backdrop(size: int, world: float, floor: float | None) -> NDArray[np.uint8]:
    """(size, 1, 3): plain, or with the ground below `floor` under a line of a 64th of the picture."""
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
    corner = np.stack([centers[:, 0], size / scale - centers[:, 1]], 1) * scale - half * scale - 1
    first = np.floor(corner).astype(np.int64)
    side = np.arange(int(np.ceil(2 * half * scale)) + 3)
    columns, rows = first[:, :1] + side, first[:, 1:] + side
    x, y = (columns + 0.5) / scale, (size - rows - 0.5) / scale
    distance = shape.distance(x[:, None, :].astype(np.float64), y[:, :, None].astype(np.float64))
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    frame, row, column = np.nonzero(inside & (distance * scale < 0.5))
    coverage = np.clip(0.5 - distance[frame, row, column] * scale, 0, 1)[:, None]
    place = (frame, rows[frame, row], columns[frame, column])
    behind = frames[place].astype(np.float64)
    frames[place] = np.rint(behind + coverage * (np.array(shape.color, np.float64) - behind)).astype(np.uint8)
