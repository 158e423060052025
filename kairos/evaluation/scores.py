"""What one video is worth beside the true clip: a number for each measure, NaN where nothing can be judged.

The clip is asked only what could be seen: a ball that leaves the picture or is behind a wall is not missed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kairos.evaluation.reading import Reading, Track
from kairos.worlds import WORLD, Clip

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Scores = dict[str, float]

LOST_ERROR = 1.0
"""The least velocity error of a ball that cannot be seen, so that losing one at rest is no gain."""
ASTRAY = 0.15
"""World units from its place, about a pixel, beyond which a ball is not where the given frames have it."""
LATE = 2
"""Frames that a ball may come out from behind a wall too early or too late."""
SIZE_SLACK = 0.25
"""Share of its area by which a ball that comes out may differ."""
NEAR_EDGE = 0.5
"""A ball last seen this near to the picture's border, or to the wall, may have left by its own motion."""
ADRIFT = 0.02
"""World units in two frames from which a ball moves towards a border."""
FIT_FRAMES = 6
"""Frames before and after a contact that velocities are fitted to."""
BEGINNING = 8
"""Frames in which a video shows what its caption names, before anything leaves the picture."""
STARTS = 0.15
"""World units along x from which a ball has begun to move."""


def score(reading: Reading, clip: Clip, given: int, truth: Reading) -> Scores:
    """Every measure that the clip's scene has, of the frames after the `given` ones.

    `truth` is the reading of the clip's own frames, by which it is judged when a ball comes out, and whether
    the video begins as the clip does.
    """
    return {
        "velocity_error": velocity_error(reading, clip, given),
        "displacement": displacement(reading, clip, given),
        "size_error": size_error(reading, clip, given),
        "begins": begins(reading, truth, given),
        **conservation(reading, clip, given),
        **(collision(reading, clip, given) if clip.parameters["scene"] == "collision" else {}),
        **(permanence(reading, clip, truth, given) if "hidden_times" in clip.parameters else {}),
    }


def begins(reading: Reading, truth: Reading, given: int) -> float:
    """1 where the first `given` frames are the clip's: its balls are mostly in their places there; else 0."""
    there, shown = truth.blobs[:, :given] > 0, reading.blobs[:, :given] > 0
    if not there.any():
        return math.nan
    away = np.linalg.norm(reading.centers[:, :given] - truth.centers[:, :given], axis=-1)
    return float(np.median(np.where(shown, away, math.inf)[there]) <= ASTRAY)


def visible(clip: Clip) -> Mask:
    """(F, n): wholly in the picture and no part of it behind a wall."""
    places, radii = clip.positions, clip.radii[None, :, None]
    inside: Mask = np.all((places > radii) & (places < WORLD - radii), axis=-1)
    first, _, _, last = clip.parameters.get("hidden_times", (math.inf, 0, 0, -math.inf))
    times = frame_times(clip)
    return inside & ~((times > first) & (times < last))[:, None]


def frame_times(clip: Clip) -> Floats:
    """When each frame is, (F,), in units of time."""
    return np.arange(len(clip.positions), dtype=np.float64) * clip.dt


def velocity_error(reading: Reading, clip: Clip, given: int, end: int | None = None) -> float:
    """Mean |v measured - v true| over visible balls and frames from `given` to before `end`, in world units
    per unit of time.

    Velocities are differences of places from frame to frame, for measured and true places alike. A ball that
    the video has lost counts as standing still, and as an error of at least `LOST_ERROR`.
    """
    errors: list[Floats] = []
    seen = visible(clip)
    part = slice(max(given, 1) - 1, None if end is None else end - 1)
    for ball, color in enumerate(clip.colors):
        path = reading.ball(color)
        asked = (seen[1:, ball] & seen[:-1, ball])[part]
        true = (np.diff(clip.positions[:, ball], axis=0) / clip.dt)[part]
        measured = (np.diff(path.centers, axis=0) / clip.dt)[part]
        there = (path.there[1:] & path.there[:-1])[part]
        lost = np.maximum(np.linalg.norm(true, axis=-1), LOST_ERROR)
        errors.append(np.where(there, np.linalg.norm(measured - true, axis=-1), lost)[asked])
    return mean(np.concatenate(errors))


