"""What is wrong with a student's clips where it is seen: in their decoded frames.

Latents that are a little off may show as nothing, or as a ball of another colour.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from kairos.models.vae import decode
from kairos.models.vae_layers import quicken
from kairos.training.clips import ClipReference
from kairos.training.vae import pixels, placement_errors

STANDING, MOVING = 3e-3, 1e-3
"""Errors of a frame, and of its change, that are as small as can be asked."""
CHANGES = 3.0
"""How much a change from frame to frame counts beside the frames."""


class FrameErrors:
    """Decodes clips with a decoder that stays as it is, and holds them against the true ones."""

    def __init__(
        self, vae: AutoencoderKLWan, references: Mapping[str, ClipReference], clips: int, device: torch.device
    ) -> None:
        """references: where the frames of each key are read. clips: how many of a batch are decoded."""
        self.vae = quicken(copy.deepcopy(vae).float().eval().requires_grad_(False).to(device))
        self.references, self.clips = references, clips

    def __call__(self, latents: Tensor, keys: Sequence[str], past: int, generator: torch.Generator) -> Tensor:
        """The mean error of the frames behind the first `past` latent ones of latents (B, 16, F, h, w).

        Of each frame, and of each change from the frame before, the root of the squared error counts: a clip
        that went another way than the true one does not drown those that are nearly right, and a ball that
        is somewhere else than it should be gains nothing by fading. Under autocast the decoder is quicker;
        errors are weighed in float32.
        """
        rows = torch.randperm(len(keys), generator=generator)[: self.clips].tolist()
        frames = 4 * (latents.shape[2] - 1) + 1
        true = [torch.from_numpy(self.references[keys[row]].read()[:frames].copy()) for row in rows]
        made = decode(self.vae, latents[rows].float()).float()
        with torch.autocast(latents.device.type, enabled=False):
            last_given = max(4 * (past - 1), 0)
            difference = (made - pixels(torch.stack(true), latents.device))[:, :, last_given:]
            here, change = placement_errors(difference)
            standing = 4 * difference.square().mean((1, 3, 4)) + here
        return (standing + STANDING).sqrt().mean() + CHANGES * (change + MOVING).sqrt().mean()
