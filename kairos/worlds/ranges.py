"""What the splits draw from. Ranges of speed and radius follow phyworld (Kang et al., arXiv 2411.02385).

In distribution: speed 1 to 4, radius 0.7 to 1.4 (0.5 to 1.4 in collisions). Beyond it: speed 0 to 0.8 or 4.5
to 6, radius 0.3 to 0.6 or 1.5 to 2. "train" and "in" leave out the speeds of "interpolation", 2.3 to 2.7.
"""

from __future__ import annotations

import numpy as np

from kairos.worlds.world import PLANNED, WORLD

Ranges = tuple[tuple[float, float], ...]

SPEED: Ranges = ((1.0, 2.3), (2.7, 4.0))
SPEED_HELD_OUT: Ranges = ((2.3, 2.7),)
SPEED_OUT: Ranges = ((0.0, 0.8), (4.5, 6.0))
RADIUS: Ranges = ((0.7, 1.4),)
RADIUS_OUT: Ranges = ((0.3, 0.6), (1.5, 2.0))
RADIUS_COLLISION: Ranges = ((0.5, 1.4),)
RADIUS_COLLISION_OUT: Ranges = ((0.3, 0.45), (1.5, 2.0))


def draw_from(rng: np.random.Generator, ranges: Ranges) -> float:
    """Uniform over a union of intervals."""
    place = rng.random() * sum(high - low for low, high in ranges)
    for low, high in ranges:
        if place <= high - low:
            return low + place
        place -= high - low
    return ranges[-1][1]


def side(rng: np.random.Generator) -> int:
    """1 or -1: a scene is worked out for motion to the right, and mirrored half of the time."""
    return 1 - 2 * int(rng.integers(2))


def ranges_of(
    rng: np.random.Generator,
    split: str,
    radius: Ranges = RADIUS,
    radius_out: Ranges = RADIUS_OUT,
    *,
    inside: Ranges = SPEED,
    held_out: Ranges = SPEED_HELD_OUT,
    outside: Ranges = SPEED_OUT,
    name: str = "speed",
) -> tuple[Ranges, Ranges, str | None]:
    """The ranges of a scene's quantity, speed or what `name` says, and of the radius in a split; and what is
    beyond them in "out": that quantity, the radius or both."""
    if split == "interpolation":
        return held_out, radius, None
    if split == "out":
        beyond = (name, "radius", "both")[rng.integers(3)]
        return inside if beyond == "radius" else outside, radius if beyond == name else radius_out, beyond
    return inside, radius, None


def start(rng: np.random.Generator, speed: float, radius: float) -> float:
    """A starting x for motion to the right: in the picture, to the clip's end where the speed allows it."""
    return float(rng.uniform(radius, max(radius + 1.0, WORLD - radius - speed * PLANNED)))
