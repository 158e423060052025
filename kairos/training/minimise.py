"""A loop for what is trained beside the LinearDiT, which may be stopped and goes on."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kairos.data.files import prepare_folder
from kairos.errors import UserError
from kairos.training.batches import seed_of
from kairos.training.checkpoint import (
    check_fits,
    copy_into,
    load_checkpoint,
    load_optimizer,
    save_checkpoint,
    trained_parameters,
)

logger = logging.getLogger(__name__)

SAVE_EVERY_S, TELL_EVERY_S = 300.0, 15.0
CLIP_NORM = 1.0


def minimise(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    loss: Callable[[int], Tensor],
    rate: Callable[[int], float],
    *,
    seed: int,
    origins: Mapping[str, str] | None = None,
    told: Callable[[float], str] = "loss {:.4f}".format,
) -> None:
    """Minimise `loss(step)` up to `steps`, behind the checkpoint in `folder` unless it says other `origins`.

    rate: the share of the full learning rates at a step.
    seed: each step begins with torch's random numbers seeded by it and the step.
    told: what the log says of a loss.

    Every five minutes, at the end, and on Ctrl-C or SIGTERM, which then raise KeyboardInterrupt, a checkpoint
    is written.
    """
    prepare_folder(folder)
    trained, made_of = trained_parameters(module), dict(origins or {})
    rates = [group["lr"] for group in optimizer.param_groups]
    step, state = 0, load_checkpoint(folder)
    if state is not None and all(state["origins"].get(part, of) == of for part, of in made_of.items()):
        check_fits(state["model"], trained, folder)
        copy_into(trained, state["model"])
        load_optimizer(optimizer, state["optimizer"])
        step = int(state["step"])
    saved = reported = time.monotonic()
    with stop_signal() as stop:
        while step < steps:
            for group, full in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = full * rate(step)
            torch.manual_seed(seed_of(seed, step))
            value = loss(step)
            optimizer.zero_grad()
            value.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
            optimizer.step()
            step += 1
            if time.monotonic() - reported > TELL_EVERY_S:
                reported = time.monotonic()
                logger.info("%s: step %d/%d, %s", folder.name, step, steps, told(float(value.detach())))
            if stop() or step == steps or time.monotonic() - saved > SAVE_EVERY_S:
                read = value.item(), norm.item()
                if not math.isfinite(sum(read)):
                    said = "loss {} and a gradient of norm {}".format(*read)
                    raise UserError(f"{folder.name}: step {step} has {said}; what was saved is as it was")
                weights = {name: parameter.detach() for name, parameter in trained.items()}
                kept = {"model": weights, "optimizer": optimizer.state_dict(), "step": step}
                save_checkpoint(folder, kept | {"origins": made_of})
                saved = time.monotonic()
            if stop():
                logger.info("stopped and saved at step %d of %d", step, steps)
                raise KeyboardInterrupt


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came; a second Ctrl-C ends the program at once."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)
        logger.info("stopping after this step; press Ctrl-C again to lose it")

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where signals do not come
        before = {}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
