"""Recipes: what is read, refused and planned, and a model that comes of one."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import random_pipeline
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import Qwen2VLImageProcessorPil

from kairos import KairosPipeline, KairosTransformer3DModel, MachineError, UserError
from kairos.presets import ASSETS
from kairos.training import run as stage_run
from kairos.training import steps
from kairos.training.loop import build_optimizer
from kairos.training.materials import encoder_dtype, load_start, sampler_of
from kairos.training.parallel import ALONE
from kairos.training.plan import check_memory, plan_stage, refuse_too_large
from kairos.training.recipe import build_recipe, read_recipe
from kairos.training.samples import sampling_of
from kairos.training.steps import run_recipe
from kairos.weights import save_original

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))

TINY = {
    "name": "tiny",
    "output": "runs/tiny",
    "scenes": ["uniform"],
    "vae": [{"steps": 1, "num_frames": 1, "batch_size": 2}],
    "conditioner": {"steps": 2, "captions": 30, "batch_size": 4, "vocabulary": 300},
    "data": {"source": "simulator", "scenes": ["uniform"], "clips": 8},
    "model": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "num_layers": 4,
        "gated_delta_head_dim": 8,
        "text_dim": 128,
        "pad_dilated": False,
        "causal": "chunk",
    },
    "stages": [
        {
            "name": "transformer",
            "buckets": [{"frames": 9, "height": 64, "width": 64}],
            "mix": {"t2v": 0.5, "ti2v": 0.5},
            "steps": 2,
            "batch_size": 2,
            "muon_lr": 0.01,
        }
    ],
    "defaults": {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 1.0},
}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_can_be_read_and_planned(file):
    recipe = read_recipe(file)
    for stage in recipe.stages:
        plan = plan_stage(recipe, stage, world=8)
        assert plan.total_gb > 0 and plan.flops > 0 and plan.trained <= plan.parameters
    assert recipe.steps[-1] == "assemble"


def test_the_recipe_of_kairos_tiny_makes_the_model_that_ships():
    recipe = read_recipe(next(file for file in RECIPES if file.stem == "kairos-tiny-teacher"))
    shipped = json.loads((ASSETS / "kairos-tiny" / "transformer" / "config.json").read_text())
    made = KairosTransformer3DModel(**recipe.model)
    assert {name: shipped[name] for name in recipe.model} == {
        name: made.config[name] for name in recipe.model
    }
    plan = plan_stage(recipe, recipe.stages[0])
    assert plan.parameters == sum(p.numel() for p in made.parameters())


def test_a_recipe_makes_a_model_that_makes_a_video(tmp_path, monkeypatch):
    from kairos.presets import load_pipeline
    from kairos.training import clips, distillation, flow, frames, vae, visible
    from kairos.training.visible import seen
    from kairos.weights import load_vae_file

    os.umask(umask := os.umask(0))
    monkeypatch.setattr(vae, "MEASURED_CLIPS", 1)
    monkeypatch.setattr(visible, "CLIPS", 1)
    roots: dict[str, list[torch.Tensor | None]] = {"flow": [], "distillation": []}
    for module, kept in ((flow, roots["flow"]), (distillation, roots["distillation"])):
        monkeypatch.setattr(module, "seen", lambda x, root, kept=kept: (kept.append(root), seen(x, root))[1])
    content = copy.deepcopy(TINY) | {"output": str(tmp_path)}
    content["stages"][0]["visible"] = 0.5
    content["stages"].append(
        {
            "name": "distillation",
            "objective": "distillation",
            "buckets": [{"frames": 9, "height": 64, "width": 64}],
            "steps": 1,
            "batch_size": 1,
            "visible": 0.5,
            "distillation": {"fake_score_updates": 1, "teacher_steps": 1, "motion_clips": 1, "score": 0.1},
        }
    )
    true = {"truth": 1.0, "frames": 1.0, "frame_clips": 1, "teacher_steps": 1, "motion_clips": 1}
    content["stages"].append(
        content["stages"][-1] | {"name": "true", "mix": {"continuation": 1.0}, "distillation": true}
    )
    decoded = []
    told = frames.FrameErrors.__call__
    monkeypatch.setattr(
        frames.FrameErrors, "__call__", lambda self, *given: (decoded.append(given[2]), told(self, *given))[1]
    )
    content["decoder"] = {"steps": 1, "batch_size": 2}
    recipe = build_recipe(content, "recipe")
    stages = ("transformer", "distillation", "true", "decoder")
    assert recipe.steps == ("vae", "conditioner", "cache", *stages, "assemble")
    run_recipe(recipe)
    for kept in roots.values():
        assert kept and all(root is not None and root.shape == (16, 16) for root in kept)
    assert decoded == [2]  # latent frames of the past
    made = [tmp_path / part / "config.json" for part in ("vae", "decoder")]
    made.append(tmp_path / "transformer" / "checkpoint.pt")
    before = [file.stat().st_mtime_ns for file in made]
    run_recipe(recipe)  # everything is finished: nothing is made again
    assert [file.stat().st_mtime_ns for file in made] == before
    pipeline = load_pipeline(tmp_path / "tiny", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline.scheduler.timesteps) == 4 and pipeline.config.defaults["guidance_scale"] == 1
    video = pipeline("a red ball", num_frames=5).frames
    assert video.shape == (1, 5, 64, 64, 3)
    assert "_name_or_path" not in (tmp_path / "tiny" / "vae" / "config.json").read_text()
    for part in ("vae", "conditioner", "decoder", "transformer", "tiny"):
        modes = {file.stat().st_mode & 0o777 for file in (tmp_path / part).rglob("*.safetensors")}
        assert modes == {0o666 & ~umask}, part
    first, second, last = (
        load_vae_file(tmp_path / part, dtype=torch.float32).state_dict()
        for part in ("vae", "decoder", "tiny/vae")
    )
    assert all(torch.equal(value, second[name].bfloat16().float()) for name, value in last.items())
    changed = {name.split(".")[0] for name in first if not torch.equal(first[name], second[name])}
    assert changed == {"decoder", "post_quant_conv"}
    (tmp_path / "decoder" / "finished").unlink()
    monkeypatch.setattr(clips.SimulatorSource, "references", lambda *_: iter(()))
    with pytest.raises(UserError, match="8 cached clips are not in the data any more"):
        run_recipe(recipe, ("decoder",))


def test_a_stage_goes_on_from_weights_that_are_there(tmp_path, kairos):
    """kairos-tiny-teacher lends VAE, text encoder and weights; one stage is a LoRA with sample videos."""
    bucket = {"frames": 9, "height": 64, "width": 64}
    content = {
        "name": "mine",
        "output": str(tmp_path),
        "base": "kairos-tiny-teacher",
        "data": {"source": "simulator", "scenes": ["uniform"], "clips": 4},
        "stages": [
            {
                "name": "more",
                "steps": 1,
                "batch_size": 2,
                "buckets": [bucket],
                "start_from": "kairos-tiny-teacher",
            },
            {
                "name": "lora",
                "steps": 2,
                "batch_size": 2,
                "buckets": [bucket],
                "lora": {"rank": 2},
                "samples_every": 2,
            },
        ],
        "defaults": {"num_inference_steps": 1},
    }
    run_recipe(build_recipe(content, "recipe"), ("cache", "more", "lora"))
    assert (tmp_path / "more" / "ema" / "diffusion_pytorch_model.safetensors").exists()
    assert (tmp_path / "lora" / "ema" / "lora.safetensors").exists()
    samples = sorted((tmp_path / "lora" / "samples").glob("step-0000002-*.mp4"))
    assert len(samples) == 4
    status, shown, said = kairos("show", samples[1])  # a sample of training, as the base would make it
    assert status == 0, said
    for line in ("step 2", "num_inference_steps 1", "guidance_scale 3.0", "sampler FlowMatchScheduler"):
        assert f"{line}\n" in shown
    assert re.search(r"caption \w+ .*ball", shown) and "kairos" not in shown

    video = tmp_path / "v.mp4"
    lora = tmp_path / "lora" / "ema"
    command = ["generate", "a red ball", "--frames", "5", "--steps", "1", "-o", video]
    command += ["--lora", f"{lora}:0.5", "--lora", str(lora / "lora.safetensors")]
    status, _, said = kairos(*command)
    assert status == 0, said
    from kairos.data.media import read_metadata

    assert read_metadata(video)["loras"] == [f"{lora}:0.5", str(lora / "lora.safetensors")]
    status, _, said = kairos("generate", "x", "--lora", "nothing.safetensors", "-o", video)
    assert status == 2 and "no LoRA at nothing.safetensors" in said


def test_a_vae_goes_on_from_the_bases(tmp_path):
    """Its latents keep their normalisation, and the LinearDiT and the words are the base's."""
    from kairos.presets import load_pipeline

    content = changed(
        name="mine",
        output=str(tmp_path),
        base="kairos-tiny-teacher",
        vae=[{"steps": 1, "num_frames": 5, "batch_size": 1, "muon_lr": 1e-4, "roots": True, "anchor": 0.2}],
        conditioner="absent",
        model="absent",
        stages=[SHORT | {"steps": 1, "adamw_lr": 1e-9, "muon_lr": None}],
        data=TINY["data"] | {"clips": 2},
    )
    recipe = build_recipe(content, "recipe")
    assert recipe.steps == ("vae", "cache", "transformer", "assemble")
    run_recipe(recipe)
    mine, base = load_pipeline(tmp_path / "mine"), load_pipeline("kairos-tiny-teacher")
    moved = {}
    for part in ("vae", "transformer", "text_encoder"):
        old = getattr(base, part).state_dict()
        moved[part] = max(
            float((value - old[name]).norm() / old[name].norm().clamp(min=1e-3))
            for name, value in getattr(mine, part).state_dict().items()
        )
    assert 0 < moved["vae"] < 0.1 and moved["transformer"] < 1e-3 and moved["text_encoder"] == 0
    assert mine.vae.config.latents_std == base.vae.config.latents_std


