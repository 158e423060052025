"""The gated linear attention of the LinearDiT: a Gated DeltaNet layer (arXiv 2412.06464).

It is causal along the tokens: splitting a sequence and carrying the state over gives what one pass gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kairos.models.norm import RMSNorm
from kairos.models.tiles import Tiles
from kairos.ops.gated_delta import fused_by_fla, gated_delta_rule

PRECISE = ("A_log", "dt_bias", "a_proj", "b_proj")
"""Parameters of the gates: float32 in a model of half precision too, since errors in a decay multiply."""

CONV_SIZE = 4
"""Tokens that a short convolution sees."""

Projections = tuple[Tensor, Tensor, Tensor]
"""Of queries, keys and values."""


@dataclass(frozen=True)
class DeltaState:
    """What the layer keeps: S (B, H, Dk, Dv), float32, and the last inputs of the convolutions (B, C, 3)."""

    recurrent_state: Tensor
    conv_q: Tensor
    conv_k: Tensor
    conv_v: Tensor


class GatedDeltaNet(nn.Module):
    """q, k, v through short convolutions, the gated delta rule, and a gated norm on the way out."""

    in_segments = True
    """Whether a long sequence may pass a tile at a time, each from the state of the one before."""

    def __init__(self, dim: int, heads: int, head_dim: int, expand_v: int = 2, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        dim_k, dim_v = heads * head_dim, heads * head_dim * expand_v
        self.q_proj = nn.Linear(dim, dim_k, bias=False)
        self.k_proj = nn.Linear(dim, dim_k, bias=False)
        self.v_proj = nn.Linear(dim, dim_v, bias=False)
        self.a_proj = nn.Linear(dim, heads, bias=False)
        self.b_proj = nn.Linear(dim, heads, bias=False)
        self.g_proj = nn.Linear(dim, dim_v, bias=False)
        self.o_proj = nn.Linear(dim_v, dim, bias=False)
        self.q_conv1d = ShortConv(dim_k, CONV_SIZE)
        self.k_conv1d = ShortConv(dim_k, CONV_SIZE)
        self.v_conv1d = ShortConv(dim_v, CONV_SIZE)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.o_norm = RMSNorm(head_dim * expand_v, eps)
        self.reset_gates()

    @torch.no_grad()
    def reset_gates(self) -> None:
        """Memories of a few tokens to a thousand: A in [1, 16], time steps in [0.001, 0.1], as in Mamba2."""
        self.A_log.uniform_(1, 16).log_()
        step = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step

    def forward(self, tiles: Tiles, past: DeltaState | None = None) -> tuple[Tensor, DeltaState]:
        """Mix the tokens along their sequence; also returns the state after the last."""
        kept = past

        def segment(tokens: slice, rows: slice) -> tuple[Tensor]:
            nonlocal kept
            y, kept = self.pass_over(tiles.read(tokens, rows), kept)
            return (tiles.finish(tokens, rows, y),)

        if self.in_segments:
            (out,) = tiles.map(segment)
        else:
            y, kept = self.pass_over(tiles.read(slice(None), slice(None)), past)
            (out,) = tiles.map(lambda tokens, rows: (tiles.finish(tokens, rows, y[:, tokens]),))
        assert kept is not None
        return out, kept

    def pass_over(self, x: Tensor, past: DeltaState | None) -> tuple[Tensor, DeltaState]:
        """All of the layer, for tokens that follow one another."""
        with torch.autocast(x.device.type, enabled=False):
            precise = x.to(self.a_proj.weight.dtype)
            beta = self.b_proj(precise).sigmoid()
            g = -self.A_log.exp() * F.softplus(self.a_proj(precise) + self.dt_bias)
        projections = tuple(
            proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out, kept = self.mix(projections, g, beta, past)
        gate = self.g_proj(x).unflatten(-1, (self.heads, -1))
        return self.o_proj(self.o_norm(out, out.dtype, gate).flatten(2)), kept

    def mix(
        self, projections: Projections, g: Tensor, beta: Tensor, past: DeltaState | None
    ) -> tuple[Tensor, DeltaState]:
        """Convolutions and delta rule: the part that needs whole sequences, head by head.

        projections: q, k, v (B, N, H, D); g, beta (B, N, H). Returns the rule's output (B, N, H, Dv).
        """
        convs = None if past is None else (past.conv_q, past.conv_k, past.conv_v)
        (q, k, v), (conv_q, conv_k, conv_v) = self.convolve(projections, convs)
        out, recurrent_state = gated_delta_rule(
            q, k, v, g, beta, initial_state=None if past is None else past.recurrent_state
        )
        return out, DeltaState(recurrent_state, conv_q, conv_k, conv_v)

    def convolve(
        self, projections: Projections, past: Projections | None, heads: slice = slice(None)
    ) -> tuple[Projections, Projections]:
        """q, k, v of the rule, q and k normalised, and the last inputs (B, C, 3); for a part of the heads."""
        q, k, v = (
            conv(x, None if past is None else past[i], heads)
            for i, (x, conv) in enumerate(
                zip(projections, (self.q_conv1d, self.k_conv1d, self.v_conv1d), strict=True)
            )
        )
        with torch.autocast(q[0].device.type, enabled=False):
            convolved = l2_normalise(q[0], self.head_dim**-0.5), l2_normalise(k[0]), v[0]
        return convolved, (q[1], k[1], v[1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves and casts as every module, but half precision passes the gates and their gradients by."""
        gates = [p for name, p in self.named_parameters() if name.split(".")[0] in PRECISE]
        precise = {id(tensor) for p in gates for tensor in (p, p.grad)}

        def apply(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            kept = id(tensor) in precise and moved.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(moved.device) if kept else moved

        return super()._apply(apply, recurse)


class ShortConv(nn.Conv1d):
    """A causal depthwise convolution and SiLU.

    Its weight is read in its own forward alone: only there do the hooks of diffusers and accelerate, which
    keep weights elsewhere or in another dtype, have it ready.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__(channels, channels, size, groups=channels, bias=False)

    def forward(  # type: ignore[override]
        self, x: Tensor, past: Tensor | None = None, heads: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Of x (B, N, H, D) after `past`, and its last inputs (B, C, kernel - 1), the next call's past.

        With `heads`, x has only those of the convolution's heads.
        """
        size = self.kernel_size[0]
        count, head_dim = x.shape[1], x.shape[-1]
        weight = self.weight.unflatten(0, (-1, head_dim))[heads].flatten(0, 1)
        x = x.flatten(2)
        before = x.new_zeros(x.shape[0], size - 1, x.shape[2]) if past is None else past.mT.to(x.dtype)
        if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled():
            taps = weight[:, 0].mT.contiguous()  # channels stay last, as the rule wants them
            out = x * taps[-1]
            for lag in range(1, size):
                out[:, lag:].addcmul_(x[:, :-lag], taps[-1 - lag])
                out[:, :lag].addcmul_(before[:, size - 1 - lag :][:, :count], taps[-1 - lag])
            out = F.silu(out, inplace=True)
        elif x.is_cuda and torch.compiler.is_compiling():
            out = shifted_conv(torch.cat((before, x), dim=1), weight)
        elif fused_by_fla(x, weight):
            from fla.modules.convolution import causal_conv1d

            state = None if past is None else F.pad(past.to(x.dtype), (1, 0))  # it keeps one input more
            out, _ = causal_conv1d(x, weight[:, 0], initial_state=state, activation="silu")
        else:
            out = F.silu(F.conv1d(torch.cat((before, x), dim=1).mT, weight, groups=len(weight))).mT
        kept = torch.cat((before, x[:, 1 - size :]), dim=1)[:, 1 - size :]
        return out.unflatten(-1, (-1, head_dim)), kept.mT


def shifted_conv(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU of the depthwise convolution of x (B, N + kernel - 1, C), as a sum of x shifted: products in
    float32 that a compiler makes one pass of, where its convolution would want the channels first."""
    size = weight.shape[-1]
    count, dtype = x.shape[1] - size + 1, x.dtype
    x, taps = x.float(), weight[:, 0].float()
    out = x[:, :count] * taps[:, 0]
    for lag in range(1, size):
        out = out + x[:, lag : lag + count] * taps[:, lag]
    return F.silu(out).to(dtype)


def l2_normalise(x: Tensor, length: float = 1.0) -> Tensor:
    """x of this length along its last axis, in float32: length * x * rsqrt(sum x^2 + 1e-6).

    In x's own dtype where fla's rule takes it, which wants no other: there it is a norm's one pass.
    """
    if fused_by_fla(x):
        dim = x.shape[-1]
        weight = x.new_full((dim,), length * dim**-0.5)
        return F.rms_norm(x, (dim,), weight, 1e-6 / dim)
    x = x.float()
    x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
    return x if length == 1 else x * length
