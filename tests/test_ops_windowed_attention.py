"""Windowed attention: the blocked route equals the reference, and the reference is what the words say."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from kairos import UserError
from kairos.ops import attention
from kairos.ops.attention import attend
from kairos.ops.windowed_attention import windowed_attention

module = importlib.import_module("kairos.ops.windowed_attention")


def random_qkv(frames: int, tokens: int, past: int = 0, batch: int = 2, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, n * tokens, 2, 8, generator=generator).requires_grad_()
        for n in (frames, past + frames, past + frames)
    ]


@st.composite
def layouts(draw):
    frames = draw(st.integers(1, 26))
    past = draw(st.sampled_from([0, 0, 1, 3, 7, 18]))
    chunk_frames = None
    if draw(st.booleans()):
        chunk_frames, left = [], frames
        while left:
            chunk_frames.append(draw(st.integers(1, min(left, 5))))
            left -= chunk_frames[-1]
    return {
        "frames": frames,
        "past": past,
        "tokens_per_frame": draw(st.sampled_from([1, 2, 5])),
        "window_frames": draw(st.integers(1, 3)),
        "dilation": draw(st.sampled_from([1, 2, 4, 6])),
        "pad_dilated": past == 0 and draw(st.booleans()),
        "chunk_frames": chunk_frames,
    }


@pytest.mark.parametrize("kept", [True, False])
def test_blocks_take_their_masks_from_nowhere_else_and_make_small_ones_once(monkeypatch, kept):
    """What is copied to a GPU waits for all that it has to do."""
    qkv, options = random_qkv(9, 3, past=2), {"tokens_per_frame": 3, "chunk_frames": (4, 2, 3)}
    expected = windowed_attention(*qkv, **options, backend="reference")
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a copy"))
    if not kept:
        monkeypatch.setattr(module, "DENSE_TOKENS_CUDA", 0)
    for _ in range(2):
        found = windowed_attention(*qkv, **options, backend="blocked")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        if kept:
            monkeypatch.setattr(torch, "ones", lambda *_, **__: pytest.fail("a mask made anew"))


@given(layout=layouts(), batch=st.integers(1, 2))
@settings(max_examples=80, deadline=None)
def test_the_blocked_route_and_its_gradients_equal_the_reference(layout, batch):
    layout = dict(layout)
    qkv = random_qkv(layout.pop("frames"), layout["tokens_per_frame"], layout.pop("past"), batch)
    expected = windowed_attention(*qkv, **layout, backend="reference")
    found = windowed_attention(*qkv, **layout, backend="blocked")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    weights = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), qkv),
        torch.autograd.grad((expected * weights).sum(), qkv),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "blocked", "merged"])
def test_a_query_sees_the_tokens_within_three_frames_lengths_and_no_other(backend):
    tokens, frames = 4, 12
    q, k, v = (x.detach() for x in random_qkv(frames, tokens, batch=1))
    out = windowed_attention(q, k, v, tokens_per_frame=tokens, backend=backend)
    for i in range(tokens * frames):
        seen = slice(max(i - 3 * tokens, 0), i + 3 * tokens + 1)
        scores = torch.einsum("hd,khd->hk", q[0, i], k[0, seen]) * 8**-0.5
        expected = torch.einsum("hk,khd->hd", scores.softmax(-1), v[0, seen])
        torch.testing.assert_close(out[0, i], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "blocked", "merged"])
@pytest.mark.parametrize("frames", [8, 10, 3])
def test_a_dilated_layer_is_the_window_on_each_phase_alone(backend, frames):
    tokens = 3
    q, k, v = random_qkv(frames, tokens)
    out = windowed_attention(q, k, v, tokens_per_frame=tokens, dilation=4, window_frames=1, backend=backend)
    by_frame = [x.unflatten(1, (frames, tokens)) for x in (q, k, v, out)]
    for phase in range(min(4, frames)):
        *qkv, expected = (x[:, phase::4].flatten(1, 2) for x in by_frame)
        alone = windowed_attention(*qkv, tokens_per_frame=tokens, window_frames=1, backend="reference")
        torch.testing.assert_close(alone, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("frames", "added"), [(8, 4), (9, 3), (11, 1)])
def test_padding_adds_unmasked_zeros_and_a_whole_dilation_to_an_exact_multiple(frames, added):
    tokens = 2
    q, k, v = random_qkv(frames, tokens)
    padded = windowed_attention(
        q, k, v, tokens_per_frame=tokens, dilation=4, pad_dilated=True, backend="blocked"
    )
    longer = [torch.cat((x, torch.zeros_like(x[:, : added * tokens])), dim=1) for x in (q, k, v)]
    expected = windowed_attention(*longer, tokens_per_frame=tokens, dilation=4, backend="reference")
    torch.testing.assert_close(padded, expected[:, : frames * tokens], atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "blocked", "merged"])
def test_queries_after_a_past_see_what_they_see_in_the_whole(backend):
    tokens, frames, past = 3, 9, 5
    q, k, v = random_qkv(frames, tokens)
    arguments = {"tokens_per_frame": tokens, "dilation": 2, "backend": backend}
    whole = windowed_attention(q, k, v, **arguments, chunk_frames=(past, frames - past))
    tail = windowed_attention(q[:, past * tokens :], k, v, **arguments)
    torch.testing.assert_close(tail, whole[:, past * tokens :], atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "blocked", "merged"])
def test_a_later_chunk_does_not_change_an_earlier_one_by_a_bit(backend):
    tokens, frames = 4, 20
    q, k, v = (x.detach() for x in random_qkv(frames, tokens))
    arguments = {"tokens_per_frame": tokens, "chunk_frames": (1, 6, 13), "backend": backend}
    before = windowed_attention(q, k, v, **arguments)
    for x in (q, k, v):
        x[:, 7 * tokens :] = torch.randn_like(x[:, 7 * tokens :]) * 50
    after = windowed_attention(q, k, v, **arguments)
    assert torch.equal(before[:, : 7 * tokens], after[:, : 7 * tokens])
    assert not torch.equal(before[:, 7 * tokens :], after[:, 7 * tokens :])


def test_a_long_sequence_never_meets_a_mask_of_all_its_pairs(monkeypatch):
    tokens, frames, largest = 16, 120, 0
    plain = attention.F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None):
        nonlocal largest
        largest = max(largest, attn_mask.numel())
        return plain(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    qkv = random_qkv(frames, tokens, batch=1)
    windowed_attention(*qkv, tokens_per_frame=tokens)
    windowed_attention(*qkv, tokens_per_frame=tokens, chunk_frames=[3] * 40)
    assert 0 < largest <= 7 * frames * tokens * tokens < (frames * tokens) ** 2 / 10


@pytest.mark.parametrize("masked", [False, True])
def test_the_explicit_product_that_trains_equals_the_fused_one(masked):
    q, k, v = (x.detach().bfloat16().transpose(1, 2) for x in random_qkv(6, 4))
    mask = torch.ones(24, 24, dtype=torch.bool).tril() if masked else None
    fused = attend(q, k, v, mask)
    trained = attend(q.clone().requires_grad_(), k, v, mask)
    assert trained.requires_grad
    torch.testing.assert_close(trained, fused, atol=2e-2, rtol=0)


@pytest.mark.parametrize("chunk_frames", [(3, 4), (9, 0), (-1, 10), ()])
def test_chunks_that_do_not_make_up_the_frames_are_refused(chunk_frames):
    with pytest.raises(UserError, match="sum to the 9 frames"):
        windowed_attention(*random_qkv(9, 2), tokens_per_frame=2, chunk_frames=chunk_frames)


def test_an_unknown_backend_is_refused():
    with pytest.raises(UserError, match="reference, blocked, merged, flex, flash"):
        windowed_attention(*random_qkv(2, 2), tokens_per_frame=2, backend="dense")


@given(layout=layouts(), batch=st.integers(1, 2))
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_whole_frames_and_triangles_merged_equal_the_reference(layout, batch):
    layout = dict(layout)
    qkv = random_qkv(layout.pop("frames"), layout["tokens_per_frame"], layout.pop("past"), batch)
    expected = windowed_attention(*qkv, **layout, backend="reference")
    found = windowed_attention(*qkv, **layout, backend="merged")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_merging_meets_no_mask_where_frames_see_alike(monkeypatch):
    masked = []
    monkeypatch.setattr(module, "attend", lambda q, k, v, mask: masked.append(len(q)) or q)
    windowed_attention(*random_qkv(40, 4), tokens_per_frame=4, backend="merged")
    assert sum(masked) == 6  # three frames at each end


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pad_dilated", [False, True])
@torch.no_grad()
def test_flex_attention_equals_the_reference(monkeypatch, pad_dilated):
    eager = torch.compile(flex_attention, backend="eager")  # inductor's compiler takes most of a minute
    monkeypatch.setattr(module, "_compiled_flex", lambda: eager)
    layout = {"tokens_per_frame": 4, "dilation": 2, "pad_dilated": pad_dilated, "chunk_frames": (3, 5)}
    qkv = [x.detach() for x in random_qkv(8, 4)]
    expected = windowed_attention(*qkv, **layout, backend="reference")
    found = windowed_attention(*qkv, **layout, backend="flex")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_block_mask_that_inference_made_serves_training_too():
    layout = module.Layout(tokens=5, window=1, dilation=1, frames=7, first=0, chunks=(0,) * 7)
    with torch.inference_mode():
        made = module._block_mask(layout, torch.device("cpu"))
    assert not made.kv_indices.is_inference() and not made.kv_num_blocks.is_inference()


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_flex_attention_past_its_limit_of_compilations_fails_rather_than_turn_dense(monkeypatch):
    torch._dynamo.reset()
    eager = torch.compile(flex_attention, backend="eager", dynamic=False)
    monkeypatch.setattr(module, "_compiled_flex", lambda: eager)
    monkeypatch.setattr(module, "RECOMPILE_LIMIT", 2)
    with pytest.raises(Exception, match="recompile_limit"):
        for frames in range(3, 9):
            qkv = (x.detach() for x in random_qkv(frames, 4))
            windowed_attention(*qkv, tokens_per_frame=4, backend="flex")
    torch._dynamo.reset()


@pytest.mark.parametrize("dilation", [1, 2, 5])
@pytest.mark.parametrize("past", [0, 3])
@torch.no_grad()
def test_flash_attention_is_asked_for_the_same_windows(monkeypatch, dilation, past):
    """It runs on CUDA only: here its call is answered by its definition, ends lined up."""

    def answer(q, k, v, *unused, window_size_left, window_size_right):
        place = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        distance = torch.arange(k.shape[1]) - place
        seen = (distance >= -window_size_left) & (distance <= window_size_right)
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen)
        return (out.transpose(1, 2),)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", answer)
    for pad_dilated in (False, past == 0):
        layout = {"tokens_per_frame": 3, "dilation": dilation, "window_frames": 2, "pad_dilated": pad_dilated}
        qkv = random_qkv(11, 3, past)
        expected = windowed_attention(*qkv, **layout, backend="reference")
        found = windowed_attention(*qkv, **layout, backend="flash")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