SHORT = TINY["stages"][0] | {"buckets": [{"frames": 5, "height": 64, "width": 64}]}


CLIP, PICTURE = TINY["stages"][0]["buckets"][0], {"frames": 1, "height": 64, "width": 64}


def one(**options):
    """The recipe with other options of its stage."""
    return changed(stages=[TINY["stages"][0] | options])


def distilled(**options):
    return one(objective="distillation", distillation=options)


def changed(**changes):
    return {key: value for key, value in (copy.deepcopy(TINY) | changes).items() if value != "absent"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(scens=["uniform"]), "unknown key 'scens'; did you mean 'scenes'"),
        (changed(name="absent"), "the key 'name' is missing"),
        (changed(scenes=None), "scenes must be a list, got None"),
        (changed(scenes="absent"), "the key 'scenes' is missing"),
        (changed(scenes=["unifrom"]), "unknown scene 'unifrom'"),
        (changed(vae={"stages": []}), "vae must be a list"),
        (changed(vae=[{"steps": 1}]), r"vae\[0\]: the key 'num_frames' is missing"),
        (changed(conditioner={"step": 1}), "conditioner: unknown key 'step'; did you mean 'steps'"),
        (changed(conditioner=None), "the key 'conditioner' is missing"),
        (changed(vae="absent"), "the key 'vae' is missing"),
        (changed(vae=[TINY["vae"][0] | {"anchor": 1.0}]), "a VAE from nothing has no latents to be held to"),
        (changed(vae="absent", conditioner="absent"), "the key 'base' is missing"),
        (changed(data="absent"), "data.source must be one of"),
        (changed(model="absent"), "the key 'model' is missing"),
        (changed(seed="seven"), "seed must be a whole number, got 'seven'"),
        (changed(stages=[{"name": "x", "steps": 1}]), "stage x: the key 'buckets' is missing"),
        (changed(stages=[TINY["stages"][0]] * 2), "two stages are named 'transformer'"),
        (changed(decoder={"step": 1}), "decoder: unknown key 'step'; did you mean 'steps'"),
        (changed(decoder={"steps": 0}), "decoder.steps must be at least 1, got 0"),
        (
            changed(decoder={"steps": 1, "batch_size": 3}),
            "decoder.batch_size must be even, at least 2, got 3",
        ),
        (changed(decoder={"steps": 1}, stages="absent"), "the decoder learns from what the last stage makes"),
        (changed(decoder={"steps": 1}, stages=[SHORT]), "in a bucket of more than 5 frames"),
        (changed(decoder={"steps": 1}, stages=[TINY["stages"][0] | {"lora": {}}]), "train a whole LinearDiT"),
        (changed(stages=[TINY["stages"][0] | {"name": "decoder"}]), "two stages are named 'decoder'"),
        (changed(defaults={"hight": 64}), "defaults: unknown key 'hight'; did you mean 'height'"),
        (changed(defaults={"fps": float("nan")}), "defaults.fps must be a finite number, got nan"),
        (changed(model={"hidden_size": "abc"}), "model.hidden_size must be a whole number, got 'abc'"),
        (changed(conditioner={"steps": "many"}), "conditioner.steps must be a whole number, got 'many'"),
        (changed(conditioner={"captions": 0}), "conditioner.captions must be at least 1, got 0"),
        (changed(seed=-1), "seed must be at least 0, got -1"),
        (changed(threads=-1), "threads must be at least 1, got -1"),
        (changed(data=TINY["data"] | {"clips": 0}), "data.clips must be at least 1, got 0"),
        (one(distillation={}), "distillation goes with objective: distillation, got objective: flow"),
        (one(preference={}), "preference goes with objective: preference, got objective: flow"),
        (one(objective="distillation", lora={}), "distillation trains all weights; leave out lora"),
        (one(objective="preference", buckets=[CLIP, PICTURE]), "preference has one bucket, got 2"),
        (one(images=0.5), "images is the share of buckets of one frame, got 0.5 and no such bucket"),
        (one(buckets=[CLIP, PICTURE]), "images is 0, so bucket 1x64x64 would never be drawn"),
        (one(batch_size=3, accumulate=2), "batch_size must be a multiple of accumulate, got 3 and 2"),
        (one(start_from="transformer"), "start_from must name an earlier stage, got 'transformer'"),
        (
            changed(stages=[TINY["stages"][0] | {"lora": {}}, TINY["stages"][0] | {"name": "next"}]),
            "stage next: transformer makes a LoRA",
        ),
        (one(decay_steps=-5), "decay_steps must be at least 0, got -5"),
        (one(muon_lr=-1), "muon_lr must be above 0, got -1"),
        (one(adamw_lr=float("inf")), "adamw_lr must be a finite number, got inf"),
        (one(betas=[1.5, 2]), "betas must be two numbers from 0 to below 1"),
        (one(weight_decay=-1), "weight_decay must be at least 0, got -1"),
        (one(time_std=float("nan")), "time_std must be a finite number, got nan"),
        (one(mix={"t2v": float("nan")}), "mix.t2v must be a finite number"),
        (distilled(shift=0), "distillation.shift must be above 0, got 0"),
        (distilled(fake_score_updates=-1), "fake_score_updates must be at least 0, got -1"),
        (distilled(fake_score_lr=-1), "fake_score_lr must be above 0, got -1"),
        (distilled(motion_clips=0), "motion_clips must be at least 1, got 0"),
        (distilled(sigma_range=[-5, 30]), "sigma_range must be two rising numbers from 0 to 1"),
        (distilled(sigma_range=[0.1, 0.2, 0.3]), "sigma_range must be two rising numbers from 0 to 1"),
        (distilled(sampling_times=[900, 500]), "sampling_times must fall from 1000"),
        (changed(stages=[TINY["stages"][0] | {"stepz": 1}]), r"stages\[0\]: unknown key 'stepz'"),
        (changed(stages=[TINY["stages"][0] | {"steps": "many"}]), "steps must be a whole number, got 'many'"),
        (changed(stages=[TINY["stages"][0] | {"visible": 1.5}]), "visible must be from 0 to 1, got 1.5"),
        (
            changed(stages=[TINY["stages"][0] | {"visible": 0.5, "objective": "preference"}]),
            "visible goes with the objectives flow and distillation",
        ),
        (changed(stages=[TINY["stages"][0] | {"buckets": [{"frames": 8, "height": 64, "width": 64}]}]), "4n"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused_in_one_line(content, message):
    with pytest.raises(UserError, match=message) as caught:
        build_recipe(content, "recipe.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not YAML"), ("- 1", "a mapping"), (None, "no recipe at")]
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_recipe(file)


