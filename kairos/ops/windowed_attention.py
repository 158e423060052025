"""Attention inside a window of tokens around each query, dilated in time or not, chunk-causal or not.

Tokens are ordered frame-major, L to a frame. A query at place i of its sequence sees the keys at places j
where |i - j| <= window_frames * L: 2 * window_frames - 1 whole frames, and of the two outermost the part that
is near. With dilation d, the frames of one phase f mod d form a sequence of their own. With chunks, no query
sees a later chunk.

Queries may be the last frames of the keys: what lies before them is the past that a rollout keeps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kairos.errors import UserError
from kairos.ops.attention import attend, attend_and_sum
from kairos.ops.routes import quickest, say_once

logger = logging.getLogger(__name__)

DENSE_TOKENS = 256
"""Up to so many keys, one product with one small mask is faster than a product for each frame."""
DENSE_TOKENS_CUDA = 512
"""The same on a GPU, where so few are hardly work, and training has many a layout: to measure and compile for
each would take longer than the training."""
MASK_ELEMENTS = 1 << 21
"""Frames whose masks differ are taken together up to this size of their masks."""
RECOMPILE_LIMIT = 64
"""Shapes that FlexAttention is compiled for."""
BACKENDS = ("auto", "reference", "blocked", "merged", "flex", "flash")


@torch.compiler.disable  # its loops follow the shapes: a compiler would unroll and specialise them
def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tokens_per_frame: int,
    window_frames: int = 3,
    dilation: int = 1,
    pad_dilated: bool = False,
    chunk_frames: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention, scaled by D^-0.5, inside the window.

    Args:
        q: (B, F * L, H, D), the last F frames of the keys.
        k, v: (B, (past + F) * L, H, D).
        tokens_per_frame: L.
        window_frames: frames seen on each side, of the query's own phase.
        dilation: d; frames with the same f mod d see one another.
        pad_dilated: append frames of zeros up to the next multiple of d, and d of them where it is one
            already. They are not masked: their score is 0 and so is their value. The released models were
            trained so.
        chunk_frames: sizes of consecutive chunks of the F query frames; the past lies in earlier chunks.
        backend: "auto", "reference" (one dense mask), "blocked" (a frame of queries against its window, under
            a small mask), "merged" (the same without a mask, for inference), "flex" (FlexAttention) or
            "flash" (torch's own FlashAttention-2, CUDA and half precision only).

    Returns:
        (B, F * L, H, D) in q's dtype.
    """
    if backend not in BACKENDS:
        raise UserError(
            f"backend of windowed attention must be one of {', '.join(BACKENDS)}, got {backend!r}"
        )
    frames, key_frames = q.shape[1] // tokens_per_frame, k.shape[1] // tokens_per_frame
    chunks = _chunk_of_frames(frames, key_frames, chunk_frames)
    if pad_dilated and dilation > 1:
        added = dilation - key_frames % dilation
        k, v = (F.pad(x, (0, 0, 0, 0, 0, added * tokens_per_frame)) for x in (k, v))
        chunks += chunks[-1:] * added
    layout = Layout(tokens_per_frame, window_frames, dilation, frames, key_frames - frames, tuple(chunks))

    if backend == "auto":
        if q.is_cuda and k.shape[1] > DENSE_TOKENS_CUDA:
            return quickest(f"windowed attention of {layout}", _on_cuda(q, k, v, layout), (q, k, v))
        few = DENSE_TOKENS_CUDA if q.is_cuda else DENSE_TOKENS
        backend = "reference" if k.shape[1] <= few else "blocked"
    say_once(logger, f"windowed attention on {q.device.type}: {backend}")
    return ROUTES[backend](q, k, v, layout)


