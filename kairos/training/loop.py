"""The training loop, for every objective and any number of processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from kairos.data.files import prepare_folder, write_atomically
from kairos.errors import UserError
from kairos.training.batches import seed_of
from kairos.training.checkpoint import (
    check_fits,
    copy_into,
    gathered,
    load_checkpoint,
    load_optimizer,
    save_checkpoint,
    trained_parameters,
)
from kairos.training.minimise import stop_signal
from kairos.training.muon import Muon, split_parameters
from kairos.training.objective import Objective
from kairos.training.parallel import ALONE, Processes, local, whole
from kairos.training.progress import Progress
from kairos.training.stage import Stage
from kairos.weights.files import CONFIG
from kairos.weights.transformer import DIFFUSERS_FILE, config_text

logger = logging.getLogger(__name__)


def train(
    model: Any,
    objective: Objective,
    stage: Stage,
    output: Path,
    *,
    here: Processes = ALONE,
    make_samples: Callable[[Any, Path, int], Any] | None = None,
    origins: dict[str, str] | None = None,
) -> dict[str, Tensor]:
    """Train `model` up to step `stage.steps`, going on from the checkpoint in `output` if there is one.

    Returns the moving average of the trained parameters, also written to `output`/ema. On Ctrl-C or SIGTERM
    it saves, and raises KeyboardInterrupt. `origins`, of `made_of`, are kept in its checkpoints.
    """
    if here.first:
        prepare_folder(output)
    trained = trained_parameters(model)
    optimizer = build_optimizer(model, stage)
    rates = [group["lr"] for group in optimizer.param_groups]
    ema = {name: parameter.detach().clone() for name, parameter in trained.items()}
    step = resume(output, trained, ema, optimizer, objective)
    if step >= stage.steps:  # its last checkpoint is there, its weights are not
        store(output, model, trained, ema, optimizer, objective, step, here, origins)
    model.train()
    progress = Progress(output, stage, sum(p.numel() for p in trained.values()), step, here)
    saved = time.monotonic()
    with stop_signal() as stop, progress:
        while step < stage.steps:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * stage.learning_rate(step)
            torch.manual_seed(seed_of(stage.seed, step, here.rank))
            for part in range(stage.accumulate):
                with progress.clock("forward"):
                    loss, clips = objective.loss(model, step, part)
                with progress.clock("backward"):
                    (loss / stage.accumulate).backward()
                progress.add(loss, clips)
            norm = nn.utils.clip_grad_norm_(list(trained.values()), stage.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            update_ema(ema, trained, min(stage.ema, (step + 1) / (step + 10)))
            step += 1
            progress.step(
                step, whole(norm), stage.learning_rate(step - 1), partial(objective.report, model, step)
            )
            if make_samples and stage.samples_every and step % stage.samples_every == 0:
                progress.show(make_samples(model, output, step), step)
            stopped, due = here.any(stop(), time.monotonic() - saved > stage.save_every_s)
            if stopped or due or step == stage.steps:
                progress.catch_up()
                store(output, model, trained, ema, optimizer, objective, step, here, origins)
                saved = time.monotonic()
                (stopped,) = here.any(stop())  # it may have come while saving
            if stopped:
                logger.info("stopped and saved at step %d of %d", step, stage.steps)
                raise KeyboardInterrupt
    return ema


def build_optimizer(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """AdamW, or Muon for the matrices inside the blocks where the stage gives it a rate."""
    betas = (stage.betas[0], stage.betas[1])
    if stage.muon_lr is None:
        parameters = list(trained_parameters(model).values())
        return torch.optim.AdamW(
            parameters, lr=stage.adamw_lr, betas=betas, weight_decay=stage.weight_decay, foreach=True
        )
    groups = split_parameters(
        model,
        muon_lr=stage.muon_lr,
        adamw_lr=stage.adamw_lr,
        exclude=("embedding", "projection", "head.", "modulation"),
    )
    for group in groups:
        group["weight_decay"] = stage.weight_decay
    return Muon(groups, betas=betas)


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], trained: dict[str, nn.Parameter], decay: float) -> None:
    """ema <- decay ema + (1 - decay) trained."""
    torch._foreach_lerp_(
        [local(tensor) for tensor in ema.values()], [local(p.detach()) for p in trained.values()], 1 - decay
    )


def resume(
    output: Path,
    trained: dict[str, nn.Parameter],
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    objective: Objective,
) -> int:
    """Take up the newest checkpoint; the step to go on from, 0 where there is none."""
    state = load_checkpoint(output)
    if state is None:
        return 0
    check_fits(state["model"], trained, output)
    kept = state.get("objective", {})
    if kept.keys() != objective.state().keys():
        raise UserError(f"the checkpoint in {output} is of another objective; name another output")
    copy_into(trained, state["model"])
    copy_into(ema, state["ema"])
    load_optimizer(optimizer, state["optimizer"])
    objective.load_state(kept)
    return int(state["step"])


def store(
    output: Path,
    model: Any,
    trained: dict[str, nn.Parameter],
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    step: int,
    here: Processes,
    origins: dict[str, str] | None = None,
) -> None:
    """Write the moving average as a model of its own, then the checkpoint: one of the last step says that all
    is there."""
    average = gathered(ema, here)
    weights = average if is_lora(average) else gathered(frozen_parameters(model), here) | average
    state = {
        "model": gathered(trained, here),
        "ema": average,
        "optimizer": gathered(optimizer.state_dict(), here),
        "step": step,
        "objective": gathered(objective.state(), here),
        "origins": origins or {},
    }
    if here.first:
        save_weights(output / "ema", model, weights)
        save_checkpoint(output, state)
    here.wait()


def save_weights(folder: Path, model: Any, weights: dict[str, Tensor]) -> None:
    """Weights beside their configuration, in diffusers' layout; those of LoRA as lora.safetensors alone."""
    prepare_folder(folder)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    if is_lora(weights):
        from kairos.training.lora import lora_bytes

        write_atomically(folder / "lora.safetensors", lora_bytes(model, weights))
        return
    config = config_text(model.config)
    metadata = {"format": "pt", CONFIG: config}
    write_atomically(folder / "config.json", config.encode())
    write_atomically(folder / DIFFUSERS_FILE, save(weights, metadata=metadata))


def is_lora(weights: Iterable[str]) -> bool:
    """Whether these are the names of low-rank updates, not of a model's weights."""
    return any("lora_" in name for name in weights)


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of those that stay as they are."""
    return {name: p for name, p in model.named_parameters() if not p.requires_grad}
