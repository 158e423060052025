"""The VAE's training: what it draws, what it minimises, and what a stage leaves as it was."""

from __future__ import annotations

import copy
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from kairos import UserError
from kairos.training import vae as vae_training
from kairos.training.minimise import minimise
from kairos.training.vae import (
    VAEStage,
    _draw,
    build_vae,
    draw_batch,
    draw_shapes,
    picture_loss,
    pixels,
    placement_loss,
    train_vae,
    vae_loss,
)


def test_a_decoder_stage_gives_the_encoder_no_gradient():
    torch.manual_seed(0)
    vae = build_vae(base_dim=8)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    stage = VAEStage(steps=1, num_frames=5, batch_size=2, decoder_only=True)
    vae_loss(vae, torch.rand(2, 3, 5, 16, 16) * 2 - 1, stage, 1e-4)[0].backward()
    assert all(p.grad is None for p in vae.encoder.parameters())
    assert any(p.grad is not None for p in vae.decoder.parameters())


def test_roots_weigh_a_nearly_right_frame_and_a_wrong_one_nearly_alike():
    difference = torch.zeros(2, 3, 5, 16, 16)
    difference[0, :, :, 4:12, 4:12], difference[1, :, :, 4:12, 4:12] = 0.1, 1.0
    difference.requires_grad_()
    share = {}
    for roots in (False, True):
        stage = VAEStage(steps=1, num_frames=5, batch_size=2, placement=1.0, roots=roots)
        (gradient,) = torch.autograd.grad(picture_loss(difference, stage), difference)
        right, wrong = gradient.square().sum((1, 2, 3, 4)).sqrt().tolist()
        share[roots] = right / wrong
    assert share[True] > 0.9 and share[False] < 0.15


def test_noise_of_a_vaes_stage_shakes_the_latents_of_half_of_the_clips():
    torch.manual_seed(0)
    vae = build_vae(base_dim=8)
    seen, decode = [], vae.decode
    vae.decode = lambda latents: (seen.append(latents.detach()), decode(latents))[1]
    video = torch.rand(1, 3, 5, 16, 16).expand(64, -1, -1, -1, -1) * 2 - 1
    for noise in (0.0, 50.0):
        vae_loss(vae, video, VAEStage(steps=1, num_frames=5, batch_size=64, noise=noise), 0.0)
    quiet, shaken = ((latents - seen[0].mean(0)).square().mean((1, 2, 3, 4)).sqrt() for latents in seen)
    assert 16 < (shaken > 2 * quiet.max()).sum() < 48 and shaken.max() < 60


def test_an_anchor_holds_the_latents_and_their_normalisation(tmp_path):
    def moved(anchor):
        torch.manual_seed(0)
        vae = build_vae(base_dim=8)
        vae.register_to_config(latents_mean=[0.5] * 16, latents_std=[0.1] * 16)
        before = copy.deepcopy(vae)
        stage = VAEStage(steps=6, num_frames=1, batch_size=2, scenes=1.0, muon_lr=0.005, anchor=anchor)
        train_vae(tmp_path / str(anchor), stages=(stage,), scenes=("uniform",), start=vae)
        video = pixels(draw_batch(np.random.default_rng(5), stage, ("uniform",)), "cpu")
        with torch.no_grad():
            change = vae.encode(video).latent_dist.mode() - before.encode(video).latent_dist.mode()
        return change.square().mean().sqrt().item(), vae.config.latents_mean

    free, measured = moved(0.0)
    held, kept = moved(100.0)
    assert held < free / 3
    assert kept == [0.5] * 16 and measured != kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps of a stage of the VAE must be at least 1, got 0"),
        ({"num_frames": 6}, r"num_frames of a stage of the VAE must be 4n \+ 1, at most 33, got 6"),
        ({"num_frames": 37}, r"num_frames of a stage of the VAE must be 4n \+ 1, at most 33, got 37"),
        ({"scenes": 1.5}, "scenes of a stage of the VAE must be from 0 to 1, got 1.5"),
        ({"noise": -0.1}, "noise of a stage of the VAE must be at least 0, got -0.1"),
        ({"roots": True, "num_frames": 1}, "roots of a stage of the VAE needs clips of more than one frame"),
        ({"anchor": 0.2, "decoder_only": True}, "anchor holds the encoder, which decoder_only leaves"),
    ],
)
def test_a_stage_of_the_vae_that_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        VAEStage(**{"steps": 1, "num_frames": 5, "batch_size": 2} | changes)


