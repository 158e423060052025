"""A rank's place among the others, and what all must have in common before they begin.

Ranks learn their place as torchrun tells it: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
`launch` sets the same, so there is one way in.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist

from kairos import __version__
from kairos.errors import MachineError, UserError, one_line

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
RENDEZVOUS_S = 120.0
"""How long a rank waits for the others at the start: imports on a slow disk take a minute."""
LOAD_S = 3600.0
"""How long one waits for the others later, while they load."""
WORK_S = 30 * 24 * 3600.0
"""And while they work: the rest of a list may take days. One that dies is found at once."""
LETTING_GO_S = 0.5
"""What a rank gives gloo's threads, which need microseconds of a core, before it ends."""


@dataclass(frozen=True)
class World:
    """The ranks, as one of them sees them."""

    rank: int
    size: int
    store: dist.Store
    device: torch.device

    def share(self, name: str, value: Any, wait_s: float = WORK_S) -> list[Any]:
        """The values of all ranks, JSON each. Every rank calls it, with a new name each time."""
        return _share(self.store, self.rank, self.size, name, value, wait_s)

    def agree(self, said: Mapping[str, object]) -> None:
        """Refuse ranks that differ from rank 0 in what they say; with names not used before."""
        _agree(self.store, self.rank, self.size, said, LOAD_S)


def join(
    device: str = "auto", said: Mapping[str, object] | None = None, wait_s: float = RENDEZVOUS_S
) -> World:
    """Take this rank's place: NCCL between GPUs, gloo between CPUs. `leave` ends it.

    Args:
        device: "cuda", a GPU for each rank of a machine; "cpu"; or "auto", GPUs where there are any.
        said: what must be the same on all ranks, beside the versions.
        wait_s: how long to wait for the rendezvous and for the other ranks.

    Raises:
        UserError: for a place that is half said, a missing rendezvous, a port in use, too few GPUs, and ranks
            that differ in versions or arguments.
    """
    rank, size, local_rank, host, port = _place()
    store = _store(rank, host, port, wait_s)
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    versions |= {"kairos": __version__, "python": platform.python_version()}
    with one_voice(store):
        _agree(store, rank, size, {"ranks": size, "device": kind, **versions, **(said or {})}, wait_s)
        if kind == "cuda":
            check_gpus(local_rank + 1)
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
    else:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        torch.set_num_threads(max(1, torch.get_num_threads() // local_size))
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=dist.PrefixStore("torch", store),
        rank=rank,
        world_size=size,
    )
    return World(
        rank, size, store, torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")
    )


def leave() -> None:
    """Leave the process group, where there is one.

    gloo's threads let go of a tensor a moment after its exchange is answered, and need Python's lock for it.
    Before Python 3.14 one that asks for the lock while the interpreter ends aborts the process
    (python/cpython#87135), so they get time for it first.
    """
    if dist.is_initialized():
        gloo = dist.get_backend() == "gloo"
        dist.destroy_process_group()
        if gloo:
            time.sleep(LETTING_GO_S)


def _share(store: dist.Store, rank: int, size: int, name: str, value: Any, wait_s: float) -> list[Any]:
    store.set(f"{name}/{rank}", json.dumps(value, default=str))
    for other in range(size):
        try:
            store.wait([f"{name}/{other}"], timedelta(seconds=wait_s))
        except (RuntimeError, dist.DistError) as error:
            raise MachineError(
                f"rank {other} of {size} did not come within {wait_s:g} s; start all {size} ranks, or fewer"
            ) from error
    return [json.loads(store.get(f"{name}/{other}")) for other in range(size)]


def _agree(store: dist.Store, rank: int, size: int, said: Mapping[str, object], wait_s: float) -> None:
    first, *others = _share(store, rank, size, ",".join(said), dict(said), wait_s)
    for other, theirs in enumerate(others, start=1):
        for name in first:
            if first[name] != theirs[name]:
                raise UserError(
                    f"ranks differ in {name}: {first[name]!r} on rank 0, {theirs[name]!r} on rank {other}; "
                    "start all ranks with the same versions and arguments"
                )


@contextmanager
def one_voice(store: dist.Store) -> Iterator[None]:
    """Of ranks that fail together the first one speaks; the others leave with status 1 and say nothing."""
    try:
        yield
    except Exception:
        try:
            first = store.add("failed", 1) == 1
        except (RuntimeError, dist.DistError):  # the store went with its rank, which has spoken
            first = False
        if not first:
            sys.exit(1)
        raise


def check_gpus(wanted: int) -> None:
    """Refuse more GPUs than there are."""
    there = gpus_here()
    if not there:
        raise UserError("this machine has no GPU; --device cpu runs on it, with --gpus N in N processes")
    if wanted > there:
        raise UserError(f"{wanted} GPUs are asked for and this machine has {there}; take --gpus {there}")


def gpus_here() -> int:
    """How many GPUs this machine has for us."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _place() -> tuple[int, int, int, str, int]:
    said = {name: os.environ.get(name, "") for name in PLACE}
    if missing := [name for name, value in said.items() if not value]:
        raise UserError(
            f"{', '.join(missing)} not set: start ranks with torchrun, or with --gpus N outside of it"
        )
    try:
        rank, size, local_rank, port = (int(said[name]) for name in PLACE if name != "MASTER_ADDR")
    except ValueError:
        wrong = next(n for n in PLACE if n != "MASTER_ADDR" and not said[n].lstrip("-").isdigit())
        raise UserError(f"{wrong} must be a whole number, got {said[wrong]!r}") from None
    if not 0 <= rank < size:
        raise UserError(f"RANK must be from 0 to WORLD_SIZE - 1 = {size - 1}, got {rank}")
    return rank, size, local_rank, said["MASTER_ADDR"], port


def _store(rank: int, host: str, port: int, wait_s: float) -> dist.Store:
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun or by `launch`
    try:
        store = dist.TCPStore(
            host,
            port,
            is_master=rank == 0 and not hosted,
            timeout=timedelta(seconds=wait_s),
            wait_for_workers=False,
        )
    except (RuntimeError, dist.DistError, ValueError) as error:
        text = str(error)
        if "EADDRINUSE" in text or "address already in use" in text.lower():
            raise UserError(
                f"port {port} is in use on {host}; set MASTER_PORT (torchrun --master-port) to a free one"
            ) from error
        raise UserError(
            f"no rendezvous at {host}:{port} after {wait_s:g} s ({one_line(error)}); "
            "is rank 0 running, and MASTER_ADDR its address?"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"kairos/{attempt}", store)