@dataclass(frozen=True)
class Layout:
    """Who sees whom. Frames are counted along the keys; the queries are `frames` of them from `first` on."""

    tokens: int
    """L, tokens a frame."""
    window: int
    dilation: int
    frames: int
    first: int
    chunks: tuple[int, ...]
    """The chunk of each key frame."""

    def sees(self, query: Tensor, key: Tensor, chunks: Tensor) -> Tensor:
        """Whether the token at place `query` sees the one at `key`; `chunks` is self.chunks as a tensor."""
        query_frame, key_frame = query // self.tokens, key // self.tokens
        # The places inside the sequence of one phase.
        query = query_frame // self.dilation * self.tokens + query % self.tokens
        key = key_frame // self.dilation * self.tokens + key % self.tokens
        return (
            (query_frame % self.dilation == key_frame % self.dilation)
            & ((query - key).abs() <= self.window * self.tokens)
            & (chunks[key_frame] <= chunks[query_frame])
        )


def _chunk_of_frames(frames: int, key_frames: int, chunk_frames: Sequence[int] | None) -> list[int]:
    """The chunk of each key frame; what lies before the queries is chunk 0."""
    sizes = (frames,) if chunk_frames is None else tuple(chunk_frames)
    if sum(sizes) != frames or min(sizes) < 1:
        raise UserError(f"chunk_frames must be positive and sum to the {frames} frames, got {list(sizes)}")
    return [0] * (key_frames - frames) + [
        chunk for chunk, size in enumerate(sizes, start=1) for _ in range(size)
    ]


