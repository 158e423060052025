"""Muon: momentum whose matrix updates are made orthogonal, and AdamW for everything that is not a matrix.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
torch.optim.Muon takes matrices only; a convolution weight is one here, (out, in * kernel).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kairos.training.parallel import laid_like, whole
from kairos.training.precision import has_bfloat16

TOGETHER = 1 << 24
"""Elements that are made orthogonal at once, at most; of the 4B model's matrices each is more."""


class Muon(torch.optim.Optimizer):
    """Two kinds of parameter group: `muon=True` (orthogonalised momentum) and `muon=False` (AdamW).

    The step of a matrix is scaled by sqrt(max(1, rows / columns)), as in the source.
    """

    def __init__(
        self,
        groups: Iterable[dict],
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(
            groups,
            {
                "lr": 1e-3,
                "weight_decay": 0.0,
                "muon": False,
                "momentum": momentum,
                "betas": betas,
                "eps": eps,
            },
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["weight_decay"]:
                for parameter in trained:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
            if group["muon"]:
                self._muon(trained, group)
                continue
            for parameter in trained:
                self._adamw(parameter, parameter.grad, self.state[parameter], group)

    def _muon(self, parameters: list[nn.Parameter], group: dict) -> None:
        """Small matrices of one shape are made orthogonal together: each alone is too little for a GPU."""
        alike: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            alike.setdefault(parameter.shape, []).append(parameter)
        for shape, members in alike.items():
            rows, columns = shape[0], shape[1:].numel()
            together = max(1, TOGETHER // shape.numel())
            for first in range(0, len(members), together):
                some = members[first : first + together]
                updates = orthogonalise(torch.stack([self._direction(one, group) for one in some]))
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for parameter, update in zip(some, updates, strict=True):
                    parameter.add_(laid_like(update.view(shape), parameter), alpha=-rate)

    def _direction(self, parameter: nn.Parameter, group: dict) -> Tensor:
        """The gradient with its momentum, as a matrix (rows, columns)."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        # A matrix that is spread over processes is put together: orthogonal is a property of the whole.
        return whole(gradient.lerp(momentum, group["momentum"])).flatten(1)

    @staticmethod
    def _adamw(parameter: Tensor, gradient: Tensor, state: dict, group: dict) -> None:
        if not state:
            state["step"] = 0
            state["mean"] = torch.zeros_like(parameter)
            state["square"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean = state["mean"].lerp_(gradient, 1 - beta1)
        square = state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1 ** state["step"]))


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: five Newton-Schulz steps of the quintic of the source.

    Takes (rows, columns), or a batch of them.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(torch.bfloat16 if has_bfloat16(matrix.device.type) else torch.float32)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrix.dtype)


def split_parameters(
    model: nn.Module, *, muon_lr: float, adamw_lr: float, exclude: tuple[str, ...] = ()
) -> list[dict]:
    """Parameter groups of a model: matrices and convolutions to Muon, the rest to AdamW.

    `exclude` names parts (by substring) whose matrices go to AdamW: embeddings and output heads.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            small = sum(size > 1 for size in parameter.shape) < 2 or any(part in name for part in exclude)
            (others if small else matrices).append(parameter)
    return [
        {"params": matrices, "lr": muon_lr, "muon": True},
        {"params": others, "lr": adamw_lr, "muon": False},
    ]
