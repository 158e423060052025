"""Training: batches that are functions of the step, exact resuming, what counts in the loss, checkpoints, the
optimizer, and the VAE of kairos-tiny."""

from __future__ import annotations

import errno
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_parts import MIX, clip_set, small_model, small_stage

from kairos import MachineError, UserError
from kairos.models.vae_layers import computed_in
from kairos.schedulers import shift_for
from kairos.training import ahead as ahead_module
from kairos.training import checkpoint, loop, muon
from kairos.training.ahead import Ahead
from kairos.training.batches import choose_set, draw_batch, draw_cut, row_at
from kairos.training.checkpoint import load_checkpoint, save_checkpoint
from kairos.training.clips import Bucket
from kairos.training.flow import FlowMatching, flow_loss
from kairos.training.loop import train
from kairos.training.muon import Muon, orthogonalise, split_parameters
from kairos.training.parallel import Processes
from kairos.training.plan import activation_bytes
from kairos.training.progress import Progress, duration
from kairos.training.stage import Stage
from kairos.weights import load_transformer_file


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return clip_set(tmp_path_factory.mktemp("cache"))


class Recorded(FlowMatching):
    """Flow matching that remembers what it was given and what it lost; it may stop after some steps."""

    def __init__(self, clips, stage, interrupt_at=None):
        super().__init__([clips], stage)
        self.keys, self.losses, self.interrupt_at = [], [], interrupt_at

    def loss(self, model, step, part):
        batch = self.batch(model, step, part)
        with self.processes.autocast(self.stage.precision):
            loss = flow_loss(model, batch)
        self.keys.append(batch.keys)
        self.losses.append(loss.item())
        if step + 1 == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        return loss, len(batch)


def test_a_batch_is_a_function_of_the_seed_and_the_step(clips):
    stage = small_stage()
    first, again, other = (draw_batch([clips], stage, step, causal=True) for step in (3, 3, 4))
    assert torch.equal(first.noisy, again.noisy) and first.cut == again.cut and first.keys == again.keys
    assert first.noisy.shape != other.noisy.shape or not torch.equal(first.noisy, other.noisy)
    different = draw_batch([clips], replace(stage, seed=1), 3, causal=True)
    assert first.noisy.shape != different.noisy.shape or not torch.equal(first.noisy, different.noisy)


@pytest.mark.parametrize("units", [True, False])
def test_without_products_in_bfloat16_a_stage_trains_in_float32_and_says_so(
    tmp_path, clips, monkeypatch, caplog, units
):
    computed_in.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: units)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, seen = small_model(), set()
    model.blocks[0].ffn[0].register_forward_hook(lambda *call: seen.add(call[-1].dtype))
    stage = small_stage(steps=1, precision="bfloat16")
    try:
        with caplog.at_level(logging.INFO, "kairos"):
            train(model, FlowMatching([clips], stage), stage, tmp_path)
        assert seen == {torch.bfloat16 if units else torch.float32}
        assert ("has no products in bfloat16" in caplog.text) is not units
        kept = activation_bytes(dict(model.config), 64, stage)
        exact = activation_bytes(dict(model.config), 64, replace(stage, precision="float32"))
        assert exact == (2 if units else 1) * kept
    finally:
        computed_in.cache_clear()


def test_the_parts_of_a_batch_are_the_whole(clips):
    stage = small_stage()
    whole = draw_batch([clips], stage, 5, causal=True)
    parts = [draw_batch([clips], stage, 5, causal=True, part=i, parts=2) for i in range(2)]
    for name in ("noisy", "target", "timestep"):
        joined = torch.stack([getattr(part, name) for part in parts], 1).flatten(0, 1)
        assert torch.equal(joined, getattr(whole, name)), name


def test_a_batch_that_cannot_be_cut_in_equal_parts_is_refused(clips):
    with pytest.raises(UserError, match="cannot be cut in 3 equal parts"):
        draw_batch([clips], small_stage(), 5, causal=True, part=0, parts=3)


