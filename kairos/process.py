"""What a process knows of itself: its memory, and whose child it is."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time

KEPT = 512 << 20
"""Bytes at the end of the heap that are kept."""
LARGEST = 32 << 20
"""Bytes of the largest tensor that the heap has room for: the most that glibc allows."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones.

    By itself it gives that of large ones back to the system at once and asks for it anew, and the system
    fills it with zeros, page by page: a seventh of the time in which kairos-tiny decodes frames on a CPU.
    Nothing is changed with another library, nor where the environment says what to do (MALLOC_..._).
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_MMAP_THRESHOLD, LARGEST)
    mallopt(_TRIM_THRESHOLD, KEPT)


def peak_gb() -> float | None:
    """The most memory that this process has held so far; None where nobody says, as on Windows."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def end_with(parent: int) -> None:
    """From now on, end this process when its parent is gone: a killed run leaves nothing running."""

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