def test_stages_that_are_not_there_yet_are_named(tmp_path):
    recipe = build_recipe(copy.deepcopy(TINY) | {"output": str(tmp_path)}, "recipe")
    with pytest.raises(UserError, match="unknown stage 'dit'; stages are vae, conditioner, cache"):
        run_recipe(recipe, ("dit",))
    with pytest.raises(UserError, match="has no vae yet; run the recipe's stage vae first"):
        run_recipe(recipe, ("cache",))
    for part in ("vae", "conditioner"):
        (tmp_path / part).mkdir()  # begun, and stopped before its end
        with pytest.raises(UserError, match=f"has no {part} yet; run the recipe's stage {part} first"):
            run_recipe(recipe, ("cache",))
        (tmp_path / part / "finished").touch()
    for part in ("vae", "conditioner"):
        (tmp_path / part / "finished").unlink()
    with pytest.raises(UserError, match="stage transformer has no weights"):
        run_recipe(recipe, ("assemble",))
    recipe = build_recipe(copy.deepcopy(TINY) | {"output": str(tmp_path), "decoder": {"steps": 1}}, "recipe")
    with pytest.raises(UserError, match="has no decoder yet; run the recipe's stage decoder first"):
        run_recipe(recipe, ("assemble",))


def test_a_model_that_does_not_exist_and_a_rollout_that_cannot_be_are_refused(tmp_path):
    content = {key: value for key, value in TINY.items() if key not in ("vae", "conditioner", "scenes")}
    content |= {"output": str(tmp_path), "base": "kairos-tini", "stages": TINY["stages"]}
    with pytest.raises(UserError, match="did you mean 'kairos-tiny'"):
        run_recipe(build_recipe(content, "recipe"))
    stage = TINY["stages"][0] | {"start_from": "random", "mix": {"rollout": 1.0}}
    model = TINY["model"] | {"causal": "none"}
    content |= {"base": "kairos-tiny", "stages": [stage], "model": model}
    with pytest.raises(UserError, match="the task rollout needs"):
        run_recipe(build_recipe(content, "recipe"), ("transformer",))
    content |= {"model": {"causal": "chunk"}}  # the rest is the base's
    recipe = build_recipe(content, "recipe")
    made = stage_run.starting_model(recipe, recipe.stages[0])
    assert made.config.hidden_size < 500 and made.config.causal == "chunk"
    content |= {"stages": [stage | {"mix": {"t2v": 1.0}}], "model": model | {"hidden": 3}}
    with pytest.raises(UserError, match="hidden"):
        run_recipe(build_recipe(content, "recipe"), ("transformer",))


