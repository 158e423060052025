"""What moves in a clip, as tracks: blobs that differ from the still ground, linked from frame to frame."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Grey = NDArray[np.uint8]  # (F, h, w)
Masks = NDArray[np.bool_]

MAX_BLOBS = 24
"""In one frame: of a crowd or of waves only the largest are followed."""
CROWDED = 0.3
"""Where more of the picture than this differs from its median over time, it is the camera that moves."""


@dataclass(frozen=True)
class Blob:
    """A connected region that moves. Pixels of the grey view; x to the right, y down."""

    center: tuple[float, float]
    area: float
    box: tuple[int, int, int, int]  # left, top, right, bottom; the last two are outside
    at_border: bool


@dataclass
class Track:
    """One thing, from the frame in which it is first seen."""

    first: int
    blobs: list[Blob] = field(default_factory=list)
    came_from: int | None = None  # the track beside which it first appeared
    went_into: int | None = None  # the track that took it in, in a contact

    @property
    def last(self) -> int:
        return self.first + len(self.blobs) - 1

    @property
    def path(self) -> NDArray[np.float64]:
        """(n, 2) centres."""
        return np.array([blob.center for blob in self.blobs])

    @property
    def reach(self) -> float:
        """How far it gets from where it began."""
        path = self.path
        return float(np.linalg.norm(path - path[0], axis=1).max())


def moving_masks(grey: Grey) -> Masks:
    """(F, h, w): what differs from the ground, or under a moving camera from the ground's motion."""
    import cv2

    ground = np.median(grey[np.linspace(0, len(grey) - 1, min(len(grey), 49)).astype(int)], axis=0)
    difference = np.stack([cv2.absdiff(picture, ground.astype(np.uint8)) for picture in grey])
    # Well above what the quiet part of the clip flickers by: noise of the camera and the codec.
    masks = difference > max(10.0, 6 * float(np.median(difference)))
    if masks.mean() > CROWDED:
        method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        masks = np.zeros(grey.shape, np.bool_)
        for index in range(len(grey) - 1):
            flow = method.calc(grey[index], grey[index + 1], None)
            ground_flow = _ground_motion(flow)
            least = max(0.8, 0.5 * float(np.linalg.norm(ground_flow, axis=-1).mean()))
            masks[index] = np.linalg.norm(flow - ground_flow, axis=-1) > least
    kernel = np.ones((3, 3), np.uint8)
    opened = [cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, kernel) for mask in masks]
    return np.stack(opened).astype(np.bool_)


def tracks_of(masks: Masks) -> list[Track]:
    """The things of a clip; every frame's blobs go to the tracks that predict them best."""
    from scipy.optimize import linear_sum_assignment

    width = masks.shape[2]
    tracks: list[Track] = []
    alive: list[int] = []
    for index, mask in enumerate(masks):
        blobs = _blobs(mask)
        expected = [_expected(tracks[number]) for number in alive]
        taken: dict[int, int] = {}
        if blobs and alive:
            centers = np.array([blob.center for blob in blobs])
            cost = np.linalg.norm(np.array(expected)[:, None] - centers[None], axis=-1)
            areas = np.array([tracks[number].blobs[-1].area for number in alive])
            ratio = np.abs(np.log(areas[:, None] / np.array([blob.area for blob in blobs])[None]))
            gate = np.maximum(0.06 * width, 0.8 * np.sqrt(areas))[:, None]
            rows, columns = linear_sum_assignment(np.where(cost < gate, cost + 0.02 * width * ratio, 1e6))
            taken = {
                int(row): int(column)
                for row, column in zip(rows, columns, strict=True)
                if cost[row, column] < gate[row, 0]
            }
        for row, column in taken.items():
            tracks[alive[row]].blobs.append(blobs[column])
        holders = {column: alive[row] for row, column in taken.items()}
        for row, number in enumerate(alive):
            if row not in taken:  # gone: into another blob, or out of sight
                tracks[number].went_into = _holder(expected[row], blobs, holders)
        following = list(holders.values())
        for column, blob in enumerate(blobs):
            if column not in holders:
                tracks.append(Track(index, [blob], came_from=_beside(blob, tracks, alive)))
                following.append(len(tracks) - 1)
        alive = following
    return tracks


def _blobs(mask: NDArray[np.bool_]) -> list[Blob]:
    import cv2

    height, width = mask.shape
    _, _, stats, centers = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    blobs = []
    for (left, top, wide, high, area), center in zip(stats[1:], centers[1:], strict=True):
        if area < max(6, 0.0012 * height * width):
            continue
        right, bottom = left + wide, top + high
        at_border = bool(left <= 1 or top <= 1 or right >= width - 1 or bottom >= height - 1)
        place = float(center[0]), float(center[1])
        blobs.append(Blob(place, float(area), (int(left), int(top), int(right), int(bottom)), at_border))
    return sorted(blobs, key=lambda blob: -blob.area)[:MAX_BLOBS]


def _expected(track: Track) -> tuple[float, float]:
    """Where a thing is next, if it goes on as it went."""
    recent = track.path[-3:]
    step = (recent[-1] - recent[0]) / max(1, len(recent) - 1)
    return float(recent[-1][0] + step[0]), float(recent[-1][1] + step[1])


def _holder(place: tuple[float, float], blobs: list[Blob], holders: dict[int, int]) -> int | None:
    for column, blob in enumerate(blobs):
        left, top, right, bottom = blob.box
        if column in holders and left - 1 <= place[0] <= right and top - 1 <= place[1] <= bottom:
            return holders[column]
    return None


def _beside(blob: Blob, tracks: list[Track], alive: list[int]) -> int | None:
    for number in alive:
        if gap(blob, tracks[number].blobs[-1]) <= 3:
            return number
    return None


def gap(one: Blob, other: Blob) -> float:
    """Pixels between the boxes of two blobs; 0 where they touch."""
    across = max(one.box[0] - other.box[2], other.box[0] - one.box[2], 0)
    down = max(one.box[1] - other.box[3], other.box[1] - one.box[3], 0)
    return float(np.hypot(across, down))


def _ground_motion(flow: NDArray[np.float32]) -> NDArray[np.float32]:
    """The affine motion of most of the picture: pan, zoom and turn."""
    height, width = flow.shape[:2]
    y, x = np.mgrid[0:height:4, 0:width:4].reshape(2, -1)
    design = np.stack([x, y, np.ones_like(x)], -1).astype(np.float32)
    values = flow[y, x]
    keep = np.ones(len(values), np.bool_)
    for _ in range(3):  # without what does not go along with it
        solution, *_ = np.linalg.lstsq(design[keep], values[keep], rcond=None)
        error = np.linalg.norm(values - design @ solution, axis=1)
        keep = error <= max(0.3, float(np.percentile(error, 70)))
    y, x = np.mgrid[0:height, 0:width]
    whole: NDArray[np.float32] = np.stack([x, y, np.ones_like(x)], -1).astype(np.float32) @ solution
    return whole
