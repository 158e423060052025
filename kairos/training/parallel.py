"""One process or many: where a process stands, and how the model is laid over all of them (FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from kairos.distributed.ranks import leave
from kairos.models.compiled import compile_blocks
from kairos.training.precision import has_bfloat16

PATIENCE = timedelta(days=30)
"""So long the others wait while the first process makes a VAE, a cache or pairs; torchrun ends them where it
dies."""


@dataclass(frozen=True)
class Processes:
    """How many processes train together, which one this is, and its device."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    waiting: Any = None
    """Their process group for `wait`."""

    @property
    def first(self) -> bool:
        """This one writes files and talks."""
        return self.rank == 0

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """What a stage's precision asks for; where there are no products in bfloat16, float32."""
        bfloat16 = precision == "bfloat16" and has_bfloat16(self.device.type)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16)

    def means(self, values: Tensor) -> list[float]:
        """The means of some numbers over the processes."""
        values = values.detach().float()
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.world
        return values.tolist()

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is raised in one of the processes."""
        if self.world == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.float32, device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return [value > 0 for value in raised.tolist()]

    def wait(self) -> None:
        """Until all are here, however long one works alone."""
        if self.world > 1:
            dist.barrier(self.waiting)


ALONE = Processes()


@contextmanager
def processes() -> Iterator[Processes]:
    """This process under torchrun, or alone: on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Processes(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        waiting = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Processes(dist.get_rank(), dist.get_world_size(), device, waiting)
    finally:
        leave()


def prepare(model: Any, here: Processes, *, checkpointing: bool, compiled: bool) -> None:
    """Put on the model, in place and in this order: device, activation checkpointing, compilation, shards."""
    model.to(here.device)
    if checkpointing:
        model.enable_gradient_checkpointing()
    if compiled:
        compile_blocks(model)
    shard(model, here)


def shard(model: Any, here: Processes) -> None:
    """Lay the parameters over the processes, block by block; nothing to do for one process.

    They are gathered as they are kept, in float32: autocast rounds what is multiplied, as on one GPU, and
    nothing else. FSDP's own mixed precision would round times, rotary tables and decays as well.
    """
    if here.world == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(here.device.type, (here.world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def average_gradients(parameters: Iterable[nn.Parameter], here: Processes) -> None:
    """The mean over the processes, for what every one of them holds whole."""
    if here.world == 1:
        return
    for parameter in parameters:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad.div_(here.world)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; it shares memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor in the layout, and on the device, of a parameter."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