def test_what_cannot_fit_is_refused_before_it_starts():
    recipe = read_recipe(next(file for file in RECIPES if file.stem == "kairos-4b"))
    stage = recipe.stages[-1]
    plan = plan_stage(recipe, stage, 1)
    assert plan.parameters == pytest.approx(4e9, rel=0.2) and plan.memory_gb["weights"] == pytest.approx(
        16, rel=0.2
    )
    with pytest.raises(MachineError, match=r"needs about .* GB a process .* try") as caught:
        refuse_too_large(plan, 80.0)
    assert "\n" not in str(caught.value)
    eight = plan_stage(recipe, stage, 8)
    assert eight.memory_gb["optimizer"] == pytest.approx(plan.memory_gb["optimizer"] / 8)
    check_memory(
        build_recipe(copy.deepcopy(TINY), "recipe"), build_recipe(copy.deepcopy(TINY), "r").stages[0], ALONE
    )


def test_frames_that_are_decoded_take_memory_by_the_size_of_the_vae():
    content = yaml.safe_load(next(file for file in RECIPES if file.stem == "kairos-tiny").read_text())
    stage = next(stage for stage in content["stages"] if stage["name"] == "frames")
    plans = {}
    for clips in (1, 6, 60):
        stage["distillation"]["frame_clips"] = clips
        recipe = build_recipe(content, "recipe")
        plans[clips] = plan_stage(recipe, recipe.stages[-1])
    one, six, all_of_them = (plans[clips].memory_gb["decoder"] for clips in plans)
    assert one == pytest.approx(0.286, rel=0.01)  # what autograd's hooks have counted
    assert six == pytest.approx(6 * one) and all_of_them == pytest.approx(16 * one)
    assert plans[6].flops > plans[1].flops
    content["base"] = "kairos-4b-480p"
    large = plan_stage(build_recipe(content, "recipe"), recipe.stages[-1])
    assert large.memory_gb["decoder"] > 6 * all_of_them
    with pytest.raises(MachineError, match="try fewer frame_clips"):
        refuse_too_large(replace(large, memory_gb=large.memory_gb | {"decoder": 400.0}), 80.0)


