"""How much moves: by the codec's motion vectors, by optical flow, and how much of it is new."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kairos.curation.views import Stage, Views


@dataclass(frozen=True)
class Motion(Stage):
    """Motion vectors of the codec, as cosmos-curate takes them: free, for the decoder has them anyway.

    motion: the mean over picture and time, in picture widths a second. motion_patch: the mean over time of
    the cells that move most, so that one small ball on a still ground counts.
    """

    name = "motion"
    inputs = ("vectors",)
    outputs = ("motion", "motion_patch")
    share: float = 0.02  # of the cells, those that move most

    def measure(self, views: Views) -> dict[str, Any]:
        if not len(views.vectors):
            return {"motion": 0.0, "motion_patch": 0.0}
        speed = np.linalg.norm(views.vectors, axis=-1) * views.fps / views.width
        flat = np.sort(speed.reshape(len(speed), -1), axis=1)
        most = flat[:, -max(1, round(self.share * flat.shape[1])) :]
        return {"motion": round(float(speed.mean()), 6), "motion_patch": round(float(most.mean()), 6)}


@dataclass(frozen=True)
class Flow(Stage):
    """Dense optical flow (DIS, its fastest preset) between frames at `rate` a second.

    flow: its mean in picture widths a second; flow_share: how much of the picture moves; camera: the median
    flow, which is that of the ground.
    """

    name = "flow"
    inputs = ("grey",)
    outputs = ("flow", "flow_share", "camera")
    rate: float = 4.0
    least: float = 0.02  # widths a second: what is slower stands still
    may_be_0 = ("least",)

    def measure(self, views: Views) -> dict[str, Any]:
        import cv2

        method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        step = max(1, round(views.fps / self.rate))
        width = views.grey.shape[2]
        means, shares, cameras = [], [], []
        for index in range(0, len(views.grey) - 1, step):
            field = method.calc(views.grey[index], views.grey[index + 1], None) * (views.fps / width)
            speed = np.linalg.norm(field, axis=-1)
            means.append(speed.mean())
            shares.append((speed > self.least).mean())
            cameras.append(np.linalg.norm(np.median(field.reshape(-1, 2), axis=0)))
        if not means:
            return {"flow": 0.0, "flow_share": 0.0, "camera": 0.0}
        return {
            "flow": round(float(np.mean(means)), 5),
            "flow_share": round(float(np.mean(shares)), 5),
            "camera": round(float(np.mean(cameras)), 5),
        }


@dataclass(frozen=True)
class Richness(Stage):
    """How many independent things happen over time: the effective rank of the pictures' change.

    The exponential of the entropy of the spectrum of the clip's small pictures about their mean, without
    what noise and compression put there. A still has 0, a picture that fades 1, a thing that travels about
    as many as it has places.
    """

    name = "richness"
    inputs = ("grey",)
    outputs = ("richness",)
    rate: float = 4.0
    side: int = 24
    noise: float = 0.5  # grey levels, a pixel
    may_be_0 = ("noise",)

    def measure(self, views: Views) -> dict[str, Any]:
        import cv2

        step = max(1, round(views.fps / self.rate))
        small = [
            cv2.resize(picture, (self.side, self.side), interpolation=cv2.INTER_AREA)
            for picture in views.grey[::step]
        ]
        states = np.stack(small).reshape(len(small), -1).astype(np.float64)
        spectrum = np.linalg.svd(states - states.mean(axis=0), compute_uv=False) ** 2 / states.size
        spectrum = spectrum[spectrum > self.noise**2]
        if not len(spectrum):
            return {"richness": 0.0}
        shares = spectrum / spectrum.sum()
        return {"richness": round(float(np.exp(-(shares * np.log(shares)).sum())), 4)}