def test_the_time_is_the_logistic_of_a_normal_variable_shifted_by_the_shape(clips):
    """Its own for every clip: mean and spread are the stage's, and the shift is the sampler's."""
    stage = small_stage(mix={"continuation": 1.0}, batch_size=64, time_mean=0.5, time_std=0.8)
    tokens = (clips.bucket.height // 16) * (clips.bucket.width // 16)
    shift = shift_for(clips.latent_frames, tokens)
    assert shift > 1.2
    times = torch.cat([draw_batch([clips], stage, step, causal=True).sigma[:, -1] for step in range(30)])
    unshifted = times / (shift - (shift - 1) * times)
    logits = torch.logit(unshifted)
    assert logits.mean().item() == pytest.approx(0.5, abs=0.06)
    assert logits.std().item() == pytest.approx(0.8, abs=0.05)
    assert times.unique().numel() == times.numel()


def test_captions_are_dropped_and_the_past_is_noisy_in_the_shares_that_the_stage_says(clips):
    stage = small_stage(mix={"continuation": 1.0}, batch_size=8, text_dropout=0.3, past_noise=0.1)
    empty, noisy = [], []
    for step in range(200):
        batch = draw_batch([clips], stage, step, causal=True)
        empty += (batch.prompt_mask.sum(1) == 1).tolist()  # captions have two tokens or more
        noisy.append(batch.sigma[:, : batch.cut.past].any().item())
    assert np.mean(empty) == pytest.approx(0.3, abs=0.04)
    assert np.mean(noisy) == pytest.approx(0.25, abs=0.08)


def test_buckets_come_in_proportion_to_the_batches_that_they_hold(clips, tmp_path):
    more = clip_set(tmp_path, 12, Bucket(9, 32, 32))
    one_by_one = replace(more, bucket=replace(more.bucket, batch_size=1))
    for other, share in ((more, 12 / 16), (one_by_one, 12 / 13)):
        drawn = [choose_set(np.random.default_rng(i), [clips, other], small_stage()) for i in range(500)]
        assert np.mean([one is other for one in drawn]) == pytest.approx(share, abs=0.05)


def test_every_clip_comes_once_an_epoch(clips):
    for epoch in range(3):
        rows = [row_at(0, clips, epoch * len(clips) + place) for place in range(len(clips))]
        assert sorted(rows) == list(range(len(clips)))


def test_every_cut_fits_the_clip_and_tasks_come_in_their_shares():
    rng = np.random.default_rng(0)
    cuts = [draw_cut(rng, MIX, 9) for _ in range(4000)]
    assert all(cut.chunk >= 1 and cut.past + cut.chunk <= 9 for cut in cuts)
    assert {cut.past for cut in cuts} >= {0, 1, 2, 3, 6}
    assert all(cut.chunk == 1 for cut in cuts if cut.past == 0 or cut.task == "ti2v")
    assert any(0 < cut.past + cut.chunk < 9 for cut in cuts if cut.past)
    for task, share in MIX.items():
        assert abs(sum(cut.task == task for cut in cuts) / len(cuts) - share) < 0.03, task


def test_rollouts_are_unrolled_as_far_as_the_clip_goes():
    cuts = [draw_cut(np.random.default_rng(seed), {"rollout": 1.0}, 17, unrolled=3) for seed in range(300)]
    assert all(cut.past >= 2 and cut.frames <= 17 for cut in cuts)
    assert {cut.chunks for cut in cuts} == {1, 2, 3} and {cut.chunk for cut in cuts} == {1, 2, 3, 4}
    assert all(cut.chunks == 3 for cut in cuts if cut.past + 3 * cut.chunk <= 17)


def test_a_bucket_may_have_tasks_of_its_own(clips):
    stage = small_stage(mix={"continuation": 1.0})
    own = replace(clips, bucket=replace(clips.bucket, mix={"rollout": 1.0}))
    for few, task in ((clips, "continuation"), (own, "rollout")):
        assert {draw_batch([few], stage, step, causal=True).cut.task for step in range(5)} == {task}


def test_a_model_that_sees_the_whole_clip_makes_all_that_is_not_given():
    rng = np.random.default_rng(0)
    mix = {task: 1.0 for task in ("t2v", "ti2v", "i2v", "continuation", "unconditional")}
    cuts = [draw_cut(rng, mix, 9, causal=False) for _ in range(300)]
    assert all(cut.past + cut.chunk == 9 for cut in cuts)
    assert {cut.task for cut in cuts} == set(mix)


def test_image_to_video_has_no_words_and_unconditional_no_text_at_all(clips):
    stage = small_stage(mix={"i2v": 1.0}, text_dropout=0.0)
    batch = draw_batch([clips], stage, 0, causal=False)
    assert batch.cut.past == 1 and batch.prompt_mask.sum() == len(batch)  # the empty prompt's one token
    batch = draw_batch([clips], replace(stage, mix={"unconditional": 1.0}), 0, causal=False)
    assert not batch.prompt_embeds.any() and batch.prompt_mask.all()


def test_pictures_have_their_share_of_the_batches(clips, tmp_path):
    pictures = clip_set(tmp_path, 3, Bucket(1, 32, 32))
    stage = small_stage(images=0.3)
    drawn = [draw_batch([clips, pictures], stage, step, causal=False) for step in range(200)]
    share = np.mean([batch.sample.shape[2] == 1 for batch in drawn])
    assert 0.2 < share < 0.4


@pytest.mark.parametrize(("task", "frames", "times"), [("t2v", 1, 4), ("ti2v", 2, 2), ("continuation", 5, 1)])
def test_batches_of_the_first_frames_hold_more_clips(clips, task, frames, times):
    stage = small_stage(mix={task: 1.0}, batch_size=2)
    assert draw_batch([clips], stage, 0, causal=True).sample.shape[0:3:2] == (2 * times, frames)


def test_the_past_is_almost_clean_and_its_time_is_told(clips):
    for step in range(40):
        batch = draw_batch([clips], small_stage(), step, causal=True)
        past = batch.cut.past
        assert (batch.timestep[:, :past] <= 100).all()
        assert (batch.timestep[:, past:] > 0).all()
        if past and not batch.timestep[:, :past].any():
            rows = [clips.keys.index(key) for key in batch.keys]
            assert torch.equal(batch.noisy[:, :, :past], clips.latents(rows)[:, :, :past])


def test_frames_of_the_past_do_not_count_in_the_loss(clips):
    model = small_model()
    batch = draw_batch([clips], small_stage(mix={"ti2v": 1.0}), 0, causal=True)
    loss = flow_loss(model, batch)
    changed = replace(batch, sample=batch.sample.clone(), noise=batch.noise.clone())
    changed.noise[:, :, :1] += 100 * (batch.sigma[0, 0] == 0)  # at sigma 0 the model does not see it
    assert torch.equal(flow_loss(model, changed), loss)
    changed.noise[:, :, 1:] += 1
    assert not torch.equal(flow_loss(model, changed), loss)


def test_changing_a_later_chunk_leaves_every_earlier_output_unchanged(clips):
    model = small_model().eval()
    for parameter in model.parameters():  # branches begin as nothing; let them do something
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    batch = draw_batch([clips], small_stage(mix={"continuation": 1.0}), 0, causal=True)
    chunks, shape = (1, 2, 2), batch.noisy.shape
    later = batch.noisy.clone()
    later[:, :, 3:] = torch.randn(shape[0], shape[1], 2, *shape[3:])
    timestep = batch.timestep.clone()
    timestep[:, 3:] = 17.0
    with torch.no_grad():
        first, second = (
            model(
                latents,
                times,
                batch.prompt_embeds,
                encoder_attention_mask=batch.prompt_mask,
                chunk_frames=chunks,
                return_dict=False,
            )[0]
            for latents, times in ((batch.noisy, batch.timestep), (later, timestep))
        )
    assert torch.equal(first[:, :, :3], second[:, :, :3])
    assert not torch.equal(first[:, :, 3:], second[:, :, 3:])


@pytest.mark.parametrize("workers", [0, 2])
def test_twenty_steps_equal_ten_a_stop_and_ten_more(clips, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("kairos.training.flow.workers_for", lambda device: workers)
    stage = small_stage(steps=20, decay_steps=8)
    whole = Recorded(clips, stage)
    ema = train(small_model(), whole, stage, tmp_path / "whole")
    first, second = Recorded(clips, stage, interrupt_at=10), Recorded(clips, stage)
    with pytest.raises(KeyboardInterrupt):
        train(small_model(), first, stage, tmp_path / "parts")
    assert load_checkpoint(tmp_path / "parts")["step"] == 10
    ema_of_parts = train(small_model(), second, stage, tmp_path / "parts")
    assert first.keys + second.keys == whole.keys
    assert first.losses + second.losses == whole.losses
    for name, value in ema.items():
        assert torch.equal(value, ema_of_parts[name]), name
    one, other = (load_checkpoint(tmp_path / part)["model"] for part in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("moment", ["last step", "last save"])
def test_a_signal_at_the_end_of_a_stage_ends_the_run(clips, tmp_path, monkeypatch, moment):
    """The stage is saved, and those after it are not begun."""
    stage = small_stage(steps=2)
    objective = Recorded(clips, stage, interrupt_at=2 if moment == "last step" else None)
    if moment == "last save":
        write = save_checkpoint
        monkeypatch.setattr(
            loop, "save_checkpoint", lambda *what: (write(*what), os.kill(os.getpid(), signal.SIGTERM))
        )
    with pytest.raises(KeyboardInterrupt):
        train(small_model(), objective, stage, tmp_path)
    assert load_checkpoint(tmp_path)["step"] == 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_that_workers_draw_ahead_are_those_that_are_drawn_at_once(
    clips, tmp_path, monkeypatch, accumulate
):
    stage = small_stage(steps=6, accumulate=accumulate)
    at_once, ahead = Recorded(clips, stage), Recorded(clips, stage)
    train(small_model(), at_once, stage, tmp_path / "at_once")
    monkeypatch.setattr("kairos.training.flow.workers_for", lambda device: 2)
    train(small_model(), ahead, stage, tmp_path / "ahead")
    assert ahead.keys == at_once.keys and ahead.losses == at_once.losses
    assert not ahead._ahead._begun  # nothing was drawn that nobody asked for
    ahead.close()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_takes_matrices_together_that_are_alike_and_none_at_all(weight_decay, monkeypatch):
    def updated(together: int) -> list[Tensor]:
        monkeypatch.setattr(muon, "TOGETHER", together)
        torch.manual_seed(0)
        matrices = [nn.Parameter(torch.randn(6, 4)) for _ in range(3)] + [nn.Parameter(torch.randn(4, 6))]
        groups = [{"params": matrices, "muon": True, "lr": 0.1}, {"params": [], "lr": 0.1}]
        optimizer = Muon([group | {"weight_decay": weight_decay} for group in groups])
        for _ in range(2):
            sum(matrix.square().sum() for matrix in matrices).backward()
            optimizer.step()
        return [matrix.detach() for matrix in matrices]

    for one, other in zip(updated(1), updated(1 << 24), strict=True):
        assert torch.allclose(one, other, atol=2e-3)  # products are bfloat16, and a batch sums otherwise


def test_a_step_of_muon_is_larger_for_a_tall_matrix():
    """By the root of rows to columns, so that what goes through it changes as much."""
    for rows, columns, scale in ((32, 8, 2.0), (8, 32, 1.0)):
        matrix = nn.Parameter(torch.zeros(rows, columns))
        matrix.grad = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        Muon([{"params": [matrix], "muon": True, "lr": 0.1}]).step()
        values = torch.linalg.svdvals(matrix.detach()) / (0.1 * scale)
        assert values.min() > 0.6 and values.max() < 1.3


def test_numbers_that_come_now_and_then_stand_in_the_next_line(tmp_path, caplog, monkeypatch):
    now = iter(range(0, 10_000, 4))
    monkeypatch.setattr("kairos.training.progress.time", SimpleNamespace(monotonic=lambda: next(now)))
    progress = Progress(tmp_path, small_stage(steps=100), 1, 0, Processes())
    with caplog.at_level(logging.INFO, "kairos"):
        for step in range(1, 21):
            progress.add(torch.tensor(1.0), 1)
            extra = {"ratio": 0.9} if step == 9 else {}
            progress.step(step, torch.tensor(1.0), 1.0, extra.copy)
    lines = [line for line in caplog.messages if line.startswith("step ")]
    assert not any(line.startswith("step 9/") for line in lines)
    assert ["ratio 0.900" in line for line in lines].count(True) == 1
    assert next(line for line in lines if "ratio" in line).startswith(("step 10/", "step 11/", "step 12/"))


def test_numbers_that_are_read_later_are_those_that_are_read_at_once(tmp_path):
    def written(device: str) -> list[tuple[str, float, int]]:
        scalars: list[tuple[str, float, int]] = []
        here = Processes(device=SimpleNamespace(type=device))
        progress = Progress(tmp_path, small_stage(steps=100, report_every_s=1e9), 1, 0, here)
        progress.writer = SimpleNamespace(add_scalar=lambda *written: scalars.append(written))
        for step in range(1, 46):
            progress.add(torch.tensor(float(step)), 1)
            progress.step(step, torch.tensor(step / 10), 1.0, dict)
            if device == "cuda" and step == 10:
                assert len(scalars) == 3  # the first step's, and no more
        progress.catch_up()
        return scalars

    assert written("cuda") == written("cpu")


def test_a_call_made_ahead_is_made_once_by_another_process():
    ahead = Ahead(lambda number: (os.getpid(), torch.full((3,), float(number))), workers=2)
    ahead.begin(range(4))
    ahead.begin(range(4))
    made = [ahead.get(number) for number in range(4)]
    assert all(process != os.getpid() for process, _ in made)
    assert [tensor.tolist() for _, tensor in made] == [[float(number)] * 3 for number in range(4)]
    assert ahead.get(9)[0] == os.getpid()  # nobody has begun it
    ahead.close()
    ahead.close()
    assert Ahead(lambda number: os.getpid(), workers=0).get(1) == os.getpid()


ORPHANS = """
import os, time
from kairos.training.ahead import Ahead
ahead = Ahead(lambda number: os.getpid(), workers=2)
ahead.begin(range(8))
print(*{ahead.get(number) for number in range(8)}, flush=True)
os.kill(os.getpid(), 9)
"""


def test_workers_do_not_outlive_a_training_that_is_killed():
    killed = subprocess.run([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True, timeout=120)
    workers = [int(number) for number in killed.stdout.split()]
    until = time.monotonic() + 30
    while any(is_alive(worker) for worker in workers) and time.monotonic() < until:
        time.sleep(0.2)
    assert workers and not any(is_alive(worker) for worker in workers)


def is_alive(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def test_workers_finish_what_their_parent_needs_though_all_are_told_to_end():
    ahead = Ahead(lambda number: (os.getpid(), time.sleep(0.5)), workers=1)
    ahead.begin([0])
    worker, _ = ahead.get(0)
    ahead.begin([1, 2])
    os.kill(worker, signal.SIGTERM)
    assert [ahead.get(number)[0] for number in (1, 2)] == [worker, worker]
    ahead.close()


def test_a_worker_that_dies_holds_nobody_up():
    ahead = Ahead(lambda number: (os.getpid(), time.sleep(number)), workers=2)
    ahead.begin([0, 0.1])
    workers = {ahead.get(number)[0] for number in (0, 0.1)}
    ahead.begin([5, 6])
    os.kill(workers.pop(), signal.SIGKILL)
    since = time.monotonic()
    with pytest.raises(BrokenProcessPool):
        [ahead.get(number) for number in (5, 6)]
    ahead.close()
    assert time.monotonic() - since < ahead_module.GRACE_S / 2


def test_what_a_worker_cannot_do_is_said_where_it_is_asked_for():
    ahead = Ahead(lambda number: 1 // number, workers=1)
    ahead.begin([0, 1])
    with pytest.raises(ZeroDivisionError):
        ahead.get(0)
    assert ahead.get(1) == 1
    ahead.close()


KILLED = """
import sys, os
sys.path.insert(0, {tests!r})
from pathlib import Path
from training_parts import clip_set, small_model, small_stage
from kairos.training.flow import FlowMatching
from kairos.training.loop import train
folder = Path({folder!r})
stage = small_stage(steps=20, decay_steps=8, save_every_s=0.0)
class Slow(FlowMatching):
    def loss(self, model, step, part):
        if step == 13:
            os.kill(os.getpid(), 9)
        return super().loss(model, step, part)
train(small_model(), Slow([clip_set(folder / "cache")], stage), stage, folder / "parts")
"""


def test_twenty_steps_are_the_same_after_a_kill(tmp_path):
    program = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr.decode()
    assert load_checkpoint(tmp_path / "parts")["step"] == 13
    clips = clip_set(tmp_path / "again")
    stage = small_stage(steps=20, decay_steps=8)
    whole = train(small_model(), FlowMatching([clips], stage), stage, tmp_path / "whole")
    parts = train(small_model(), FlowMatching([clips], stage), stage, tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_an_accumulated_batch_gives_the_step_of_the_whole_one(clips, tmp_path):
    averages = []
    for parts in (1, 2):
        stage = small_stage(steps=3, accumulate=parts, precision="float32", muon_lr=None)
        averages.append(train(small_model(), FlowMatching([clips], stage), stage, tmp_path / str(parts)))
    for name, value in averages[0].items():
        torch.testing.assert_close(value, averages[1][name], atol=1e-5, rtol=1e-4)


def test_the_moving_average_follows_quickly_at_first(clips, tmp_path):
    """It would hardly leave the random weights in a few steps: its decay rises to the stage's."""
    stage, weights = small_stage(steps=3, ema=0.999), []

    class Watched(FlowMatching):
        def report(self, model, step):
            weights.append(model.head.head.weight.detach().clone())
            return {}

    model = small_model()
    average = model.head.head.weight.detach().clone()
    made = train(model, Watched([clips], stage), stage, tmp_path)
    for step, weight in enumerate(weights):
        average = average.lerp(weight, 1 - (step + 1) / (step + 10))
    torch.testing.assert_close(made["head.head.weight"], average)
    stage, model = small_stage(steps=3, ema=0.05), small_model()  # below all of these
    average, before = model.head.head.weight.detach().clone(), len(weights)
    made = train(model, Watched([clips], stage), stage, tmp_path / "quick")
    for weight in weights[before:]:
        average = average.lerp(weight, 0.95)
    torch.testing.assert_close(made["head.head.weight"], average)


def test_a_gradient_is_cut_to_the_stages_norm(clips, tmp_path, monkeypatch):
    norms = []

    def optimizer(model, stage):
        made = torch.optim.SGD(model.parameters(), lr=1e-3)
        made.register_step_pre_hook(
            lambda *_: norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        )
        return made

    monkeypatch.setattr(loop, "build_optimizer", optimizer)
    for clip_norm in (0.01, 1e6):
        stage = small_stage(steps=1, clip_norm=clip_norm, mix={"continuation": 1.0})
        train(small_model(), FlowMatching([clips], stage), stage, tmp_path / str(clip_norm))
    assert norms[0] == pytest.approx(0.01, rel=1e-3) and norms[1] > 0.02


def test_a_small_model_overfits_four_clips(clips, tmp_path):
    """It has seen the clips so often that the first frame tells the others, noise though they are."""
    stage = small_stage(
        steps=170,
        decay_steps=60,
        batch_size=8,
        ema=0.9,
        adamw_lr=3e-3,
        muon_lr=0.03,
        mix={"ti2v": 1.0},
        text_dropout=0.0,
    )

    def loss_of(model):
        batches = [draw_batch([clips], stage, 10_000 + i, causal=True) for i in range(8)]
        with torch.no_grad():
            return sum(flow_loss(model, batch).item() for batch in batches) / 8

    model = small_model(hidden_size=96, ffn_dim=192)
    before = loss_of(model)
    train(model, FlowMatching([clips], stage), stage, tmp_path)
    assert loss_of(model) < 0.1 * before


def test_a_torn_checkpoint_gives_way_to_the_one_before(tmp_path, caplog):
    for step in (1, 2):
        save_checkpoint(tmp_path, {"model": {"w": torch.full((1000,), float(step))}, "step": step})
    file = tmp_path / checkpoint.NAME
    data = bytearray(file.read_bytes())
    for torn in (data[: len(data) // 2], data[:2000] + b"\xff\xff" + data[2002:], b""):
        file.write_bytes(bytes(torn))
        with caplog.at_level(logging.WARNING, "kairos"):
            assert load_checkpoint(tmp_path)["step"] == 1
        assert "is torn" in caplog.text
    (tmp_path / checkpoint.PREVIOUS).write_bytes(b"")
    with pytest.raises(UserError, match="no whole checkpoint"):
        load_checkpoint(tmp_path)


def test_checkpoints_are_kept_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, {"model": {"w": torch.zeros(10)}, "step": step})
    assert load_checkpoint(tmp_path)["step"] == 3
    (tmp_path / checkpoint.NAME).unlink()
    assert load_checkpoint(tmp_path)["step"] == 2


def test_the_first_process_alone_keeps_what_is_to_be_written():
    state = {"w": torch.ones(3), "groups": [{"lr": 0.1, "step": torch.tensor(4.0)}]}
    first, second = (checkpoint.gathered(state, Processes(rank=rank, world=2)) for rank in (0, 1))
    assert torch.equal(first["w"], state["w"]) and first["groups"] == state["groups"]
    assert second["w"].numel() == second["groups"][0]["step"].numel() == 0


def test_a_disk_that_fills_while_saving_loses_nothing(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {"model": {"w": torch.zeros(10)}, "step": 1})

    class FullDisk(io.FileIO):
        def write(self, data):
            if self.tell() > 500:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(Path, "open", lambda self, mode: FullDisk(self, "w"))
    with pytest.raises(
        MachineError, match=r"checkpoint.pt: no space left on device; free some space"
    ) as caught:
        save_checkpoint(tmp_path, {"model": {"w": torch.zeros(10_000)}, "step": 2})
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == [checkpoint.NAME]
    assert load_checkpoint(tmp_path)["step"] == 1


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors", "checkpoint.pt"])
def test_a_run_that_ends_while_it_writes_its_last_weights_is_finished_by_the_next(
    clips, tmp_path, monkeypatch, name
):
    stage = small_stage(steps=2, save_every_s=0.0)
    written = []

    def fails(write):
        def writing(path, content):
            file = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
            written.append(file.name)
            if file.name == name and written.count(name) == 2:
                raise MachineError("the disk is full")
            write(path, content)

        return writing

    with monkeypatch.context() as patched:
        for function in ("write_atomically", "save_checkpoint"):
            patched.setattr(loop, function, fails(getattr(loop, function)))
        with pytest.raises(MachineError, match="full"):
            train(small_model(), FlowMatching([clips], stage), stage, tmp_path)
    assert load_checkpoint(tmp_path)["step"] == 1  # so the stage does not count as finished
    ema = train(small_model(), FlowMatching([clips], stage), stage, tmp_path)
    for again in (False, True):
        if again:  # a finished stage whose weights are lost
            shutil.rmtree(tmp_path / "ema")
            train(small_model(), FlowMatching([clips], stage), stage, tmp_path)
        model = load_transformer_file(tmp_path / "ema")
        assert all(torch.equal(model.get_parameter(key), value) for key, value in ema.items())


def test_a_stage_goes_on_with_the_rates_betas_and_decay_that_its_recipe_says_now(
    clips, tmp_path, monkeypatch
):
    made = []
    build = loop.build_optimizer
    monkeypatch.setattr(loop, "build_optimizer", lambda *what: made.append(build(*what)) or made[-1])
    stage = small_stage(steps=1)
    train(small_model(), FlowMatching([clips], stage), stage, tmp_path)
    stage = small_stage(steps=2, weight_decay=0.5, betas=(0.5, 0.6))
    train(small_model(), FlowMatching([clips], stage), stage, tmp_path)
    for group in made[-1].param_groups:
        assert group["weight_decay"] == 0.5 and group["betas"] == (0.5, 0.6)
    stage = small_stage(steps=3, muon_lr=None)
    with pytest.raises(UserError, match="muon_lr was added or taken away"):
        train(small_model(), FlowMatching([clips], stage), stage, tmp_path)


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(clips, tmp_path):
    stage = small_stage(steps=6, save_every_s=0.0)

    class Broken(FlowMatching):
        def loss(self, model, step, part):
            loss, count = super().loss(model, step, part)
            return (loss * float("nan") if step == 3 else loss), count

    with pytest.raises(UserError, match="step 4 has loss nan") as caught:
        train(small_model(), Broken([clips], stage), stage, tmp_path)
    assert "\n" not in str(caught.value)
    state = load_checkpoint(tmp_path)
    assert state["step"] == 3 and all(value.isfinite().all() for value in state["model"].values())


def test_a_checkpoint_of_another_model_is_refused(clips, tmp_path):
    stage = small_stage(steps=1)
    train(small_model(), FlowMatching([clips], stage), stage, tmp_path)
    for other, message in (
        (small_model(ffn_dim=48), r"ffn.0.weight is \(64, 32\)"),
        (small_model(num_layers=8), "lacks"),
    ):
        with pytest.raises(UserError, match=f"of another model: .*{message}"):
            train(other, FlowMatching([clips], stage), stage, tmp_path)


def test_a_checkpoint_of_the_first_training_is_taken_up(clips, tmp_path):
    """Those of kairos-tiny hold model, EMA, optimizer and step, and nothing else."""
    model = small_model()
    groups = split_parameters(
        model, muon_lr=0.01, adamw_lr=1e-3, exclude=("embedding", "projection", "head.", "modulation")
    )
    optimizer = Muon(groups)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "ema": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": 7,
    }
    torch.save(state, tmp_path / "checkpoint.pt")
    stage = small_stage(steps=8)
    recorded = Recorded(clips, stage)
    train(small_model(), recorded, stage, tmp_path)
    assert len(recorded.losses) == 1


def test_progress_is_told_in_lines_and_in_tensorboard(clips, tmp_path, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stage = small_stage(steps=4, report_every_s=0.0, samples_every=2)
    frames = [np.zeros((5, 32, 32, 3), np.uint8)]
    with caplog.at_level(logging.INFO, "kairos"):
        train(
            small_model(),
            FlowMatching([clips], stage),
            stage,
            tmp_path,
            make_samples=lambda model, output, step: frames,
        )
    assert all(word in caplog.text for word in ("step 4/4: loss", "steps/s", "clips/s", "GB", "left"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Images("samples")] == [2, 4]


def test_a_disk_that_tensorboard_finds_full_is_said_once_and_not_by_its_thread(tmp_path, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", b"events")

    said = []
    monkeypatch.setattr(threading, "excepthook", said.append)
    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(OSError, match="No space left"), Progress(tmp_path, small_stage(), 1, 0, Processes()):
        pass
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("tensorboard"):
            thread.join()
    assert not said
    monkeypatch.undo()
    before = threading.excepthook
    with Progress(tmp_path, small_stage(), 1, 0, Processes()):
        assert threading.excepthook != before
    assert threading.excepthook == before


def test_durations_are_told_in_the_units_that_people_use():
    told = {0.01234: "0.012 s", 0: "0 s", 7.31: "7.3 s", 65: "1 min 05 s", 3725: "1 h 02 min"}
    assert {seconds: duration(seconds) for seconds in told} == told
    assert duration(1.74e10) == "4,833,333 h 20 min"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mix": {"tv2": 1.0}}, "unknown task in mix; did you mean 't2v'"),
        ({"mix": {}}, "mix must give tasks shares"),
        ({"buckets": (Bucket(9, 32, 32, mix={"rolout": 1.0}),)}, "did you mean 'rollout'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"images": 1.5}, "images must be from 0 to 1"),
        ({"precision": "float8"}, "precision must be"),
        ({"objective": "gan"}, "objective must be one of"),
        ({"adamw_lr": 0.0}, "adamw_lr must be above 0"),
        ({"time_std": -1.0}, "time_std must be at least 0"),
    ],
)
def test_a_stage_that_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        small_stage(**wrong)


def test_rates_rise_stay_and_fall():
    stage = Stage("s", steps=100, warmup_steps=10, decay_steps=40)
    rates = [stage.learning_rate(step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9:60] == [1.0] * 51 and rates[-1] == pytest.approx(0.025)
    assert Stage("s", steps=100, warmup_steps=1).learning_rate(99) == 1


def test_orthogonalised_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((16, 40), (40, 16), (24, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.3 and values.max() < 1.4


def test_muon_takes_matrices_and_convolutions_and_adamw_the_rest():
    model = torch.nn.Sequential(torch.nn.Conv3d(3, 4, 3), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    muon, adamw = split_parameters(model, muon_lr=0.1, adamw_lr=0.01, exclude=("2.",))
    assert [p.ndim for p in muon["params"]] == [5]
    assert sorted(p.ndim for p in adamw["params"]) == [1, 1, 1, 1, 2]


def test_the_adamw_half_is_torch_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    a = Muon([{"params": [ours], "lr": 0.1, "weight_decay": 0.1}], betas=(0.9, 0.99))
    b = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1, betas=(0.9, 0.99))
    for _ in range(5):
        gradient = torch.randn(5)
        for parameter, optimizer in ((ours, a), (theirs, b)):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)
