"""What a clip looks like at moments of it: perceptual hashes and colours, by which near duplicates are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kairos.curation.views import Views


@dataclass(frozen=True)
class Fingerprint:
    """256 bits (ImageHash's DCT hash) and twelve colours' bytes for each of the moments, in hexadecimal.

    Moments come at a fixed rate from the clip's start and are few enough for an index of millions of clips.
    A flat picture has no hash worth comparing and gives none.
    """

    name: ClassVar[str] = "fingerprint"
    version: ClassVar[int] = 1
    inputs: ClassVar[tuple[str, ...]] = ("grey", "samples")
    outputs: ClassVar[tuple[str, ...]] = ("moments", "colors")
    rate: float = 2.0
    flat: float = 2.0  # grey levels of standard deviation

    def measure(self, views: Views) -> dict[str, Any]:
        import cv2
        import imagehash
        from PIL import Image

        step = max(1, round(views.fps / self.rate))
        moments = []
        for picture in views.grey[::step]:
            if picture.std() < self.flat:
                moments.append("")
                continue
            bits = imagehash.phash(Image.fromarray(picture), hash_size=16).hash
            moments.append(np.packbits(bits).tobytes().hex())
        color = np.mean([cv2.resize(p, (2, 2), interpolation=cv2.INTER_AREA) for p in views.samples], axis=0)
        return {"moments": moments, "colors": np.round(color).astype(np.uint8).tobytes().hex()}
