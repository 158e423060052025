"""What a clip looks like at moments of it: hashes and colours, by which near duplicates are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kairos.curation.views import Stage, Views


@dataclass(frozen=True)
class Fingerprint(Stage):
    """For each moment 256 bits (ImageHash's DCT hash) of the picture and 64 of what moves in it, for the clip
    its colours; all in hexadecimal. Two runs of one experiment before one camera differ in what moves only.

    Moments come at a fixed rate from the clip's start and are few enough for an index of millions of clips.
    A flat picture has no hash worth comparing and gives none.
    """

    name = "fingerprint"
    inputs = ("grey", "samples")
    outputs = ("moments", "changes", "colors")
    rate: float = 2.0
    flat: float = 2.0  # grey levels of standard deviation
    change: float = 16.0  # grey levels from the clip's median picture: what is less is noise
    may_be_0 = ("flat", "change")

    def measure(self, views: Views) -> dict[str, Any]:
        import cv2
        import imagehash
        from PIL import Image

        step = max(1, round(views.fps / self.rate))
        ground = np.median(views.grey[::step], axis=0)
        moments, changes = [], []
        for picture in views.grey[::step]:
            if picture.std() < self.flat:
                continue
            bits = imagehash.phash(Image.fromarray(picture), hash_size=16).hash
            moments.append(np.packbits(bits).tobytes().hex())
            moved = (
                cv2.GaussianBlur((np.abs(picture - ground) > self.change).astype(np.float32), (0, 0), 1.5)
                * 255
            )
            bits = imagehash.phash(Image.fromarray(moved.astype(np.uint8)), hash_size=8).hash
            changes.append(np.packbits(bits).tobytes().hex() if moved.any() else "")
        color = np.mean([cv2.resize(p, (2, 2), interpolation=cv2.INTER_AREA) for p in views.samples], axis=0)
        return {
            "moments": moments,
            "changes": changes,
            "colors": np.round(color).astype(np.uint8).tobytes().hex(),
        }
