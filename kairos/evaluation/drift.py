"""Drift: the measures of a long rollout, for each second of it.

The worlds are known for as long as one likes, so a rollout of a minute has its truth. What leaves the picture
is no longer asked for; scenes in which everything stays, such as the pendulum, tell most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kairos.evaluation import scores
from kairos.evaluation.models import Frames
from kairos.evaluation.reading import Reading, read
from kairos.evaluation.summary import average
from kairos.streaming import DriftMeter
from kairos.worlds import Clip
from kairos.worlds.export import FPS

Record = dict[str, Any]
MEASURES = ("velocity_error", "size_error", "conserved_frames", "fidelity", "sharpness", "colour")
"""Of each second: three of the suite's, and what `kairos.streaming.DriftMeter` sees in the pictures."""


def by_second(frames: Frames, reading: Reading, clip: Clip, given: int) -> list[scores.Scores]:
    """The measures of each whole second of a video, the given frames left out."""
    meter = DriftMeter()
    rows = []
    for start in range(0, len(frames) - FPS + 1, FPS):
        end = start + FPS
        seen = meter.measure(frames[start:end] / np.float32(255)).to_dict()
        first = max(start, given)
        rows.append(
            {
                "velocity_error": scores.velocity_error(reading, clip, first, end),
                "size_error": scores.size_error(reading, clip, first, end),
                "conserved_frames": scores.conservation(reading, clip, first, end)["conserved_frames"],
                **{name: seen[name] for name in ("fidelity", "sharpness", "colour")},
            }
        )
    return rows


def drift_of(
    videos: dict[str, Frames], clips: Sequence[Clip], sceneries: Sequence[Frames], given: int
) -> list[Record]:
    """For each clip {"model", "truth" and maybe "vae": the measures of each second}.

    videos: kind -> (B, F, H, W, 3).
    """
    return [
        {
            kind: by_second(batch[i], read(batch[i], sceneries[i]), clips[i], given)
            for kind, batch in videos.items()
        }
        for i in range(len(clips))
    ]


def summarise_drift(records: Sequence[Record], seed: int) -> dict[str, Any]:
    """{measure: [{"second", "value", "ci", "clips", "floor_truth", "floor_vae"}, ...]} of one scene.

    Seconds of which nothing can be said, because everything has left the picture, are left out.
    """
    result: dict[str, Any] = {}
    for name in MEASURES:
        rows = []
        for second in range(len(records[0]["model"])):

            def column(kind: str, second: int = second, name: str = name) -> np.ndarray:
                values = [record[kind][second][name] for record in records if kind in record]
                return np.array([np.nan if value is None else value for value in values], np.float64)

            entry = average(column("model"), seed)
            if entry["clips"]:
                floors = {f"floor_{kind}": average(column(kind), seed)["value"] for kind in ("truth", "vae")}
                rows.append({"second": second + 1} | entry | floors)
        if rows:
            result[name] = rows
    return result
