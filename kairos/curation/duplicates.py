"""Near duplicates: clips whose moments look alike, in order. Not quadratic in the number of clips.

Every moment's hash of 256 bits is cut into eight bands of 32; moments that agree in one whole band are
candidates (locality-sensitive hashing). Only those are compared. Of what is alike the largest stays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kairos.curation.settings import Duplicates

BANDS = 8
CROWDED = 64
"""A band shared by more clips than this says nothing; neighbours in it are compared, not all with all."""

_BIT_COUNTS = np.array([number.bit_count() for number in range(256)], np.uint8)


@dataclass(frozen=True)
class Fingerprinted:
    """What is known of one clip. `better` orders clips: of two that are alike the greater stays."""

    clip_id: str
    moments: tuple[str, ...]
    changes: tuple[str, ...]
    colors: str
    better: tuple[Any, ...]
    embedding: tuple[float, ...] = ()


def find_duplicates(clips: Sequence[Fingerprinted], settings: Duplicates) -> dict[str, str]:
    """{clip_id: the clip that stands for it} for every clip that is dropped as a near duplicate."""
    order = sorted(clips, key=lambda clip: clip.better, reverse=True)
    hashes = [_hashes(clip) for clip in order]
    pairs = (
        (one, other)
        for one, other in _candidates(hashes)
        if _alike(order[one], hashes[one], order[other], hashes[other], settings)
    )
    near = _near_embeddings(order, settings.embedding)
    kept: dict[int, int] = {}
    group = list(range(len(order)))

    def root(number: int) -> int:
        while group[number] != number:
            group[number] = group[group[number]]
            number = group[number]
        return number

    for one, other in [*pairs, *near]:
        first, second = sorted((root(one), root(other)))
        group[second] = first  # the better one is the root
    for number in range(len(order)):
        if root(number) != number:
            kept[number] = root(number)
    return {order[number].clip_id: order[best].clip_id for number, best in kept.items()}


def _hashes(clip: Fingerprinted) -> NDArray[np.uint8]:
    """(n, 32) bytes."""
    text = "".join(clip.moments)
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, 32)


def _candidates(hashes: Sequence[NDArray[np.uint8]]) -> Iterator[tuple[int, int]]:
    """Pairs of clips with moments that agree in a band, each once."""
    if not hashes:
        return
    owner = np.repeat(np.arange(len(hashes)), [len(own) for own in hashes])
    bands = np.concatenate(list(hashes)).view(np.uint32) if len(owner) else np.zeros((0, BANDS), np.uint32)
    seen: set[tuple[int, int]] = set()
    for band in range(BANDS):
        keys = bands[:, band]
        order = np.lexsort((owner, keys))
        ends = np.flatnonzero(np.diff(keys[order])) + 1
        for run in np.split(owner[order], ends) if len(order) else ():
            members = np.unique(run)
            reach = len(members) if len(members) <= CROWDED else 8
            for place, one in enumerate(members):
                for other in members[place + 1 : place + reach]:
                    pair = int(one), int(other)
                    if pair not in seen:
                        seen.add(pair)
                        yield pair


def _alike(
    one: Fingerprinted,
    one_hashes: NDArray[np.uint8],
    other: Fingerprinted,
    other_hashes: NDArray[np.uint8],
    settings: Duplicates,
) -> bool:
    """Whether enough moments of the shorter clip look like moments of the longer, at one offset in time."""
    colors = [np.frombuffer(bytes.fromhex(clip.colors), np.uint8).astype(int) for clip in (one, other)]
    if np.abs(colors[0] - colors[1]).mean() > settings.color:
        return False
    if len(one_hashes) > len(other_hashes):
        one, one_hashes, other, other_hashes = other, other_hashes, one, one_hashes
    count, longer = len(one_hashes), len(other_hashes)
    if not count:
        return False
    distances = _BIT_COUNTS[one_hashes[:, None] ^ other_hashes[None]].sum(axis=-1, dtype=np.int32)
    like = (distances <= settings.bits) & _same_change(one.changes, other.changes, settings.change_bits)
    offsets = range(-(count // 4), longer - count + count // 4 + 1)
    return bool(max(np.diagonal(like, offset).sum() for offset in offsets) >= settings.share * count)


def _same_change(one: Sequence[str], other: Sequence[str], bits: int) -> NDArray[np.bool_]:
    """(n, m): whether the same moves in two moments; nothing is like nothing, and unlike anything."""
    numbers = [np.array([int(text or "0", 16) for text in changes], np.uint64) for changes in (one, other)]
    difference = (numbers[0][:, None] ^ numbers[1][None]).view(np.uint8).reshape(len(one), len(other), 8)
    still = (numbers[0] == 0)[:, None] == (numbers[1] == 0)[None]
    near: NDArray[np.bool_] = (_BIT_COUNTS[difference].sum(axis=-1, dtype=np.int32) <= bits) & still
    return near


def _near_embeddings(order: Sequence[Fingerprinted], distance: float) -> Iterable[tuple[int, int]]:
    """Pairs whose embeddings are nearer than a cosine distance, sought within clusters (as in SemDeDup)."""
    having = [number for number, clip in enumerate(order) if clip.embedding]
    if len(having) < 2:
        return
    vectors = np.array([order[number].embedding for number in having], np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-12
    for members in _clusters(vectors).values():
        if len(members) < 2:
            continue
        own = vectors[members]
        for one, other in zip(*np.nonzero(np.triu(own @ own.T >= 1 - distance, 1)), strict=True):
            yield having[members[one]], having[members[other]]


def _clusters(vectors: NDArray[np.float32], rounds: int = 10) -> dict[int, list[int]]:
    """k-means on the sphere with about the square root of n clusters, from a fixed start."""
    count = max(1, round(np.sqrt(len(vectors)) / 4))
    rng = np.random.default_rng(0)
    centers = vectors[rng.choice(len(vectors), count, replace=False)]
    for _ in range(rounds):
        nearest = (vectors @ centers.T).argmax(axis=1)
        for cluster in range(count):
            own = vectors[nearest == cluster]
            if len(own):
                centers[cluster] = own.mean(axis=0) / (np.linalg.norm(own.mean(axis=0)) + 1e-12)
    clusters: dict[int, list[int]] = defaultdict(list)
    for number, cluster in enumerate((vectors @ centers.T).argmax(axis=1)):
        clusters[int(cluster)].append(number)
    return clusters
