"""Trains kairos-tiny's VAE: the WAN2.1 architecture at a small width, from nothing, on drawn shapes.

Pictures of random shapes come first (plain balls alone would let the empty background win), then short clips
of moving shapes mixed with clips of the physics scenes.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from kairos.data.config import above_0, at_least
from kairos.data.files import whole_files
from kairos.errors import UserError
from kairos.models.vae import normalisation, quickest_dtype
from kairos.models.vae_layers import quicken
from kairos.training.ahead import Ahead, workers_for
from kairos.training.batches import seed_of
from kairos.training.minimise import minimise
from kairos.training.muon import Muon, split_parameters
from kairos.training.origins import finish, is_finished, options_hash, origins_of
from kairos.weights.fingerprint import fingerprint
from kairos.worlds import BACKGROUND, COLORS, simulate

logger = logging.getLogger(__name__)

PALETTE = np.array(list(COLORS.values()), dtype=np.float32)

STANDING, MOVING = 1e-3, 3e-4
"""Errors of a frame, and of its change, that are as small as can be asked of `roots`."""

LONGEST = 33
"""Frames of a physics clip, of which a stage's clips are cut."""

MEASURED_CLIPS = 24
"""Clips over which the latents' mean and standard deviation are taken."""


@dataclass(frozen=True)
class VAEStage:
    """One stretch of the training, on clips of `num_frames`; `scenes` is the share of physics clips among
    them."""

    steps: int
    num_frames: int
    batch_size: int
    scenes: float = 0.0
    muon_lr: float = 0.02
    final_lr: float = 1.0
    """The learning rate falls linearly to this share of itself over the stage."""
    decoder_only: bool = False
    """Leave the encoder as it is: latents that were made with it stay good."""
    placement: float = 0.0
    """Weight of `placement_loss`, which asks that things stand where they should."""
    roots: bool = False
    """Count the root of each frame's error, so that a frame that is nearly right goes on getting better;
    `placement` is then the weight of what changes from frame to frame."""
    noise: float = 0.0
    """Half of the clips' latents carry noise, up to so many standard deviations: a decoder that stands it
    stands what is off in a model's latents too."""
    anchor: float = 0.0
    """Weight of the squares of what the latents have moved since the stage began, in standard deviations:
    a LinearDiT that knew them needs little to know these. Their normalisation stays."""

    def __post_init__(self) -> None:
        of = " of a stage of the VAE"
        at_least(1, self, "steps", "num_frames", "batch_size", of=of)
        at_least(0, self, "placement", "noise", "anchor", "final_lr", of=of)
        above_0(self, "muon_lr", of=of)
        if self.num_frames % 4 != 1 or self.num_frames > LONGEST:
            raise UserError(
                f"num_frames of a stage of the VAE must be 4n + 1, at most {LONGEST}, got {self.num_frames}"
            )
        if not 0 <= self.scenes <= 1:
            raise UserError(f"scenes of a stage of the VAE must be from 0 to 1, got {self.scenes}")
        if self.roots and self.num_frames == 1:
            raise UserError("roots of a stage of the VAE needs clips of more than one frame")
        if self.anchor and self.decoder_only:
            raise UserError("anchor holds the encoder, which decoder_only leaves as it is; leave one out")


