"""What is said of each scene: sentences true of the clip, in the language of `kairos.worlds.captions`."""

from __future__ import annotations

import numpy as np

from kairos.worlds.captions import BLOCK, Ball, Caption, Speaker

HITS = (
    "hits",
    "hits",
    "strikes",
    "collides with",
    "bumps into",
    "knocks into",
    "runs into",
    "crashes into",
)
AT_REST = ("at rest", "that stands still", "that is at rest", "standing still", "that does not move")
COLLIDE = (
    "collide",
    "collide head-on",
    "roll towards each other and collide",
    "move towards each other and bounce apart",
    "hit each other",
    "crash into each other",
    "meet and bounce off each other",
    "bump into each other",
)


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
    hits = say.pick(*HITS)
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
        tail = say.pick(*AT_REST)
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
    return say.caption(subject, say.pick(*COLLIDE))


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
            f"and falls to {ground}",
            f"and falls to {ground}",
            f"and drops to {ground}",
            f"and lands on {ground}",
            "and falls",
            "and falls down",
            "in an arc",
            f"and hits {ground}",
        )
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


def bounce(rng: np.random.Generator, ball: Ball, manner: str | None) -> Caption:
    """A ball that is dropped. `manner`: high, low or None."""
    say = Speaker(rng, "bounce", [ball])
    subject = say.ball(0, article=say.article())
    ground = say.pick("the ground", "the floor", "the floor")
    how = say.manner(manner, high=("high", "high up"), low=("a little", "weakly"))
    form = say.rng.random()
    if form < 0.5:
        verb = say.pick("falls", "drops", "is dropped", "falls down", "falls to " + ground)
        return say.frame(say.caption(subject, verb, "and bounces", how))
    if form < 0.8:
        verb, ending = (
            ("bounces off", "") if say.often(0.5) else (say.pick("drops onto", "falls onto"), "and bounces")
        )
        return say.frame(say.caption(subject, verb, ground, ending, how))
    return say.frame(say.caption(subject, say.pick("bounces", "bouncing", "bounces up and down"), how))


def pendulum(rng: np.random.Generator, ball: Ball) -> Caption:
    """A ball on a rod, let go."""
    say = Speaker(rng, "pendulum", [ball])
    rod = say.pick("a rod", "a rod", "a string", "a thin rod")
    form = say.rng.random()
    if form < 0.5:
        subject = say.ball(0, article=say.article())
        verb = say.pick("swings", "swings", "is let go and swings", "swinging", "swings like a pendulum")
        return say.frame(say.caption(subject, "on", rod, verb, say.toward(0, share=0.6)))
    if form < 0.8:
        subject = say.ball(0, article=say.article())
        hangs = say.pick("hangs from", "hangs on", "is tied to")
        return say.frame(say.caption(subject, hangs, rod, "and swings", say.toward(0, share=0.6)))
    subject = f"a pendulum with {say.ball(0)}"
    return say.frame(say.caption(subject, say.pick("swings", "swinging"), say.toward(0, share=0.6)))


def occlusion(rng: np.random.Generator, ball: Ball, manner: str | None) -> Caption:
    """A ball that passes behind a wall. `manner`: wide, narrow or None."""
    say = Speaker(rng, "occlusion", [ball])
    subject = say.ball(0, article=say.article())
    width = say.manner(manner, wide=("wide", "broad"), narrow=("narrow",))
    wall = " ".join(
        part for part in ("a", width, say.pick("", "grey"), say.pick("wall", "wall", "screen")) if part
    )
    form = say.rng.random()
    if form < 0.6:
        verb = say.pick("rolls", "rolls", "moves", "goes", "passes")
        again = say.pick(
            "and comes out again", "and comes out on the other side", "and appears again", "", ""
        )
        return say.frame(say.caption(subject, verb, say.way(0), "behind", wall, again))
    if form < 0.8:
        verb = say.pick("disappears behind", "vanishes behind", "is hidden by", "passes behind")
        again = say.pick("and comes out again", "and appears again", "for a moment")
        return say.frame(
            say.caption(subject, say.pick("rolls", "moves"), f"{say.way(0)},", verb, wall, again)
        )
    return say.frame(say.caption(subject, say.pick("rolling", "moving"), say.way(0), "behind", wall))


def ramp(rng: np.random.Generator, ball: Ball, manner: str | None, arrives: bool) -> Caption:
    """A ball that rolls down a ramp. `manner`: steep, gentle or None. `arrives`: at the floor, in time to be
    seen on it."""
    say = Speaker(rng, "ramp", [ball])
    subject = say.ball(0, article=say.article())
    slope = say.manner(manner, steep=("steep",), gentle=("gentle",))
    slope = say.caption("a", slope, say.pick("ramp", "ramp", "slope", "hill")).text
    verb = say.pick("rolls down", "rolls down", "runs down", "rolling down", "is let go and rolls down")
    ending = say.pick("", "", *(("onto the floor", "and along the floor") if arrives else ()))
    return say.frame(say.caption(subject, verb, slope, say.toward(0, share=0.7), ending))


def push(rng: np.random.Generator, block: Ball) -> Caption:
    """A block that a gripper pushes along the floor."""
    say = Speaker(rng, "push", [block])
    gripper = say.pick("a gripper", "a gripper", "a robot", "a robot arm", "a robot gripper")
    over = say.pick("", "", "along the floor", "over the floor", "across the floor")
    if say.often(0.6):
        verb = say.pick("pushes", "pushes", "shoves", "pushing")
        return say.frame(say.caption(gripper, verb, say.ball(0, nouns=BLOCK), say.toward(0), over))
    subject = say.ball(0, article=say.article(), nouns=BLOCK)
    return say.frame(say.caption(subject, "is pushed", say.toward(0), over, say.pick("", f"by {gripper}")))
