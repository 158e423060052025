"""Who does the work: child processes, so that a decoder that crashes or hangs takes down its clip only.

`run_locally` and `run_on_ray` are the two executors: (items, count of workers) in, (item, result) pairs out
as they come. Both put each task into a `Worker`; what is run where does not change a result.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from kairos.errors import MachineError
from kairos.process import end_with

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = dict[str, Any]
"""What a task gives; of one that could not be done, {"failed": reason}, and {"machine": what} where no other
can be done either."""

_PARENT: list[Any] = []  # in a child: the connection to who waits for its results


def still_working() -> None:
    """Called by a long task now and then: the time that it has begins anew."""
    for connection in _PARENT:
        connection.send(None)


class Worker(Generic[Item]):
    """One child process that runs `task` on one item after another, and is replaced where it dies."""

    def __init__(self, task: Callable[[Item], Result], limit_s: float, memory_gb: float) -> None:
        self._task, self._limit_s, self._memory_gb = task, limit_s, memory_gb
        self._process: Any = None
        self._began = 0.0
        self.item: Item | None = None
        self.connection: Any = None

    def begin(self, item: Item) -> None:
        """Send an item; `hear` gives its result."""
        if self._process is None or not self._process.is_alive():
            self._start()
        self.item, self._began = item, time.monotonic()
        with suppress(ConnectionError):  # a child that has just died: `hear` tells of it
            self.connection.send(item)

    @property
    def left_s(self) -> float:
        """Seconds until the time of the task is up, unless it says before that it is still working."""
        return self._began + self._limit_s - time.monotonic()

    def hear(self) -> Result | None:
        """The result of what was begun; None where the child says that it is still working.

        Waits for one of the two, for the child's death, or for the end of its time.
        """
        result: Result | None
        try:
            if self.connection.poll(max(0.0, self.left_s)):
                result = self.connection.recv()
                if result is None:
                    self._began = time.monotonic()
                    return None
            else:
                result = {"failed": f"hung: nothing was heard for {self._limit_s:g} s (limits.task_s)"}
                self.stop()
        except (EOFError, ConnectionError):
            self._process.join(5)
            code = self._process.exitcode
            result = {"failed": f"crashed: the decoder's process ended with {_ending(code)}"}
            self.stop()
        self.item = None
        return result

    def stop(self) -> None:
        """End the child, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self.connection.close()
        self._process = None

    def _start(self) -> None:
        self.stop()
        context = multiprocessing.get_context("spawn")  # threads of a library do not outlive a fork whole
        self.connection, theirs = context.Pipe()
        arguments = (theirs, self._task, self._memory_gb, os.getpid())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()


def run_locally(
    task: Callable[[Item], Result], items: Iterable[Item], *, workers: int, limit_s: float, memory_gb: float
) -> Generator[tuple[Item, Result], None, None]:
    """Run `task` on every item, in `workers` child processes; the pairs come in the order they end in."""
    pool: list[Worker[Item]] = [Worker(task, limit_s, memory_gb) for _ in range(workers)]
    waiting = iter(items)
    busy: list[Worker[Item]] = []
    try:
        while True:
            for worker in pool:
                if worker.item is None and (item := next(waiting, None)) is not None:
                    worker.begin(item)
                    busy.append(worker)
            if not busy:
                return
            patience = max(0.0, min(worker.left_s for worker in busy))
            ready = multiprocessing.connection.wait([worker.connection for worker in busy], patience)
            for worker in [w for w in busy if w.connection in ready or w.left_s <= 0]:
                item = worker.item
                assert item is not None
                if (result := worker.hear()) is not None:
                    busy.remove(worker)
                    yield item, result
    finally:
        for worker in pool:
            worker.stop()


def run_on_ray(
    task: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    limit_s: float,
    memory_gb: float,
) -> Generator[tuple[Item, Result], None, None]:
    """The same on the Ray cluster that this process is connected to, by Ray Data: an actor a core, in each of
    them a `Worker`. The cluster's machines must see the input and the output by the same paths.
    """
    pending = list(items)
    if not pending:
        return
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [{"index": index} for index in range(len(pending))]
    found = ray.data.from_items(rows, override_num_blocks=min(len(rows), 4 * workers)).map_batches(
        _Isolated,
        fn_constructor_args=(task, ray.put(pending), limit_s, memory_gb),
        batch_size=1,
        concurrency=min(workers, len(rows)),
        num_cpus=1,
        batch_format="numpy",
    )
    for row in found.iter_rows():
        yield pending[int(row["index"])], _unpacked(row["result"])


class _Isolated:
    """Ray Data's actor. What crashes is the child of this one; the actor lives on."""

    def __init__(self, task: Callable[[Any], Result], items: Any, limit_s: float, memory_gb: float) -> None:
        import ray

        self._items = ray.get(items) if isinstance(items, ray.ObjectRef) else items
        self._worker: Worker[Any] = Worker(task, limit_s, memory_gb)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import json

        import numpy as np

        results = []
        for index in batch["index"]:
            self._worker.begin(self._items[int(index)])
            while (result := self._worker.hear()) is None:
                pass
            results.append(json.dumps(result))
        return {"index": batch["index"], "result": np.array(results, dtype=object)}


def _unpacked(result: Any) -> Result:
    import json

    unpacked: Result = json.loads(result)
    return unpacked


def _serve(connection: Any, task: Callable[[Any], Result], memory_gb: float, parent: int) -> None:
    """The life of a child: item in, result out, until nobody is there."""
    import resource
    import signal

    from kairos.curation.source import Refused

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends us
    end_with(parent)
    limit = int(memory_gb * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _single_threaded()
    _PARENT.append(connection)
    while True:
        try:
            item = connection.recv()
        except (EOFError, OSError):
            return
        try:
            result = task(item)
        except Refused as refusal:
            result = {"refused": str(refusal)} | refusal.facts
        except MemoryError:
            result = {"failed": f"memory: more than {memory_gb:g} GB asked for (limits.memory_gb)"}
        except MachineError as error:
            result = {"machine": str(error)}
        except Exception as error:
            logger.debug("a task failed", exc_info=True)
            said = " ".join(str(error).split())[:200]
            result = {"failed": f"error: {type(error).__name__}: {said}"}
        try:
            connection.send(result)
        except OSError:
            return


def _single_threaded() -> None:
    """One core a worker: more would only get in each other's way, and core-hours would mean nothing."""
    import cv2

    cv2.setNumThreads(1)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"


def _ending(code: int | None) -> str:
    import signal

    if code is not None and code < 0:
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"status {code}"
