"""What ranks send one another, over any torch.distributed backend, with every byte counted.

Sizes need not divide: `spread` gives the shares, and every exchange takes shares of different sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor


def spread(total: int, parts: int) -> list[int]:
    """`total` in `parts` shares that differ by one at most, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def slices(sizes: Sequence[int]) -> list[slice]:
    """Where consecutive shares of these sizes lie."""
    return [slice(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]


class Exchange:
    """The exchanges of one group, as one of its ranks sees them. `sent` counts this rank's bytes by kind."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent: Counter[str] = Counter()

    def all_to_all(self, parts: Sequence[Tensor], received: Sequence[int]) -> list[Tensor]:
        """Part r goes to rank r. `received` says how many elements come from each rank; returned flat.

        The parts are of one dtype and may have any shape; they travel as bytes, which every backend knows.
        """
        width = parts[0].element_size()
        buffer = torch.cat([part.reshape(-1) for part in parts])
        out = buffer.new_empty(sum(received))
        dist.all_to_all_single(
            out.view(torch.uint8),
            buffer.view(torch.uint8),
            [width * size for size in received],
            [width * part.numel() for part in parts],
            group=self.group,
        )
        self._count("all-to-all", sum(part.nbytes for r, part in enumerate(parts) if r != self.rank))
        return list(out.split(list(received)))

    def gather(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """The shares of all ranks, of these sizes along `dim`, joined."""
        x = x.movedim(dim, 0).contiguous()
        largest = max(sizes)
        if len(x) < largest:  # backends want equal shares
            x = torch.cat((x, x.new_zeros(largest - len(x), *x.shape[1:])))
        out = [torch.empty_like(x) for _ in sizes]
        dist.all_gather([share.view(torch.uint8) for share in out], x.view(torch.uint8), group=self.group)
        self._count("all-gather", x.nbytes * (self.size - 1))
        return torch.cat([share[:size] for share, size in zip(out, sizes, strict=True)]).movedim(0, dim)

    def pass_on(self, x: Tensor) -> Tensor:
        """x goes to the next rank; what the previous one sent is returned, zeros at the first."""
        return self.neighbours(None, x)[0]

    def neighbours(self, to_previous: Tensor | None, to_next: Tensor | None) -> tuple[Tensor, Tensor]:
        """Send to the ranks beside this one; returns what comes from the previous and from the next.

        Both come in the shape of what is sent the same way; zeros come from beyond the ends.
        """
        operations, out = [], []
        for sent, step in ((to_next, 1), (to_previous, -1)):
            if sent is None:
                out.append(torch.empty(0))
                continue
            sent = sent.contiguous()
            came = torch.zeros_like(sent)
            out.append(came)
            if 0 <= self.rank + step < self.size:
                operations.append(dist.P2POp(dist.isend, sent, self._global(self.rank + step), self.group))
                self._count("neighbours", sent.nbytes)
            if 0 <= self.rank - step < self.size:
                operations.append(dist.P2POp(dist.irecv, came, self._global(self.rank - step), self.group))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return out[0], out[1]

    def broadcast(self, x: Tensor, source: int) -> None:
        """x of rank `source` to all, in place."""
        dist.broadcast(x, self._global(source), group=self.group)
        if self.rank == source:
            self._count("broadcast", x.nbytes * (self.size - 1))

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)

    def _count(self, kind: str, sent: int) -> None:
        self.sent[kind] += sent
