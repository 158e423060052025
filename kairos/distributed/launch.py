"""Starts ranks on this machine and ends them together.

A function runs in as many processes, told of their places as torchrun would. When one raises or dies, all end
within seconds, and its error is raised here, once.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tqdm import tqdm

from kairos.errors import MachineError, UserError

logger = logging.getLogger(__name__)

SETTLE_S = 0.7
"""After a first failure: for the report of a rank that died, which others may notice before it is seen."""
END_S = 3.0
"""For ranks to end by themselves before they are killed."""
PRELOADED = ["kairos.pipeline", "kairos.presets", "kairos.distributed.parallel", "kairos.distributed.ranks"]


class RankError(RuntimeError):
    """A rank failed by a bug; its own traceback is in the message."""


def launch(function: Callable[..., Any], arguments: Sequence[Any] = (), *, size: int) -> list[Any]:
    """`function(*arguments)` in `size` processes; returns what each rank returned.

    The function and its arguments are pickled. Ctrl-C here ends the ranks, and so does this process's end.

    Raises:
        UserError, MachineError: as a rank raised it; MachineError too for a rank that died.
        RankError: for any other error of a rank, with its traceback.
    """
    from torch.distributed import TCPStore

    # Port 0: the system picks a free one, and it is taken from then on.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context: Any = _context()
    ranks: list[BaseProcess] = []
    ears: list[Connection] = []
    # Ranks write where this process writes now, not where it did when the first of them were started.
    voices = {fd: Connection(os.dup(fd), readable=False) for fd in (1, 2)} if os.name == "posix" else {}
    try:
        for rank in range(size):
            ear, mouth = context.Pipe(duplex=False)
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": size,
                "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": store.port,
                "TORCHELASTIC_USE_AGENT_STORE": True,
            }
            process = context.Process(
                target=_run,
                args=(function, tuple(arguments), place, mouth, voices),
                name=f"kairos rank {rank}",
            )
            process.start()
            mouth.close()
            ranks.append(process)
            ears.append(ear)
        return _results(ranks, ears)
    finally:
        _end(ranks)
        for connection in (*ears, *voices.values()):
            connection.close()


def _context() -> Any:
    """Processes forked off one that has imported everything: they start quickly and share its memory."""
    import torch

    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # What is imported asks for GPUs, and what is forked off a process that has found some cannot use them.
    context.set_forkserver_preload([] if torch.cuda.device_count() else PRELOADED)
    if threading.current_thread() is threading.main_thread():
        # Ctrl-C reaches all processes of a terminal; this one alone answers it, and ends the others.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, before)
    return context


def _run(
    function: Callable[..., Any],
    arguments: tuple,
    place: dict[str, Any],
    mouth: Connection,
    voices: dict[int, Connection],
) -> None:
    """What a rank's process does."""
    _end_with(multiprocessing.parent_process())
    for fd, voice in voices.items():
        os.dup2(voice.fileno(), fd)
    # By default tqdm's lock is a semaphore of the system, which is complained of when its process is ended.
    tqdm.set_lock(threading.RLock())
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        answer: tuple = ("done", function(*arguments))
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as error:
        answer = ("error", f"left with status {error.code}", "left")  # it had nothing to say
    except BaseException as error:
        kind = (
            "user"
            if isinstance(error, UserError)
            else "machine"
            if isinstance(error, MachineError)
            else "bug"
        )
        answer = ("error", str(error) if kind != "bug" else traceback.format_exc(), kind)
    try:
        mouth.send(answer)
    except (pickle.PicklingError, AttributeError, TypeError):
        mouth.send(("error", f"a rank's result cannot be sent: {answer[1]!r}"[:400], "bug"))
    if answer[0] == "error":
        # Leaving would close this rank's connections, and the others would complain of that.
        time.sleep(10 * END_S)
        sys.exit(1)


def _end_with(parent: BaseProcess | None) -> None:
    """End this process when its parent does, however that ended."""

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def _results(ranks: Sequence[BaseProcess], ears: Sequence[Connection]) -> list[Any]:
    """Wait for all ranks; raise what went wrong first."""
    answers: dict[int, tuple] = {}
    failures: list[tuple[int, str, str]] = []
    deadline: float | None = None
    while len(answers) < len(ranks) and (deadline is None or time.monotonic() < deadline):
        open_ranks = [rank for rank in range(len(ranks)) if rank not in answers]
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        wait([source for r in open_ranks for source in (ears[r], ranks[r].sentinel)], timeout=left)
        for rank in open_ranks:
            answer = _answer(ranks[rank], ears[rank])
            if answer is None:
                continue
            answers[rank] = answer
            if answer[0] != "done":
                failures.append((rank, *answer[1:]))
                deadline = deadline or time.monotonic() + SETTLE_S
    if not failures:
        for process in ranks:
            process.join(END_S)
        return [answers[rank][1] for rank in range(len(ranks))]
    order = {"death": 0, "user": 1, "machine": 1, "bug": 1, "left": 2}
    rank, message, kind = min(failures, key=lambda failure: order[failure[2]])
    where = f"rank {rank} of {len(ranks)}"
    if kind == "user":
        raise UserError(message)
    if kind in ("death", "left"):
        raise MachineError(f"{where} {message}; the other ranks are ended")
    if kind == "machine":
        raise MachineError(f"{where}: {message}")
    raise RankError(f"{where} failed:\n{message}")


def _answer(process: BaseProcess, ear: Connection) -> tuple | None:
    """What a rank said, or how it ended without a word; None while it is at work."""
    gone = process.exitcode is not None  # before the pipe is read: what was said before the end is in it
    try:
        if ear.poll():
            return ear.recv()
    except (EOFError, OSError):
        process.join(END_S)
        gone = True
    if not gone:
        return None
    code = process.exitcode
    if code == 130:
        raise KeyboardInterrupt
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        memory = ", as a machine does that is out of memory" if name == "SIGKILL" else ""
        return "error", f"was killed by {name}{memory}", "death"
    return "error", f"ended with status {code} without a word", "death"


def _end(ranks: Sequence[BaseProcess]) -> None:
    for process in ranks:
        if process.is_alive():
            process.terminate()
    deadline = time.monotonic() + END_S
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
