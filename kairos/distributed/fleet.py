"""A Ray cluster; a list of tasks on it, an actor with its own model for each GPU, retries when one dies."""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kairos.errors import MachineError, UserError, one_line

logger = logging.getLogger(__name__)

PROBE_S = 5.0
"""Ray itself tries an address where nothing answers for minutes."""


@contextmanager
def cluster(address: str, *, workers: int | None, on_gpus: bool) -> Iterator[tuple[Any, int]]:
    """Ray, connected to `address`, and how many workers it has room for.

    address: "local" starts one here, for as long as it is needed; a process that is connected stays where it
    is. workers: how many to have; None is one for each GPU, or each core.

    Raises:
        UserError: where Ray is not installed, nobody is at the address, or it has too few GPUs or cores.
        MachineError: where "local" does not start.
    """
    check_address(address)
    import ray

    connected = ray.is_initialized()
    if not connected:
        connect(ray, address, workers or 1, on_gpus)
    try:
        kind = "GPU" if on_gpus else "CPU"
        there = int(ray.cluster_resources().get(kind, 0))
        wanted = workers or there
        if not 1 <= wanted <= there:
            others = "--device cpu --gpus N runs on CPUs" if on_gpus else "start it with some"
            fix = f"ask for {there} at most" if there else others
            raise UserError(f"{workers or 'all'} {kind}s are asked for and Ray has {there or 'none'}; {fix}")
        free = wanted if address == "local" else int(ray.available_resources().get(kind, 0))
        if free < wanted:
            logger.warning("of %d %ss %d are free; the others are used once they are", wanted, kind, free)
        yield ray, wanted
    finally:
        if not connected:
            ray.shutdown()


def connect(ray: Any, address: str, cores: int, on_gpus: bool) -> None:
    """Start Ray here, with so many cores where it is not for GPUs, or connect to where it is."""
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        options["include_dashboard"] = False
        options |= {} if on_gpus else {"num_cpus": cores, "num_gpus": 0}
    else:
        probe(address)
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises bare ones, too
        if address == "local":
            raise MachineError(f"Ray does not start on this machine: {one_line(error)}") from error
        raise UserError(f"no Ray at {address} ({one_line(error)}); start one, or take --ray local") from error


def check_address(address: str) -> tuple[str, int] | None:
    """Host and port of Ray's address, if it has some. UserError where Ray is missing, or this is no address:
    to be known before any work."""
    try:
        import ray  # noqa: F401
    except ImportError:
        extras = '"kairos-world[ray]", for curation "kairos-world[curation]"'
        raise UserError(f"Ray is missing; pip install {extras}") from None
    if address in ("local", "auto"):
        return None
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--ray must be local, auto, HOST:PORT or ray://HOST:PORT, got {address!r}")
    return host, int(port)


def probe(address: str) -> None:
    """Refuse an address where nobody answers."""
    if (place := check_address(address)) is None:
        return
    try:
        socket.create_connection(place, timeout=PROBE_S).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"no Ray at {address} ({reason}); start one, or take --ray local") from error


def run_tasks(
    ray: Any,
    start_worker: Callable[[], Any],
    tasks: Mapping[int, Any],
    *,
    workers: int,
    retries: int,
    again: Callable[[Any], str] = lambda answer: "",
) -> Iterator[tuple[int, Any]]:
    """The number of each task, its key in `tasks`, and its answer, `worker.run.remote(task)`, as they come.

    Workers load side by side, and each is given a task when it is ready. One that cannot start is done
    without where there are others. A task whose worker dies goes to another, up to `retries` times, and so
    does one whose answer is to be had `again`, which says why. What fails to the end has its exception as
    answer, and so has what still waits when no worker can start any more.

    Raises:
        MachineError: when no worker can start, and nothing was answered.
    """
    waiting = deque(tasks)
    failures = dict.fromkeys(tasks, 0)
    running: dict[Any, tuple[int, Any]] = {}
    starting: dict[Any, Any] = {}
    idle: list[Any] = []
    answered = False
    while waiting or running:
        while waiting and idle:
            number, worker = waiting.popleft(), idle.pop()
            running[worker.run.remote(tasks[number])] = number, worker
        while len(starting) < min(len(waiting), workers - len(running)):
            worker = start_worker()
            starting[worker.ready.remote()] = worker
        (done, *_), _ = ray.wait([*running, *starting], num_returns=1)
        if done in starting:
            worker = starting.pop(done)
            try:
                ray.get(done)
                idle.append(worker)
            except ray.exceptions.RayError as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
                if not (running or starting):
                    nobody = MachineError(f"a worker cannot start: {reason}")
                    if not answered:
                        raise nobody from error
                    yield from ((number, nobody) for number in waiting)
                    return
                logger.warning("a worker cannot start, the others go on: %s", reason)
                workers -= 1
            continue
        number, worker = running.pop(done)
        try:
            answer = ray.get(done)
            failure = again(answer)
            idle.append(worker)
        except ray.exceptions.RayError as error:
            answer, failure = error, one_line(error)
            if not isinstance(error, ray.exceptions.RayActorError):
                idle.append(worker)
        failures[number] += bool(failure)
        if failure and failures[number] <= retries:
            logger.warning("request %d is tried again: %s", number, failure)
            waiting.append(number)
        else:
            answered = True
            yield number, answer
