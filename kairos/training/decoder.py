"""Trains the VAE's decoder on what the finished LinearDiT makes.

A model's latents are not quite the encoder's. What is off in them is small and much the same for every noise,
and shows as outlines that tremble; a decoder that has seen it can take a part of it away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from kairos.data.config import above_0, at_least
from kairos.errors import UserError
from kairos.models.vae import decode
from kairos.models.vae_layers import quicken
from kairos.schedulers import FlowMatchScheduler
from kairos.training.batches import row_at, seed_of
from kairos.training.cache import ClipSet
from kairos.training.clips import ClipReference
from kairos.training.minimise import minimise
from kairos.training.muon import Muon, split_parameters
from kairos.training.parallel import ALONE, Processes
from kairos.training.samples import sample_latents, sampling_of
from kairos.training.vae import falling_rate, pixels, placement_errors, save_vae

GIVEN = 2
"""Latent frames from which a sampled clip goes on: they tell places and speeds."""
LAST_STEP = 0.6
"""Share of the other clips that have been through the model's last step."""
STANDING, MOVING = 0.4, 0.1
"""Errors of a sampled frame, and of its change, from which on more of them hardly counts."""


@dataclass(frozen=True)
class DecoderStage:
    """How long and how fast the decoder is trained; the encoder, and so what latents mean, stays."""

    steps: int
    batch_size: int = 4
    """Clips; half of them are sampled."""
    muon_lr: float = 0.003
    final_lr: float = 0.02
    """The learning rate falls linearly to this share of itself."""
    moving: float = 3.0
    """How much a change from frame to frame counts beside the frames."""

    def __post_init__(self) -> None:
        at_least(1, self, "steps", where="decoder.")
        above_0(self, "muon_lr", where="decoder.")
        at_least(0, self, "final_lr", "moving", where="decoder.")
        if self.batch_size < 2 or self.batch_size % 2:
            raise UserError(f"decoder.batch_size must be even, at least 2, got {self.batch_size}")


def train_decoder(
    output: Path,
    stage: DecoderStage,
    vae: AutoencoderKLWan,
    model: Any,
    clips: ClipSet,
    references: Mapping[str, ClipReference],
    *,
    scheduler: FlowMatchScheduler,
    defaults: Mapping[str, float | bool],
    precision: str = "float32",
    seed: int = 0,
    origins: Mapping[str, str] | None = None,
    here: Processes = ALONE,
) -> None:
    """Train the decoder of `vae` and write the VAE to `output`, a diffusers folder.

    A run that was stopped goes on from the checkpoint there, if it is of these `origins`.

    Half of each batch goes on from the first latent frames as `model` samples them; of the others most are
    what its last step makes of the clip under noise, the rest the encoder's own latents. All are to become
    the clip's own frames.

    Args:
        references: where the frames of each of `clips.keys` are read.
        defaults: of the model's pipeline: num_inference_steps, guidance_scale, guide_continuation.
        precision: in which it samples.
    """
    device = here.device
    sampling = sampling_of(scheduler, defaults)
    vae = quicken(vae.float().train().to(device))
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    model.requires_grad_(False).to(device)
    optimizer = Muon(split_parameters(vae, muon_lr=stage.muon_lr, adamw_lr=stage.muon_lr / 10))

    def loss(step: int) -> Tensor:
        rows = [row_at(seed, clips, stage.batch_size * step + i) for i in range(stage.batch_size)]
        with here.autocast(precision):
            latents = draw_latents(model, clips, rows, sampling, seed_of(seed, step), device)
        frames = 4 * (latents.shape[2] - 1) + 1
        true = [torch.from_numpy(references[clips.keys[row]].read()[:frames].copy()) for row in rows]
        return decoder_loss(decode(vae, latents) - pixels(torch.stack(true), device), stage.moving)

    rate = partial(falling_rate, stage.final_lr, stage.steps)
    minimise(output, vae, optimizer, stage.steps, loss, rate, seed=seed, origins=origins)
    save_vae(vae, output)


@torch.no_grad()
def draw_latents(
    model: Any,
    clips: ClipSet,
    rows: Sequence[int],
    sampling: Mapping[str, Any],
    seed: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Latents (B, 16, F, h, w) of the rows, the first half of the rows sampled. Half of the batches are cut
    to the first half of their frames."""
    generator = torch.Generator().manual_seed(seed)
    whole, last = torch.rand(2, generator=generator).tolist()
    half = len(rows) // 2
    options: dict[str, Any] = {**sampling, "seed": seed, "device": device}
    sampled = sample_latents(model, clips, rows[:half], known_frames=GIVEN, **options)
    if last < LAST_STEP:
        others = sample_latents(model, clips, rows[half:], last_step_alone=True, **options)
    else:
        others = clips.latents(rows[half:]).to(device)
    latents = torch.cat([sampled, others])
    return latents if whole < 0.5 else latents[:, :, : (latents.shape[2] + 1) // 2]


def decoder_loss(difference: Tensor, moving: float) -> Tensor:
    """The loss of frames (B, 3, F, H, W) decoded from `draw_latents`, less the true ones.

    Where a sampled clip goes another way than the true one there is nothing to be learned about it, so there
    errors count by Cauchy's function, which hardly grows beyond those of outlines.
    """
    here, change = placement_errors(difference)
    plain = 4 * difference.square().mean((1, 3, 4)) + 0.5 * difference.abs().mean((1, 3, 4))
    half = len(difference) // 2
    loss = difference.new_zeros(())
    for errors, large, weight in ((plain + 4 * here, STANDING, 1.0), (4 * change, MOVING, moving)):
        robust = large * torch.log1p(errors[:half] / large)
        loss = loss + weight * (robust.mean() + errors[half:].mean()) / 2
    return loss
