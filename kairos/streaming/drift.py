"""How far a rollout has drifted from its beginning: six measures of each chunk, against the first.

They see pictures only, so they cost no model and hold for every scene; and they cannot tell a world that
changes from a model that decays: a new prompt, or a ball that leaves the picture, moves them too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.floating]  # (F, H, W, 3) in [0, 1]

HISTOGRAM_LEVELS = 8  # of each channel


@dataclass(frozen=True)
class Drift:
    """One chunk of one video, against the first chunk."""

    brightness: float
    """The mean of the picture, in [0, 1]."""
    colour: float
    """How far the three channels' means have moved, on average, in [0, 1]."""
    contrast: float
    """The spread of the pixels, as a multiple of the first chunk's."""
    sharpness: float
    """The variance of the Laplacian (Pech-Pacheco et al. 2000), as a multiple of the first chunk's."""
    motion: float
    """The mean absolute difference of consecutive frames, in [0, 1]; 0 for a still."""
    fidelity: float
    """The part of the pixels that have the colours of the first chunk (the intersection of the colour
    histograms, Swain and Ballard 1991): 1 all of them, 0 none."""

    def to_dict(self) -> dict[str, float]:
        """Its measures, rounded for a file."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class DriftLimits:
    """What a video may drift before it is said to have drifted: (least, most) of each measure."""

    brightness: tuple[float, float] = (0.02, 0.98)
    colour: tuple[float, float] = (0.0, 0.15)
    contrast: tuple[float, float] = (0.4, 2.5)
    sharpness: tuple[float, float] = (0.2, 5.0)
    motion: tuple[float, float] = (0.0, 0.2)
    fidelity: tuple[float, float] = (0.5, 1.0)

    def broken_by(self, drift: Drift) -> str | None:
        """The first limit that is passed, in words, or None."""
        for field in fields(drift):
            value, (least, most) = getattr(drift, field.name), getattr(self, field.name)
            if not least <= round(value, 6) <= most:
                return f"{field.name} is {value:.3g}, and may be {least:g} to {most:g}"
        return None


class DriftMeter:
    """Measures a video chunk after chunk. It keeps the first chunk's measures and the last frame."""

    def __init__(self) -> None:
        self._first: _Look | None = None
        self._last: Frames | None = None

    def measure(self, frames: Frames) -> Drift:
        """The drift of the chunk that comes next, (F, H, W, 3) in [0, 1]."""
        look = _Look.of(frames)
        first = self._first = self._first or look
        joined = frames if self._last is None else np.concatenate((self._last[None], frames))
        self._last = frames[-1].copy()
        return Drift(
            brightness=float(look.mean.mean()),
            colour=float(np.abs(look.mean - first.mean).mean()),
            contrast=_ratio(look.spread, first.spread),
            sharpness=_ratio(look.sharpness, first.sharpness),
            motion=float(np.abs(np.diff(joined, axis=0)).mean()) if len(joined) > 1 else 0.0,
            fidelity=float(np.minimum(look.histogram, first.histogram).sum()),
        )


@dataclass(frozen=True)
class _Look:
    """What is measured of a chunk by itself."""

    mean: NDArray[np.floating]  # (3,)
    spread: float
    sharpness: float
    histogram: NDArray[np.floating]  # (HISTOGRAM_LEVELS ** 3,), its sum is 1

    @classmethod
    def of(cls, frames: Frames) -> _Look:
        grey = frames.mean(axis=-1)
        around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
        levels = np.clip(frames * HISTOGRAM_LEVELS, 0, HISTOGRAM_LEVELS - 1).astype(np.int16)
        codes = (levels @ (HISTOGRAM_LEVELS ** np.arange(3, dtype=np.int16))).ravel()
        return cls(
            mean=frames.mean(axis=(0, 1, 2)),
            spread=float(frames.std(axis=(1, 2)).mean()),
            sharpness=float((around - 4 * grey[:, 1:-1, 1:-1]).var(axis=(1, 2)).mean()),
            histogram=np.bincount(codes, minlength=HISTOGRAM_LEVELS**3) / codes.size,
        )


def _ratio(value: float, first: float, smallest: float = 1e-6) -> float:
    """How many times `first` it is; 1 where both are nothing."""
    return (value + smallest) / (first + smallest)
