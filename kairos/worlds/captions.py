"""The caption grammar: many true ways to say what happens in a clip, with words left out now and then.

A caption comes with what it says, so a prompt encoder can be taught and a text metric knows what was promised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

SMALL, LARGE = 0.9, 1.15
SLOW, FAST = 1.8, 3.1


@dataclass(frozen=True)
class Ball:
    """A ball in words. `size`: small, medium, large; `speed`: still, slow, medium, fast; `direction`: left, right, none."""

    color: str
    size: str
    speed: str
    direction: str

    @staticmethod
    def of(color: str, radius: float, velocity: NDArray[np.float64]) -> Ball:
        """The words for a radius and a starting velocity (2,), in world units."""
        speed = float(np.abs(velocity[0]))
        return Ball(
            color,
            "small" if radius < SMALL else "large" if radius > LARGE else "medium",
            "still" if speed < 1e-6 else "slow" if speed < SLOW else "fast" if speed > FAST else "medium",
            "none" if speed < 1e-6 else "right" if velocity[0] > 0 else "left",
        )


@dataclass(frozen=True)
class Caption:
    """A caption and what it names. `said`: scene, count, and for each ball its color, size, speed, direction or None."""

    text: str
    said: dict[str, Any] = field(default_factory=dict)


class Speaker:
    """Chooses words at random and remembers what has been said of each ball."""

    def __init__(self, rng: np.random.Generator, scene: str, balls: Sequence[Ball]):
        self.rng = rng
        self.balls = balls
        self.said: dict[str, Any] = {"scene": scene, "count": len(balls)}
        for kind in ("colors", "sizes", "directions", "speeds"):
            self.said[kind] = [None] * len(balls)

    def pick(self, *options: str) -> str:
        return options[int(self.rng.integers(len(options)))]

    def often(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def caption(self, *parts: str) -> Caption:
        """The parts as one line; empty ones vanish."""
        text = " ".join(part for part in parts if part).replace(" ,", ",")
        return Caption(text, self.said)

    def ball(self, i: int, *, article: str = "a", adjective: str = "") -> str:
        """A noun phrase, such as "a small red ball"."""
        ball, words = self.balls[i], [adjective]
        if ball.size != "medium" and self.often(0.4):
            synonyms = (
                ("small", "small", "little", "tiny")
                if ball.size == "small"
                else ("large", "large", "big", "huge")
            )
            words.append(self.pick(*synonyms))
            self.said["sizes"][i] = ball.size
        if self.often(0.97):
            words.append(ball.color)
            self.said["colors"][i] = ball.color
        words.append(self.pick("ball", "ball", "ball", "ball", "ball", "circle", "sphere"))
        words = [word for word in words if word]
        if article == "a":
            article = "an" if words[0][0] in "aeiou" else "a"
        return " ".join([article, *words] if article else words)

    def article(self) -> str:
        return "a" if self.often(0.88) else self.pick("the", "one", "")

    def toward(self, i: int, *, share: float = 0.9) -> str:
        """A phrase of direction, such as "to the right", or nothing."""
        side = self.balls[i].direction
        if side == "none" or not self.often(share):
            return ""
        self.said["directions"][i] = side
        other = "left" if side == "right" else "right"
        return self.pick(
            f"to the {side}", f"to the {side}", f"to the {side}", f"towards the {side}", f"toward the {side}",
            f"{side}ward", f"{side}wards", side, f"from {other} to {side}", f"from the {other} to the {side}",
        )  # fmt: skip

    def pace(self, i: int, *, share: float = 0.4) -> str:
        """A phrase of speed, such as "slowly", or nothing."""
        speed = self.balls[i].speed
        if speed not in ("slow", "fast") or not self.often(share):
            return ""
        self.said["speeds"][i] = speed
        if speed == "slow":
            return self.pick("slowly", "slowly", "slowly", "gently", "at low speed")
        return self.pick("quickly", "quickly", "fast", "rapidly", "at high speed")

    def way(self, i: int, *, share: float = 0.9) -> str:
        """Direction and speed, in either order."""
        both = [self.toward(i, share=share), self.pace(i)]
        if self.often(0.5):
            both.reverse()
        return " ".join(part for part in both if part)

    def frame(self, text: Caption) -> Caption:
        """The caption, now and then framed as people write prompts."""
        if self.often(0.1):
            opening = self.pick("a video of", "a clip of", "an animation of", "a simulation of")
            return Caption(f"{opening} {text.text}", text.said)
        if self.often(0.08):
            return Caption(
                f"{text.text} {self.pick('on a plain background', 'on a light background', 'in the picture')}",
                text.said,
            )
        return text


def uniform(rng: np.random.Generator, ball: Ball) -> Caption:
    """One ball in free motion."""
    say = Speaker(rng, "uniform", [ball])
    subject = say.ball(0, article=say.article())
    if ball.speed == "still":
        say.said["directions"][0], say.said["speeds"][0] = "none", "still"
        return say.caption(subject, say.pick("at rest", "stands still", "does not move"))
    if say.often(0.25):
        verb = say.pick("moving", "rolling", "sliding", "gliding", "travelling", "going")
    else:
        verb = say.pick("moves", "moves", "rolls", "rolls", "slides", "glides", "travels", "goes")
    where = (
        say.pick("across the screen", "across the picture", "at constant speed", "in a straight line")
        if say.often(0.15)
        else ""
    )
    return say.frame(say.caption(subject, verb, say.way(0), where))


def collision(rng: np.random.Generator, first: Ball, second: Ball, kind: str) -> Caption:
    """Two balls that meet; the first one is the subject. `kind`: head-on, rest or catching."""
    say = Speaker(rng, "collision", [first, second])
    if kind == "head-on" and say.often(0.3):
        return say.frame(_mutual(say))
    subject = say.ball(0, article=say.article())
    verb = say.pick("rolls", "rolls", "moves", "moves", "slides", "goes")
    hits = say.pick(
        "hits", "hits", "strikes", "collides with", "bumps into", "knocks into", "runs into", "crashes into"
    )
    if say.often(0.15):
        verb = say.pick("rolling", "moving", "sliding")
        middle = [verb, say.way(0), say.pick("hits", "strikes", "collides with")]
    elif say.often(0.15):
        middle = [hits]
    elif kind == "catching" and say.often(0.4):
        middle = [verb, say.way(0), "and catches up with"]
        return say.frame(
            say.caption(subject, *middle, say.ball(1, adjective="slower" if say.often(0.5) else ""))
        )
    else:
        middle = [verb, say.way(0), "and", hits]
    moving = say.pick("rolling", "moving", "coming", "going") if say.often(0.45) else ""
    if kind == "rest" and say.often(0.5):
        say.said["directions"][1], say.said["speeds"][1] = "none", "still"
        if say.often(0.4):
            return say.frame(
                say.caption(
                    subject, *middle, say.ball(1, adjective=say.pick("still", "resting", "stationary"))
                )
            )
        tail = say.pick(
            "at rest", "that stands still", "that is at rest", "standing still", "that does not move"
        )
        return say.frame(say.caption(subject, *middle, say.ball(1), tail))
    target = say.ball(1)
    if kind != "rest" and moving:
        tail = say.way(1, share=1.0)
        return say.frame(say.caption(subject, *middle, target, moving, tail))
    return say.frame(say.caption(subject, *middle, target))


def _mutual(say: Speaker) -> Caption:
    """Both balls as subjects of a head-on collision. Directions are opposite and not said."""
    if say.often(0.3):
        listing = say.pick("one {} and one {}", "a {} one and a {} one", "{} and {}")
        say.said["colors"] = [ball.color for ball in say.balls]
        listing = listing.format(*say.said["colors"]).replace("a orange", "an orange")
        subject = f"two balls, {listing},"
    else:
        subject = f"{say.ball(0, article=say.article())} and {say.ball(1)}"
    predicate = say.pick(
        "collide", "collide head-on", "roll towards each other and collide", "move towards each other and bounce apart",
        "hit each other", "crash into each other", "meet and bounce off each other", "bump into each other",
    )  # fmt: skip
    return say.caption(subject, predicate)


def parabola(rng: np.random.Generator, ball: Ball) -> Caption:
    """One ball thrown level that falls to the floor."""
    say = Speaker(rng, "parabola", [ball])
    subject = say.ball(0, article=say.article())
    ground = say.pick("the ground", "the ground", "the floor")
    if ball.speed == "still":
        say.said["directions"][0], say.said["speeds"][0] = "none", "still"
        return say.caption(
            subject, say.pick("is dropped and falls to", "falls straight down to", "drops to"), ground
        )
    form = say.rng.random()
    if form < 0.6:
        verb = say.pick("is thrown", "is thrown", "is tossed", "is launched", "flies")
        ending = say.pick(
            f"and falls to {ground}", f"and falls to {ground}", f"and drops to {ground}", f"and lands on {ground}", "and falls",
            "and falls down", "in an arc", f"and hits {ground}",
        )  # fmt: skip
        return say.frame(say.caption(subject, verb, say.way(0), ending))
    if form < 0.8:
        verb = say.pick("falls", "drops", "falls in an arc", "falls through the air")
        return say.frame(
            say.caption(
                subject, verb, say.way(0), say.pick("", f"to {ground}", f"onto {ground}", "under gravity")
            )
        )
    if form < 0.9:
        return say.frame(say.caption(subject, say.pick("thrown", "flying", "tossed", "falling"), say.way(0)))
    return say.frame(say.caption(subject, "is thrown", say.way(0)))
