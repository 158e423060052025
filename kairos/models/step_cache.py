"""Leaves out blocks at a step that is like the one before, as the first block tells.

What the first block adds to the tokens is computed at every step. Where it has hardly changed since the last
step that was computed in full, what all later blocks added there is added again: ParaAttention's first-block
cache, in the manner of TeaCache (arXiv 2411.19108).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class StepCache:
    """One for each prompt and video. Holds two tensors of the tokens' size.

    Attributes:
        threshold: the mean change of what the first block adds, relative to its mean size, up to which later
            blocks are left out. 0.1 and the like; calibrate it (`kairos bench --step-cache`).
        computed, skipped: steps so far.
    """

    threshold: float
    first: Tensor | None = None
    later: Tensor | None = None
    computed: int = 0
    skipped: int = 0

    def skips(self, added: Tensor) -> bool:
        """Whether the later blocks may be left out, given what the first block added (B, N, dim)."""
        if self.first is not None and self.first.shape == added.shape:
            change = (added - self.first).abs().mean() / self.first.abs().mean()
            if change <= self.threshold:
                self.skipped += 1
                return True
        self.first = added
        self.computed += 1
        return False
