"""A list of jobs handed out one by one: who is free takes the next, so a long one holds no short one up."""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist


class WorkQueue:
    """Numbers 0 to `count` - 1, each given to one rank, in order, through the ranks' store."""

    def __init__(self, store: dist.Store, count: int, name: str = "queue") -> None:
        self.store, self.count, self.name = store, count, name

    def __iter__(self) -> Iterator[int]:
        while (number := self.store.add(self.name, 1) - 1) < self.count:
            yield number
