"""The norm of queries, keys and the gated delta layer's output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kairos.ops.gated_delta import fused_by_fla


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight over the last axis, in float32 whatever the model's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, dtype: torch.dtype = torch.float32, gate: Tensor | None = None) -> Tensor:
        """The norm of x, times SiLU(gate) where there is one; rounded once, to `dtype`."""
        if gate is not None:
            if x.dtype == dtype and fused_by_fla(x, gate, self.weight):
                from fla.modules.fused_norm_gate import rms_norm_gated

                return rms_norm_gated(x, gate, self.weight, None, eps=self.eps)
            return (self.forward(x) * F.silu(gate)).to(dtype)
        if x.is_cuda and x.dtype == self.weight.dtype == dtype:  # its kernel is float32 inside
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps).to(dtype)
        x, weight = x.float(), self.weight.float()
        if x.device.type != "cpu" or torch.is_grad_enabled():
            return F.rms_norm(x, x.shape[-1:], weight, self.eps).to(dtype)
        # A CPU has no kernel for it and makes five passes; this is two, in a quarter of the time.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * torch.rsqrt(length.square() / x.shape[-1] + self.eps)).mul_(weight).to(dtype)
