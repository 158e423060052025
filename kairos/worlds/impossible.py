"""Impossible twins of clips: the same beginning, then something that no law of the scene allows.

For violation of expectation, as in IntPhys (Riochet et al., arXiv 1803.07616): a model that knows the law is
less surprised by the clip than by its twin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from kairos.errors import UserError
from kairos.worlds.palette import COLORS
from kairos.worlds.world import DT, GRAVITY, Motion, drawn, paint

Frames = NDArray[np.uint8]
ENOUGH = 0.25
"""By how many pictures' worth of pixels, all frames together, a twin is to differ."""
FAR = -1e3
"""Where what has vanished is put."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A possible and an impossible video (F, H, W, 3), equal before frame `begins`, of one caption."""

    possible: Frames = field(repr=False)
    impossible: Frames = field(repr=False)
    violation: str
    begins: int


def impossible_twin(
    scene: str,
    *,
    split: str = "in",
    seed: int = 0,
    index: int = 0,
    num_frames: int = 33,
    size: int = 64,
    given: int = 5,
) -> Pair:
    """The clip of (scene, split, seed, index) and its twin, which differ after the `given` frames only.

    The violations of a scene (`VIOLATIONS`) take turns by index. Where the one whose turn it is would show
    nothing, because the ball has left the picture, the next one is taken. Raises UserError for a scene that
    has none, and for fewer than 8 frames after the given ones.
    """
    if scene not in VIOLATIONS:
        raise UserError(f"there are no impossible twins of {scene!r}; of {', '.join(VIOLATIONS)}")
    if num_frames < given + 8:
        raise UserError(f"a twin needs 8 frames after the {given} given, got {num_frames} frames in all")
    world, motion, colors, _ = drawn(scene, split, seed, index, num_frames, size)
    possible = paint(world, motion, colors, size=size)
    kinds = VIOLATIONS[scene]
    turn = index % len(kinds)
    best: tuple[float, str, Frames] = (-1.0, kinds[turn], possible)
    for kind in (*kinds[turn:], *kinds[:turn]):
        altered, other = CHANGES[kind](motion, colors, given)
        impossible = possible.copy()
        impossible[given:] = paint(world, altered, other, size=size)[given:]
        seen = float((impossible != possible).any(-1).sum()) / size**2
        best = max(best, (seen, kind, impossible), key=lambda candidate: candidate[0])
        if seen > ENOUGH:
            break
    _, kind, impossible = best
    differs = np.flatnonzero((impossible != possible).any((1, 2, 3)))
    return Pair(possible, impossible, kind, int(differs[0]) if len(differs) else num_frames)


Change = Callable[[Motion, tuple[str, ...], int], tuple[Motion, tuple[str, ...]]]


