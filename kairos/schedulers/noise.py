"""Noise for every device: drawn on the CPU, so that one seed gives one video everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kairos.errors import UserError

Generators = torch.Generator | list[torch.Generator] | None

CPU_FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Said wherever noise is drawn: torch's defaults, which a program may set, would make another video."""


def draw_noise(shape: Sequence[int], generator: Generators) -> Tensor:
    """Standard normal noise, float32, drawn on the CPU; with a list, each video from its own generator.

    Raises:
        UserError: for a generator that is none or on another device, and a list of another length than the
            first axis.
    """
    if isinstance(generator, tuple):
        generator = list(generator)
    check_generators(generator if isinstance(generator, list) else [generator])
    if not isinstance(generator, list):
        return torch.randn(*shape, generator=generator, **CPU_FLOATS)
    if len(generator) != shape[0]:
        raise UserError(f"give one generator, or one for each of the {shape[0]} videos, got {len(generator)}")
    return torch.cat([torch.randn(1, *shape[1:], generator=g, **CPU_FLOATS) for g in generator])


def check_generators(generators: Iterable[torch.Generator | None]) -> None:
    """Refuse what is no generator, such as a seed, and those that are not on the CPU; None is torch's own."""
    for generator in generators:
        if generator is None:
            continue
        if not isinstance(generator, torch.Generator):
            raise UserError(
                f"a generator must be a torch.Generator, got {generator!r}; for the seed 0 give "
                "torch.Generator().manual_seed(0)"
            )
        if generator.device.type != "cpu":
            raise UserError('the generator must be on the CPU (torch.Generator("cpu")): noise is drawn there')
