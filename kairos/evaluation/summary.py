"""From the records of clips to numbers: means with their intervals, beside the floors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Record = dict[str, Any]
RESAMPLES = 1000
NORMAL = 1.96
"""Standard deviations on either side of a normal mean that hold 95 %."""


@dataclass(frozen=True)
class Measure:
    """A number of the suite: `better` is "low", "high", or "one" for a ratio that should be 1."""

    about: str
    unit: str
    better: str
    decimals: int = 3

    @property
    def answers(self) -> bool:
        """Whether each clip says yes, 1, or no, 0."""
        return self.unit in ("share of clips", "share of pairs")


WORLD_SPEED = "world units per unit of time"
MEASURES: dict[str, Measure] = {
    "velocity_error": Measure("velocity error of a continuation", WORLD_SPEED, "low"),
    "motion_ratio": Measure("displacement, model to truth", "", "one"),
    "motion_to_teacher": Measure("displacement, model to teacher", "", "one"),
    "conserved": Measure("count and colours stay through the whole clip", "share of clips", "high"),
    "conserved_frames": Measure("frames with the right count and colours", "share of frames", "high"),
    "size_error": Measure("area of balls", "share of the true area", "low"),
    "permanence": Measure("the ball comes out from behind the wall", "share of clips", "high"),
    "contact": Measure("the balls meet and part", "share of clips", "high"),
    "contact_time_error": Measure("time of the contact", "units of time", "low"),
    "momentum_before": Measure("momentum before the contact", "share of the balls' momenta", "low"),
    "momentum_after": Measure("momentum after the contact", "share of the balls' momenta", "low"),
    "energy_before": Measure("kinetic energy before the contact", "share of the true one", "low"),
    "energy_after": Measure("kinetic energy after the contact", "share of the true one", "low"),
    "penetration": Measure("deepest overlap of the balls", "world units", "low"),
    "expectation": Measure("possible preferred to impossible", "share of pairs", "high"),
    "colors": Measure("text to video: colours as captioned", "share of clips", "high"),
    "count": Measure("text to video: count as captioned", "share of clips", "high"),
    "direction": Measure("text to video: direction as captioned", "share of clips", "high"),
    "all": Measure("text to video: all three", "share of clips", "high"),
    "psnr": Measure("the VAE's reconstruction", "dB", "high", 2),
}
"""Every measure by its name in results.json, in the order in which it is shown."""
TEXT = ("colors", "count", "direction", "all")


def summarise(
    records: Sequence[Record], seed: int, beside: Sequence[Record | None] | None = None
) -> dict[str, Any]:
    """{measure: {"value", "ci", "floor_truth", "floor_vae", "clips"}} of the records of one scene and split.

    A measure that no record has is left out; a floor that cannot be is None. `clips` is how many the mean is
    of: a clip that the truth cannot be judged by either is not counted. beside: a teacher's records.
    """

    def column(kind: str, name: str, rows: Sequence[Record | None] = records) -> np.ndarray:
        values = [((row or {}).get("scores", {}).get(kind) or {}).get(name) for row in rows]
        return np.array([math.nan if value is None else value for value in values], np.float64)

    result: dict[str, Any] = {}

    def add(name: str, entry: Record, truth: float | None = None, vae: float | None = None) -> None:
        if entry["clips"]:
            result[name] = entry | {"floor_truth": truth, "floor_vae": vae}

    for name in MEASURES:
        if name == "motion_ratio":
            moved, true = column("model", "displacement"), column("truth", "displacement")
            again = ratio(column("vae", "displacement"), true, seed)["value"]
            add(name, ratio(moved, true, seed), 1.0, again)
        elif name == "motion_to_teacher":
            if beside:
                taught = column("model", "displacement", beside)
                add(name, ratio(column("model", "displacement"), taught, seed))
        elif name == "expectation":
            pairs = [row["expectation"] for row in records if row.get("expectation")]
            right = np.array([preferred(pair["possible"], pair["impossible"]) for pair in pairs], np.float64)
            kinds = np.array([pair["violation"] for pair in pairs])
            add(name, average(right, seed, answers=True))
            if name in result:
                result[name]["violations"] = {
                    str(kind): average(right[kinds == kind], seed)["value"] for kind in np.unique(kinds)
                }
        else:
            kind = "text" if name in TEXT else "vae" if name == "psnr" else "model"
            floors = [average(column(floor, name), seed)["value"] for floor in ("truth", "vae")]
            add(name, average(column(kind, name), seed, answers=MEASURES[name].answers), *floors)
    return result


def preferred(possible: float | None, impossible: float | None) -> float:
    """1 where the possible clip has the lower loss, else 0; nan where one has none that is finite."""
    if possible is None or impossible is None or not math.isfinite(possible - impossible):
        return math.nan
    return float(possible < impossible)


def average(values: Any, seed: int, *, answers: bool = False) -> Record:
    """The mean of what is finite, with its 95 % interval: Wilson's of `answers`, which are yes and no, else a
    bootstrap's."""
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    if not len(known):
        return {"value": None, "ci": [None, None], "clips": 0}
    draws = np.random.default_rng(seed).choice(known, (RESAMPLES, len(known))).mean(1)
    ci = wilson(known) if answers else interval(draws, len(known))
    return {"value": float(known.mean()), "ci": ci, "clips": len(known)}


def ratio(above: np.ndarray, below: np.ndarray, seed: int) -> Record:
    """The ratio of two means over the same clips, with its 95 % bootstrap interval."""
    known = np.isfinite(above) & np.isfinite(below)
    above, below = above[known], below[known]
    if not len(below) or below.sum() <= 0:
        return {"value": None, "ci": [None, None], "clips": 0}
    draws = np.random.default_rng(seed).integers(len(below), size=(RESAMPLES, len(below)))
    total = below[draws].sum(1)
    ratios = above[draws].sum(1)[total > 0] / total[total > 0]
    return {
        "value": float(above.sum() / below.sum()),
        "ci": interval(ratios, len(below)),
        "clips": len(below),
    }


def interval(draws: np.ndarray, clips: int) -> list[float | None]:
    """Of the draws of a bootstrap, which from one clip says nothing."""
    return np.percentile(draws, [2.5, 97.5]).tolist() if clips > 1 else [None, None]


def wilson(answers: np.ndarray) -> list[float | None]:
    """Of the share of ones among zeros and ones (Wilson 1927): it has a width where all answers are one."""
    ones, count, square = answers.sum(), len(answers), NORMAL**2
    middle = (ones + square / 2) / (count + square)
    half = NORMAL * math.sqrt(ones * (count - ones) / count + square / 4) / (count + square)
    return np.array([middle - half, middle + half]).clip(0, 1).round(9).tolist()
