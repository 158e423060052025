"""How much physics a clip shows: moments a second at which something happens to what moves.

A thing that moves freely, or falls, has a steady acceleration; a hit is a jump in it. Things that touch,
vanish in the picture's middle and come back tell of solidity and permanence. The score is the rate of such
moments, and below one moment in a clip, how much moves at all: events above plain motion above stills.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kairos.curation.stages.tracking import Track, gap, moving_masks, tracks_of
from kairos.curation.views import Stage, Views


@dataclass(frozen=True)
class Physics(Stage):
    """Scores from tracks. Counts are of the clip; events_per_s counts moments, not the parts of one."""

    name = "physics"
    version = 2
    inputs = ("grey",)
    outputs = (
        "physics_score",
        "events_per_s",
        "jumps",
        "contacts",
        "occlusions",
        "reappearances",
        "falls",
    )
    # Wide and high enough for sources of other rates than the clips': their steady motion judders, for each
    # picture is up to a frame's time late.
    window: int = 4  # frames on each side of a jump
    least_jump: float = 0.005  # picture widths a frame, of velocity
    relative_jump: float = 0.6  # of the thing's own usual speed
    least_frames: int = 6  # of a track that counts
    least_reach: float = 0.03  # picture widths that it must go
    one_moment_s: float = 0.25
    may_be_0 = ("least_jump", "relative_jump", "least_frames", "least_reach")

    def measure(self, views: Views) -> dict[str, Any]:
        grey = views.grey
        if len(grey) < 2 * self.window + 2:
            return dict.fromkeys(self.outputs, 0.0)
        masks = moving_masks(grey)
        width = grey.shape[2]
        tracks = tracks_of(masks)
        things = {
            number: track
            for number, track in enumerate(tracks)
            if len(track.blobs) >= self.least_frames and track.reach >= self.least_reach * width
        }
        jumps = [time for track in things.values() for time in self._jumps(track, width)]
        contacts = self._contacts(things)
        last = len(grey) - 2
        hidden = [
            track.last
            for track in things.values()
            if track.last < last and track.went_into is None and not self._left(track)
        ]
        shown = [
            track.first
            for track in things.values()
            if track.first > 2 and track.came_from is None and not track.blobs[0].at_border
        ]
        seconds = len(grey) / views.fps
        moments = _moments([*jumps, *contacts, *hidden, *shown], self.one_moment_s * views.fps)
        events_per_s = moments / seconds
        moving = {time for track in things.values() for time in range(track.first, track.last + 1)}
        return {
            "physics_score": round(events_per_s + 0.1 * len(moving) / len(grey), 4),
            "events_per_s": round(events_per_s, 4),
            "jumps": len(jumps),
            "contacts": len(contacts),
            "occlusions": len(hidden),
            "reappearances": len(shown),
            "falls": sum(self._falls(track, width) for track in things.values()),
        }

    def _jumps(self, track: Track, width: int) -> list[int]:
        """The frames at which the velocity changes by more than a steady acceleration explains."""
        change, near_border = self._changes(track)
        if not len(change):
            return []
        path = track.path
        usual = float(np.median(np.linalg.norm(np.diff(path, axis=0), axis=1)))
        size = np.linalg.norm(change - np.median(change, axis=0), axis=1)
        size[near_border] = 0  # a thing that enters or leaves the picture seems to slow down
        least = max(self.least_jump * width, self.relative_jump * usual)
        times: list[int] = []
        for index in np.flatnonzero(size > least):
            around = size[max(0, index - self.window) : index + self.window + 1]
            if size[index] == around.max() and (not times or index - times[-1] > self.window):
                times.append(int(index))
        return [track.first + self.window + time for time in times]

    def _changes(self, track: Track) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """(n, 2) velocity after less velocity before each inner frame, and where the border is in the way."""
        k, path = self.window, track.path
        if len(path) < 2 * k + 1:
            return np.zeros((0, 2)), np.zeros(0, np.bool_)
        change = (path[2 * k :] - 2 * path[k:-k] + path[: -2 * k]) / k
        border = np.array([blob.at_border for blob in track.blobs])
        return change, np.array([border[i : i + 2 * k + 1].any() for i in range(len(change))])

    def _falls(self, track: Track, width: int) -> bool:
        """Whether it is drawn down steadily: the acceleration is downward for most of its way."""
        change, near_border = self._changes(track)
        inner = change[~near_border]
        if len(inner) < 2 * self.window:
            return False
        down = inner[:, 1] / self.window
        return bool(np.median(down) > 2e-4 * width and (down > 0).mean() > 0.7)

    def _contacts(self, things: dict[int, Track]) -> list[int]:
        """The frames in which two things first touch, or become one blob."""
        times = []
        numbers = sorted(things)
        for place, one in enumerate(numbers):
            for other in numbers[place + 1 :]:
                first, second = things[one], things[other]
                common = range(max(first.first, second.first), min(first.last, second.last) + 1)
                distances = [
                    gap(first.blobs[t - first.first], second.blobs[t - second.first]) for t in common
                ]
                apart = [t for t, distance in zip(common, distances, strict=True) if distance > 4]
                touch = next(
                    (
                        t
                        for t, d in zip(common, distances, strict=True)
                        if d <= 1.5 and apart and t > apart[0]
                    ),
                    None,
                )
                if touch is not None:
                    times.append(touch)
                elif first.went_into == other or second.went_into == one:
                    times.append(min(first.last, second.last))
        return times

    @staticmethod
    def _left(track: Track) -> bool:
        """Whether a thing ended at the border of the picture, where all that leaves it ends."""
        return any(blob.at_border for blob in track.blobs[-3:])


def _moments(times: Iterable[int], apart: float) -> int:
    """How many moments there are, where those nearer than `apart` frames are one."""
    count, last = 0, -np.inf
    for time in sorted(times):
        if time - last > apart:
            count += 1
            last = time
    return count
