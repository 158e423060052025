"""Noise for every device: drawn on the CPU, so that one seed gives one video everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kairos.errors import UserError

Generators = torch.Generator | list[torch.Generator] | None


def draw_noise(shape: Sequence[int], generator: Generators) -> Tensor:
    """Standard normal noise, float32, drawn on the CPU; with a list, each video from its own generator.

    Raises:
        UserError: for a generator on another device, and a list of another length than the first axis.
    """
    if isinstance(generator, tuple):
        generator = list(generator)
    generators = generator if isinstance(generator, list) else [generator]
    if any(g is not None and g.device.type != "cpu" for g in generators):
        raise UserError('the generator must be on the CPU (torch.Generator("cpu")): noise is drawn there')
    if not isinstance(generator, list):
        return torch.randn(*shape, generator=generator)
    if len(generator) != shape[0]:
        raise UserError(f"give one generator, or one for each of the {shape[0]} videos, got {len(generator)}")
    return torch.cat([torch.randn(1, *shape[1:], generator=g) for g in generator])