def test_long_clips_that_are_only_unrolled_take_memory_for_their_chunks_alone():
    content = yaml.safe_load(next(file for file in RECIPES if file.stem == "kairos-tiny").read_text())
    stage = next(stage for stage in content["stages"] if stage["name"] == "frames")
    stage |= {"images": 0, "distillation": stage["distillation"] | {"unrolled": 2}}

    def planned(*buckets):
        stage["buckets"] = [{"height": 64, "width": 64} | bucket for bucket in buckets]
        recipe = build_recipe(content, "recipe")
        return plan_stage(recipe, recipe.stages[-1]).memory_gb

    short, long = {"frames": 33}, {"frames": 129}
    whole, unrolled = planned(short, long), planned(short, long | {"mix": {"rollout": 1}})
    # Eight of 33 latent frames, where the short clips' nine are the most.
    assert unrolled["activations"] == pytest.approx(whole["activations"] * 9 / 33)
    assert unrolled["decoder"] == planned(short)["decoder"] < whole["decoder"]


def test_the_critics_three_verdicts_count():
    stage = TINY["stages"][0] | {"objective": "distillation", "checkpointing": True}
    plans = [
        plan_stage(recipe, recipe.stages[0]).memory_gb["activations"]
        for adversarial in (0.0, 1.0)
        for recipe in [
            build_recipe(changed(stages=[stage | {"distillation": {"adversarial": adversarial}}]), "recipe")
        ]
    ]
    # Two of them hold the blocks up to the middle of four: three.
    assert plans[1] == pytest.approx((1 + 2 * 3 / 4) * plans[0])


def test_a_teacher_and_its_fake_score_are_planned_at_their_own_size(tmp_path):
    sizes = TINY["model"] | {"num_layers": 8, "hidden_size": 64}
    save_original(KairosTransformer3DModel(**sizes), tmp_path / "teacher.safetensors")
    stage = TINY["stages"][0] | {"objective": "distillation", "checkpointing": True}

    def planned(teacher):
        recipe = build_recipe(changed(stages=[stage | {"distillation": {"teacher": teacher}}]), "recipe")
        return plan_stage(recipe, recipe.stages[0]).memory_gb

    alike, larger = planned(""), planned(str(tmp_path / "teacher.safetensors"))
    parameters = sum(p.numel() for p in KairosTransformer3DModel(**sizes).parameters())
    assert larger["teacher"] == pytest.approx(4 * parameters / 1e9) and alike["teacher"] == alike["weights"]
    assert larger["fake score"] == pytest.approx(16 * parameters / 1e9)
    assert larger["activations"] > 2 * alike["activations"] and larger["weights"] == alike["weights"]
    tiny = planned("kairos-tiny-teacher")["teacher"]
    assert tiny == pytest.approx(4 * sum(p.numel() for p in load_tiny().parameters()) / 1e9)


