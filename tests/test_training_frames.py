"""Errors of decoded frames: what they see, whom they teach, and when they are asked for in vain."""

from __future__ import annotations

import pytest
import torch
from training_parts import clip_set, small_model, small_stage

from kairos import UserError
from kairos.models.vae import decode
from kairos.training.clips import Bucket, ClipReference
from kairos.training.distillation import DistillationObjective
from kairos.training.frames import CHANGES, MOVING, STANDING, FrameErrors
from kairos.training.stage import Distillation
from kairos.training.vae import build_vae

BUCKET = Bucket(17, 32, 32)
LEAST = STANDING**0.5 + CHANGES * MOVING**0.5


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return build_vae(base_dim=8).eval()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return clip_set(tmp_path_factory.mktemp("cache"), bucket=BUCKET)


def references(vae, clips, change=lambda frames: frames):
    """The frames of each clip are what the decoder makes of its latents, then changed."""
    with torch.no_grad():
        videos = ((decode(vae, clips.latents([0, 1, 2, 3])) + 1) * 127.5).round()
    frames = videos.permute(0, 2, 3, 4, 1).to(torch.uint8).numpy()
    return {
        key: ClipReference(key, key, caption, BUCKET, lambda frames=frames[row]: change(frames))
        for row, (key, caption) in enumerate(zip(clips.keys, clips.captions, strict=True))
    }


def errors(vae, known, latents, keys, past=2, count=4):
    measure = FrameErrors(vae, known, count, torch.device("cpu"))
    return measure(latents, keys, past, torch.Generator().manual_seed(0))


def test_true_latents_have_the_least_error_and_wrong_ones_hear_which_way_to_go(vae, clips):
    known, true = references(vae, clips), clips.latents([0, 1, 2, 3])
    assert errors(vae, known, true, clips.keys).item() == pytest.approx(LEAST, abs=2e-3)
    wrong = true.clone()
    wrong[:, :, 2:] += 0.5
    wrong.requires_grad_()
    error = errors(vae, known, wrong, clips.keys)
    assert error > LEAST + 0.02
    (gradient,) = torch.autograd.grad(error, wrong)
    better = wrong.detach() - 0.1 * gradient / gradient.norm()
    assert errors(vae, known, better, clips.keys) < error
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_given_frames_do_not_count_but_the_step_away_from_them_does(vae, clips):
    def black(which):
        def change(frames):
            frames = frames.copy()
            frames[which] = 0
            return frames

        return references(vae, clips, change)

    true = clips.latents([0, 1, 2, 3])
    early, last = (errors(vae, black(which), true, clips.keys) for which in (slice(4), 4))
    assert early.item() == pytest.approx(LEAST, abs=2e-3)
    assert last > LEAST + 0.02


def test_clips_of_a_batch_are_drawn_as_many_as_are_wanted(vae, clips):
    known, read = references(vae, clips), []
    counted = {
        key: ClipReference(key, key, "", BUCKET, lambda one=one: (read.append(one.key), one.read())[1])
        for key, one in known.items()
    }
    errors(vae, counted, clips.latents([0, 1, 2, 3]), clips.keys, count=3)
    assert len(set(read)) == len(read) == 3
    errors(vae, counted, clips.latents([0]), clips.keys[:1], count=3)
    assert len(read) == 4


@pytest.mark.parametrize(("task", "counts"), [("continuation", True), ("ti2v", False)])
def test_frames_count_where_the_start_tells_how_it_goes_on(vae, clips, task, counts):
    def losses(weight):
        options = Distillation(truth=1.0, frames=weight, sampling_times=(1000, 300), matching=0.0)
        stage = small_stage(distillation=options, mix={task: 1.0}, precision="float32", batch_size=4)
        measure = FrameErrors(vae, references(vae, clips), 4, torch.device("cpu")) if weight else None
        model = small_model()
        objective = DistillationObjective(model, [clips], stage, options, frames=measure)
        return [float(objective.loss(model, step, 0)[0].detach()) for step in range(2)]

    without, with_them = losses(0.0), losses(2.0)
    for plain, more in zip(without, with_them, strict=True):
        assert (more > plain + 2 * LEAST) if counts else more == plain


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_frames_are_decoded_in_the_precision_of_their_stage(vae, clips, monkeypatch, precision):
    monkeypatch.setattr("kairos.training.parallel.has_bfloat16", lambda device: True)
    autocast = []

    def decoded(*given):
        autocast.append(torch.is_autocast_enabled("cpu"))
        with torch.autocast("cpu", enabled=False):
            return decode(*given)

    monkeypatch.setattr("kairos.training.frames.decode", decoded)
    options = Distillation(truth=1.0, frames=1.0, sampling_times=(1000, 300), matching=0.0)
    stage = small_stage(distillation=options, mix={"continuation": 1.0}, precision=precision, batch_size=2)
    measure = FrameErrors(vae, references(vae, clips), 2, torch.device("cpu"))
    DistillationObjective(small_model(), [clips], stage, options, frames=measure).loss(small_model(), 0, 0)
    assert autocast == [precision == "bfloat16"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"frames": 1.0}, "distillation.frames goes with truth"),
        ({"frames": -1.0, "truth": 1.0}, "at least 0, got -1.0"),
        ({"frame_clips": 0}, "frame_clips must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, why):
    with pytest.raises(UserError, match=why):
        Distillation(**options)


@pytest.mark.parametrize(
    "buckets",
    [(), (Bucket(5, 32, 32), Bucket(1, 32, 32)), (Bucket(5, 32, 32), Bucket(33, 32, 32, mix={"rollout": 1}))],
)
def test_a_stage_without_clips_that_could_go_on_is_refused(buckets):
    options = Distillation(truth=1.0, frames=1.0, unrolled=2)
    with pytest.raises(UserError, match="frames needs clips of more than 5 frames"):
        small_stage(objective="distillation", distillation=options, buckets=buckets)
