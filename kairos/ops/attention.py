"""Softmax attention under a mask, by the product that is fastest where it runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EXPLICIT_SCORES = 1 << 24
"""Up to so many scores they are held whole while training on a CPU."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T D^-0.5) v.

    q (B, H, N, D), k and v (B, H, M, D), mask (broadcast to B, H, N, M) true where a query sees a key; each
    query sees one at least. Returns (B, H, N, D) in v's dtype.
    """
    scores = q.shape[:3].numel() * k.shape[2]
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if trained and q.device.type == "cpu" and q.dtype == torch.bfloat16 and scores <= EXPLICIT_SCORES:
        return _explicit(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_and_sum(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> tuple[Tensor, Tensor]:
    """As `attend`, without a mask or with query i seeing keys 0 .. i; and the log of each query's sum of
    exponentials, (B, H, N, 1) float32, by which parts are merged. For inference."""
    aten = torch.ops.aten
    if q.is_cuda:
        out, total = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    else:
        out, total = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out, total.reshape(*q.shape[:3], 1)


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """With the scores written out: back through the CPU's fused product takes 3 to 8 times as long."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