def load_tiny():
    return KairosTransformer3DModel.from_pretrained(ASSETS / "kairos-tiny-teacher" / "transformer")


def test_muon_keeps_one_number_of_a_matrix_and_two_of_the_rest():
    recipe = build_recipe(copy.deepcopy(TINY), "recipe")
    stage = recipe.stages[0]
    model = KairosTransformer3DModel(**recipe.model)
    optimizer = build_optimizer(model, stage)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    kept = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )
    assert plan_stage(recipe, stage).memory_gb["optimizer"] == pytest.approx(kept / 1e9)


def test_a_model_keeps_its_sampler_when_it_learns_preferences():
    stage = TINY["stages"][0]
    fast = stage | {"name": "fast", "objective": "distillation"}
    better = stage | {"name": "better", "objective": "preference"}
    recipe = build_recipe(changed(stages=[stage, fast, better]), "recipe")
    samplers = [type(sampler_of(recipe, one)[0]).__name__ for one in recipe.stages]
    assert samplers == ["FlowMatchScheduler", "FewStepScheduler", "FewStepScheduler"]


def test_a_base_with_pictures_in_its_prompts_learns_from_them_and_takes_images_afterwards(tmp_path):
    from kairos.presets import load_pipeline

    base = random_pipeline()
    base.register_modules(processor=Qwen2VLImageProcessorPil())
    base.register_to_config(prompt_template="2026")
    for mark, token in (("image_token_id", "image_pad"), ("vision_start_token_id", "vision_start")):
        setattr(base.text_encoder.config, mark, base.tokenizer.convert_tokens_to_ids(f"<|{token}|>"))
    base.save_pretrained(tmp_path / "base")
    stage = {
        "name": "more",
        "buckets": [{"frames": 9, "height": 32, "width": 32}],
        "steps": 4,
        "batch_size": 2,
    }
    content = {
        "name": "mine",
        "output": str(tmp_path / "runs"),
        "base": str(tmp_path / "base"),
        "data": {"source": "simulator", "scenes": ["uniform"], "clips": 2},
        "stages": [stage | {"mix": {"t2v": 0.5, "i2v": 0.5}}],
    }
    run_recipe(build_recipe(content, "recipe"))
    mine = load_pipeline(tmp_path / "runs" / "mine", dtype=torch.float32)
    mine.set_progress_bar_config(disable=True)
    assert mine.config.prompt_template == "2026"
    first = Image.new("RGB", (32, 32), "red")
    assert mine("a ball", image=first, num_frames=5, num_inference_steps=1).frames.shape == (1, 5, 32, 32, 3)


def test_weights_alone_are_of_the_bases_kind_and_a_teacher_stays_what_it_is(tmp_path):
    def read(source, **options):
        return load_start(recipe, str(source), **options).config

    bare, larger = tmp_path / "bare.safetensors", tmp_path / "larger.safetensors"
    recipe = build_recipe(changed(base="kairos-tiny", vae="absent", conditioner="absent", model={}), "recipe")
    tiny = load_start(recipe, "kairos-tiny")
    save_file(tiny.state_dict(), bare)
    assert read(bare)["causal"] == tiny.config["causal"] == "chunk"
    assert read(bare)["pad_dilated"] is False

    sizes = dict(recipe.model | TINY["model"])
    save_original(KairosTransformer3DModel(**sizes | {"num_layers": 8, "causal": "none"}), larger)
    recipe = build_recipe(changed(model=sizes | {"num_layers": 4, "causal": "chunk"}), "recipe")
    assert (read(larger, teaches=True)["num_layers"], read(larger, teaches=True)["causal"]) == (8, "none")
    with pytest.raises(UserError, match="does not fit"):
        read(larger)


