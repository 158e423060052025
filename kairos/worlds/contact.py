"""The scenes whose law is a bounce, a rod, a wall in the way, a slope, or a push.

States are exact, in closed form; the pendulum's, which has none, is integrated to far below what one sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kairos.worlds import phrases
from kairos.worlds.captions import Ball, Caption
from kairos.worlds.palette import FIXTURE, GROUND_LINE
from kairos.worlds.ranges import RADIUS_OUT, draw_from, ranges_of, side
from kairos.worlds.render import Box, Disc, Rod, Wedge
from kairos.worlds.world import FLOOR, GRAVITY, WORLD, Floats, Motion

SEEN_BY = 2.8
"""Time by which a ball must be at the floor for a caption to say so: in 33 frames it is there for four."""


class Bounce:
    """Gravity and restitution: a ball is let go above the floor; each bounce keeps a share of its speed."""

    name = "bounce"
    floor = True

    def move(self, rng: np.random.Generator, split: str, times: Floats) -> Motion:
        shares, radii, beyond = ranges_of(
            rng,
            split,
            inside=((0.5, 0.65), (0.75, 0.9)),
            held_out=((0.65, 0.75),),
            outside=((0.2, 0.4), (0.95, 1.0)),
            name="restitution",
        )
        restitution, radius = draw_from(rng, shares), draw_from(rng, radii)
        drop = rng.uniform(1.5, min(5.0, WORLD - FLOOR - 2 * radius))
        x = rng.uniform(radius, WORLD - radius)
        begin, speed, height = 0.0, 0.0, drop  # of the flight that a time falls into; speed is upward
        heights, speeds = [], []
        for time in times.tolist():
            while time > (end := begin + (speed + math.sqrt(speed**2 - 2 * GRAVITY * height)) / -GRAVITY):
                speed = restitution * (-GRAVITY * (end - begin) - speed)
                begin, height = end, 0.0
                if speed < 1e-3:
                    begin, speed = math.inf, 0.0
                    break
            flight = max(time - begin, 0.0)
            heights.append(height + speed * flight + GRAVITY / 2 * flight**2)
            speeds.append(speed + GRAVITY * flight if begin < math.inf else 0.0)
        y = FLOOR + radius + np.array(heights)
        positions = np.stack([np.full_like(y, x), y], -1)[:, None]
        velocities = np.stack([np.zeros_like(y), speeds], -1)[:, None]
        contact_time = math.sqrt(2 * drop / -GRAVITY)
        manner = "high" if restitution > 0.8 else "low" if restitution < 0.55 else None
        facts = {
            "beyond": beyond,
            "restitution": restitution,
            "contact_time": contact_time,
            "manner": manner,
        }
        return Motion(positions, velocities, np.array([radius]), facts)

    def describe(self, rng: np.random.Generator, balls: Sequence[Ball], facts: dict[str, Any]) -> Caption:
        return phrases.bounce(rng, balls[0], facts["manner"])


class Pendulum:
    """Conserved energy: a ball on a rod of no mass, let go from rest at an angle."""

    name = "pendulum"
    floor = False

    def move(self, rng: np.random.Generator, split: str, times: Floats) -> Motion:
        lengths, radii, beyond = ranges_of(
            rng,
            split,
            inside=((2.0, 3.2), (3.8, 5.0)),
            held_out=((3.2, 3.8),),
            outside=((1.2, 1.8), (5.3, 6.0)),
            name="length",
        )
        while True:
            length, radius = draw_from(rng, lengths), draw_from(rng, radii)
            amplitude = math.radians(rng.uniform(25, 60))
            reach = length * math.sin(amplitude) + radius
            pivot = np.array([rng.uniform(4.5, 5.5), WORLD - 0.7])
            top = pivot[1] - length * math.cos(amplitude) + radius
            if reach <= 4.5 and top <= WORLD and length + radius <= pivot[1]:
                break
        sign = side(rng)  # the way it swings first; it starts on the other side
        angle, rate = swing(-sign * amplitude, GRAVITY / length, times)
        along = np.stack([np.sin(angle), -np.cos(angle)], -1)
        across = np.stack([np.cos(angle), np.sin(angle)], -1)
        positions, velocities = pivot + length * along, length * rate[:, None] * across
        pivots = np.broadcast_to(pivot, positions.shape)
        # Rounded as the state is, so that the rod is the same picture on every machine.
        rod = Rod(pivots, positions.round(9), 0.08, FIXTURE)
        facts = {"beyond": beyond, "length": length, "amplitude": amplitude, "pivot": pivot.tolist()}
        return Motion(
            positions[:, None],
            velocities[:, None],
            np.array([radius]),
            facts,
            behind=(rod, Disc(pivots, 0.2, GROUND_LINE)),
            heading=np.array([[sign * math.sqrt(-2 * GRAVITY * length * (1 - math.cos(amplitude))), 0.0]]),
        )

    def describe(self, rng: np.random.Generator, balls: Sequence[Ball], facts: dict[str, Any]) -> Caption:
        return phrases.pendulum(rng, balls[0])


def swing(angle: float, pull: float, times: Floats, substeps: int = 16) -> tuple[Floats, Floats]:
    """Angles and their rates (F,) of angle'' = pull * sin(angle), at rest at first; Runge-Kutta 4."""
    rate, states = 0.0, [(angle, 0.0)]
    for before, after in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        h = (after - before) / substeps
        for _ in range(substeps):
            a1, r1 = rate, pull * math.sin(angle)
            a2, r2 = rate + h / 2 * r1, pull * math.sin(angle + h / 2 * a1)
            a3, r3 = rate + h / 2 * r2, pull * math.sin(angle + h / 2 * a2)
            a4, r4 = rate + h * r3, pull * math.sin(angle + h * a3)
            angle += h / 6 * (a1 + 2 * a2 + 2 * a3 + a4)
            rate += h / 6 * (r1 + 2 * r2 + 2 * r3 + r4)
        states.append((angle, rate))
    angles, rates = np.array(states).T
    return angles, rates


class Occlusion:
    """Object permanence: a ball rolls behind a wall that hides all of it, and comes out as it went in."""

    name = "occlusion"
    floor = True

    def move(self, rng: np.random.Generator, split: str, times: Floats) -> Motion:
        speeds, radii, beyond = ranges_of(rng, split, outside=((4.5, 6.0),))
        if beyond in ("radius", "both"):
            radii = RADIUS_OUT[:1]  # a larger ball leaves no room for a wall that hides it
        gap = 0.3
        while True:  # motion to the right; whole in frame 0, whole again at the other side before frame 30
            speed, radius = draw_from(rng, speeds), draw_from(rng, radii)
            x = rng.uniform(radius, 4.0)
            near = rng.uniform(x + radius + gap, 6.0) if x + radius + gap < 6.0 else math.inf
            far = near + rng.uniform(2 * radius + gap, max(2 * radius + gap, 4.5))
            if far + 2 * radius + gap <= WORLD and (far + radius - x) / speed <= 2.9:
                break
        sign, height = side(rng), float(max(4.5, FLOOR + 2 * radius + 1))
        wall = np.array([(near + far) / 2 if sign > 0 else WORLD - (near + far) / 2, (FLOOR + height) / 2])
        path = x + speed * times
        positions = np.stack([path if sign > 0 else WORLD - path, np.full_like(path, FLOOR + radius)], -1)
        velocities = np.broadcast_to([sign * speed, 0.0], positions.shape).copy()
        width = far - near
        facts = {
            "beyond": beyond,
            "wall": sorted([near, far] if sign > 0 else [WORLD - near, WORLD - far]),
            "wall_height": height,
            # Partly hidden from the first to the last of these, wholly between the middle two.
            "hidden_times": [
                (edge + shift - x) / speed
                for edge, shift in ((near, -radius), (near, radius), (far, -radius), (far, radius))
            ],
            "manner": "wide" if width > 3.6 else "narrow" if width < 2.4 else None,
        }
        shape = Box(np.broadcast_to(wall, positions.shape), (width / 2, (height - FLOOR) / 2), FIXTURE)
        return Motion(positions[:, None], velocities[:, None], np.array([radius]), facts, before=(shape,))

    def describe(self, rng: np.random.Generator, balls: Sequence[Ball], facts: dict[str, Any]) -> Caption:
        return phrases.occlusion(rng, balls[0], facts["manner"])


class Ramp:
    """Rolling under gravity: a disc rolls down without slipping, two thirds of g along the slope, and on.

    The foot is taken as smooth: the disc turns there and keeps its speed.
    """

    name = "ramp"
    floor = True

    def move(self, rng: np.random.Generator, split: str, times: Floats) -> Motion:
        slopes, radii, beyond = ranges_of(
            rng,
            split,
            inside=((12.0, 22.0), (26.0, 35.0)),
            held_out=((22.0, 26.0),),
            outside=((6.0, 10.0), (38.0, 45.0)),
            name="slope",
        )
        while True:  # a ramp that falls to the right
            degrees, radius = draw_from(rng, slopes), draw_from(rng, radii)
            angle = math.radians(degrees)
            down, out = (
                np.array([math.cos(angle), -math.sin(angle)]),
                np.array([math.sin(angle), math.cos(angle)]),
            )
            foot = np.array([rng.uniform(4.0, 8.0), FLOOR])
            turn = radius * math.tan(angle / 2)  # the disc touches slope and floor this far from the foot
            run = rng.uniform(1.5, 6.0)
            begin = foot - (turn + run) * down + radius * out
            if np.all(begin >= radius) and np.all(begin <= WORLD - radius):
                break
        pull = -GRAVITY * 2 / 3 * math.sin(angle)
        arrival = math.sqrt(2 * run / pull)
        on_slope = np.minimum(times, arrival)
        rolled, after = pull / 2 * on_slope**2, pull * arrival * np.maximum(times - arrival, 0)
        x = begin[0] + down[0] * rolled + after
        y = begin[1] + down[1] * rolled
        speed = pull * on_slope
        sloping = times < arrival
        vx, vy = np.where(sloping, down[0], 1.0) * speed, np.where(sloping, down[1], 0.0) * speed
        sign = side(rng)
        positions = np.stack([x if sign > 0 else WORLD - x, y], -1)[:, None]
        velocities = np.stack([sign * vx, vy], -1)[:, None]
        facts = {
            "beyond": beyond,
            "slope_degrees": degrees,
            "arrival_time": arrival,
            "manner": "steep" if degrees > 29 else "gentle" if degrees < 17 else None,
        }
        end = (float(foot[0] if sign > 0 else WORLD - foot[0]), FLOOR)
        rise = round(-sign * math.tan(angle), 9)
        wedge = Wedge(end, rise, WORLD, len(times), FIXTURE)
        heading = np.array([[sign * down[0] * pull * arrival, 0.0]])
        return Motion(positions, velocities, np.array([radius]), facts, behind=(wedge,), heading=heading)

    def describe(self, rng: np.random.Generator, balls: Sequence[Ball], facts: dict[str, Any]) -> Caption:
        return phrases.ramp(rng, balls[0], facts["manner"], facts["arrival_time"] < SEEN_BY)


class Push:
    """Contact with a driven body: a gripper comes up to a block, pushes it with one force, and stops.

    The block, of mass side^2 on a floor with friction mu, gains force / mass - mu |g| while it is pushed and
    loses mu |g| afterwards, until it stands. The gripper has no mass: at the touch the block gets no speed.
    """

    name = "push"
    floor = True

    def move(self, rng: np.random.Generator, split: str, times: Floats) -> Motion:
        forces, radii, beyond = ranges_of(
            rng,
            split,
            inside=((3.0, 6.0), (7.5, 12.0)),
            held_out=((6.0, 7.5),),
            outside=((1.0, 2.5), (14.0, 20.0)),
            name="force",
        )
        while True:  # a push to the right
            force, radius, friction = draw_from(rng, forces), draw_from(rng, radii), rng.uniform(0.1, 0.4)
            drag = -GRAVITY * friction
            gain = force / (2 * radius) ** 2 - drag
            approach, duration = rng.uniform(1.0, 3.0), rng.uniform(0.8, 1.4)
            touch = rng.uniform(0.3, 0.8)
            rest = rng.uniform(radius + 1.0, 6.0)
            released = rest + gain * duration**2 / 2
            if 0.3 <= gain <= 8 and rest - radius - approach * touch >= 0.3 and released <= WORLD - radius:
                break
        pushed = np.clip(times - touch, 0, duration)
        top = gain * duration
        slid = np.clip(times - touch - duration, 0, top / drag)
        travel = gain / 2 * pushed**2 + top * slid - drag / 2 * slid**2
        speed = np.where(times < touch + duration, gain * pushed, top - drag * slid)
        plate = rest - radius + np.minimum(approach * (times - touch), 0) + gain / 2 * pushed**2
        sign = side(rng)

        def place(x: Floats) -> Floats:
            return np.stack([x if sign > 0 else WORLD - x, np.full_like(x, FLOOR + radius)], -1)

        velocities = np.stack([sign * speed, np.zeros_like(speed)], -1)[:, None]
        facts = {
            "beyond": beyond,
            "force": force,
            "friction": friction,
            "contact_time": touch,
            "release_time": touch + duration,
        }
        arm = Box(place(plate - WORLD / 2).round(9), (WORLD / 2, 0.12), FIXTURE)
        hand = Box(place(plate - 0.15).round(9), (0.15, 0.8 * radius), GROUND_LINE)
        return Motion(
            place(rest + travel)[:, None],
            velocities,
            np.array([radius]),
            facts,
            behind=(arm, hand),
            heading=np.array([[sign * top, 0.0]]),
            blocks=True,
        )

    def describe(self, rng: np.random.Generator, balls: Sequence[Ball], facts: dict[str, Any]) -> Caption:
        return phrases.push(rng, balls[0])
