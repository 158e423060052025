"""CFG parallel: the two branches of guidance on two halves of the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kairos.distributed.exchange import Exchange


class BranchParallel:
    """What a pipeline's `branches` becomes: each half computes one velocity, and all get both.

    Half b begins at rank `leaders[b]` of the exchange's group. A rank of no half (`half` is None: the last of
    an odd number) computes none and receives both.
    """

    def __init__(self, exchange: Exchange, leaders: Sequence[int], half: int | None) -> None:
        self.exchange, self.leaders, self.half = exchange, tuple(leaders), half

    def __call__(self, velocities: Sequence[Callable[[], Tensor]], like: Tensor) -> list[Tensor]:
        """The velocities, each shaped as `like`. Without guidance there is one, for all halves."""
        out = []
        mine = None if self.half is None else min(self.half, len(velocities) - 1)
        made = velocities[mine]() if mine is not None else None
        for branch, leader in zip(range(len(velocities)), self.leaders, strict=False):
            velocity = made if branch == mine and made is not None else torch.empty_like(like)
            self.exchange.broadcast(velocity := velocity.contiguous(), leader)
            out.append(velocity)
        return out
