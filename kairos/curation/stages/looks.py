"""How a clip looks: blur, exposure, black frames and bars; and the strip of pictures that one is shown."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from kairos.curation.views import Array, Stage, Views


@dataclass(frozen=True)
class Sharpness(Stage):
    """The variance of the Laplacian, the usual measure of blur: the median over the sampled frames.

    Only where there is something to see: the sharpest cells of a grid of cells count, and frames with some
    contrast. A flat wall behind a sharp ball is no blur, nor is the wall that the ball has left.
    """

    name = "sharpness"
    version = 2
    inputs = ("samples",)
    outputs = ("sharpness",)
    cells: int = 6  # along each side
    share: float = 0.1  # of the cells, the sharpest
    contrast: float = 5.0  # standard deviation of levels in a cell; a frame with less in all shows nothing

    def measure(self, views: Views) -> dict[str, Any]:
        import cv2

        values, shown = [], []
        for picture in views.samples:
            grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
            variances = np.sort(self._variances(cv2.Laplacian(grey, cv2.CV_32F)))
            values.append(variances[-max(1, round(self.share * variances.size)) :].mean())
            if self._variances(grey).max() >= self.contrast**2:
                shown.append(values[-1])
        return {"sharpness": round(float(np.median(shown or values)), 3)}

    def _variances(self, plane: Array) -> Array:
        """Of each cell of (H, W)."""
        height, width = (side // self.cells * self.cells for side in plane.shape)
        grid = plane[:height, :width].reshape(
            self.cells, height // self.cells, self.cells, width // self.cells
        )
        return grid.var(axis=(1, 3)).ravel()


@dataclass(frozen=True)
class Exposure(Stage):
    """Mean brightness in [0, 1], and the share of frames that are black."""

    name = "exposure"
    inputs = ("grey",)
    outputs = ("brightness", "dark_share")
    dark: float = 0.04  # a frame whose brightest pixels are below this is black
    may_be_0 = ("dark",)

    def measure(self, views: Views) -> dict[str, Any]:
        levels = (views.grey.astype(np.float32) - 16) / 219  # limited range
        brightest = np.percentile(levels.reshape(len(levels), -1), 98, axis=1)
        return {
            "brightness": round(float(np.clip(levels.mean(), 0, 1)), 4),
            "dark_share": round(float((brightest < self.dark).mean()), 4),
        }


@dataclass(frozen=True)
class Bars(Stage):
    """The share of the picture that black bars take: borders that are black in every bright frame."""

    name = "bars"
    inputs = ("grey",)
    outputs = ("bars_share",)
    dark: float = 0.06
    may_be_0 = ("dark",)

    def measure(self, views: Views) -> dict[str, Any]:
        lit = (views.grey.max(axis=0).astype(np.float32) - 16) / 219 > self.dark
        if not lit.any():
            return {"bars_share": 0.0}  # black frames are another matter
        rows, columns = lit.mean(axis=1) > 0.02, lit.mean(axis=0) > 0.02
        inside = _extent(rows) * _extent(columns)
        return {"bars_share": round(1 - inside / lit.size, 4)}


def _extent(lines: Any) -> int:
    where = np.flatnonzero(lines)
    return int(where[-1] - where[0] + 1) if len(where) else 0


@dataclass(frozen=True)
class Strip(Stage):
    """Six small pictures in a row, a JPEG in base64: for the report, and for models that write captions."""

    name = "strip"
    inputs = ("samples",)
    outputs = ("strip",)
    pictures: int = 6
    height: int = 112
    quality: int = 80

    def measure(self, views: Views) -> dict[str, Any]:
        from PIL import Image

        count = min(self.pictures, len(views.samples))
        chosen = views.samples[np.linspace(0, len(views.samples) - 1, count).round().astype(int)]
        height, width = self.height, max(1, round(self.height * views.width / views.height))
        strip = Image.new("RGB", (width * count, height))
        for column, picture in enumerate(chosen):
            strip.paste(Image.fromarray(picture).resize((width, height)), (column * width, 0))
        buffer = io.BytesIO()
        strip.save(buffer, "JPEG", quality=self.quality)
        return {"strip": base64.b64encode(buffer.getvalue()).decode()}