def middle(motion: Motion, given: int) -> int:
    """The frame in which something without a cause happens: half-way, or, where a ball is hidden for a while,
    then."""
    frames = len(motion.positions)
    if "hidden_times" in motion.facts:
        _, gone, back, _ = motion.facts["hidden_times"]
        return int(np.clip(round((gone + back) / 2 / DT), given, frames - 2))
    if "contact_time" in motion.facts:  # there an event of its own changes the motion; keep clear of it
        return int(np.clip(round(motion.facts["contact_time"] / DT) + 4, given, frames - 6))
    return max(given, frames // 2)


def stops(motion: Motion, colors: tuple[str, ...], given: int) -> tuple[Motion, tuple[str, ...]]:
    """Everything stands still from one frame on, in mid-air or on the slope."""
    return picked(motion, np.minimum(np.arange(len(motion.positions)), middle(motion, given))), colors


def turns(motion: Motion, colors: tuple[str, ...], given: int) -> tuple[Motion, tuple[str, ...]]:
    """Everything goes back as it came from one frame on, as if time ran backwards."""
    turn = middle(motion, given)
    return picked(motion, np.abs(turn - np.abs(np.arange(len(motion.positions)) - turn))), colors


def vanishes(motion: Motion, colors: tuple[str, ...], given: int) -> tuple[Motion, tuple[str, ...]]:
    """The first ball is no more from one frame on; behind a wall: it does not come out."""
    positions = motion.positions.copy()
    positions[middle(motion, given) :, 0] = FAR
    return replace(motion, positions=positions), colors


def recolours(motion: Motion, colors: tuple[str, ...], given: int) -> tuple[Motion, tuple[str, ...]]:
    """The first ball has another colour; behind a wall: it comes out as another one."""
    names = [name for name in COLORS if name not in colors]
    other = names[(list(COLORS).index(colors[0]) + 3) % len(names)]
    positions = np.concatenate([motion.positions, motion.positions[:, :1]], 1)
    change = middle(motion, given)
    positions[change:, 0] = FAR
    positions[:change, -1] = FAR
    return replace(motion, positions=positions, radii=np.append(motion.radii, motion.radii[0])), (
        *colors,
        other,
    )


def passes_through(motion: Motion, colors: tuple[str, ...], given: int) -> tuple[Motion, tuple[str, ...]]:
    """What meets something goes on as if it were not there: two balls, a ball and the floor."""
    times = (np.arange(len(motion.positions)) * DT)[:, None, None]
    fall = np.array([0.0, GRAVITY if "restitution" in motion.facts else 0.0])
    positions = motion.positions[:1] + motion.velocities[:1] * times + fall / 2 * times**2
    return replace(motion, positions=positions), colors


def stays(motion: Motion, colors: tuple[str, ...], given: int) -> tuple[Motion, tuple[str, ...]]:
    """What is struck or pushed does not move: the gripper goes through the block, or a ball halts another."""
    positions = motion.positions.copy()
    positions[:, -1] = positions[0, -1]
    return replace(motion, positions=positions), colors


def hovers(motion: Motion, colors: tuple[str, ...], given: int) -> tuple[Motion, tuple[str, ...]]:
    """Gravity ends: from one frame on everything keeps its velocity."""
    change = middle(motion, given)
    positions = motion.positions.copy()
    after = (np.arange(len(positions) - change) * DT)[:, None, None]
    positions[change:] = positions[change] + motion.velocities[change] * after
    return replace(motion, positions=positions), colors


def rises(motion: Motion, colors: tuple[str, ...], given: int) -> tuple[Motion, tuple[str, ...]]:
    """Gravity turns over: from one frame on what fell goes up again as it fell."""
    change = middle(motion, given)
    positions = motion.positions.copy()
    positions[change:, :, 1] = 2 * positions[change, :, 1] - positions[change:, :, 1]
    return replace(motion, positions=positions), colors


CHANGES: dict[str, Change] = {
    "stops": stops,
    "turns": turns,
    "vanishes": vanishes,
    "recolours": recolours,
    "passes through": passes_through,
    "stays": stays,
    "hovers": hovers,
    "rises": rises,
}
VIOLATIONS: dict[str, tuple[str, ...]] = {
    "uniform": ("turns", "recolours", "stops", "vanishes"),
    "collision": ("passes through", "recolours"),
    "parabola": ("hovers", "turns", "rises", "recolours"),
    "bounce": ("passes through", "recolours"),
    "pendulum": ("turns", "stops", "recolours"),
    "occlusion": ("vanishes", "recolours", "turns"),
    "ramp": ("turns", "stops", "recolours"),
    "push": ("stays", "recolours"),
}
"""What is impossible in each scene, in the order in which it takes turns."""


def picked(motion: Motion, frames: NDArray[np.int64]) -> Motion:
    """The motion with its frames in another order, balls and fixtures alike."""

    def shape(part: object) -> object:
        arrays = {
            name: value[frames]
            for name, value in vars(part).items()
            if isinstance(value, np.ndarray) and len(value) == len(motion.positions)
        }
        return replace(part, **arrays)  # type: ignore[type-var]

    return replace(
        motion,
        positions=motion.positions[frames],
        velocities=motion.velocities[frames],
        behind=tuple(shape(part) for part in motion.behind),  # type: ignore[misc]
        before=tuple(shape(part) for part in motion.before),  # type: ignore[misc]
    )
