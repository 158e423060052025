"""The batch of a step: which clips, what is given of them, how much noise. All of it is a function of
(seed, step), so a run that was stopped sees what it would have seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kairos.errors import UserError
from kairos.pipeline import OPENING_FRAMES
from kairos.schedulers import shift_for
from kairos.training.cache import ClipSet
from kairos.training.stage import Stage

OPENING_CLIPS = 4
"""A first frame has so few tokens that this many times as many of them are still the smaller batch; of two
frames there are half as many."""

LONGEST_CHUNK = 4
"""Latent frames of a rollout's chunk, at most."""


@dataclass(frozen=True)
class ClipCut:
    """How the clips of a batch are cut: `past` clean latent frames, then `chunks` of `chunk` to be made."""

    task: str
    past: int
    chunk: int
    chunks: int = 1

    @property
    def frames(self) -> int:
        """All of them, given and made."""
        return self.past + self.chunk * self.chunks


def draw_cut(
    rng: np.random.Generator,
    mix: dict[str, float],
    latent_frames: int,
    *,
    causal: bool = True,
    unrolled: int = 1,
) -> ClipCut:
    """What the model has to do in a batch.

    t2v: everything from the caption; ti2v, i2v: from the first frame, with and without words; continuation:
    from two or three latent frames; rollout: from any number; unconditional: t2v without any text. In a
    chunk-causal model the first two latent frames are chunks of their own (`kairos.pipeline.chunk_ends`): the
    first decides colours, sizes and places, the second speeds; so t2v and ti2v end with them. Its rollouts
    are of any length, with chunks of one to four frames. With `unrolled` above 1 there are up to so many
    chunks, behind at least two latent frames, which tell how the clip goes on.
    """
    tasks = list(mix)
    shares = np.array([mix[task] for task in tasks], dtype=np.float64)
    task = tasks[int(rng.choice(len(tasks), p=shares / shares.sum()))]
    if task in ("t2v", "unconditional") or latent_frames == 1:
        task = task if task in ("t2v", "unconditional") else "t2v"
        return ClipCut(task, 0, 1 if causal else latent_frames)
    if task in ("ti2v", "i2v"):
        return ClipCut(task, 1, 1 if causal else latent_frames - 1)
    if task == "continuation":
        past = min(int(rng.choice([2, 3], p=[0.75, 0.25])), latent_frames - 1)
        return ClipCut(task, past, latent_frames - past)
    least = 2 if unrolled > 1 and latent_frames > 2 else 1
    past = int(rng.integers(least, max(latent_frames - 1, least + 1)))
    left = latent_frames - past
    if not causal:
        return ClipCut(task, past, left)
    chunk = min(int(rng.integers(1, LONGEST_CHUNK + 1)), left)
    return ClipCut(task, past, chunk, min(unrolled, left // chunk))


@dataclass
class Batch:
    """Inputs and target of one step; `cut` says which frames count."""

    sample: Tensor
    """(B, 16, F, h, w), the clean latents."""
    noise: Tensor
    sigma: Tensor
    """(B, F)"""
    prompt_embeds: Tensor
    prompt_mask: Tensor
    cut: ClipCut
    keys: list[str]
    """Of the clips, as `ClipSet` has them."""

    @property
    def noisy(self) -> Tensor:
        spread = self.sigma[:, None, :, None, None]
        return (1 - spread) * self.sample + spread * self.noise

    @property
    def target(self) -> Tensor:
        return self.noise - self.sample

    @property
    def timestep(self) -> Tensor:
        return 1000 * self.sigma

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {
            name: moved_to(device, value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def __len__(self) -> int:
        return len(self.sample)


def moved_to(device: torch.device, value: Tensor) -> Tensor:
    """On the device; to a GPU by a copy that does not wait for what is computed there, which pinned memory
    allows."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def draw_batch(
    sets: Sequence[ClipSet],
    stage: Stage,
    step: int,
    *,
    causal: bool,
    patch: int = 4,
    part: int = 0,
    parts: int = 1,
) -> Batch:
    """Part `part` of `parts` of the batch of `step`; the parts together are the whole.

    causal, patch: of the model: whether it sees chunks, and the latents of a token.
    """
    rng = np.random.default_rng((stage.seed, step))
    clips = choose_set(rng, sets, stage)
    mix = clips.bucket.mix or stage.mix
    unrolled = stage.distillation.unrolled if stage.distillation else 1
    cut = draw_cut(rng, mix, clips.latent_frames, causal=causal, unrolled=unrolled)
    frames = cut.frames
    opening = causal and cut.chunk == 1 and frames <= OPENING_FRAMES and frames < clips.latent_frames
    most = stage.batch_of(clips.bucket) * (OPENING_CLIPS if causal and clips.latent_frames > 1 else 1)
    batch_size = most // frames if opening else stage.batch_of(clips.bucket)
    if batch_size % parts:
        raise UserError(f"batches of {batch_size} clips cannot be cut in {parts} equal parts")
    past_noise = stage.past_noise if cut.past and rng.random() < 0.25 else 0.0
    rows = [row_at(stage.seed, clips, step * most + i) for i in range(part, batch_size, parts)]
    sample = clips.latents(rows)[:, :, :frames]

    height, width = sample.shape[-2:]
    shift = shift_for(frames if opening else clips.latent_frames, height * width // patch)
    seeds = [seed_of(stage.seed, step, i) for i in range(part, batch_size, parts)]
    sigma, noise, own = draw_times(stage, seeds, sample, cut.past, shift)
    captions = []
    for number, (row, generator) in enumerate(zip(rows, own, strict=True)):
        chance = torch.rand(2, generator=generator)
        sigma[number, : cut.past] = past_noise * chance[0]
        dropped = cut.task == "i2v" or chance[1] < stage.text_dropout
        captions.append("" if dropped else clips.captions[row])
    keys = [clips.keys[row] for row in rows]
    embeds, mask = clips.embeddings(captions, keys if cut.past else None)
    if cut.task == "unconditional":
        embeds, mask = torch.zeros_like(embeds[:, :1]), torch.ones_like(mask[:, :1])
    return Batch(sample, noise, sigma, embeds, mask, cut, keys)


def draw_times(
    stage: Stage, seeds: Sequence[int], sample: Tensor, past: int, shift: float
) -> tuple[Tensor, Tensor, list[torch.Generator]]:
    """Sigmas (B, F), 0 in the past, and noise for clips like `sample`, each by its seed; and the generators,
    for what else is drawn of a clip."""
    own = [torch.Generator().manual_seed(seed) for seed in seeds]
    sigma, noise = torch.zeros(len(seeds), sample.shape[2]), torch.empty(sample.shape)
    for number, generator in enumerate(own):
        torch.randn(sample.shape[1:], generator=generator, out=noise[number])
        u = torch.sigmoid(torch.randn((), generator=generator) * stage.time_std + stage.time_mean)
        sigma[number, past:] = shift * u / (1 + (shift - 1) * u)
    return sigma, noise, own


def choose_set(rng: np.random.Generator, sets: Sequence[ClipSet], stage: Stage) -> ClipSet:
    """A bucket: pictures for the stage's share, else in proportion to the batches that it holds."""
    pictures = [clips for clips in sets if clips.bucket.frames == 1]
    videos = [clips for clips in sets if clips.bucket.frames > 1]
    among = pictures if (pictures and rng.random() < stage.images) or not videos else videos
    weights = np.array([len(clips) / stage.batch_of(clips.bucket) for clips in among])
    return among[int(rng.choice(len(among), p=weights / weights.sum()))]


def row_at(seed: int, clips: ClipSet, position: int) -> int:
    """The clip at a position of the endless sequence of epochs, each a permutation of its own."""
    epoch, place = divmod(position, len(clips))
    return int(permutation(seed, epoch, len(clips))[place])


@lru_cache(maxsize=16)
def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, length)).permutation(length)


def seed_of(*numbers: int) -> int:
    """One seed for torch of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
