"""The scenes whose law is free motion, an elastic collision, or a fall. States are exact, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kairos.worlds import phrases
from kairos.worlds.captions import Ball, Caption
from kairos.worlds.ranges import (
    RADIUS_COLLISION,
    RADIUS_COLLISION_OUT,
    SPEED,
    draw_from,
    ranges_of,
    side,
    start,
)
from kairos.worlds.world import FLOOR, GRAVITY, WORLD, Floats, Motion


class Uniform:
    """Inertia: one ball, no force."""

    name = "uniform"
    floor = False

    def move(self, rng: np.random.Generator, split: str, times: Floats) -> Motion:
        speeds, radii, beyond = ranges_of(rng, split)
        speed, radius, sign = draw_from(rng, speeds), draw_from(rng, radii), side(rng)
        x = start(rng, speed, radius) + speed * times
        y = rng.uniform(radius, WORLD - radius)
        positions = np.stack([x if sign > 0 else WORLD - x, np.full_like(x, y)], -1)[:, None]
        velocities = np.broadcast_to([sign * speed, 0.0], positions.shape)
        return Motion(positions, np.array(velocities), np.array([radius]), {"beyond": beyond})

    def describe(self, rng: np.random.Generator, balls: Sequence[Ball], facts: dict[str, Any]) -> Caption:
        return phrases.uniform(rng, balls[0])


class Collision:
    """Momentum and energy: two balls of one density on one line meet without loss.

    Kinds: "head-on", "rest" (the second ball stands still) and "catching" (both go one way, the first is
    faster).
    """

    name = "collision"
    floor = False

    def move(self, rng: np.random.Generator, split: str, times: Floats) -> Motion:
        speeds, radii, beyond = ranges_of(rng, split, RADIUS_COLLISION, RADIUS_COLLISION_OUT)
        others = SPEED if split == "interpolation" else speeds
        kind = ("head-on", "rest", "catching")[rng.integers(3)]
        sign = side(rng)
        while True:  # in the frame of a first ball that goes to the right and has the second one ahead of it
            first, second = draw_from(rng, speeds), draw_from(rng, others)
            second = {"head-on": -second, "rest": 0.0, "catching": second}[kind]
            r = np.array([draw_from(rng, radii), draw_from(rng, radii)])
            contact = rng.uniform(0.5, 2.2)
            meeting = rng.uniform(r[0], WORLD - r[0] - 2 * r[1])
            x0 = np.array([meeting - first * contact, meeting + r[0] + r[1] - second * contact])
            if (
                first - second >= (0.3 if split == "out" else 1.0)
                and np.all(x0 >= r)
                and np.all(x0 <= WORLD - r)
            ):
                break
        v0, mass = np.array([first, second]), r**2
        v1 = 2 * (mass @ v0) / mass.sum() - v0
        after = np.clip(times - contact, 0, None)[:, None]
        x = x0 + v0 * (times[:, None] - after) + v1 * after
        v = np.where(after > 0, v1, v0)
        y = rng.uniform(r.max(), WORLD - r.max())
        positions = np.stack([x if sign > 0 else WORLD - x, np.full_like(x, y)], -1)
        velocities = np.stack([sign * v, np.zeros_like(v)], -1)
        return Motion(
            positions, velocities, r, {"beyond": beyond, "kind": kind, "contact_time": float(contact)}
        )

    def describe(self, rng: np.random.Generator, balls: Sequence[Ball], facts: dict[str, Any]) -> Caption:
        return phrases.collision(rng, balls[0], balls[1], facts["kind"])


class Parabola:
    """Gravity: one ball thrown level falls, lands without bouncing and rolls on."""

    name = "parabola"
    floor = True

    def move(self, rng: np.random.Generator, split: str, times: Floats) -> Motion:
        speeds, radii, beyond = ranges_of(rng, split)
        speed, radius, sign = draw_from(rng, speeds), draw_from(rng, radii), side(rng)
        x = start(rng, speed, radius) + speed * times
        height = rng.uniform(FLOOR + radius + 3, WORLD - radius)
        landing = np.sqrt(2 * (height - FLOOR - radius) / -GRAVITY)
        falling = np.minimum(times, landing)
        positions = np.stack([x if sign > 0 else WORLD - x, height + GRAVITY / 2 * falling**2], -1)[:, None]
        vertical = np.where(times < landing, GRAVITY * times, 0.0)
        velocities = np.stack([np.full_like(times, sign * speed), vertical], -1)[:, None]
        facts = {"beyond": beyond, "landing_time": float(landing)}
        return Motion(positions, velocities, np.array([radius]), facts)

    def describe(self, rng: np.random.Generator, balls: Sequence[Ball], facts: dict[str, Any]) -> Caption:
        return phrases.parabola(rng, balls[0])