def test_a_few_step_base_keeps_its_sampler_for_preferences_and_loses_it_to_flow_matching(tmp_path):
    def sampler(objective, base="kairos-tiny", start=""):
        stage = TINY["stages"][0] | {"objective": objective, "start_from": start}
        content = changed(base=base, vae="absent", conditioner="absent", defaults={}, stages=[stage])
        recipe = build_recipe(content, "recipe")
        scheduler, defaults = sampler_of(recipe, recipe.stages[0])
        steps, guidance = defaults["num_inference_steps"], defaults["guidance_scale"]
        return type(scheduler).__name__, steps, guidance, scheduler.config.get("shift")

    own = json.loads((ASSETS / "kairos-tiny" / "scheduler" / "scheduler_config.json").read_text())["shift"]
    assert sampler("preference") == ("FewStepScheduler", 4, 1.0, own)
    shutil.copytree(ASSETS / "kairos-tiny", tmp_path / "saved")
    assert sampler("preference", str(tmp_path / "saved")) == ("FewStepScheduler", 4, 1.0, own)
    assert sampler("flow")[:3] == ("FlowMatchScheduler", 50, 5.0)
    assert sampler("preference", "kairos-tiny-teacher")[:2] == ("FlowMatchScheduler", 20)
    assert sampler("preference", start="kairos-tiny-teacher")[:3] == ("FlowMatchScheduler", 20, 3.0)
    assert sampler("preference", "kairos-tiny-teacher", "kairos-tiny")[:3] == ("FewStepScheduler", 4, 1.0)
    weights = ASSETS / "kairos-tiny" / "transformer"
    assert sampler("preference", start=str(weights)) == ("FewStepScheduler", 4, 1.0, own)


def test_samples_are_made_as_the_finished_model_makes_its_videos():
    def sampling(base, **options):
        content = changed(
            base=base, vae="absent", conditioner="absent", defaults={}, stages=[SHORT | options]
        )
        recipe = build_recipe(content, "recipe")
        return sampling_of(*sampler_of(recipe, recipe.stages[0]))

    of_teacher = {"steps": 20, "guidance_scale": 3.0, "guide_continuation": False, "few_step": None}
    assert sampling("kairos-tiny-teacher") == of_teacher == sampling("kairos-tiny-teacher", lora={})
    assert sampling("kairos-tiny")["few_step"] is None and sampling("kairos-tiny")["steps"] == 50
    own = sampling("kairos-tiny", lora={})["few_step"]  # a LoRA changes no sampler
    assert own is not None and len(own.config.sampling_times) == 4


def test_a_model_without_a_base_makes_clips_as_long_and_large_as_it_has_seen():
    long, small = {"frames": 13, "height": 48, "width": 48}, {"frames": 13, "height": 32, "width": 32}
    stage = TINY["stages"][0] | {"buckets": [CLIP, small, long]}
    better = TINY["stages"][0] | {"name": "better", "objective": "preference"}
    seen = {"height": 48, "width": 48, "num_frames": 13}
    for defaults in ({}, {"height": 64, "num_inference_steps": 7}):
        recipe = build_recipe(changed(stages=[stage, better], defaults=defaults), "recipe")
        for one_stage in recipe.stages:
            found = sampler_of(recipe, one_stage)[1]
            assert {name: found[name] for name in seen} == {
                name: defaults.get(name, value) for name, value in seen.items()
            }
            assert found["num_inference_steps"] == defaults.get("num_inference_steps", 50)


def test_a_lora_is_added_to_a_whole_model_or_its_weights_which_all_commands_take(tmp_path, kairos):
    from kairos.presets import load_pipeline
    from kairos.weights import load_transformer_file

    before = load_pipeline("kairos-tiny").transformer.get_parameter("blocks.0.ffn.0.weight")
    up, down = torch.ones(before.shape[0], 1), torch.full((1, before.shape[1]), 0.5)
    layer, file = "transformer.blocks.0.ffn.0", tmp_path / "lora.safetensors"
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, file)

    def export(source, output):
        return kairos("train", "export", source, output, "--lora", f"{file}:2", "--dtype", "float32")

    for source, output in (("kairos-tiny", "whole"), (tmp_path / "whole", "one.safetensors")):
        status, _, said = export(source, tmp_path / output)
        assert status == 0, said
    whole = load_pipeline(tmp_path / "whole")
    assert whole.config.defaults["num_inference_steps"] == 4
    assert not any(str(ASSETS) in text.read_text() for text in (tmp_path / "whole").rglob("*.json"))
    once, twice = whole.transformer, load_transformer_file(tmp_path / "one.safetensors")
    for times, model in ((1, once), (2, twice)):
        after = model.get_parameter("blocks.0.ffn.0.weight")
        torch.testing.assert_close(after, before + times * torch.ones_like(before))
    status, _, said = kairos("train", "export", file, tmp_path / "two.safetensors")
    assert status == 2 and "is a LoRA, which is added to a LinearDiT: kairos generate --lora" in said
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "diffusion_pytorch_model.safetensors").touch()
    status, _, said = export("kairos-tiny", tmp_path / "alone")
    assert status == 2 and "alone holds a LinearDiT alone, and kairos-tiny is a whole model" in said


