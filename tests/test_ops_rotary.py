"""Rotary positions: rotation in pairs, exact however far a rollout has come."""

from __future__ import annotations

import math

import torch

from kairos.ops.rotary import apply_rotary, rotary_table


def test_each_pair_turns_by_its_own_axis_and_frequency():
    frames, height, width, head_dim = 2, 3, 4, 14  # 7 pairs: 3 for the frame, 2 for the row, 2 for the column
    x = torch.randn(1, frames * height * width, 1, head_dim)
    out = apply_rotary(x, rotary_table(frames, height, width, head_dim))
    f, row, column = 1, 2, 3
    token = (f * height + row) * width + column
    angles = [f, f * 1e4 ** (-1 / 3), f * 1e4 ** (-2 / 3), row, row * 1e-2, column, column * 1e-2]
    for pair, angle in enumerate(angles):
        a, b = x[0, token, 0, 2 * pair : 2 * pair + 2].tolist()
        turned = (a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle))
        torch.testing.assert_close(out[0, token, 0, 2 * pair : 2 * pair + 2], torch.tensor(turned))


def test_scores_depend_on_distance_alone_even_after_ten_million_frames():
    q, k = torch.randn(2, 1, 8, 1, 48, dtype=torch.float64)
    scores = []
    for first in (0, 10_000_000):
        table = rotary_table(8, 1, 1, 48, first_frame=first)
        scores.append(apply_rotary(q, table)[0, :, 0] @ apply_rotary(k, table)[0, :, 0].T)
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=0)


def test_a_table_that_begins_later_is_the_tail_of_a_longer_one():
    whole = rotary_table(9, 2, 3, 24)
    tail = rotary_table(4, 2, 3, 24, first_frame=5)
    for longer, shorter in zip(whole, tail, strict=True):
        assert torch.equal(longer[5 * 6 :], shorter)


def test_compilers_are_given_the_same_rotation_and_gradient_in_real_numbers(monkeypatch):
    table = rotary_table(3, 2, 2, 24)
    x, weights = torch.randn(2, 12, 5, 24, requires_grad=True), torch.randn(2, 12, 5, 24)
    found = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        out = apply_rotary(x, table)
        found.append((out, *torch.autograd.grad((out * weights).sum(), x)))
    for complex_numbers, real_numbers in zip(*found, strict=True):
        torch.testing.assert_close(real_numbers, complex_numbers, atol=1e-6, rtol=0)
    half = torch.randn(2, 12, 5, 24).bfloat16()
    assert torch.equal(apply_rotary(half, table), apply_rotary(half.float(), table))
