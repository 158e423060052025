"""What an error of the latents does to the picture, so that training minds what is seen.

A VAE's latents are not alike: of kairos-tiny's sixteen directions one makes two fifths of what an error of
all shows, and two make nothing. A mean squared error of latents spends as much on each of them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from kairos.models.vae import decode
from kairos.models.vae_layers import quicken
from kairos.training.cache import ClipSet

CLIPS = 16
"""Places, each in a clip of its own, at which the decoder is asked."""
WINDOW = 5, 8, 8
"""Frames, rows and columns of latents around such a place that are decoded."""
CHANGE = 0.3
"""By how much a latent is changed, in standard deviations."""


@torch.no_grad()
def visible_root(vae: AutoencoderKLWan, clips: ClipSet, share: float, seed: int = 0) -> Tensor:
    """A symmetric matrix (C, C) by which a latent's error e is to be multiplied: |R e|^2 counts it by the
    squares of the pixels that it changes, and for the rest of `share` every channel alike.

    The square of R is share * G + (1 - share) * I. G[c, d] is the product of the changes that channels c and
    d make, one at a time, in the decoded picture; it is the mean over places drawn where clips differ most
    from what is usual, and scaled to the trace of I. So R of a VAE whose channels are all alike is I.
    """
    vae = quicken(copy.deepcopy(vae).float().eval())  # small changes would drown in bfloat16
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(clips), generator=generator)[:CLIPS].tolist()
    latents = clips.latents(rows)
    unusual = (latents - latents.mean((0, 2), keepdim=True)).square().sum(1).clamp(min=1e-6)
    channels = latents.shape[1]
    each, gram = torch.arange(channels), torch.zeros(channels, channels)
    for clip, weights in zip(latents, unusual, strict=True):
        place = int(torch.multinomial(weights.flatten(), 1, generator=generator))
        window, (frame, row, column) = cut_around(clip, np.unravel_index(place, weights.shape))
        changed = window.repeat(channels + 1, 1, 1, 1, 1)
        changed[each + 1, each, frame, row, column] += CHANGE
        pictures = decode(vae, changed.to(vae.device)).cpu()
        changes = (pictures[1:] - pictures[0]).flatten(1)
        gram += changes @ changes.T
    gram *= channels / gram.trace()
    values, vectors = torch.linalg.eigh(share * gram + (1 - share) * torch.eye(channels))
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def cut_around(clip: Tensor, place: Sequence[Any]) -> tuple[Tensor, list[int]]:
    """The window of a clip (C, F, h, w) around a place (frame, row, column), and where in it the place is."""
    at = []
    for axis, (middle, wide) in enumerate(zip(place, WINDOW, strict=True), start=1):
        first = max(min(int(middle) - wide // 2, clip.shape[axis] - wide), 0)
        clip = clip.narrow(axis, first, min(wide, clip.shape[axis]))
        at.append(int(middle) - first)
    return clip, at


def seen(latents: Tensor, root: Tensor | None) -> Tensor:
    """Latents, or errors of them, (B, C, F, h, w) times `visible_root`'s matrix; as they are without one."""
    if root is None:
        return latents
    with torch.autocast(latents.device.type, enabled=False):
        return torch.einsum("cd,bdfhw->bcfhw", root.to(latents), latents)
