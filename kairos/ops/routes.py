"""Which route an operation takes: said once, and where several would do, the one measured quickest."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

logger = logging.getLogger(__name__)

Route = Callable[..., Tensor]

RUNS = 3
ROUNDINGS = 8
"""Of the largest value, in its dtype: how far a route may be off in its result."""
ROUNDINGS_OF_GRADIENTS = 32
"""And in its gradients, which are products of what was rounded."""
_SAID: set[str] = set()
_CHOSEN: dict[Hashable, str] = {}


def say_once(logger: logging.Logger, message: str) -> None:
    """Log `message` at INFO the first time it comes."""
    if not torch.compiler.is_compiling() and message not in _SAID:
        _SAID.add(message)
        logger.info(message)


def quickest(name: str, routes: Mapping[str, Route], inputs: tuple[Tensor, ...]) -> Tensor:
    """The result by the route that was quickest when inputs of these shapes first came.

    The first route is trusted and always runs. Another is taken only where it runs and its results are the
    first one's, to the precision of their dtype; what is left out, and why, is logged, and so are the times.
    Where gradients are wanted, they count as results do, and the way back is timed too. By results that are
    no numbers nothing can be chosen: then the first is taken, this time.

    Args:
        name: of the operation, with all besides the inputs that decides what is quick.
        routes: functions of the inputs.
    """
    like = inputs[0]
    grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    key = (name, *routes, like.dtype, like.device, grad, *(tensor.shape for tensor in inputs))
    if key not in _CHOSEN:
        chosen = _measure(name, routes, inputs, grad)
        if chosen is None:
            return next(iter(routes.values()))(*inputs)
        _CHOSEN[key] = chosen
    return routes[_CHOSEN[key]](*inputs)


def _results(route: Route, inputs: tuple[Tensor, ...], grad: bool) -> tuple[Tensor, ...]:
    """What the route gives and, where `grad`, of its sum the gradient for each input."""
    if not grad:
        with torch.no_grad():
            return (route(*inputs),)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    # Or activation checkpointing, which may be around this, would count what is kept here among its own.
    with saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
        out = route(*leaves)
        return out.detach(), *torch.autograd.grad(out.sum(), leaves)


def _measure(name: str, routes: Mapping[str, Route], inputs: tuple[Tensor, ...], grad: bool) -> str | None:
    device = inputs[0].device
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    first, *_ = routes
    expected = _results(routes[first], inputs, grad)
    if not all(each.isfinite().all() for each in expected):
        return None
    seconds: dict[str, float] = {}
    for route, function in routes.items():
        try:
            if said := _differs(_results(function, inputs, grad), expected):  # also the warm-up
                logger.warning("%s: %s is off by %s, and left out", name, route, said)
                continue
            times = []
            for _ in range(RUNS):
                wait()
                since = time.perf_counter()
                _results(function, inputs, grad)
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


def _differs(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str:
    """How far the result, or else a gradient, is from what it should be; empty where it is near enough."""
    for place, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        roundings = ROUNDINGS_OF_GRADIENTS if place else ROUNDINGS
        tolerance = roundings * torch.finfo(theirs.dtype).eps * theirs.abs().max().item()
        difference = (mine - theirs).abs().max().item()
        if not difference <= tolerance:
            return f"{difference:.1e}" + " in a gradient" * (place > 0)
    return ""