def build_vae(base_dim: int = 16, num_res_blocks: int = 1) -> AutoencoderKLWan:
    """A WAN2.1 VAE with random weights, `base_dim` wide (the released one is 96)."""
    vae = AutoencoderKLWan(
        base_dim=base_dim,
        num_res_blocks=num_res_blocks,
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    return vae


def draw_shapes(rng: np.random.Generator, batch: int, num_frames: int, size: int = 64) -> np.ndarray:
    """Clips of one to seven coloured shapes in motion: (B, F, size, size, 3) float32 in [0, 255]."""
    axis = np.arange(size, dtype=np.float32) + 0.5
    x, y = axis[None, None, :], axis[None, :, None]
    time_axis = np.arange(num_frames, dtype=np.float32)
    clips = np.empty((batch, num_frames, size, size, 3), dtype=np.float32)
    for clip in clips:
        light = rng.random() < 0.7
        clip[:] = BACKGROUND if light else rng.uniform(0, 255, 3)
        for _ in range(rng.integers(1, 8)):
            colour = PALETTE[rng.integers(len(PALETTE))] if rng.random() < 0.6 else rng.uniform(0, 255, 3)
            position = rng.uniform(0, size, 2)
            velocity = rng.normal(0, 1.5, 2) * (rng.random() < 0.8)
            gravity = rng.uniform(0, 0.3) * (rng.random() < 0.3)
            cx = (position[0] + velocity[0] * time_axis)[:, None, None].astype(np.float32)
            cy = (position[1] + velocity[1] * time_axis + 0.5 * gravity * time_axis**2)[:, None, None]
            dx, dy = x - cx, y - cy.astype(np.float32)
            if rng.random() < 0.55:
                distance = np.sqrt(dx * dx + dy * dy) - rng.uniform(1.5, 13)
            else:
                angle = (rng.uniform(0, math.pi) if rng.random() < 0.5 else 0.0) + rng.normal(
                    0, 0.05
                ) * time_axis
                cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
                half = (
                    rng.uniform(0.5, 14, 2) if rng.random() < 0.8 else np.array([size, rng.uniform(0.5, 4)])
                )
                across = np.abs(cos * dx + sin * dy) - half[0]
                along = np.abs(-sin * dx + cos * dy) - half[1]
                distance = np.maximum(across, along)
            cover = np.clip(0.5 - distance, 0, 1)[..., None].astype(np.float32)
            clip += cover * (np.asarray(colour, dtype=np.float32) - clip)
    return clips


def draw_clip(rng: np.random.Generator, stage: VAEStage, scenes: tuple[str, ...]) -> np.ndarray:
    """(F, 64, 64, 3) in [0, 255]: shapes, or for the stage's share a clip of the physics scenes."""
    if rng.random() >= stage.scenes:
        return draw_shapes(rng, 1, stage.num_frames)[0]
    scene = scenes[rng.integers(len(scenes))]
    index = int(rng.integers(1 << 30))
    frames = simulate(scene, split="train", seed=1, index=index, num_frames=LONGEST).frames
    start = rng.integers(len(frames) - stage.num_frames + 1)
    return frames[start : start + stage.num_frames]


def draw_batch(rng: np.random.Generator, stage: VAEStage, scenes: tuple[str, ...]) -> Tensor:
    """(B, F, 64, 64, 3) in [0, 255], as bytes."""
    clips = [draw_clip(rng, stage, scenes) for _ in range(stage.batch_size)]
    return torch.from_numpy(np.stack(clips).round().astype(np.uint8))


def pixels(clips: Tensor, device: torch.device | str) -> Tensor:
    """Bytes (B, F, H, W, 3) as what a VAE takes: (B, 3, F, H, W) in [-1, 1]."""
    return clips.to(device).permute(0, 4, 1, 2, 3) / 127.5 - 1


def vae_loss(
    vae: AutoencoderKLWan,
    video: Tensor,
    stage: VAEStage,
    kl_weight: float,
    before: AutoencoderKLWan | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of clips (B, 3, F, H, W) in [-1, 1], and the mean squared error alone.

    before: the VAE as it was when the stage began, for its `anchor`.
    """
    device = video.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or quickest_dtype("cpu") is not None):
        with torch.set_grad_enabled(vae.quant_conv.weight.requires_grad):
            posterior = vae.encode(video).latent_dist
        latents = posterior.sample()
        _, std = normalisation(vae, latents)
        if stage.noise:
            strength = 2 * (torch.rand(len(latents), 1, 1, 1, 1, device=latents.device) - 0.5).clamp(min=0)
            latents = latents + stage.noise * strength * std * torch.randn_like(latents)
        output = vae.decode(latents).sample
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    difference = output.float() - video
    loss = picture_loss(difference, stage) + kl_weight * divergence
    if before is not None:
        with torch.no_grad():
            held = before.encode(video).latent_dist.mode()
        loss = loss + stage.anchor * ((mean - held) / std).square().mean()
    return loss, difference.square().mean()


def picture_loss(difference: Tensor, stage: VAEStage) -> Tensor:
    """What is wrong with decoded clips, of their difference (B, 3, F, H, W) from the true ones.

    4 MSE + 0.5 L1 + the weighted `placement_loss`; with the stage's `roots` the means over all frames of the
    roots of 8 MSE + misplacement and, weighted by `placement`, of its change, + 0.1 L1.
    """
    absolute = difference.abs().mean()
    if stage.roots:
        standing, moving = placement_errors(difference)
        standing = 8 * difference.square().mean((1, 3, 4)) + standing
        change = (moving + MOVING).sqrt().mean()
        return (standing + STANDING).sqrt().mean() + stage.placement * change + 0.1 * absolute
    loss = 4 * difference.square().mean() + 0.5 * absolute
    return loss + stage.placement * placement_loss(difference) if stage.placement else loss


def placement_loss(difference: Tensor) -> Tensor:
    """The mean of `placement_errors`, where a thing stands and how it moves."""
    standing, moving = placement_errors(difference)
    return standing.mean() + moving.mean() if moving.numel() else standing.mean()


def placement_errors(difference: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of a reconstruction's error (B, 3, F, H, W) in the means of squares of 4, 8 and 16 pixels,
    frame by frame (B, F), and of its change from frame to frame (B, F - 1).

    Noise is gone in a square's mean, an outline that is a little off is not: the error is of one sign along
    it. So a tenth of a pixel, which a mean squared error hardly sees, counts here, and twice where it
    changes from frame to frame, for then a thing trembles. White noise counts the same in every size.
    """
    frames = difference.transpose(1, 2).flatten(0, 1)
    standing = moving = difference.new_zeros(())
    for size in (4, 8, 16):
        means = F.avg_pool2d(frames, size, size // 2).unflatten(0, (len(difference), -1))
        standing = standing + size**2 * means.square().mean((2, 3, 4))
        moving = moving + size**2 * means.diff(dim=1).square().mean((2, 3, 4))
    return standing, moving


def train_vae(
    output: Path,
    *,
    stages: tuple[VAEStage, ...],
    scenes: tuple[str, ...] = ("uniform", "collision", "parabola"),
    kl_weight: float = 1e-4,
    seed: int = 0,
    start: AutoencoderKLWan | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Train and write `output`, a diffusers folder, its latents_mean and latents_std measured.

    Each stage has a folder there, with its checkpoints and, at its end, the VAE as it leaves it: a run that
    was stopped, or has stages more than had finished, goes on from the last of them. `start`: the VAE to
    begin with; None: random weights. UserError where what has finished was made of something else.
    """
    begun = {"weights": "" if start is None else fingerprint({"vae": start})}

    def made_of(count: int) -> dict[str, str]:
        return begun | {"options": options_hash(stages[:count], scenes, seed)}

    folders = [output / f"stage-{number}" for number in range(len(stages))]
    whole = origins_of(output) == made_of(len(stages))
    if (whole or not any(map(Path.exists, folders))) and is_finished("vae", output, made_of(len(stages))):
        return
    finished = [
        number
        for number, folder in enumerate(folders)
        if is_finished(f"vae/{folder.name}", folder, made_of(number + 1))
    ]
    torch.manual_seed(seed)
    vae = build_vae() if start is None else start.float()
    if finished:
        vae = AutoencoderKLWan.from_pretrained(folders[finished[-1]])
    logger.info("VAE of %.2f M parameters", sum(p.numel() for p in vae.parameters()) / 1e6)
    (output / "finished").unlink(missing_ok=True)
    for number in range(finished[-1] + 1 if finished else 0, len(stages)):
        stage, folder = stages[number], folders[number]
        vae.train().to(device)
        quicken(vae)
        behind = begun | {"options": options_hash(stages[:number])}
        train_stage(vae, stage, number, folder, scenes=scenes, kl_weight=kl_weight, seed=seed, origins=behind)
        if not stage.decoder_only and not stage.anchor:
            measure_latents(vae, scenes)
        save_vae(vae, folder)
        finish(folder, made_of(number + 1))
    save_vae(vae, output)
    finish(output, made_of(len(stages)))


def save_vae(vae: AutoencoderKLWan, folder: Path) -> None:
    """Write it in diffusers' layout, beside what else is in `folder`."""
    with whole_files(folder) as made:
        vae.save_pretrained(made)


def train_stage(
    vae: AutoencoderKLWan,
    stage: VAEStage,
    number: int,
    folder: Path,
    *,
    scenes: tuple[str, ...],
    kl_weight: float,
    seed: int,
    origins: Mapping[str, str],
) -> None:
    """Train the VAE for one stage, with its checkpoints in `folder`; of other `origins` none counts."""
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(not stage.decoder_only)
    optimizer = Muon(split_parameters(vae, muon_lr=stage.muon_lr, adamw_lr=stage.muon_lr / 10))
    before = copy.deepcopy(vae).requires_grad_(False) if stage.anchor else None
    average: Tensor | None = None

    with Ahead(partial(_draw, seed, number, stage, scenes), workers_for(vae.device)) as ahead:

        def loss(step: int) -> Tensor:
            nonlocal average
            ahead.begin(range(step, min(step + 1 + 2 * ahead.workers, stage.steps)))
            value, squared = vae_loss(vae, pixels(ahead.get(step), vae.device), stage, kl_weight, before)
            average = squared.detach() if average is None else average.lerp(squared.detach(), 0.05)
            return value

        minimise(
            folder,
            vae,
            optimizer,
            stage.steps,
            loss,
            rate=partial(falling_rate, stage.final_lr, stage.steps),
            seed=seed_of(seed, number),
            origins=origins,
            told=lambda _: f"{10 * math.log10(4 / float(cast(Tensor, average))):.1f} dB",
        )


def falling_rate(final: float, steps: int, step: int) -> float:
    """The share of the learning rate at a step: twenty to warm up, then linearly down to `final`."""
    return min(1.0, (step + 1) / 20) * (1 + (final - 1) * step / steps)


def _draw(seed: int, number: int, stage: VAEStage, scenes: tuple[str, ...], step: int) -> Tensor:
    """The batch of a step of stage `number`."""
    return draw_batch(np.random.default_rng((seed, number, step)), stage, scenes)


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, scenes: tuple[str, ...]) -> None:
    """Measure the latents' mean and standard deviation on physics clips, and put them in the configuration.

    A channel that the VAE hardly uses keeps a standard deviation of at least a tenth of the largest one, so
    that normalising does not blow up its noise.
    """
    vae.eval()
    means = []
    for index in range(MEASURED_CLIPS):
        frames = simulate(scenes[index % len(scenes)], split="train", seed=2, index=index).frames
        video = pixels(torch.from_numpy(frames)[None], vae.device)
        means.append(vae.encode(video).latent_dist.mode()[0].cpu())
    latents = torch.stack(means).transpose(0, 1).flatten(1)
    std = latents.std(1)
    vae.register_to_config(
        latents_mean=[round(v, 5) for v in latents.mean(1).tolist()],
        latents_std=[round(v, 5) for v in std.clamp(min=0.1 * std.max().item()).tolist()],
    )
    logger.info("standard deviation of the latents, by channel: %s", [round(v, 2) for v in std.tolist()])
    vae.train()
