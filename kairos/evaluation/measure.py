"""Reads the state of a world off its pixels: where each coloured ball is, how large, and how many there are.

A pixel that a ball covers by `a` is background + a * (colour - background); projecting on that line gives
`a` even where a video is soft, and the distance from the line tells colours apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kairos.worlds import BACKGROUND, COLORS, DT, WORLD, Clip

Floats = NDArray[np.float64]

SOLID = 0.5
"""Cover from which a pixel counts as part of a ball."""
MIN_PIXELS = 6
"""A smaller blob, in a picture of 64 x 64, is not a ball."""
TOLERANCE = 90.0
"""A colour this far from its own line, in steps of 0 to 255, is another one."""


@dataclass(frozen=True)
class Track:
    """One colour through a video: `centers` (F, 2) in world units, y up; `areas` (F,) in square units.

    `there` (F,) is true where enough of the colour is seen to be a ball.
    """

    centers: Floats
    areas: Floats
    there: NDArray[np.bool_]


def covers(frames: NDArray[np.uint8], colors: tuple[str, ...]) -> Floats:
    """How much of each pixel each colour covers: (F, H, W, 3) -> (n, F, H, W); a pixel has at most one
    colour.

    Grey stands among the colours, so that a floor or a shadow is none of them.
    """
    pixels = frames.astype(np.float64) - BACKGROUND
    lines = np.array([*(COLORS[color] for color in colors), (0, 0, 0)], np.float64) - BACKGROUND
    cover = np.einsum("fhwc,nc->nfhw", pixels, lines) / (lines**2).sum(-1)[:, None, None, None]
    cover = cover.clip(0, 1)
    distance = np.linalg.norm(pixels[None] - cover[..., None] * lines[:, None, None, None], axis=-1)
    nearest = distance.argmin(0)[None] == np.arange(len(lines))[:, None, None, None]
    return np.where(nearest & (distance < TOLERANCE) & (cover > 0.1), cover, 0.0)[:-1]


def track(frames: NDArray[np.uint8], color: str, others: tuple[str, ...] = ()) -> Track:
    """Follow the ball of one colour; `others` are the colours it may be confused with."""
    cover = covers(frames, (color, *others))[0]
    size = frames.shape[1]
    unit = WORLD / size
    axis = (np.arange(size) + 0.5) * unit
    mass = cover.sum((1, 2))
    safe = np.maximum(mass, 1e-9)
    x = (cover.sum(1) * axis).sum(-1) / safe
    y = WORLD - (cover.sum(2) * axis).sum(-1) / safe
    return Track(np.stack([x, y], -1), mass * unit**2, mass >= MIN_PIXELS * (size / 64) ** 2)


def velocity_error(frames: NDArray[np.uint8], clip: Clip, given: int = 1) -> float:
    """Mean |v measured - v true| over balls and frames after the `given` ones, in world units per unit of
    time.

    Velocities are differences of centres from frame to frame, for the measured and the true places alike,
    where the ball is wholly in the picture in truth. A ball that the video has lost counts as standing
    still. NaN if none can be seen.
    """
    errors: list[float] = []
    for ball, color in enumerate(clip.colors):
        others = tuple(c for c in clip.colors if c != color)
        seen = track(frames, color, others)
        truth, radius = clip.positions[:, ball], clip.radii[ball]
        inside = ((truth > radius) & (truth < WORLD - radius)).all(-1)
        for frame in range(max(given, 1), len(frames)):
            if inside[frame] and inside[frame - 1]:
                true = (truth[frame] - truth[frame - 1]) / DT
                there = seen.there[frame] and seen.there[frame - 1]
                measured = (seen.centers[frame] - seen.centers[frame - 1]) / DT if there else np.zeros(2)
                errors.append(float(np.linalg.norm(measured - true)))
    return float(np.mean(errors)) if errors else float("nan")


def balls_in(frame: NDArray[np.uint8]) -> list[str]:
    """The colour of every ball in a picture (H, W, 3), one entry a ball, in the palette's order."""
    colors = tuple(COLORS)
    least = MIN_PIXELS * (frame.shape[0] / 64) ** 2
    found = []
    for color, cover in zip(colors, covers(frame[None], colors)[:, 0], strict=True):
        found += [color] * sum(size >= least for size in blob_sizes(cover > SOLID))
    return found


def blob_sizes(mask: NDArray[np.bool_]) -> list[int]:
    """Sizes in pixels of the connected parts (four neighbours) of a mask (H, W)."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    sizes = []
    while left:
        front, size = [left.pop()], 0
        while front:
            y, x = front.pop()
            size += 1
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            front += near
        sizes.append(size)
    return sizes


def caption_agreement(frames: NDArray[np.uint8], said: dict[str, Any]) -> dict[str, bool]:
    """Whether a video (F, H, W, 3) shows what its caption names: colours, count and directions of motion.

    Colours and count are those of most of the first eight frames, before anything leaves the picture. What
    the caption leaves open is not judged.
    """
    pictures = [sorted(balls_in(frame)) for frame in frames[:8]]
    shown = max(pictures, key=pictures.count)
    named = [color for color in said["colors"] if color]
    directions = True
    for color, side in zip(said["colors"], said["directions"], strict=True):
        if color and side in ("left", "right"):
            directions &= direction(track(frames, color, tuple(c for c in named if c != color))) == side
    return {
        "colors": all(color in shown for color in named),
        "count": len(shown) == said["count"],
        "direction": directions,
    }


def direction(path: Track) -> str:
    """Where a ball goes at first: "left", "right", or "none" where it hardly moves or is not seen twice."""
    frames = np.flatnonzero(path.there)[:6]
    if len(frames) < 2:
        return "none"
    moved = path.centers[frames[-1], 0] - path.centers[frames[0], 0]
    return "none" if abs(moved) < 0.1 else "right" if moved > 0 else "left"
