"""Work on a few tokens at a time, so that what is in between stays in a CPU's cache.

A long video's activations do not fit it: each would be fetched from memory, and memory of that size is asked
from the system anew each time. So what goes token by token is done tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 1024
"""Tokens for each of the CPU's threads, which share a tile. Fewer cost more calls, more leave the cache: at
width 192 the feed-forward's inside is 3 MB."""


@dataclass(frozen=True)
class Tiles:
    """A block's tokens x (B, N, dim) for the layer that mixes them, a tile at a time.

    `read(tokens, rows)` is what the layer sees of a tile; `finish(tokens, rows, y)` makes of the layer's
    output for it what the block gives out. So neither is ever in memory whole.
    """

    x: Tensor
    times: int
    read: Callable[[slice, slice], Tensor]
    finish: Callable[[slice, slice, Tensor], Tensor]

    def map(self, work: Callable[[slice, slice], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """`in_tiles` over these tokens."""
        return in_tiles(work, self.x, self.times)


def in_tiles(
    work: Callable[[slice, slice], tuple[Tensor, ...]], x: Tensor, times: int = 1
) -> tuple[Tensor, ...]:
    """`work(tokens, rows)` of all N tokens of x (B, N, ...), put together along the tokens.

    `tokens` selects a tile of x, and `rows` those of what holds `times` rows for the N tokens, one for each
    N / times of them. While training, on a GPU and inside a compiler there is one tile.
    """
    count = x.shape[1]
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return work(slice(None), slice(None))
    tile = TILE * torch.get_num_threads()
    if count <= tile:
        return work(slice(None), slice(None))
    shared = count // times if times > 1 else 1
    step = max(1, tile // shared) * shared
    whole: list[Tensor] = []
    for begin in range(0, count, step):
        tokens = slice(begin, begin + step)
        rows = slice(begin // shared, (begin + step) // shared) if times > 1 else slice(None)
        made = work(tokens, rows)
        whole = whole or [part.new_empty(part.shape[0], count, *part.shape[2:]) for part in made]
        for part, into in zip(made, whole, strict=True):
            into[:, tokens] = part
    return tuple(whole)
