"""Steps between which a run may be stopped: for what is trained beside the LinearDiT, by loops of its own."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kairos.data.files import prepare_folder
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

SAVE_EVERY_S = 300.0


@contextmanager
def kept_steps(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    seed: int,
    origins: Mapping[str, str] | None = None,
) -> Iterator[Iterator[int]]:
    """The numbers of the steps that are left of `steps`: behind the checkpoint in `folder`, whose weights and
    optimizer are taken up, where one of these `origins` is there.

    Each begins with torch's random numbers seeded by (seed, step). Every five minutes, at the end, and on
    Ctrl-C or SIGTERM, which then raise KeyboardInterrupt, a checkpoint is written.
    """
    with stop_signal() as stop:
        yield _steps(folder, module, optimizer, steps, seed, dict(origins or {}), stop)


def _steps(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    seed: int,
    origins: dict[str, str],
    stop: Callable[[], bool],
) -> Iterator[int]:
    prepare_folder(folder)
    trained = trained_parameters(module)
    step, state = 0, load_checkpoint(folder)
    if state is not None and state["origins"] == origins:
        check_fits(state["model"], trained, folder)
        copy_into(trained, state["model"])
        load_optimizer(optimizer, state["optimizer"])
        step = int(state["step"])
    saved = time.monotonic()
    while step < steps:
        torch.manual_seed(seed_of(seed, step))
        yield step
        step += 1
        if stop() or step == steps or time.monotonic() - saved > SAVE_EVERY_S:
            weights = {name: parameter.detach() for name, parameter in trained.items()}
            save_checkpoint(
                folder,
                {"model": weights, "optimizer": optimizer.state_dict(), "step": step, "origins": origins},
            )
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