def test_a_batch_of_the_vae_is_a_function_of_the_seed_the_stage_and_the_step():
    stage = VAEStage(steps=9, num_frames=5, batch_size=2, scenes=0.5)
    drawn = {key: _draw(*key[:2], stage, ("uniform",), key[2]) for key in ((0, 0, 3), (0, 0, 4), (0, 1, 3))}
    first = drawn[0, 0, 3]
    assert first.dtype == torch.uint8 and first.shape == (2, 5, 64, 64, 3)
    assert torch.equal(first, _draw(0, 0, stage, ("uniform",), 3))
    assert not any(torch.equal(first, other) for other in list(drawn.values())[1:])


def test_drawn_shapes_move_and_stay_in_range():
    clips = draw_shapes(np.random.default_rng(0), batch=6, num_frames=5)
    assert clips.shape == (6, 5, 64, 64, 3)
    assert clips.min() >= 0 and clips.max() <= 255
    assert any(np.abs(clip[0] - clip[4]).max() > 50 for clip in clips)


def test_the_loss_of_placement_sees_outlines_and_trembling_before_noise():
    axis = torch.arange(64)
    disc = ((axis[:, None] - 30) ** 2 + (axis - 30) ** 2 < 100).float()
    moved = (disc.roll(1, 1) - disc).expand(1, 3, 4, 64, 64)
    noise = torch.randn(1, 3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    noise *= (moved.square().mean() / noise.square().mean()).sqrt()
    still, random = placement_loss(moved), placement_loss(noise)  # of one squared error
    assert still > 4 * random
    trembling = moved * torch.tensor([1.0, -1, 1, -1]).view(4, 1, 1)
    assert placement_loss(trembling) > 2 * still
    assert placement_loss(torch.zeros(1, 3, 1, 64, 64)) == 0


def test_a_vae_that_has_finished_is_refused_where_what_it_was_made_of_has_changed(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(
        vae_training, "train_stage", lambda vae, stage, number, *_, **__: trained.append(number)
    )
    monkeypatch.setattr(vae_training, "measure_latents", lambda *_: None)
    stages = tuple(VAEStage(steps=steps, num_frames=1, batch_size=2) for steps in (1, 2))
    longer = (stages[0], VAEStage(steps=3, num_frames=1, batch_size=2))
    one, other = build_vae(base_dim=8), build_vae(base_dim=8)

    def run(**options):
        options = {"stages": stages, "scenes": ("uniform",), "start": one} | options
        train_vae(tmp_path, **options | {"start": copy.deepcopy(options["start"])})

    run()
    run()
    assert trained == [0, 1]
    for number, options in ((1, {"stages": longer}), (0, {"scenes": ("ramp",)}), (0, {"seed": 1})):
        refused = (
            rf"vae/stage-{number} was made from other options, .*; delete .*stage-{number} to make it again"
        )
        with pytest.raises(UserError, match=refused):
            run(**options)
    with pytest.raises(UserError, match="vae/stage-0 was made from other weights"):
        run(start=other)
    (tmp_path / "stage-1" / "finished").unlink()
    run(stages=longer)
    assert trained == [0, 1, 1]
    for file in tmp_path.rglob("finished"):
        file.write_text("")  # of an earlier version, which does not say
    run(seed=1)


def test_a_checkpoint_of_other_origins_does_not_count_and_one_that_does_not_say_does(tmp_path):
    module, steps = torch.nn.Linear(1, 1), []

    def run(until, origins):
        def loss(step):
            steps.append(step)
            return module(torch.ones(1)).sum()

        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        minimise(tmp_path, module, optimizer, until, loss, lambda _: 1.0, seed=0, origins=origins)

    for until, origins in ((1, None), (2, {"options": "a"}), (3, {"options": "a"}), (3, {"options": "b"})):
        run(until, origins)
    assert steps == [0, 1, 2, 0, 1, 2]


def test_a_vae_with_a_stage_more_goes_on_from_those_that_have_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(vae_training, "MEASURED_CLIPS", 1)
    stage = VAEStage(steps=1, num_frames=1, batch_size=2)
    folder, options = tmp_path / "vae", {"scenes": ("uniform",)}

    def weights(of=folder):
        return AutoencoderKLWan.from_pretrained(of).state_dict()["decoder.conv_in.bias"]

    def run(*stages):
        torch.manual_seed(0)
        train_vae(folder, stages=stages, start=build_vae(base_dim=8), **options)

    run(stage)
    first, begun = weights(), (folder / "stage-0" / "checkpoint.pt").stat().st_mtime_ns
    run(stage, stage)
    assert (folder / "stage-0" / "checkpoint.pt").stat().st_mtime_ns == begun
    assert torch.equal(weights(folder / "stage-0"), first) and not torch.equal(weights(), first)
    run(stage)
    assert torch.equal(weights(), first)
    for gone in folder.glob("stage-*"):
        shutil.rmtree(gone)
    run(stage)  # what it came from may go
    assert not list(folder.glob("stage-*"))
    with pytest.raises(UserError, match=r"stage vae was made from other options"):
        run(stage, stage)
    shutil.rmtree(folder)
    run(stage, stage)
    shutil.rmtree(folder / "stage-0")
    run(stage, stage, stage)
    assert sorted(path.name for path in folder.glob("stage-*")) == ["stage-1", "stage-2"]


def test_a_loss_that_is_no_number_is_not_kept(tmp_path, monkeypatch):
    def loss(vae, video, *rest):
        value = vae.decoder.conv_in.bias.sum() * float("nan")
        return value, value

    monkeypatch.setattr(vae_training, "vae_loss", loss)
    stage = VAEStage(steps=1, num_frames=1, batch_size=2)
    with pytest.raises(UserError, match="stage-0: step 1 has loss nan and a gradient of norm nan"):
        train_vae(tmp_path, stages=(stage,), scenes=("uniform",), start=build_vae(base_dim=8))
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_a_vaes_training_that_is_stopped_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    stages = (
        VAEStage(steps=2, num_frames=1, batch_size=2, scenes=1.0),
        VAEStage(steps=4, num_frames=5, batch_size=2, noise=0.5, anchor=0.1),
    )
    seen, loss = [], vae_training.vae_loss
    monkeypatch.setattr(vae_training, "MEASURED_CLIPS", 2)

    def run(folder, stop_at=None):
        def counted(vae, *rest):
            seen.append(stop_at)
            if stop_at == seen.count(stop_at):
                os.kill(os.getpid(), signal.SIGTERM)
            return loss(vae, *rest)

        monkeypatch.setattr(vae_training, "vae_loss", counted)
        torch.manual_seed(0)
        start = build_vae(base_dim=8)
        train_vae(tmp_path / folder, stages=stages, scenes=("uniform",), start=start)
        return AutoencoderKLWan.from_pretrained(tmp_path / folder)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop_at=4)  # the second step of the second stage
    assert not (tmp_path / "stopped" / "config.json").exists()
    seen.clear()
    again = run("stopped")
    assert len(seen) == 2
    assert again.config.latents_mean == whole.config.latents_mean != [0.0] * 16
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
