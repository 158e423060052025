"""Which route an operation takes: said once, and where several would do, the one measured quickest."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

RUNS = 3
_SAID: set[str] = set()
_CHOSEN: dict[Hashable, str] = {}


def say_once(logger: logging.Logger, message: str) -> None:
    """Log `message` at INFO the first time it comes."""
    if not torch.compiler.is_compiling() and message not in _SAID:
        _SAID.add(message)
        logger.info(message)


def quickest(name: str, routes: Mapping[str, Callable[..., Tensor]], inputs: tuple[Tensor, ...]) -> Tensor:
    """The result by the route that was quickest when inputs of these shapes first came.

    The first route is trusted and always runs. Another is taken only where it runs and its results are the
    first one's, to the precision of their dtype; what is left out, and why, is logged, and so are the times.
    By results that are no numbers nothing can be chosen: then the first is taken, this time.

    Args:
        name: of the operation, with all besides the inputs that decides what is quick.
        routes: functions of the inputs.
    """
    like = inputs[0]
    grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    key = (name, *routes, like.dtype, like.device, grad, *(tensor.shape for tensor in inputs))
    if key not in _CHOSEN:
        with torch.no_grad():
            chosen = _measure(name, routes, inputs)
        if chosen is None:
            return next(iter(routes.values()))(*inputs)
        _CHOSEN[key] = chosen
    return routes[_CHOSEN[key]](*inputs)


def _measure(
    name: str, routes: Mapping[str, Callable[..., Tensor]], inputs: tuple[Tensor, ...]
) -> str | None:
    device = inputs[0].device
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    first, *_ = routes
    expected = routes[first](*inputs)
    if not expected.isfinite().all():
        return None
    tolerance = 8 * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    seconds: dict[str, float] = {}
    for route, function in routes.items():
        try:
            difference = (function(*inputs) - expected).abs().max().item()  # also the warm-up
            if not difference <= tolerance:
                logger.warning("%s: %s is off by %.1e, and left out", name, route, difference)
                continue
            times = []
            for _ in range(RUNS):
                wait()
                since = time.perf_counter()
                function(*inputs)
                wait()
                times.append(time.perf_counter() - since)
            seconds[route] = min(times)
        except Exception as error:
            if route == first:
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.info("%s: %s does not run here: %s", name, route, reason)
    chosen = min(seconds, key=seconds.__getitem__)
    shown = ", ".join(f"{route} {1e3 * taken:.3g} ms" for route, taken in seconds.items())
    logger.info("%s on %s: %s (%s)", name, device.type, chosen, shown)
    return chosen
