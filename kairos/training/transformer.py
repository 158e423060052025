"""Trains a chunk-causal LinearDiT by rectified flow on cached latents: the loop behind kairos-tiny.

Everything random at a step is a function of (seed, step), so a run that stopped goes on as if it had not.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kairos.models.transformer import KairosTransformer3DModel
from kairos.schedulers import shift_for
from kairos.training.cache import Cache
from kairos.training.muon import Muon, split_parameters

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """What one run does. `decay_steps` of linear decay end it; more `steps` later move the decay."""

    steps: int = 6000
    decay_steps: int = 1200
    batch_size: int = 32
    muon_lr: float = 0.01
    adamw_lr: float = 1e-3
    weight_decay: float = 0.0
    warmup_steps: int = 50
    ema: float = 0.999
    text_dropout: float = 0.15
    past_noise: float = 0.1
    """In a quarter of the batches the clean past carries noise up to this sigma, told to the model."""
    seed: int = 0

    def learning_rate(self, step: int) -> float:
        """The share of the full rate at `step`: warm-up, constant, linear decay to a fiftieth."""
        left = max(self.steps - step, 0) / self.decay_steps
        return min(1.0, (step + 1) / self.warmup_steps) * max(min(1.0, left), 0.02)


@dataclass(frozen=True)
class Layout:
    """How a batch is cut: `past` clean latent frames, then one chunk of `chunk` frames to be made."""

    past: int
    chunk: int


def draw_layout(rng: np.random.Generator, latent_frames: int) -> Layout:
    """What one model must do: the first frame from text, the rest from it or from more, and the chunks of a
    rollout.

    The first latent frame is a chunk of its own: one frame of pixels where the others are four, and in text
    to video the place where colours, sizes and places are decided.
    """
    task = rng.random()
    if task < 0.45:
        return Layout(0, 1)
    if task < 0.85:
        past = int(rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1]))
        return Layout(past, latent_frames - past)
    past = int(rng.integers(1, latent_frames - 1))
    return Layout(past, min(int(rng.integers(1, 5)), latent_frames - past))


@dataclass
class Batch:
    """Inputs and target of one step; `layout` says which frames count."""

    noisy: Tensor
    timestep: Tensor
    prompt_embeds: Tensor
    prompt_mask: Tensor
    target: Tensor
    layout: Layout


def draw_batch(cache: Cache, recipe: Recipe, step: int) -> Batch:
    """The batch of `step`: (B, 16, F, h, w) latents, noised after the past, and the velocity to predict."""
    rng = np.random.default_rng((recipe.seed, step))
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
    layout = draw_layout(rng, cache.latents.shape[2])
    frames = layout.past + layout.chunk
    # A first frame has so few tokens that four times as many of them are still the smaller batch.
    batch_size = recipe.batch_size * (1 if layout.past else 4)
    index = torch.from_numpy(rng.integers(len(cache), size=batch_size))
    sample = cache.latents[index, :, :frames].float()
    dropped = torch.from_numpy(rng.random(batch_size) < recipe.text_dropout)
    embeds = torch.where(dropped[:, None, None], cache.empty_embeds, cache.prompt_embeds[index])
    mask = torch.where(dropped[:, None], cache.empty_mask, cache.prompt_mask[index])

    height, width = sample.shape[-2:]
    shift = shift_for(cache.latents.shape[2] if layout.past else 1, height * width // 4)
    u = torch.sigmoid(torch.randn(batch_size, generator=generator) * 1.2)
    sigma = torch.zeros(batch_size, frames)
    sigma[:, layout.past :] = (shift * u / (1 + (shift - 1) * u))[:, None]
    if layout.past and rng.random() < 0.25:
        sigma[:, : layout.past] = recipe.past_noise * torch.rand(batch_size, 1, generator=generator)
    noise = torch.randn(sample.shape, generator=generator)
    spread = sigma[:, None, :, None, None]
    return Batch(
        noisy=(1 - spread) * sample + spread * noise,
        timestep=1000 * sigma,
        prompt_embeds=embeds.float(),
        prompt_mask=mask,
        target=noise - sample,
        layout=layout,
    )


def flow_loss(model: KairosTransformer3DModel, batch: Batch) -> Tensor:
    """Mean squared error of the velocity over the frames after the past."""
    past, chunk = batch.layout.past, batch.layout.chunk
    with torch.autocast("cpu", torch.bfloat16):
        (velocity,) = model(
            batch.noisy,
            batch.timestep,
            batch.prompt_embeds,
            encoder_attention_mask=batch.prompt_mask,
            chunk_frames=(past, chunk) if past else (chunk,),
            return_dict=False,
        )
    return (velocity.float() - batch.target)[:, :, past:].square().mean()


def train_transformer(
    model: KairosTransformer3DModel,
    read_cache: Callable[[], Cache],
    output: Path,
    recipe: Recipe,
    *,
    save_every_s: float = 300,
) -> KairosTransformer3DModel:
    """Train `model` until `recipe.steps`, going on from `output`/checkpoint.pt if there is one; returns the
    EMA.

    The cache is read again at each checkpoint, so shards that were built meanwhile are used.
    """
    output.mkdir(parents=True, exist_ok=True)
    ema = copy.deepcopy(model).requires_grad_(False)
    groups = split_parameters(
        model,
        muon_lr=recipe.muon_lr,
        adamw_lr=recipe.adamw_lr,
        exclude=("embedding", "projection", "head.", "modulation"),
    )
    optimizer = Muon(groups)
    base = [group["lr"] for group in optimizer.param_groups]
    step = load_checkpoint(output / "checkpoint.pt", model, ema, optimizer)
    cache = read_cache()
    model.train()
    logger.info(
        "%.2f M parameters, %d clips, step %d of %d",
        sum(p.numel() for p in model.parameters()) / 1e6,
        len(cache),
        step,
        recipe.steps,
    )
    saved = reported = time.monotonic()
    first, seen, average = step, 0, float("nan")
    while step < recipe.steps:
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * recipe.learning_rate(step)
            group["weight_decay"] = recipe.weight_decay
        batch = draw_batch(cache, recipe, step)
        loss = flow_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, model, min(recipe.ema, (step + 1) / (step + 10)))
        step += 1
        seen += len(batch.noisy)
        value = loss.item()
        average = value if math.isnan(average) else 0.98 * average + 0.02 * value
        if step % 50 == 0:
            pace = seen / (time.monotonic() - reported)
            logger.info("step %d: loss %.4f, %.1f clips/s", step, average, pace)
            reported, seen = time.monotonic(), 0
        if time.monotonic() - saved > save_every_s or step == recipe.steps:
            save_checkpoint(output / "checkpoint.pt", model, ema, optimizer, step)
            ema.save_pretrained(output / "ema")
            cache = read_cache()
            saved = time.monotonic()
    logger.info("%d steps in this run", step - first)
    return ema


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) model, parameter by parameter."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def save_checkpoint(
    file: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Weights, EMA, optimizer and step in one file, written whole or not at all."""
    partial = file.with_suffix(".partial")
    state = {
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
    }
    torch.save(state, partial)
    os.replace(partial, file)


def load_checkpoint(file: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on from: 0 where there is no checkpoint."""
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
