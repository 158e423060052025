"""Training: batches that are functions of the step, exact resuming, what counts in the loss, the optimizer,
recipes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kairos import KairosTransformer3DModel, UserError
from kairos.training import transformer as training
from kairos.training.cache import Cache
from kairos.training.muon import Muon, orthogonalise, split_parameters
from kairos.training.recipe import read_recipe, run_recipe
from kairos.training.vae import VAEStage, build_vae, draw_shapes, vae_loss


@pytest.fixture
def cache() -> Cache:
    torch.manual_seed(0)
    return Cache(
        latents=torch.randn(4, 16, 5, 4, 4).bfloat16(),
        prompt_embeds=torch.randn(4, 6, 12).bfloat16(),
        prompt_mask=torch.ones(4, 6, dtype=torch.bool),
        empty_embeds=torch.zeros(1, 6, 12).bfloat16(),
        empty_mask=torch.tensor([[True] + [False] * 5]),
    )


def small_model() -> KairosTransformer3DModel:
    torch.manual_seed(1)
    return KairosTransformer3DModel(
        hidden_size=32,
        num_attention_heads=2,
        ffn_dim=64,
        num_layers=4,
        gated_delta_head_dim=8,
        text_dim=12,
        freq_dim=16,
        pad_dilated=False,
        causal="chunk",
    )


RECIPE = training.Recipe(steps=8, decay_steps=4, batch_size=4, warmup_steps=2)


def test_a_batch_is_a_function_of_the_seed_and_the_step(cache):
    first, again, other = (training.draw_batch(cache, RECIPE, step) for step in (3, 3, 4))
    assert torch.equal(first.noisy, again.noisy) and first.layout == again.layout
    assert first.noisy.shape != other.noisy.shape or not torch.equal(first.noisy, other.noisy)


def test_every_layout_fits_the_clip_and_all_tasks_are_drawn():
    rng = np.random.default_rng(0)
    layouts = [training.draw_layout(rng, 9) for _ in range(2000)]
    assert all(layout.chunk >= 1 and layout.past + layout.chunk <= 9 for layout in layouts)
    assert {layout.past for layout in layouts} >= {0, 1, 2, 3, 6}
    assert all(layout.chunk == 1 for layout in layouts if layout.past == 0)
    assert any(0 < layout.past + layout.chunk < 9 for layout in layouts if layout.past)


def test_the_past_is_almost_clean_and_its_time_is_told(cache):
    for step in range(40):
        batch = training.draw_batch(cache, RECIPE, step)
        past = batch.layout.past
        assert (batch.timestep[:, :past] <= 100).all()
        assert (batch.timestep[:, past:] > 0).all()
        if past and not batch.timestep[:, :past].any():
            clean = batch.noisy[:, :, :past]
            assert all(
                (clean[i] == cache.latents[:, :, :past].float()).flatten(1).all(1).any()
                for i in range(len(clean))
            )


def test_frames_of_the_past_do_not_count_in_the_loss(cache):
    model = small_model()
    step = next(s for s in range(40) if training.draw_batch(cache, RECIPE, s).layout.past)
    batch = training.draw_batch(cache, RECIPE, step)
    loss = training.flow_loss(model, batch)
    batch.target[:, :, : batch.layout.past] += 100
    assert torch.equal(training.flow_loss(model, batch), loss)
    batch.target[:, :, batch.layout.past :] += 1
    assert not torch.equal(training.flow_loss(model, batch), loss)


def test_eight_steps_equal_four_a_stop_and_four_more(cache, tmp_path):
    whole = training.train_transformer(small_model(), lambda: cache, tmp_path / "whole", RECIPE)

    class Stop(Exception):
        pass

    def stop_at_four(model, batch):
        calls.append(1)
        if len(calls) > 4:
            raise Stop
        return loss(model, batch)

    calls: list[int] = []
    loss = training.flow_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "flow_loss", stop_at_four)
        with pytest.raises(Stop):
            training.train_transformer(
                small_model(), lambda: cache, tmp_path / "parts", RECIPE, save_every_s=0
            )
    parts = training.train_transformer(small_model(), lambda: cache, tmp_path / "parts", RECIPE)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name


def test_a_small_model_learns_four_clips(cache, tmp_path):
    def loss_of(model):
        batches = [training.draw_batch(cache, RECIPE, 10_000 + i) for i in range(8)]
        with torch.no_grad():
            return sum(training.flow_loss(model, batch).item() for batch in batches) / 8

    recipe = training.Recipe(steps=250, decay_steps=100, batch_size=8, ema=0.9, adamw_lr=3e-3, muon_lr=0.02)
    before = loss_of(small_model())
    assert loss_of(training.train_transformer(small_model(), lambda: cache, tmp_path, recipe)) < 0.75 * before


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


def test_a_decoder_stage_gives_the_encoder_no_gradient():
    torch.manual_seed(0)
    vae = build_vae(base_dim=8)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    vae_loss(vae, torch.rand(2, 3, 5, 16, 16) * 2 - 1, 1e-4)[0].backward()
    assert all(p.grad is None for p in vae.encoder.parameters())
    assert any(p.grad is not None for p in vae.decoder.parameters())


def test_drawn_shapes_move_and_stay_in_range():
    clips = draw_shapes(np.random.default_rng(0), batch=6, num_frames=5)
    assert clips.shape == (6, 5, 64, 64, 3)
    assert clips.min() >= 0 and clips.max() <= 255
    assert any(np.abs(clip[0] - clip[4]).max() > 50 for clip in clips)


def test_the_recipe_of_kairos_tiny_can_be_read():
    recipe = read_recipe(Path(__file__).parents[1] / "recipes" / "kairos-tiny.yaml")
    KairosTransformer3DModel(**recipe.transformer["model"])
    assert [VAEStage(**stage) for stage in recipe.vae["stages"]]


def test_a_recipe_makes_a_model_that_makes_a_video(tmp_path, monkeypatch):
    from kairos.presets import load_pipeline
    from kairos.training import cache, vae

    monkeypatch.setattr(cache, "SHARD_CLIPS", 8)
    monkeypatch.setattr(vae, "MEASURED_CLIPS", 1)
    whole = read_recipe(Path(__file__).parents[1] / "recipes" / "kairos-tiny.yaml")
    size = {"hidden_size": 32, "num_attention_heads": 2, "ffn_dim": 32, "gated_delta_head_dim": 8}
    recipe = replace(
        whole,
        output=tmp_path,
        vae={"stages": [{"steps": 1, "num_frames": 1, "batch_size": 2}]},
        conditioner={"steps": 2, "captions": 30, "batch_size": 4, "vocabulary": 300},
        cache={"shards": 1, "num_frames": 9},
        transformer={
            "model": whole.transformer["model"] | size,
            "steps": 2,
            "decay_steps": 1,
            "batch_size": 2,
        },
    )
    run_recipe(recipe)
    before = (tmp_path / "vae" / "config.json").stat().st_mtime_ns
    run_recipe(recipe)  # everything is finished: nothing is made again
    assert (tmp_path / "vae" / "config.json").stat().st_mtime_ns == before
    pipeline = load_pipeline(tmp_path / "kairos-tiny", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline("a red ball", num_frames=5, num_inference_steps=1).frames
    assert frames.shape == (1, 5, 64, 64, 3)
    assert "_name_or_path" not in (tmp_path / "kairos-tiny" / "vae" / "config.json").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\noutput: y\nscens: [uniform]", "unknown key 'scens'; did you mean 'scenes'"),
        ("name: x\noutput: y", "'scenes' is missing"),
        ("a: [", "is not YAML"),
        ("- 1", "mapping of stages"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused_in_one_line(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_recipe(file)
    assert "\n" not in str(caught.value)


def test_an_unknown_stage_is_refused(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("name: x\noutput: y\nscenes: [uniform]")
    with pytest.raises(UserError, match="unknown stage 'dit'"):
        run_recipe(read_recipe(file), ("dit",))
