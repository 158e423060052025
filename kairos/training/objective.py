"""What is minimised: what the loop asks of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Objective:
    """Networks of its own (a fake score) belong to its state; most have none."""

    def loss(self, model: nn.Module, step: int, part: int) -> tuple[Tensor, int]:
        """The loss of one part of the step's batch, and how many clips it has."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides model and optimizer."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""

    def report(self, model: nn.Module, step: int) -> dict[str, float]:
        """Numbers to show besides the loss, now and then or after every step."""
        return {}

    def close(self) -> None:
        """End what works for it, such as processes that draw batches."""
