"""The gated delta rule: a linear attention whose state is corrected, not only added to.

    S_t = exp(g_t) S_(t-1);   u_t = beta_t (v_t - S_t^T k_t);   S_t += k_t u_t^T;   o_t = S_t^T q_t

Source: Gated Delta Networks (arXiv 2412.06464), equation 10. Three routes give the same numbers: a loop over
tokens (the reference), the WY form in chunks (arXiv 2406.06484, section 3), and flash-linear-attention's
kernels on CUDA.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from kairos.errors import UserError
from kairos.ops.routes import say_once

logger = logging.getLogger(__name__)

CHUNK = 32
"""Tokens that are solved together."""
SEGMENT = 1024
"""Tokens whose chunks are prepared together: enough for large products, few enough to stay in the cache."""
GONE = -40.0
"""Log-decay from which on what has decayed is taken for 0: beside what has not, it is. Then the product of
two decays is no denormal number, which a CPU multiplies a hundred times slower."""
BACKENDS = ("auto", "reference", "chunked", "fla")


@torch.compiler.disable  # as windowed attention: its walk follows the shapes
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the rule over N tokens.

    Args:
        q, k: (B, N, H, Dk), normalised and scaled by the caller.
        v: (B, N, H, Dv).
        g: log-decay (B, N, H), at most 0.
        beta: strength of the correction (B, N, H), in [0, 1].
        initial_state: (B, H, Dk, Dv), or None for zeros.
        backend: "auto", "reference", "chunked" or "fla".

    Returns:
        The outputs (B, N, H, Dv) in v's dtype, and the state after the last token (B, H, Dk, Dv). The
        recurrence and its state are float32 (float64 where the inputs are), under autocast too.
    """
    if backend not in BACKENDS:
        raise UserError(
            f"backend of the gated delta rule must be one of {', '.join(BACKENDS)}, got {backend!r}"
        )
    if backend == "auto":
        others = (q, k, g, beta) if initial_state is None else (q, k, g, beta, initial_state)
        backend = "fla" if _fla_will_do(v, *others) else "chunked"
    say_once(logger, f"gated delta rule on {q.device.type}: {backend}")
    if backend == "fla":
        return _fla(q, k, v, g, beta, initial_state)
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(v.dtype, torch.float32)
        if initial_state is None:
            initial_state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=dtype)
        rule = _loop if backend == "reference" else _chunked
        out, state = rule(*(x.to(dtype) for x in (q, k, v, g, beta, initial_state)))
    return out.to(v.dtype), state


def _loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The rule as it is written, token by token."""
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        correction = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * correction)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1), state


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The WY form, segment by segment."""
    outputs = []
    for begin in range(0, q.shape[1], SEGMENT):
        part = slice(begin, begin + SEGMENT)
        out, state = _segment(q[:, part], k[:, part], v[:, part], g[:, part], beta[:, part], state)
        outputs.append(out)
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], state


def _segment(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """A few chunks: what does not depend on the state for all of them at once, then a walk over them.

    Inside a chunk with G_t the sum of g up to t,
        u_t = beta_t (v_t - exp(G_t) S_0^T k_t - sum_{s<t} exp(G_t - G_s) (k_t . k_s) u_s),
    a unit lower triangular system (I + A) U = beta V - beta exp(G) K S_0.
    """
    tokens = q.shape[1]
    chunks = -(-tokens // CHUNK)
    size = -(-tokens // chunks)
    q, k, v, g, beta = (_split(x, chunks, size) for x in (q, k, v, g, beta))  # (B, H, chunks, size, ...)

    # In float64: a small decay is the difference of sums which one strong decay makes large.
    total = g.double().cumsum(-1)
    between = (total[..., :, None] - total[..., None, :]).to(q.dtype)
    lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    decay = _decay(between.masked_fill(~lower, -torch.inf))
    grown = _decay(total.to(q.dtype))[..., None]  # since the chunk began
    left = _decay((total[..., -1:] - total).to(q.dtype))[..., None]  # until the chunk ends
    system = (beta[..., None] * (k @ k.mT) * decay).tril(-1)
    # Its inverse, and two products: half the time of solving for as many columns as v and k have.
    eye = torch.eye(size, dtype=q.dtype, device=q.device)
    solve = torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True) * beta[..., None, :]
    u_free, u_state = solve @ v, solve @ (grown * k)
    scores = (q @ k.mT) * decay
    q_state, k_left, kept = q * grown, (k * left).mT, grown[..., -1:, :]

    # One product after the other, so each is one call: heads as one batch, sums inside the products, and into
    # what has just been made (not into `free`, of which autograd allows no part to change).
    walk = (x.flatten(0, 1).unbind(1) for x in (u_free, u_state, q_state, scores, k_left, kept))
    shape, state = state.shape, state.flatten(0, 1)
    outputs = []
    for free, by_state, query, score, key, keep in zip(*walk, strict=True):
        u = torch.baddbmm(free, by_state, state, alpha=-1)
        outputs.append((score @ u).baddbmm_(query, state))
        state = (keep * state).baddbmm_(key, u)
    out = torch.cat(outputs, dim=1).unflatten(0, shape[:2])[:, :, :tokens]
    return out.transpose(1, 2), state.unflatten(0, shape[:2])


def _decay(logarithm: Tensor) -> Tensor:
    return F.threshold(logarithm, GONE, -torch.inf).exp()


def _split(x: Tensor, chunks: int, size: int) -> Tensor:
    """(B, N, H, ...) -> (B, H, chunks, size, ...); tokens of zeros behind the last change nothing."""
    missing = chunks * size - x.shape[1]
    if missing:
        x = torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), dim=1)
    return x.transpose(1, 2).unflatten(2, (chunks, size))


def _fla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """flash-linear-attention's kernel; its own recurrence and state are float32."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    # The kernel wants q, k, v in one dtype and g in float32.
    out, state = chunk_gated_delta_rule(
        q.to(v.dtype),
        k.to(v.dtype),
        v,
        g.float(),
        beta.to(v.dtype),
        scale=1.0,
        initial_state=state,
        output_final_state=True,
    )
    return out, state


def fused_by_fla(x: Tensor, *others: Tensor) -> bool:
    """Whether its kernels are taken for what goes into the rule and comes out of it: each is one pass over
    memory, where torch makes several. A compiler makes one of torch's by itself."""
    return not torch.compiler.is_compiling() and _fla_will_do(x, *others)


def _fla_will_do(x: Tensor, *others: Tensor) -> bool:
    """Whether its kernels run for x, with these beside it, and keep its precision.

    In inference only: its backward (fla-core 0.6) refuses to run on Hopper with Triton before 3.7.1. And not
    in float32, whose products it makes in TF32.
    """
    trained = torch.is_grad_enabled() and any(each.requires_grad for each in (x, *others))
    half = x.dtype in (torch.float16, torch.bfloat16)
    return x.is_cuda and half and not trained and _fla_is_installed()


@cache
def _fla_is_installed() -> bool:
    return find_spec("fla") is not None
