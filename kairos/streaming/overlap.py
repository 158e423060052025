"""A video without end from a model that sees whole clips only: each clip goes on from the last frames.

An approximation, and the only one that such a model allows: it knows of the past what its last few clean
frames show, and nothing before them. Memory and time of a clip do not grow. The chunk-causal rollout
(`kairos.streaming.rollout`) is exact.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from PIL import Image

from kairos.data.media import to_uint8
from kairos.errors import UserError
from kairos.pipeline import KairosPipeline, is_number, whole

MOST_OVERLAP = 9  # frames: three latent ones, what a sliding layer sees to one side

_goes_on: ContextVar[bool] = ContextVar("goes_on", default=False)
"""Whether this thread makes a clip that is not its rollout's first."""


def is_new(record: logging.LogRecord) -> bool:
    """Not so what the pipeline warns of in a later clip: it has warned of that in the first."""
    return record.levelno != logging.WARNING or not _goes_on.get()


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
        overlap = min(MOST_OVERLAP, (own - 1) // 8 * 4 + 1) if overlap is None else overlap
        if not is_number(overlap) or overlap < 1 or overlap % 4 != 1:
            raise UserError(f"overlap must be 4n + 1, got {overlap!r}")
        self.overlap = int(overlap)
        new = None if chunk_frames is None else 4 * whole("chunk_frames", chunk_frames)
        self.clip_frames = self.overlap + new if new else own
        if self.clip_frames <= self.overlap:
            raise UserError(
                f"overlap must be less than a clip's {self.clip_frames} frames, got {self.overlap}"
            )
        self.pipeline, self.prompt, self.generator, self.options = pipeline, prompt, generator, options
        self._given: dict[str, Any] = {"image": image, "video": video}
        self._last: np.ndarray | None = None
        logging.getLogger("kairos.pipeline").addFilter(is_new)  # once, however often it is said

    def __next__(self) -> np.ndarray:
        given = self._given if self._last is None else {"video": self._last}
        went_on = _goes_on.set(self._last is not None)
        try:
            made: Any = self.pipeline(
                self.prompt,
                **given,
                num_frames=self.clip_frames,
                generator=self.generator,
                output_type="np",
                **self.options,
            )
        finally:
            _goes_on.reset(went_on)
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
