"""Checkpoints: written whole or not at all, checked when read, the one before kept.

checkpoint.pt holds {"model", "ema", "optimizer", "step", ...} of the trained parameters, the same for one
process and for many. Random states and the position in the data need no keeping: both are functions of the
step.
"""

from __future__ import annotations

import errno
import logging
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kairos.data.files import explained
from kairos.errors import MachineError, UserError, one_line
from kairos.training.parallel import Processes, laid_like, whole

logger = logging.getLogger(__name__)

NAME, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write `folder`/checkpoint.pt; what was there becomes checkpoint.previous.pt.

    At every moment one whole checkpoint lies there. Raises MachineError where the disk is full.
    """
    file, partial, link = folder / NAME, folder / f"{NAME}.partial", folder / f"{PREVIOUS}.link"
    with explained(file):
        try:
            try:
                with partial.open("wb") as handle:
                    torch.save(state, handle)
                    handle.flush()
                    os.fsync(handle.fileno())
            except RuntimeError as error:  # torch's writer hides why a write failed
                if (cause := os_error_of(error)) is not None:
                    raise cause from error
                raise OSError(
                    errno.ENOSPC, f"no space left on device, or the write failed ({one_line(error)})"
                ) from error
            if file.exists():
                link.unlink(missing_ok=True)
                try:
                    os.link(file, link)
                except OSError:  # a file system without hard links: for a moment the one before stands alone
                    link = file
                os.replace(link, folder / PREVIOUS)
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)


def os_error_of(error: BaseException | None) -> OSError | None:
    """The operating system's error behind another one, if there is one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint of `folder`, on the CPU, or None where there is none.

    Raises:
        UserError: where there are checkpoints and all of them are torn.
    """
    there = [file for file in (folder / NAME, folder / PREVIOUS) if file.exists()]
    for file in there:
        if (state := read_whole(file)) is not None:
            return state
        logger.warning("%s is torn; trying the one before", file)
    if there:
        raise UserError(f"no whole checkpoint in {folder}; delete {there[0].name} to begin anew")
    return None


def glance(folder: Path) -> dict[str, Any]:
    """`load_checkpoint` at a glance, for its step and its origins: tensors are neither read nor checked, and
    where there is none, or it is torn, this is empty."""
    states = (read_whole(file, tensors=False) for file in (folder / NAME, folder / PREVIOUS) if file.exists())
    return next((state for state in states if state is not None), {})


def read_whole(file: Path, *, tensors: bool = True) -> dict[str, Any] | None:
    """What a checkpoint holds, or None where it is torn: every part of it carries a checksum, checked
    unless its `tensors` are not asked for."""
    try:
        if tensors:
            with zipfile.ZipFile(file) as archive:
                if archive.testzip() is not None:
                    return None
        state = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        return None
    except OSError as error:
        raise MachineError(f"cannot read {file}: {error.strerror or error}") from error
    return state if isinstance(state, dict) and {"model", "step"} <= set(state) else None


def gathered(value: Any, here: Processes) -> Any:
    """The same with every tensor whole and on the CPU, for the first process. Every process has to ask; the
    others keep empty tensors, for a machine's memory holds one model more, and not one for each of its GPUs.
    """
    if isinstance(value, Tensor):
        tensor = whole(value.detach())
        return tensor.cpu() if here.first else tensor.new_empty(0)
    if isinstance(value, Mapping):
        return {key: gathered(inner, here) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(inner, here) for inner in value)
    return value


def check_fits(state: Mapping[str, Tensor], trained: Mapping[str, Tensor], where: Path) -> None:
    """Refuse a checkpoint of another model in one line."""
    for name, parameter in trained.items():
        if name not in state:
            raise UserError(
                f"the checkpoint in {where} is of another model: it lacks {name}; name another output"
            )
        if state[name].shape != parameter.shape:
            found, wanted = (tuple(t.shape) for t in (state[name], parameter))
            raise UserError(
                f"the checkpoint in {where} is of another model: {name} is {found}, not {wanted}; "
                "name another output"
            )
    if extra := [name for name in state if name not in trained]:
        raise UserError(
            f"the checkpoint in {where} is of another model: it has {extra[0]} besides; name another output"
        )


@torch.no_grad()
def copy_into(target: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Give tensors, laid out in whatever way, the values of whole ones."""
    for name, tensor in target.items():
        tensor.copy_(laid_like(values[name], tensor))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict` of a whole state, in the layout of the parameters.

    Rates, betas and decay are not loaded: a stage goes on with what its recipe says now.
    """
    groups = optimizer.state_dict()["param_groups"]
    found, wanted = ([len(group["params"]) for group in kept] for kept in (state["param_groups"], groups))
    if found != wanted:
        raise UserError(
            "the checkpoint is of another optimizer: muon_lr was added or taken away since; change it back "
            "or name another output"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    laid: dict[int, Any] = {}
    for number, entry in state["state"].items():
        parameter = parameters[number]
        laid[number] = {
            key: laid_like(value, parameter)
            if isinstance(value, Tensor) and value.shape == parameter.shape
            else value
            for key, value in entry.items()
        }
    optimizer.load_state_dict({"state": laid, "param_groups": groups})


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of those that are trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