def test_whole_models_are_merged_by_name_and_by_folder(tmp_path, kairos):
    from kairos.weights import load_transformer_file

    shutil.copytree(ASSETS / "kairos-tiny", tmp_path / "mine")
    command = [
        "train",
        "merge",
        f"{tmp_path / 'mine'}:3",
        "kairos-tiny-teacher",
        "-o",
        tmp_path / "m.safetensors",
    ]
    status, _, said = kairos(*command, "--method", "ties", "--base", "kairos-tiny")
    assert status == 0, said
    status, _, said = kairos(*command)
    assert status == 0, said
    one, two, merged = (
        load_transformer_file(path, dtype=torch.float32).state_dict()
        for path in (ASSETS / "kairos-tiny", ASSETS / "kairos-tiny-teacher", tmp_path / "m.safetensors")
    )
    for name, value in merged.items():
        torch.testing.assert_close(value, 0.75 * one[name] + 0.25 * two[name], rtol=0.01, atol=0.01)
    status, _, said = kairos("train", "merge", "kairos-tini", "-o", tmp_path / "m.safetensors")
    assert status == 2 and "no model or folder 'kairos-tini'; did you mean 'kairos-tiny'" in said


def test_lora_needs_a_small_part_of_the_memory():
    recipe = read_recipe(next(file for file in RECIPES if file.stem == "kairos-4b-lora"))
    plan = plan_stage(recipe, recipe.stages[0])
    assert plan.trained < plan.parameters / 20
    assert plan.memory_gb["optimizer"] < plan.memory_gb["weights"] / 10


def test_the_command_plans_and_refuses_in_one_line(tmp_path, kairos):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(TINY))
    status, plan, said = kairos("train", "plan", file)
    assert status == 0, said
    assert all(word in plan for word in ("parameters", "optimizer", "activations", "steps, about"))
    assert "on 1 x this device" in plan and "\nnot planned: vae, conditioner, cache, assemble\n" in plan
    status, _, said = kairos("train", "plan", file, "--memory-gb", "0.0001")
    assert status == 1 and said.count("\n") == 1 and "stage transformer needs" in said
    file.write_text("name: [")
    status, _, said = kairos("train", file)
    assert status == 2 and said.count("\n") == 1 and "is not YAML" in said


def test_a_plan_for_a_gpu_that_is_told_of_computes_the_time_from_its_peak(tmp_path, kairos, monkeypatch):
    from kairos.training import plan

    def measured(*_):
        raise AssertionError("this machine is not asked")

    monkeypatch.setattr(plan, "measured_speed", measured)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(TINY))
    exact = TINY | {"stages": [TINY["stages"][0] | {"precision": "float32"}]}
    (tmp_path / "exact.yaml").write_text(yaml.safe_dump(exact))

    def step_s(recipe, *options):
        status, said, complaint = kairos("train", "plan", recipe, "--memory-gb", 80, *options)
        assert status == 0 and "TFLOP/s, computed\n" in said, complaint
        return float(said.split("tokens, about ")[1].split(" s on 1 x a GPU of ")[0])

    assert step_s(file) == step_s(file, "--peak", 989.4) == pytest.approx(step_s(file, "--peak", 98.94) / 10)
    assert step_s("exact.yaml") == pytest.approx(15 * step_s(file), rel=0.1)
    status, _, said = kairos("train", "plan", file, "--peak", "989.4")
    assert status == 2 and "--peak is of the GPU that --memory-gb tells of" in said
    status, _, said = kairos("train", "plan", file, "--memory-gb", "80", "--peak", "0")
    assert status == 2 and "must be above 0 TFLOP/s, got 0" in said


def test_a_pipeline_that_finds_the_disk_full_is_not_left_half_there(tmp_path, monkeypatch):
    content = changed(base="kairos-tiny-teacher", vae="absent", conditioner="absent", output=str(tmp_path))
    recipe = build_recipe(content | {"model": {}}, "recipe")
    monkeypatch.setattr(steps, "load_start", lambda *_: random_pipeline().transformer)

    def full(self, folder):
        (folder / "model_index.json").write_text("{}")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(KairosPipeline, "save_pretrained", full)
    with pytest.raises(MachineError, match=r"cannot write .*tiny: no space left on device; free some space"):
        steps.assemble(recipe, ALONE)
    assert not list((tmp_path / "tiny").iterdir())


def test_a_large_encoder_beside_a_gpu_is_bfloat16_and_any_other_float32(tmp_path, monkeypatch):
    large, small = tmp_path / "large" / "text_encoder", tmp_path / "small" / "text_encoder"
    for folder, size in ((large, 2 << 30), (small, 1 << 20), (tmp_path / "small" / "transformer", 2 << 30)):
        folder.mkdir(parents=True)
        with (folder / "model.safetensors").open("wb") as file:
            file.truncate(size)  # holds nothing on a disk
    for there, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert encoder_dtype(large) == encoder_dtype(large.parent) == expected
        assert encoder_dtype(small) == encoder_dtype(small.parent) == torch.float32
