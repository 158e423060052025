"""The gated delta rule: the chunked form equals the loop, state and gradients with it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kairos import UserError
from kairos.ops.gated_delta import gated_delta_rule


def random_inputs(tokens: int, *, batch: int = 2, heads: int = 3, decay: float = 0.5, seed: int = 0) -> list:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    q, k = (F.normalize(normal(batch, tokens, heads, 16), dim=-1) for _ in range(2))
    g = -decay * torch.rand(batch, tokens, heads, generator=generator)
    beta = torch.rand(batch, tokens, heads, generator=generator)
    return [q, k, normal(batch, tokens, heads, 24), g, beta, normal(batch, heads, 16, 24)]


@pytest.mark.parametrize("tokens", [1, 5, 63, 64, 65, 144, 512, 513, 1100])
@pytest.mark.parametrize("decay", [0.01, 3.0, 10.0])
def test_the_chunked_form_equals_the_loop(tokens, decay):
    *inputs, state = random_inputs(tokens, decay=decay)
    expected = gated_delta_rule(*inputs, initial_state=state, backend="reference")
    found = gated_delta_rule(*inputs, initial_state=state)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_tokens_that_forget_all_cost_those_that_forget_nothing_no_precision():
    *inputs, state = random_inputs(512)
    inputs[3] = torch.where(inputs[3] < -0.25, -300.0, 0.01 * inputs[3])
    expected = gated_delta_rule(
        *(x.double() for x in inputs), initial_state=state.double(), backend="reference"
    )
    found = gated_delta_rule(*inputs, initial_state=state)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=0)


def test_the_loop_is_the_rule_of_the_paper():
    """One head in float64: the state as a matrix, equation 10 with the transition written out."""
    q, k, v, g, beta, state = (x.double()[0] for x in random_inputs(9, batch=1, heads=1))
    out, last = gated_delta_rule(
        *(x[None] for x in (q, k, v, g, beta)), initial_state=state[None], backend="reference"
    )
    s = state[0]
    for t in range(9):
        key = k[t, 0]
        transition = g[t, 0].exp() * (torch.eye(16).double() - beta[t, 0] * torch.outer(key, key))
        s = transition @ s + beta[t, 0] * torch.outer(key, v[t, 0])
        torch.testing.assert_close(out[0, t, 0], s.T @ q[t, 0])
    torch.testing.assert_close(last[0, 0], s)


@pytest.mark.parametrize("tokens", [7, 130])
def test_gradients_equal_those_of_the_loop(tokens):
    inputs = [x.requires_grad_() for x in random_inputs(tokens)]
    gradients = []
    for backend in ("reference", "chunked"):
        out, state = gated_delta_rule(*inputs[:5], initial_state=inputs[5], backend=backend)
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + state.square().sum()
        gradients.append(torch.autograd.grad(loss, inputs))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cut", [1, 64, 100, 600])
def test_a_sequence_may_be_cut_anywhere(cut):
    *inputs, _ = random_inputs(700)
    whole, state = gated_delta_rule(*inputs)
    first, carried = gated_delta_rule(*(x[:, :cut] for x in inputs))
    second, last = gated_delta_rule(*(x[:, cut:] for x in inputs), initial_state=carried)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(last, state, atol=1e-5, rtol=0)


def test_later_tokens_do_not_change_earlier_ones_by_a_bit():
    *inputs, _ = random_inputs(150)
    before, _ = gated_delta_rule(*inputs)
    other = random_inputs(150, seed=1)
    after, _ = gated_delta_rule(
        *(torch.cat((x[:, :70], y[:, 70:]), 1) for x, y in zip(inputs, other, strict=False))
    )
    assert torch.equal(before[:, :70], after[:, :70])


@pytest.mark.parametrize("tokens", [40, 700])
def test_bfloat16_is_as_near_to_the_truth_as_the_references_own_bfloat16(tokens):
    *inputs, _ = random_inputs(tokens)
    truth, true_state = gated_delta_rule(*(x.double() for x in inputs), backend="reference")
    rounded = [x.bfloat16() for x in inputs[:3]] + list(inputs[3:])
    errors = {}
    for backend in ("reference", "chunked"):
        out, state = gated_delta_rule(*rounded, backend=backend)
        assert out.dtype == torch.bfloat16
        errors[backend] = (out - truth).abs().max().item(), (state - true_state).abs().max().item()
    assert errors["reference"][0] > 1e-4  # bfloat16 does cost something
    for ours, theirs in zip(errors["chunked"], errors["reference"], strict=True):
        assert ours <= 1.05 * theirs + 1e-6


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_the_recurrence_is_float32_under_bfloat16_and_autocast(backend):
    *inputs, _ = random_inputs(80)
    inputs = [x.bfloat16() if i < 3 else x for i, x in enumerate(inputs)]
    expected, _ = gated_delta_rule(*(x.float() for x in inputs), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = gated_delta_rule(*inputs, backend=backend)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected, atol=0, rtol=1 / 256)


def test_a_strong_decay_neither_overflows_nor_gives_nan_gradients():
    inputs = [x.requires_grad_() for x in random_inputs(128, decay=400.0)[:5]]
    out, state = gated_delta_rule(*inputs)
    (out.sum() + state.sum()).backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs)


def test_an_unknown_backend_is_refused():
    with pytest.raises(UserError, match="reference, chunked, fla"):
        gated_delta_rule(*random_inputs(3)[:5], backend="triton")