def displacement(reading: Reading, clip: Clip, given: int) -> float:
    """How far balls are from where the given frames show them last, on average over visible frames.

    In world units. A lost ball stays where it was last seen.
    """
    last = max(given, 1) - 1
    seen = visible(clip)
    moved: list[Floats] = []
    for ball, color in enumerate(clip.colors):
        path = reading.ball(color)
        before = np.flatnonzero(path.there[: last + 1])
        if not len(before):
            moved.append(np.zeros(int(seen[last + 1 :, ball].sum())))
            continue
        held = np.maximum.accumulate(np.where(path.there, np.arange(len(path.there)), 0))
        away = np.linalg.norm(path.centers[held] - path.centers[before[-1]], axis=-1)
        moved.append(away[last + 1 :][seen[last + 1 :, ball]])
    return mean(np.concatenate(moved))


def size_error(reading: Reading, clip: Clip, given: int, end: int | None = None) -> float:
    """Mean |area / true area - 1| over visible balls that are there."""
    seen = visible(clip)
    errors = []
    for ball, color in enumerate(clip.colors):
        path = reading.ball(color)
        asked = seen[:, ball] & path.there
        asked[:given] = False
        asked[end or len(asked) :] = False
        errors.append(np.abs(path.areas[asked] / true_area(clip, ball) - 1))
    return mean(np.concatenate(errors))


def true_area(clip: Clip, ball: int) -> float:
    """Of a ball, or of a block of twice the radius, in square units."""
    return float(clip.radii[ball] ** 2) * (4 if clip.parameters["scene"] == "push" else math.pi)


def conservation(reading: Reading, clip: Clip, given: int, end: int | None = None) -> Scores:
    """Whether count and colours stay: `conserved_frames`, the share of frames; `conserved`, whether all do.

    A frame is right where each of the clip's colours is shown at most once and nothing else is, a flood of
    colour no more than a ball, and each visible one is there, unless it was last seen at an edge that it may
    have left by.
    """
    seen = visible(clip)
    right = []
    for frame in range(given, end or len(clip.positions)):
        shown = reading.shown(frame)
        fine = len(set(shown)) == len(shown) and set(shown) <= set(clip.colors) and not reading.floods[frame]
        for ball, color in enumerate(clip.colors):
            if seen[frame, ball] and color not in shown:
                fine &= may_have_left(reading.ball(color), clip, ball, frame)
        right.append(fine)
    if not right:
        return {"conserved": math.nan, "conserved_frames": math.nan}
    return {"conserved": float(all(right)), "conserved_frames": float(np.mean(right))}


def may_have_left(path: Track, clip: Clip, ball: int, frame: int) -> bool:
    """Whether a ball missing in `frame` was last seen on its way out, or where a wall may hide it.

    A wall does so until the ball should be wholly out again; one a little late shows a part of itself then.
    """
    before = np.flatnonzero(path.there[:frame])
    if not len(before):
        return False
    place, reach = path.centers[before[-1]], float(clip.radii[ball]) + NEAR_EDGE
    heading = place - path.centers[before[-3:][0]]
    if bool(((place < reach) & (heading < -ADRIFT) | (place > WORLD - reach) & (heading > ADRIFT)).any()):
        return True
    if "hidden_times" not in clip.parameters:
        return False
    left, right = clip.parameters["wall"]
    due = clip.parameters["hidden_times"][3]
    return bool(left - reach < place[0] < right + reach) and frame * clip.dt < due


