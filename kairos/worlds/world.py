"""What a scene is and what a clip holds; `simulate` makes clips.

A scene is any object with the attributes of `Scene`: how things move, how they look, and what one says
about them. Three random streams keep those apart, so colour and wording tell nothing about motion.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kairos.errors import UserError
from kairos.worlds.captions import Ball, Caption
from kairos.worlds.palette import COLORS
from kairos.worlds.render import Box, Disc, Shape, draw

Floats = NDArray[np.float64]

WORLD = 10.0
"""Side of the square world that a picture shows."""
DT = 0.1
"""World time from one video frame to the next."""
GRAVITY = -2.5
FLOOR = 0.625
"""Height of the ground in scenes with gravity: four pixels of 64."""
SPLITS = ("train", "in", "interpolation", "out")
PLANNED = 3.2
"""World time that starting places are chosen for (33 frames). A longer clip starts the same way."""


@dataclass(frozen=True)
class Motion:
    """Where everything is at each asked time, and what else is in the picture. n balls or blocks."""

    positions: Floats  # (F, n, 2)
    velocities: Floats  # (F, n, 2)
    radii: Floats  # (n,), of a block half its side
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers of the scene that serve as labels: JSON values."""
    behind: tuple[Shape, ...] = ()
    before: tuple[Shape, ...] = ()
    heading: Floats | None = None
    """(n, 2), the velocity that words go by where it is not that of the first frame."""
    blocks: bool = False
    """Squares in place of discs."""


class Scene(Protocol):
    """One kind of world. Pass your own to `simulate` to measure a model on it."""

    name: str
    floor: bool

    def move(self, rng: np.random.Generator, split: str, times: Floats) -> Motion:
        """Draw the numbers of one clip within the split's ranges, and the exact state at `times` (F,)."""
        ...

    def describe(self, rng: np.random.Generator, balls: Sequence[Ball], facts: dict[str, Any]) -> Caption:
        """One of the many true captions of the clip."""
        ...


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip and all that is true of it. World units: 10 x 10, y up; velocities in units per unit of time."""

    frames: NDArray[np.uint8] = field(repr=False)  # (F, size, size, 3)
    caption: str
    positions: Floats = field(repr=False)  # (F, n, 2)
    velocities: Floats = field(repr=False)  # (F, n, 2)
    radii: Floats  # (n,)
    colors: tuple[str, ...]
    parameters: dict[str, Any]
    """Labels, all JSON values: scene, split, seed, index, count, colors, sizes, directions, speeds, radii,
    the scene's own numbers, and `said`: which of them the caption names (None where it does not)."""
    world: Scene = field(repr=False)
    motion: Motion = field(repr=False)
    dt: float = DT

    @property
    def scenery(self) -> NDArray[np.uint8]:
        """The frames without the balls and blocks, drawn anew at each asking."""
        motion = self.motion
        empty = replace(motion, positions=motion.positions[:, :0], radii=motion.radii[:0])
        return paint(self.world, empty, (), size=self.frames.shape[1])


def simulate(
    scene: str | Scene,
    *,
    split: str = "train",
    seed: int = 0,
    index: int = 0,
    num_frames: int = 33,
    size: int = 64,
) -> Clip:
    """The clip of (scene, split, seed, index), the same on every machine.

    Splits: "train" and "in" draw from the same ranges by disjoint random streams; "interpolation" from a
    band that both leave out; "out" from beyond the ranges. Raises UserError for an unknown scene or split,
    or a number below its least.
    """
    world, motion, colors, words_rng = drawn(scene, split, seed, index, num_frames, size)
    # Rounding hides the last bits, in which the mathematics libraries of two machines may differ.
    positions, velocities = motion.positions.round(9), motion.velocities.round(9)
    radii = motion.radii.tolist()
    heading = velocities[0] if motion.heading is None else motion.heading
    balls = [Ball.of(*traits) for traits in zip(colors, radii, heading, strict=True)]
    caption = world.describe(words_rng, balls, motion.facts)
    frames = paint(world, motion, colors, size=size)
    parameters = {
        "scene": world.name,
        "split": split,
        "seed": seed,
        "index": index,
        "count": len(radii),
        "colors": list(colors),
        "sizes": [ball.size for ball in balls],
        "directions": [ball.direction for ball in balls],
        "speeds": [ball.speed for ball in balls],
        "radii": radii,
        **motion.facts,
        "said": caption.said,
    }
    return Clip(frames, caption.text, positions, velocities, motion.radii, colors, parameters, world, motion)


def drawn(
    scene: str | Scene, split: str, seed: int, index: int, num_frames: int, size: int
) -> tuple[Scene, Motion, tuple[str, ...], np.random.Generator]:
    """What `simulate` draws: the scene, its motion, the colours, and the stream that words come from."""
    world = _scene(scene)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; one of {', '.join(SPLITS)}")
    least = {"seed": (seed, 0), "index": (index, 0), "num_frames": (num_frames, 1), "size": (size, 16)}
    for name, (value, bound) in least.items():
        if value < bound:
            raise UserError(f"{name} must be at least {bound}, got {value}")
    key = [zlib.crc32(world.name.encode()), zlib.crc32(split.encode()), seed, index]
    motion_rng, look_rng, words_rng = (np.random.Generator(np.random.PCG64([*key, i])) for i in range(3))
    motion = world.move(motion_rng, split, np.arange(num_frames, dtype=np.float64) * DT)
    colors = tuple(str(color) for color in look_rng.permutation(list(COLORS))[: len(motion.radii)])
    return world, motion, colors, words_rng


def paint(world: Scene, motion: Motion, colors: Sequence[str], *, size: int) -> NDArray[np.uint8]:
    """The frames (F, size, size, 3) of a motion."""
    positions = motion.positions.round(9)
    moving = bodies(positions, motion.radii.tolist(), colors, blocks=motion.blocks)
    return draw(
        [*motion.behind, *moving, *motion.before],
        num_frames=len(positions),
        size=size,
        world=WORLD,
        floor=FLOOR if world.floor else None,
    )


def bodies(positions: Floats, radii: list[float], colors: Sequence[str], *, blocks: bool) -> list[Shape]:
    """The shapes of what moves: discs, or squares of twice the radius."""
    places = zip(positions.swapaxes(0, 1), radii, colors, strict=True)
    if blocks:
        return [Box(centers, (radius, radius), COLORS[color]) for centers, radius, color in places]
    return [Disc(centers, radius, COLORS[color]) for centers, radius, color in places]


def _scene(scene: str | Scene) -> Scene:
    if not isinstance(scene, str):
        return scene
    from kairos.worlds.scenes import SCENES

    if scene not in SCENES:
        raise UserError(f"unknown scene {scene!r}; one of {', '.join(SCENES)}")
    return SCENES[scene]
