"""A video without end from a model that sees whole clips only: each clip goes on from the last frames.

An approximation, and the only one that such a model allows: it knows of the past what its last few clean
frames show, and nothing before them. Memory and time of a clip do not grow. The chunk-causal rollout
(`kairos.streaming.rollout`) is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image

from kairos.data.media import to_uint8
from kairos.errors import UserError
from kairos.pipeline import KairosPipeline
from kairos.placement import quiet

MOST_OVERLAP = 9  # frames: three latent ones, what a sliding layer sees to one side


class OverlappingRollout(Iterator[np.ndarray]):
    """Yields frames (1, F, H, W, 3) in [0, 1], clip after clip, without end.

    The first clip comes whole, with the given frames; of the later ones what is new.
    """

    def __init__(
        self,
        pipeline: KairosPipeline,
        prompt: str = "",
        *,
        image: Image.Image | None = None,
        video: np.ndarray | Sequence[Image.Image] | None = None,
        chunk_frames: int | None = None,
        overlap: int | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        """Begin a rollout.

        Args:
            prompt, image, video, options: as in the pipeline's call.
            chunk_frames: new latent frames a clip, four frames each. Default: clips of the model's length.
            overlap: frames, 4n + 1, of the last clip that begin the next. Default: 9, or half of a clip.
            generator: on the CPU; noise is drawn from it.

        Raises:
            UserError: for input that cannot be used.
        """
        own = int(pipeline.config.defaults["num_frames"])
        self.overlap = min(MOST_OVERLAP, (own - 1) // 8 * 4 + 1) if overlap is None else overlap
        if self.overlap < 1 or self.overlap % 4 != 1:
            raise UserError(f"overlap must be 4n + 1, got {self.overlap}")
        if chunk_frames is not None and chunk_frames < 1:
            raise UserError(f"chunk_frames must be at least 1, got {chunk_frames}")
        self.clip_frames = self.overlap + 4 * chunk_frames if chunk_frames else own
        if self.clip_frames <= self.overlap:
            raise UserError(
                f"overlap must be less than a clip's {self.clip_frames} frames, got {self.overlap}"
            )
        self.pipeline, self.prompt, self.generator, self.options = pipeline, prompt, generator, options
        self._given: dict[str, Any] = {"image": image, "video": video}
        self._last: np.ndarray | None = None

    def __next__(self) -> np.ndarray:
        given = self._given if self._last is None else {"video": self._last}
        # What the pipeline warns of in the first clip, it would warn of in all.
        with nullcontext() if self._last is None else quiet("kairos.pipeline"):
            made: Any = self.pipeline(
                self.prompt,
                **given,
                num_frames=self.clip_frames,
                generator=self.generator,
                output_type="np",
                **self.options,
            )
        known = 0 if self._last is None else self.overlap
        self._last = to_uint8(made.frames[0, -self.overlap :])
        return made.frames[:, known:]

    def begin_with(self, video: np.ndarray) -> None:
        """The first frames, (4n + 1, H, W, 3) uint8, fewer than a clip has."""
        self._given = {"video": video}

    def change_prompt(self, prompt: str) -> None:
        """From the next clip on something else happens. Raises UserError before the first one."""
        if self._last is None:
            raise UserError("the prompt can change once there is a first chunk; give the first prompt")
        self.prompt = prompt