def collision(reading: Reading, clip: Clip, given: int) -> Scores:
    """The contact of two balls.

    `contact`: whether they meet and part. `contact_time_error` in units of time; where there is no contact,
    the furthest that one could be off. `momentum_before`, `_after`, `energy_before`, `_after`: |measured -
    true|, momentum as a share of the balls' true momenta added up, energy of the true one; mass is radius
    squared; 1 where the balls cannot be seen. `penetration`: the deepest overlap in world units. A side on
    which truth itself leaves less than two frames to judge by is NaN, and so is a contact that the given
    frames show.
    """
    paths = [reading.ball(color) for color in clip.colors]
    reach = clip.radii[:, None] - 0.1
    usable = np.all(
        [
            path.there & (path.centers > low).all(-1) & (path.centers < WORLD - low).all(-1)
            for path, low in zip(paths, reach, strict=True)
        ],
        axis=0,
    )
    gap = np.linalg.norm(paths[1].centers - paths[0].centers, axis=-1) - clip.radii.sum()
    times = frame_times(clip)
    true_time = float(clip.parameters["contact_time"])
    measured = contact_time(times, gap, usable)
    end = times[-1]
    missed = max(true_time - times[max(given, 1) - 1], end - true_time)
    deepest = np.maximum(-gap, 0)[given:][usable[given:]]
    scores: Scores = {
        "contact": float(measured is not None),
        "contact_time_error": missed if measured is None else abs(measured - true_time),
        "penetration": float(deepest.max()) if len(deepest) else math.nan,
    }
    mass, true = clip.radii**2, clip.velocities[0]
    momentum, energy = mass @ true, float(mass @ (true**2).sum(-1)) / 2
    scale = float(mass @ np.linalg.norm(true, axis=-1))
    time = true_time if measured is None else measured
    made = np.arange(len(times)) >= given
    early, late = usable & made & (times < time - 1e-9), usable & made & (times > time + 1e-9)
    for side, frames in (
        ("before", np.flatnonzero(early)[-FIT_FRAMES:]),
        ("after", np.flatnonzero(late)[:FIT_FRAMES]),
    ):
        # Of balls that cannot be seen nothing is known; to take them for still would suit those that meet
        # head-on, whose momenta cancel.
        scores[f"momentum_{side}"] = scores[f"energy_{side}"] = 1.0
        if len(frames) >= 2:
            velocity = np.array([slopes(times[frames], path.centers[frames]) for path in paths])
            scores[f"momentum_{side}"] = float(np.linalg.norm(mass @ velocity - momentum)) / scale
            scores[f"energy_{side}"] = abs(float(mass @ (velocity**2).sum(-1)) / 2 - energy) / energy
    before, after = judged(clip, given)
    if not before:
        scores |= dict.fromkeys(("momentum_before", "energy_before"), math.nan)
    if not after:
        scores |= dict.fromkeys(("momentum_after", "energy_after"), math.nan)
    if not after or true_time <= (given - 1) * clip.dt:
        scores |= dict.fromkeys(("contact", "contact_time_error"), math.nan)
    return scores


def judged(clip: Clip, given: int) -> tuple[bool, bool]:
    """Whether both balls are in the picture, in truth, in two frames before the contact and in two that are
    a whole one after it, from `given` on."""
    both, times, contact = visible(clip).all(-1), frame_times(clip), clip.parameters["contact_time"]
    before, after = both & (times < contact - 1e-9), both & (times > contact + clip.dt)
    return int(before[given:].sum()) >= 2, int(after[given:].sum()) >= 2


def contact_time(times: Floats, gap: Floats, usable: Mask) -> float | None:
    """When two balls meet and part: the crossing of the lines through their gap before and after it is least.

    None where they do not come close, or do not part again.
    """
    frames = np.flatnonzero(usable)
    if len(frames) < 5:
        return None
    nearest = frames[gap[frames].argmin()]
    before, after = frames[frames < nearest][-FIT_FRAMES:], frames[frames > nearest][:FIT_FRAMES]
    if len(before) < 2 or len(after) < 2 or abs(gap[nearest]) > 0.5:
        return None
    closing, start = np.polyfit(times[before], gap[before], 1)
    parting, end = np.polyfit(times[after], gap[after], 1)
    if closing > -0.1 or parting < 0.05:
        return None
    return float(np.clip((start - end) / (parting - closing), times[before[-1]], times[after[0]]))


def slopes(times: Floats, places: Floats) -> Floats:
    """The velocity (2,) of the straight line through places (k, 2)."""
    return np.polyfit(times, places, 1)[0]


