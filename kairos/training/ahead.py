"""What steps to come will need, made by other processes while a GPU is busy with the step at hand."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, Generic, TypeVar

import torch

from kairos.process import end_with

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")

MOST_WORKERS = 14
"""For one process that trains; each holds its own copy of what it has touched."""

GRACE_S = 60.0
"""How long a worker goes on after SIGTERM: its pool sends one as well, where another worker has died."""

_make: Callable[[Any], Any] | None = None


class Ahead(Generic[Key, Made]):
    """Calls of a function that other processes have begun before their results are asked for.

    The processes are forks: the function may close over anything, and must not touch a GPU. Results come
    back as bytes, not as shared memory, of which a system gives only so many pieces. Without workers a call
    is made when its result is asked for, in this process.
    """

    def __init__(self, make: Callable[[Key], Made], workers: int) -> None:
        self.make, self.workers = make, workers
        self._begun: dict[Key, Future[bytes]] = {}
        self._pool: ProcessPoolExecutor | None = None

    def begin(self, keys: Iterable[Key]) -> None:
        """Have the calls of these keys made; those that are being made already are left alone."""
        if not self.workers:
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.workers,
                mp_context=get_context("fork"),
                initializer=_become_worker,
                initargs=(self.make, os.getpid()),
            )
        for key in keys:
            if key not in self._begun:
                self._begun[key] = self._pool.submit(_call, key)

    def get(self, key: Key) -> Made:
        """The result of a key: waited for where it was begun, else made here."""
        begun = self._begun.pop(key, None)
        if begun is None:
            return self.make(key)
        try:
            return pickle.loads(begun.result())
        except BrokenProcessPool:  # one has died; the others would be waited for until their grace is over
            for worker in list((getattr(self._pool, "_processes", None) or {}).values()):
                worker.kill()
            raise

    def close(self) -> None:
        """End the workers; what they have begun is lost."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None
        self._begun.clear()

    def __enter__(self) -> Ahead[Key, Made]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def workers_for(device: torch.device | str) -> int:
    """As many as there are spare cores beside a GPU, for each process that trains on this machine; none on a
    CPU, whose cores do the step's own work."""
    if torch.device(device).type == "cpu" or not hasattr(os, "sched_getaffinity"):
        return 0
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(cores - 2, MOST_WORKERS))


def _become_worker(make: Callable[[Any], Any], parent: int) -> None:
    """Ctrl-C and SIGTERM, which come to a whole group of processes, are the parent's to answer: it may need
    the worker to finish its step. A worker does not outlive it."""
    global _make
    _make = make
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _end_later())
    torch.set_num_threads(1)
    end_with(parent)


def _end_later() -> None:
    ending = threading.Timer(GRACE_S, os._exit, (1,))
    ending.daemon = True
    ending.start()


def _call(key: Any) -> bytes:
    assert _make is not None
    return pickle.dumps(_make(key), protocol=pickle.HIGHEST_PROTOCOL)
