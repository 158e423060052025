"""What a command runs on: device, precision, memory, and the libraries that a model needs."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kairos.cli.console import hush
from kairos.errors import MachineError, UserError, one_line
from kairos.process import peak_gb

DTYPES = ("auto", "float32", "bfloat16", "float16")


def import_libraries() -> None:
    """Import what a model runs on, and have it say nothing of its insides.

    Thousands of modules are most of a cold start. Hardly any of what they make is garbage, and Python's
    collector would go through all of it again and again: it rests meanwhile, and leaves it alone later.
    """
    hush()
    first, collects = "kairos.pipeline" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        import kairos.pipeline  # noqa: F401, for the rest that it imports
    finally:
        if collects:
            gc.enable()
    if first:
        gc.freeze()
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def device_and_dtype(device: str, dtype: str) -> tuple[Any, Any]:
    """torch's own of what the command line says. Raises UserError for a device that cannot be used.

    A GPU that is named becomes the current one: memory is asked for, and streams are made, without a number.
    """
    import torch

    name = device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
        torch.empty(1, device=found).cpu()
        if found.type == "cuda" and found.index is not None:
            torch.cuda.set_device(found)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"device {device!r} cannot be used: {one_line(error)}; try --device cpu") from error
    return found, dtype_for(found, dtype)


def dtype_for(device: Any, dtype: str) -> Any:
    """What "auto" is: float32 on a CPU, where it is the quickest, and bfloat16 elsewhere."""
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    return dtype_named(dtype)


def dtype_named(name: str) -> Any:
    import torch

    return getattr(torch, name)


def free_gb(device: Any) -> float:
    """What the device's memory has free, in GB; of the machine's, what programs can have."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    try:
        said = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(said.split("MemAvailable:")[1].split()[0]) * 1024 / 1e9
    except (OSError, IndexError, ValueError):
        raise UserError("--memory auto cannot tell how much memory is free; give it in GB") from None


def peak_memory() -> str:
    """The most memory that this process has held so far, on the machine and on the GPU."""
    import torch

    said = "unknown" if (peak := peak_gb()) is None else f"{peak:.2f} GB"
    if torch.cuda.is_available():
        said += f", {torch.cuda.max_memory_allocated() / 1e9:.2f} GB on the GPU"
    return said


@contextmanager
def explained_memory(
    less: str = "a smaller size, fewer frames, --tiled or --free-encoder",
) -> Iterator[None]:
    """Too little memory, on whichever device, is the machine's failure and not a bug. `less`: what would need
    less of it."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise MachineError(f"compiling failed: {reason}; leave out --compile") from error
        if type(error).__name__ != "OutOfMemoryError" and "DefaultCPUAllocator" not in str(error):
            raise
        raise MachineError(f"not enough memory on the device; try {less}") from error