def permanence(reading: Reading, clip: Clip, truth: Reading, given: int) -> Scores:
    """`permanence`: 1 where the ball is hidden and comes out at the far side, in its colour and size, within
    two frames of the truth; else 0. NaN where the `given` frames show it come out, or none does."""
    times = frame_times(clip)
    hidden = clip.parameters["hidden_times"]
    whole = np.flatnonzero(visible(clip)[:, 0] & (times >= hidden[3]))
    due = comes_out(truth, clip)
    if due is None or due < given or not len(whole):
        return {"permanence": math.nan}
    found = comes_out(reading, clip)
    path = reading.ball(clip.colors[0])
    alone = np.mean([reading.shown(int(frame)) == [clip.colors[0]] for frame in whole]) > 0.5
    area = np.median(path.areas[whole]) / true_area(clip, 0)
    right = found is not None and abs(found - due) <= LATE and alone and abs(area - 1) <= SIZE_SLACK
    return {"permanence": float(right)}


def comes_out(reading: Reading, clip: Clip) -> int | None:
    """The frame in which half of the ball is out at the far side, after it was hidden; None if never."""
    path, area = reading.ball(clip.colors[0]), true_area(clip, 0)
    times = frame_times(clip)
    rightwards = clip.velocities[0, 0, 0] > 0
    left, right = clip.parameters["wall"]
    x = path.centers[:, 0]
    beyond = path.there & ((x > right) if rightwards else (x < left))
    out = np.flatnonzero(beyond & (path.areas > area / 2))
    if not len(out):
        return None
    _, gone, back, _ = clip.parameters["hidden_times"]
    slack = LATE * clip.dt
    behind = (times >= gone - slack) & (times <= back + slack)
    if not (path.areas[behind] < area / 4).any():
        return None  # it passed in front of the wall
    return int(out[0])


def agreement(reading: Reading, said: dict[str, Any], truth: Reading) -> Scores:
    """Whether a video shows what its caption names: colours, count and directions of motion, and all of it.

    Colours and count are those of most of the first eight frames that show any, before anything leaves the
    picture. What the caption leaves open is not judged: NaN; nor is a direction that the `truth`, the reading
    of the clip's own frames, does not show, as of a ball that is struck before it has got anywhere.
    """
    shown = first_shown(reading)
    own, true = directions(reading, said), directions(truth, said)
    right = {
        "colors": [color in shown for color in said["colors"] if color],
        "count": [len(shown) == said["count"] and not reading.floods[:BEGINNING].any()],
        "direction": [
            mine == side
            for mine, side, seen in zip(own, said["directions"], true, strict=True)
            if mine and side in ("left", "right") and seen == side
        ],
    }
    answers = right | {"all": [all(each) for each in right.values()]}
    return {name: float(all(each)) if each else math.nan for name, each in answers.items()}


def first_shown(reading: Reading) -> list[str]:
    """The colours of the balls in most of the first frames that show any."""
    pictures = [shown for frame in range(min(BEGINNING, len(reading))) if (shown := reading.shown(frame))]
    return max(pictures, key=pictures.count) if pictures else []


def directions(reading: Reading, said: dict[str, Any]) -> list[str | None]:
    """Where each ball of a caption goes first. One whose colour is not named is the only one shown whose
    colour is not, or None."""
    unnamed = [color for color in first_shown(reading) if color not in said["colors"]]
    other = unnamed[0] if len(unnamed) == 1 else None
    balls = [color or other for color in said["colors"]]
    return [direction(reading.ball(ball)) if ball else None for ball in balls]


def direction(path: Track) -> str:
    """Where a ball goes first: "left", "right", or "none" where it never gets anywhere along x."""
    frames = np.flatnonzero(path.there)
    if not len(frames):
        return "none"
    moved = path.centers[frames, 0] - path.centers[frames[0], 0]
    started = np.flatnonzero(np.abs(moved) > STARTS)
    if not len(started):
        return "none"
    return "right" if moved[started[0]] > 0 else "left"


def mean(values: NDArray[np.floating]) -> float:
    """The mean of what could be measured; NaN where nothing could."""
    known = np.asarray(values)[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan
