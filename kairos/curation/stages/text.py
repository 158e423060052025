"""The share of the picture that text takes: titles, subtitles, watermarks, slides."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from kairos.curation.views import Stage, Views

_ENGINES: list[Any] = []  # loaded once in a process


@dataclass(frozen=True)
class Text(Stage):
    """OCR by RapidOCR (PP-OCR on ONNX Runtime, its models in the package) on a few of the sampled frames.

    What is found is read as well: a box counts only where letters were recognised in it.
    """

    name = "text"
    inputs = ("samples",)
    outputs = ("text_share", "text")
    samples: int = 2
    sure: float = 0.6  # the least confidence of what was read
    side: int = 640  # pixels of the longer side of what is looked at
    may_be_0 = ("samples", "sure")

    def measure(self, views: Views) -> dict[str, Any]:
        import cv2

        count = min(self.samples, len(views.samples))  # none: the stage is off
        # Inner frames: titles fade in and out at the ends.
        where = np.linspace(0, len(views.samples) - 1, count + 2).round().astype(int)[1:-1]
        shares, words = [], []
        for picture in views.samples[where]:
            scale = min(1.0, self.side / max(picture.shape[:2]))
            if scale < 1:
                picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            found = _engine()(picture[..., ::-1], use_det=True, use_cls=False, use_rec=True)
            area = 0.0
            for box, said, score in zip(
                () if found.boxes is None else found.boxes, found.txts or (), found.scores or (), strict=False
            ):
                if score >= self.sure and sum(c.isalnum() for c in said) >= 2:
                    area += abs(float(cv2.contourArea(np.asarray(box, np.float32))))
                    words.append(said)
            shares.append(area / (picture.shape[0] * picture.shape[1]))
        text = " ".join(dict.fromkeys(words))[:200]
        return {"text_share": round(float(min(1.0, max(shares, default=0.0))), 5), "text": text}


def _engine() -> Any:
    if not _ENGINES:
        from rapidocr import RapidOCR

        logging.getLogger("RapidOCR").setLevel(logging.ERROR)
        threads = {
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        _ENGINES.append(RapidOCR(params=threads | {"Global.log_level": "error"}))
    return _ENGINES[0]