def _dense(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """The reference: every query against every key, under one mask."""
    kept = k.shape[1] <= DENSE_TOKENS_CUDA and not torch.compiler.is_compiling()  # see rotary_table
    mask = (_kept_mask if kept else _mask)(layout, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attend(q, k, v, mask).transpose(1, 2)


@torch.inference_mode(False)
def _mask(layout: Layout, device: torch.device) -> Tensor:
    query = torch.arange(layout.frames * layout.tokens, device=device) + layout.first * layout.tokens
    key = torch.arange(len(layout.chunks) * layout.tokens, device=device)
    return layout.sees(query[:, None], key[None, :], torch.tensor(layout.chunks, device=device))


_kept_mask = lru_cache(maxsize=128)(_mask)
"""Small ones are kept: making one takes as long as the product."""


# The blocked route: a frame of queries against the 2 * window + 1 frames around it, all frames as one batch.
# Keys and values are strided views, and a mask is put together from four tiles of L x L.

Kinds = tuple[tuple[int, ...], ...]
Product = Callable[[Tensor, Tensor, Tensor, Kinds], Tensor]

NONE, WHOLE, EARLIEST, LATEST = range(4)
"""How a query frame sees a key frame: not, wholly, or (at the window's two ends) as far as it reaches."""


def _blocked(q: Tensor, k: Tensor, v: Tensor, layout: Layout, product: Product | None = None) -> Tensor:
    """Phase by phase; each is an undilated sequence. `product` is of a frame with its window."""
    product = product or _masked
    q, k, v = (rearrange(x, "b (f l) h d -> b f l h d", l=layout.tokens) for x in (q, k, v))
    if layout.dilation == 1:
        return _blocked_sequence(q, k, v, layout.window, layout.first, layout.chunks, product).flatten(1, 2)
    out = torch.empty_like(q)
    for phase in range(layout.dilation):
        past = len(range(phase, layout.first, layout.dilation))
        mine = slice(phase + past * layout.dilation - layout.first, None, layout.dilation)
        if q[:, mine].shape[1]:
            every = slice(phase, None, layout.dilation)
            # Side by side, or each window would be a copy of its own: seven times as much.
            keys, values = k[:, every].contiguous(), v[:, every].contiguous()
            out[:, mine] = _blocked_sequence(
                q[:, mine], keys, values, layout.window, past, layout.chunks[every], product
            )
    return out.flatten(1, 2)


def _blocked_sequence(
    q: Tensor, k: Tensor, v: Tensor, window: int, first: int, chunks: Sequence[int], product: Product
) -> Tensor:
    """q (B, F, L, H, D) against k, v (B, key frames, L, H, D), from key frame `first` on."""
    batch, frames, tokens = q.shape[:3]
    size = min(2 * window + 1, k.shape[1])
    q = rearrange(q, "b f l h d -> f (b h) l d")
    k, v = (
        rearrange(rearrange(x, "b f l h d -> f l (b h) d").unfold(0, size, 1), "f l h d w -> f h w l d")
        for x in (k, v)
    )
    outputs = []
    for begin, end, starts, kinds in _slabs(first, frames, k.shape[0], size, window, chunks, tokens):
        keys, values = (x[starts].expand(end - begin, -1, -1, -1, -1) for x in (k, v))
        # A CPU's product leaves the heads beside each other in memory: so they are only put in line.
        outputs.append(product(q[begin:end], keys, values, kinds).transpose(1, 2))
    out = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return rearrange(out, "f l (b h) d -> b f l h d", b=batch)


def _masked(q: Tensor, k: Tensor, v: Tensor, kinds: Kinds) -> Tensor:
    """q (F, H, L, D) against k, v (F, H, W, L, D) of its window, seen as `kinds` says: (F or 1, W)."""
    tokens = q.shape[2]
    seen = [any(column) for column in zip(*kinds, strict=True)]
    near = slice(seen.index(True), len(seen) - seen[::-1].index(True))
    kinds = tuple(row[near] for row in kinds)
    small = len(kinds) * len(kinds[0]) * tokens**2 <= DENSE_TOKENS_CUDA**2
    kept = small and not torch.compiler.is_compiling()
    mask = (_kept_tiles if kept else _tiles)(kinds, tokens, q.device)
    return attend(q, k[:, :, near].flatten(2, 3), v[:, :, near].flatten(2, 3), mask)


@torch.inference_mode(False)
def _tiles(kinds: Kinds, tokens: int, device: torch.device) -> Tensor:
    """The mask (F or 1, 1, L, W * L) of `kinds`, made where it is used: a copy would wait for the GPU."""
    ones = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    tiles = (~ones, ones, ones.triu(), ones.tril())
    return torch.stack([torch.cat([tiles[kind] for kind in row], dim=1) for row in kinds])[:, None]


_kept_tiles = lru_cache(maxsize=128)(_tiles)


def _unmasked(q: Tensor, k: Tensor, v: Tensor, kinds: Kinds) -> Tensor:
    """The same without a mask, where the frames see alike: the whole frames, then the parts of the window's
    two ends, which are triangles, merged by their sums (the log-sum-exp of FlashAttention, arXiv 2205.14135).
    """
    whole = [place for place, kind in enumerate(kinds[0]) if kind == WHOLE]
    if len(kinds) > 1 or whole != list(range(whole[0], whole[-1] + 1)):
        return _masked(q, k, v, kinds)
    inside = slice(whole[0], whole[-1] + 1)
    parts = [attend_and_sum(q, k[:, :, inside].flatten(2, 3), v[:, :, inside].flatten(2, 3))]
    for place, kind in enumerate(kinds[0]):
        if kind == LATEST:  # of the last frame what is not past the query's own place
            parts.append(attend_and_sum(q, k[:, :, place], v[:, :, place], causal=True))
        elif kind == EARLIEST:  # of the first what is not before it: the same, seen from the end
            backwards = (x.flip(2) for x in (q, k[:, :, place], v[:, :, place]))
            out, total = attend_and_sum(*backwards, causal=True)
            parts.append((out.flip(2), total.flip(2)))
    outputs, sums = (torch.stack(each) for each in zip(*parts, strict=True))
    return (outputs.float() * sums.softmax(0)).sum(0).to(v.dtype)


def _slabs(
    first: int, frames: int, windows: int, size: int, window: int, chunks: Sequence[int], tokens: int
) -> Iterator[tuple[int, int, slice, Kinds]]:
    """Query frames [begin, end) that are taken together, their windows, how they see them (one row if alike).

    A window begins `window` frames before its query, but stays inside the sequence: so the queries at the two
    ends share the first and the last window, and those between have one each.
    """

    def start(frame: int) -> int:
        return min(max(first + frame - window, 0), windows - 1)

    def kinds(frame: int) -> tuple[int, ...]:
        keys = range(start(frame), start(frame) + size)
        return tuple(_kind(first + frame, key, window, chunks) for key in keys)

    def zone(frame: int) -> int:
        return (first + frame >= window) + (first + frame >= windows + window)

    for _, group in groupby(range(frames), zone):
        members = list(group)
        rows = tuple(kinds(frame) for frame in members)
        alike = all(row == rows[0] for row in rows)
        step = len(members) if alike else max(1, MASK_ELEMENTS // (size * tokens * tokens))
        for offset in range(0, len(members), step):
            slab = members[offset : offset + step]
            begin, end = slab[0], slab[-1] + 1
            starts = slice(start(begin), start(end - 1) + 1)
            yield begin, end, starts, rows[:1] if alike else rows[offset : offset + step]


def _kind(query: int, key: int, window: int, chunks: Sequence[int]) -> int:
    distance = key - query
    if abs(distance) > window or chunks[key] > chunks[query]:
        return NONE
    return EARLIEST if distance == -window else LATEST if distance == window else WHOLE


# The routes of CUDA.


def _on_cuda(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> dict[str, Route]:
    """The routes that may be quickest, the one that always runs first."""
    names = ["blocked"]
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        names.append("merged")
    if find_spec("triton") is not None:
        names.append("flex")
    if q.dtype in (torch.float16, torch.bfloat16) and len(set(layout.chunks[layout.first :])) == 1:
        names.append("flash")
    return {name: partial(ROUTES[name], layout=layout) for name in names}


def _merged(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    return _blocked(q, k, v, layout, _unmasked)


def _flash(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """FlashAttention-2 with a window of tokens, phase by phase; for queries that are one chunk."""
    reach = layout.window * layout.tokens
    if layout.dilation == 1:
        return _flash_sequence(q, k, v, reach, reach)
    q, k, v = (rearrange(x, "b (f l) h d -> b f l h d", l=layout.tokens) for x in (q, k, v))
    out = torch.empty_like(q)
    for phase in range(min(layout.dilation, k.shape[1])):
        past = len(range(phase, layout.first, layout.dilation))
        mine = slice(phase + past * layout.dilation - layout.first, None, layout.dilation)
        every = slice(phase, None, layout.dilation)
        queries, keys, values = (x.flatten(1, 2) for x in (q[:, mine], k[:, every], v[:, every]))
        if queries.shape[1]:
            # It lines the two ends up; keys that are padded end later, and so each window begins earlier.
            padded = keys.shape[1] - past * layout.tokens - queries.shape[1]
            made = _flash_sequence(queries, keys, values, reach + padded, reach - padded)
            out[:, mine] = made.unflatten(1, (-1, layout.tokens))
    return out.flatten(1, 2)


def _flash_sequence(q: Tensor, k: Tensor, v: Tensor, left: int, right: int) -> Tensor:
    """Attention of queries and keys (B, N, H, D) whose ends are lined up: a query sees the key at its own
    place, `left` keys before it and `right` behind."""
    return torch.ops.aten._flash_attention_forward(
        *(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, False, False),
        window_size_left=left,
        window_size_right=right,
    )[0]


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """FlexAttention with a block mask: blocks that no query sees are not computed."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # Past its limit of recompilations torch would take a dense product without a word: rather fail.
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, fail_on_recompile_limit_hit=True):
        return _compiled_flex()(q, k, v, block_mask=_block_mask(layout, q.device)).transpose(1, 2)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _block_mask(layout: Layout, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    chunks = torch.tensor(layout.chunks, device=device)
    offset = layout.first * layout.tokens
    return create_block_mask(
        lambda batch, head, query, key: layout.sees(query + offset, key, chunks),
        B=None,
        H=None,
        Q_LEN=layout.frames * layout.tokens,
        KV_LEN=len(layout.chunks) * layout.tokens,
        device=device,
        _compile=device.type == "cuda",
    )


Route = Callable[..., Tensor]
ROUTES: dict[str, Route] = {
    "reference": _dense,
    "blocked": _blocked,
    "merged": _merged,
    "flex": _flex,
    "flash": _flash,
}
