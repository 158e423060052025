"""The caption grammar: many true ways to say what happens in a clip, with words left out now and then.

A caption comes with what it says, so a prompt encoder can be taught and a text metric knows what was
promised. Here is the language; what is said of each scene stands in `kairos.worlds.phrases`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

SMALL, LARGE = 0.9, 1.15
SLOW, FAST = 1.8, 3.1
"""A radius below SMALL is called small; a speed above FAST, fast; and so on."""

SIZES = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
BALL = ("ball", "ball", "ball", "ball", "ball", "circle", "sphere")
BLOCK = ("block", "block", "box", "cube")


@dataclass(frozen=True)
class Ball:
    """A ball in words.

    `size`: small, medium, large; `speed`: still, slow, medium, fast; `direction`: left, right, none.
    """

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
    """A caption and what it names.

    `said`: "scene", "count", and one entry a ball in "colors", "sizes", "directions", "speeds": a word, or None
    where the caption does not say. Some scenes add "manner", such as "steep".
    """

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

    def ball(self, i: int, *, article: str = "a", adjective: str = "", nouns: tuple[str, ...] = BALL) -> str:
        """A noun phrase, such as "a small red ball"."""
        ball, words = self.balls[i], [adjective]
        if ball.size in SIZES and self.often(0.4):
            words.append(self.pick(*SIZES[ball.size]))
            self.said["sizes"][i] = ball.size
        if self.often(0.97):
            words.append(ball.color)
            self.said["colors"][i] = ball.color
        words.append(self.pick(*nouns))
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
            f"to the {side}",
            f"to the {side}",
            f"to the {side}",
            f"towards the {side}",
            f"toward the {side}",
            f"{side}ward",
            f"{side}wards",
            side,
            f"from {other} to {side}",
            f"from the {other} to the {side}",
        )

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

    def manner(self, manner: str | None, **words: tuple[str, ...]) -> str:
        """Now and then a word for the manner of what happens, where it has one; kept as `said["manner"]`."""
        self.said["manner"] = None
        if manner is None or not self.often(0.5):
            return ""
        self.said["manner"] = manner
        return self.pick(*words[manner])

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
