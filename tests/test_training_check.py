"""What is wrong with a recipe is said before any of it runs, and what was made of something else is not taken
for finished."""

from __future__ import annotations

import copy
import json
import logging
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_training_recipe import RECIPES, TINY, changed, distilled, one

from kairos import MachineError, UserError
from kairos.data.files import lock
from kairos.data.yaml_text import load_yaml
from kairos.presets import ASSETS
from kairos.training import materials, steps
from kairos.training.check import check_run, check_there
from kairos.training.materials import sampler_of
from kairos.training.origins import finish, is_finished, options_hash
from kairos.training.parallel import ALONE
from kairos.training.plan import config_at, plan_stage, refuse_too_large
from kairos.training.recipe import build_recipe, read_recipe
from kairos.training.steps import run_recipe

CLIP = TINY["stages"][0]["buckets"][0]
LINES = {
    "good": '{"video": "a.mp4", "caption": "a"}\n',
    "bad": '{"video": "a.mp4", "caption": "a"}\n{"video": "b.mp4", "text": "b"}\n',
}


def of_base(**options):
    """A recipe of one stage that goes on from kairos-tiny-teacher."""
    stage = TINY["stages"][0] | {"muon_lr": None} | options.pop("stage", {})
    without = {"vae": "absent", "conditioner": "absent", "scenes": "absent", "model": "absent"}
    return changed(**without | {"base": "kairos-tiny-teacher", "stages": [stage]} | options)


def of_file(file, **options):
    return of_base(data={"source": "manifest", "file": file, "fps": 8}, **options)


def model(**options):
    return changed(model=TINY["model"] | options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (model(causal="chunky"), 'causal must be "none" or "chunk", got \'chunky\''),
        (model(layer_pattern="SSXG"), "layer_pattern must be made of S"),
        (model(patch_size=[1, 2]), r"patch_size must be \(1, height, width\), got \(1, 2\)"),
        (model(patch_size=[1, 3, 3]), "sides of bucket 9x64x64 must be multiples of 24 pixels, a token's"),
        (model(text_dim=64), "text_dim must be that of the prompt encoder, 128, got 64"),
        (of_base(stage={"start_from": "random"}, model={"text_dim": 64}), "prompt encoder, 128, got 64"),
        (
            model(causal="none") | {"stages": [TINY["stages"][0] | {"mix": {"rollout": 1.0}}]},
            "the task rollout needs model.causal",
        ),
        (one(state={"block": 9}), "state.block must be from 0 to 3, got 9"),
        (one(train=["blocks.3.", "nope"]), "train names 'nope', which no parameter has in its name"),
        (one(lora={"targets": ["nope"]}), "lora.targets .* name no layer"),
        (one(start_from="kairos-tini"), "did you mean 'kairos-tiny'"),
        (one(start_from="kairos-4b-480p"), "kairos models download kairos-4b-480p"),
        (distilled(teacher="kairos-tini"), "did you mean 'kairos-tiny'"),
        (of_base(base="kairos-tini"), "did you mean 'kairos-tiny'"),
        (of_file("nope.jsonl"), "no manifest at nope.jsonl"),
        (of_file("bad.jsonl"), 'bad.jsonl, line 2: there is no "caption" beside'),
        (of_base(data={"source": "webdataset", "folder": "nope"}), "no folder of shards at nope"),
        (
            one(objective="preference", preference={"manifest": "nope.jsonl"}),
            "stage transformer: no manifest at nope.jsonl",
        ),
    ],
)
def test_what_a_run_would_fail_at_is_refused_before_its_first_step(
    content, message, tmp_path, monkeypatch, huggingface
):
    monkeypatch.chdir(tmp_path)
    for name, lines in LINES.items():
        (tmp_path / f"{name}.jsonl").write_text(lines)
    monkeypatch.setattr(steps, "run_step", lambda *_: pytest.fail("a step was run"))
    with pytest.raises(UserError, match=message) as caught:
        run_recipe(build_recipe(content | {"output": "out"}, "recipe"))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(data=TINY["data"] | {"split": "trian"}), "unknown split 'trian'; one of train, in"),
        (one(buckets=[CLIP | {"width": 96}]), "pictures are square, bucket 9x64x96 is not"),
        (of_file("x", stage={"state": {}}), "only the simulator knows states; leave out state"),
        (of_file("x", stage={"objective": "preference"}), "rollouts can be measured in the simulator's"),
        (one(objective="preference", preference={"given_frames": 9}), "below the bucket's 9, got 9"),
        (one(objective="preference", samples_every=5), "samples_every goes with the objectives flow"),
        (one(decay_steps=3), "decay_steps must be at most steps, got 3 and 2"),
        (one(warmup_steps=3), "warmup_steps must be at most steps, got 3 and 2"),
        (distilled(matching=0, consistency=0), "distillation has nothing to teach"),
        (of_base(stages=[]), "there is nothing to do: give it stages, or vae and conditioner"),
        (changed(output=None), "output must be a path, got None"),
        *(
            (changed(name=name), "is no name")
            for name in ("", "../../x", "a/b", "a\\b", "a\0b", "a\nb", "-x")
        ),
        *((one(name=name), "is no name") for name in ("", "..", ".x", "/tmp/x", "random")),
        *((changed(name=name), f"recipe is named '{name}', and so is") for name in ("vae", "transformer")),
        (changed(defaults={"fps": 0}), "defaults.fps must be above 0, got 0"),
        (changed(defaults={"height": 65}), "defaults.height must be a multiple of 16 pixels, got 65"),
        (changed(defaults={"num_frames": 32}), r"defaults.num_frames must be 4n \+ 1, got 32"),
        (changed(defaults={"num_inference_steps": 2.5}), "must be a whole number, got 2.5"),
        (changed(defaults={"width": True}), "width must be a whole number, got True"),
        (changed(defaults={"guidance_scale": -1}), "guidance_scale must be at least 0, got -1"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_when_it_is_read(content, message):
    with pytest.raises(UserError, match=message) as caught:
        build_recipe(content, "recipe.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["étude", "two words", "a+b", "first (2)", "a,b", "_x"])
def test_a_name_may_hold_what_a_folder_may(name):
    assert build_recipe(changed(name=name), "recipe").name == name
    assert build_recipe(one(name=name), "recipe").stages[0].name == name


def test_a_start_of_its_own_kind_is_checked_as_what_it_is(tmp_path):
    """Neither the recipe nor a base says what the weights are."""
    shutil.copytree(ASSETS / "kairos-tiny-teacher" / "transformer", tmp_path / "weights")
    stage = TINY["stages"][0] | {"mix": {"rollout": 1.0}, "start_from": str(tmp_path / "weights")}
    recipe = build_recipe(changed(model="absent", stages=[stage]), "recipe")
    check_run(recipe, recipe.stages, 1)
    plan = plan_stage(recipe, recipe.stages[0])
    assert plan.parameters < 1e8  # and not those of the 4B model


def test_a_teacher_that_the_recipe_makes_is_of_the_recipes_kind_and_any_other_of_its_own():
    student = TINY["stages"][0] | {"name": "fast", "objective": "distillation", "muon_lr": None}
    content = of_base(model={"window_frames": 2})
    recipe = build_recipe(content | {"stages": [*content["stages"], student]}, "recipe")
    frames = {
        teacher: config_at(recipe, teacher, teaches=True)["window_frames"]
        for teacher in ("transformer", "kairos-tiny-teacher")
    }
    assert frames == {"transformer": 2, "kairos-tiny-teacher": 3}


def test_a_key_that_is_there_twice_is_refused_and_an_anchor_may_be_changed(tmp_path):
    file = tmp_path / "recipe.yaml"
    text = (
        "name: x\noutput: y\nbase: kairos-tiny\ndata: {source: simulator, scenes: [push]}\nstages:\n"
        "  - &first {name: a, steps: 1, buckets: [{frames: 5, height: 64, width: 64}]}\n"
        "  - {<<: *first, name: b, start_from: a}\n"
    )
    file.write_text(text)
    assert [stage.name for stage in read_recipe(file).stages] == ["a", "b"]
    file.write_text(text.replace("steps: 1", "steps: 1, steps: 2"))
    with pytest.raises(UserError, match=r"recipe.yaml: the key 'steps' is there twice, at line 6"):
        read_recipe(file)
    file.write_text("name: {{unfilled}}\n")
    with pytest.raises(UserError, match="is not YAML"):
        read_recipe(file)
    assert load_yaml("{1: a, '1': b, x: {y: &b {<<: &d {k: 1}, k: 2}}, z: {<<: *b}}")["x"] == {"y": {"k": 2}}
    assert load_yaml("&a [*a]")


def test_a_batch_that_processes_cannot_share_is_refused_before_it_comes_up(tmp_path, kairos):
    pictures = CLIP | {"frames": 1, "batch_size": 6}
    content = one(batch_size=8, accumulate=2, buckets=[CLIP, pictures], images=0.1)
    recipe = build_recipe(content, "recipe")
    check_run(recipe, recipe.stages, 1)
    with pytest.raises(UserError, match="multiple of accumulate times processes, got 6, 2 and 4"):
        check_run(recipe, recipe.stages, 4)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(content))
    status, _, said = kairos("train", "plan", file, "--processes", "4")
    assert status == 2 and "got 6, 2 and 4" in said


def test_names_of_steps_may_have_spaces_around_them(tmp_path, kairos, monkeypatch):
    ran = []
    monkeypatch.setattr(steps, "run_step", lambda recipe, name, here: ran.append(name))
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(of_base(output=str(tmp_path / "out"))))
    status, _, said = kairos("train", file, "--only", "cache, transformer")
    assert status == 0, said
    assert ran == ["cache", "transformer"]


def test_two_trainings_do_not_work_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "run_step", lambda *_: None)
    recipe = build_recipe(of_base(output=str(tmp_path)), "recipe")
    with lock(tmp_path, "busy"), pytest.raises(UserError, match="another kairos train works in"):
        run_recipe(recipe)
    run_recipe(recipe)  # the other one has ended


def test_a_model_plays_its_videos_as_fast_as_it_has_seen_them(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(steps, "run_step", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text(LINES["good"])

    def made(**options):
        caplog.clear()
        recipe = build_recipe(of_file("good.jsonl", output="out", **options), "recipe")
        with caplog.at_level(logging.WARNING, "kairos"):
            run_recipe(recipe)
        return sampler_of(recipe, recipe.stages[-1])[1]["fps"]

    assert made(defaults={}) == 8 and not caplog.text
    assert made(defaults={"fps": 24}) == 24
    assert "learns from clips at 8 fps, and the finished model says 24" in caplog.text
    content = of_file("good.jsonl", defaults={})
    first, wanted = (
        content["stages"][0],
        {"objective": "preference", "preference": {"manifest": "pairs.jsonl"}},
    )
    simulator = {"data": TINY["data"]}
    for last in ({"lora": {}} | simulator, wanted | simulator):  # neither changes what was learned before
        content["stages"] = [first, first | {"name": "last"} | last]
        recipe = build_recipe(content, "recipe")
        stage = recipe.assembled
        assert sampler_of(recipe, stage)[1]["fps"] == recipe.fps_of(stage) == 8
    simulated = build_recipe(of_base(defaults={}), "recipe")
    assert sampler_of(simulated, simulated.stages[0])[1]["fps"] == 16  # the base's


AT = {  # what a recipe's comment says: processes, and GB of each for the stages that are not named
    "kairos-4b": (8, 80, {"continual-720p": 141, "domain-robots": 141}),
    "kairos-4b-post-training": (8, 80, {}),
    "kairos-4b-distilled": (8, 80, {}),
    "kairos-4b-lora": (1, 40, {}),
}


@pytest.mark.parametrize("name", AT)
def test_a_recipe_fits_the_gpus_that_its_comment_names(name):
    recipe = read_recipe(next(file for file in RECIPES if file.stem == name))
    processes, memory_gb, others = AT[name]
    check_run(recipe, recipe.stages, processes)
    for stage in recipe.stages:
        plan = plan_stage(recipe, stage, processes, "cuda")
        refuse_too_large(plan, others.get(stage.name, memory_gb))
        if stage.name in others:
            with pytest.raises(MachineError, match=r"try shorter or smaller clips$"):
                refuse_too_large(plan, memory_gb)


def test_a_plan_for_another_machine_does_not_depend_on_this_one(monkeypatch):
    from kairos.training import plan

    recipe = build_recipe(copy.deepcopy(TINY), "recipe")
    planned = []
    for there in (True, False):
        monkeypatch.setattr(plan, "has_bfloat16", lambda device, there=there: device != "cpu" or there)
        planned.append([plan_stage(recipe, recipe.stages[0], 1, kind) for kind in ("cuda", "cpu")])
    assert planned[0][0] == planned[1][0] == planned[0][1] != planned[1][1]


def test_the_advice_is_none_that_is_followed_already():
    def advice(memory_gb=0.001, **options):
        recipe = build_recipe(one(**options), "recipe")
        with pytest.raises(MachineError) as caught:
            refuse_too_large(plan_stage(recipe, recipe.stages[0]), memory_gb)
        return str(caught.value).split("try ")[1]

    long = [CLIP | {"frames": 257}]
    more = "a larger accumulate or more processes or shorter or smaller clips"
    assert advice(buckets=long) == f"checkpointing: true or {more}"
    assert advice(buckets=long, checkpointing=True) == more
    assert advice(buckets=long, batch_size=1) == "checkpointing: true or shorter or smaller clips"
    small = [CLIP | {"frames": 1, "height": 16, "width": 16}]
    assert advice(0.0001, buckets=small, batch_size=1, images=1.0) == "more processes or lora"


def test_a_stage_whose_start_has_changed_is_not_taken_for_finished(tmp_path):
    """Nor one whose VAE has; what an older checkpoint does not say is let be."""
    stage = {"buckets": [{"frames": 5, "height": 64, "width": 64}], "batch_size": 2, "adamw_lr": 1e-3}

    def run(steps_of_a, *only, **options):
        stages = [stage | {"name": "a", "steps": steps_of_a}, stage | {"name": "b", "steps": 1} | options]
        stages[0]["start_from"] = "random"
        data = TINY["data"] | {"clips": 2}
        content = of_base(output=str(tmp_path), data=data, model=TINY["model"], stages=stages)
        run_recipe(build_recipe(content, "recipe"), only)

    run(1)
    run(1)  # finished
    with pytest.raises(
        UserError, match=r"stage b was made from other weights .*; delete .*b to make it again, or leave a as"
    ):
        run(2)
    assert torch.load(tmp_path / "a" / "checkpoint.pt")["step"] == 1  # said before the harm is done
    run(2, "b")
    (tmp_path / "b").rename(tmp_path / "kept")
    run(2, "a")
    (tmp_path / "kept").rename(tmp_path / "b")
    with pytest.raises(
        UserError, match=r"stage b was made from other weights .*; delete .*b to make it again"
    ):
        run(2)
    with pytest.raises(UserError, match="stage b was made from other weights"):
        run(2, "b", steps=2)  # nor does it go on
    shutil.rmtree(tmp_path / "b")
    run(2)
    listed = next((tmp_path / "cache").glob("clips-*.json"))
    content = json.loads(listed.read_text())
    listed.write_text(json.dumps(content | {"vae": "another"}))
    with pytest.raises(UserError, match="stage b was made from latents of another VAE"):
        run(2, "b")
    listed.write_text(json.dumps(content))
    file = tmp_path / "b" / "checkpoint.pt"
    state = torch.load(file)
    assert state.pop("origins")["text"]
    torch.save(state, file)
    run(3)


def test_what_a_finished_stage_started_from_may_be_deleted(tmp_path):
    shutil.copytree(ASSETS / "kairos-tiny-teacher" / "transformer", tmp_path / "start")
    stage = {"buckets": [{"frames": 5, "height": 64, "width": 64}], "batch_size": 2, "steps": 1}
    stages = [stage | {"name": "a", "start_from": str(tmp_path / "start")}, stage | {"name": "b"}]
    content = of_base(output=str(tmp_path / "out"), data=TINY["data"] | {"clips": 2}, stages=stages)
    run_recipe(build_recipe(content, "recipe"), ("cache", "a"))
    shutil.rmtree(tmp_path / "start")
    stages[0]["batch_size"], stages[0]["accumulate"] = 3, 3  # a finished stage shares none
    recipe = build_recipe(content, "recipe")
    check_run(recipe, recipe.stages[:1], 2)
    assert plan_stage(recipe, recipe.stages[0]).parameters == plan_stage(recipe, recipe.stages[1]).parameters
    run_recipe(recipe, ("b",))
    run_recipe(recipe, ("a", "b"))
    shutil.rmtree(tmp_path / "out" / "a")
    with pytest.raises(UserError, match="no model or folder"):
        run_recipe(recipe, ("a",))


def test_a_manifest_of_pairs_is_not_asked_for_where_the_pairs_are_there(tmp_path):
    options = {"objective": "preference", "preference": {"manifest": str(tmp_path / "gone.jsonl")}}
    recipe = build_recipe(of_base(output=str(tmp_path), stage=options), "recipe")
    with pytest.raises(UserError, match="stage transformer: no manifest at"):
        check_there(recipe, recipe.steps)
    (tmp_path / "gone.jsonl").write_text('{"better": "a.mp4", "worse": "b.mp4"}\n')
    with pytest.raises(UserError, match=r"gone\.jsonl, line 1: no file 'a\.mp4' in"):
        check_there(recipe, recipe.steps)  # before any stage has run
    (tmp_path / "gone.jsonl").unlink()
    (tmp_path / "transformer" / "pairs").mkdir(parents=True)
    (tmp_path / "transformer" / "pairs" / "pairs.json").write_text('{"of": "", "pairs": []}')
    check_there(recipe, recipe.steps)


def test_a_base_whose_configuration_is_of_another_version_is_refused_in_one_line(tmp_path):
    shutil.copytree(ASSETS / "kairos-tiny-teacher", tmp_path / "base")
    file = tmp_path / "base" / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"invented": 1}))
    recipe = build_recipe(of_base(base=str(tmp_path / "base")), "recipe")
    with pytest.raises(UserError, match=r"stage transformer: the configuration does not fit .*invented"):
        check_run(recipe, recipe.stages, 1)


def test_the_decoder_asks_for_no_weights_but_those_it_learns_from(tmp_path):
    stage = {"start_from": str(tmp_path / "gone"), "objective": "distillation"}
    recipe = build_recipe(of_base(output=str(tmp_path), stage=stage, decoder={"steps": 1}), "recipe")
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "finished").touch()
    steps.make_decoder(recipe, ALONE)


def test_a_folder_that_another_user_works_in_is_refused_in_one_line(tmp_path):
    (tmp_path / ".lock").mkdir()  # cannot be opened, whoever asks
    with pytest.raises(UserError, match=r"cannot write .*\.lock"):
        lock(tmp_path, "busy")


def test_a_decoder_that_learned_from_other_weights_is_not_finished(tmp_path):
    now = {"weights": "one", "vae": "v"}
    assert not is_finished("decoder", tmp_path, now)
    for text in ("", '{"weights": "one", "vae": ""}', '{"weights": "one", "vae": "v"}'):
        (tmp_path / "finished").write_text(text)
        assert is_finished("decoder", tmp_path, now)
    with pytest.raises(UserError, match="decoder was made from other weights"):
        is_finished("decoder", tmp_path, now | {"weights": "two"})


def test_a_prompt_encoder_or_decoder_of_other_options_is_not_taken_for_finished(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(
        steps, "train_conditioner", lambda output, **_: (output.mkdir(), trained.append(1))[1]
    )

    def recipe(**options):
        return build_recipe(changed(output=str(tmp_path), **options), "recipe")

    for _ in range(2):
        steps.make_conditioner(recipe(), ALONE)
    assert trained == [1]
    other = TINY["conditioner"] | {"steps": 3}
    for options in ({"conditioner": other}, {"scenes": ["ramp"]}, {"seed": 4}):
        with pytest.raises(UserError, match="stage conditioner was made from other options, scenes or seed"):
            steps.make_conditioner(recipe(**options), ALONE)
    (tmp_path / "decoder").mkdir()
    finish(tmp_path / "decoder", {"options": options_hash(recipe(decoder={"steps": 1}).decoder, 0)})
    steps.make_decoder(recipe(decoder={"steps": 1, "batch_size": 4}), ALONE)  # what it is anyway
    for options in ({"decoder": {"steps": 2}}, {"decoder": {"steps": 1}, "seed": 4}):
        with pytest.raises(UserError, match="stage decoder was made from other options"):
            steps.make_decoder(recipe(**options), ALONE)


def test_flow_matching_behind_a_distillation_is_told_and_a_lora_of_it_warned_of(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(steps, "run_step", lambda *_: None)

    def told(*stages, base="kairos-tiny", **options):
        caplog.clear()
        content = of_base(base=base, output=str(tmp_path), **options)
        content["stages"] = [content["stages"][0] | stage for stage in stages]
        with caplog.at_level(logging.INFO, "kairos.training.steps"):
            run_recipe(build_recipe(content, "recipe"))
        return [
            (one.levelname, one.getMessage()) for one in caplog.records if "distilled" in one.getMessage()
        ]

    flow, lora = {"name": "flow"}, {"name": "lora", "lora": {}}
    distilled = {"name": "fast", "objective": "distillation"}
    ((level, line),) = told(flow, defaults={"guidance_scale": 2.5})
    assert level == "INFO"
    assert "kairos-tiny was distilled to 4 steps; after flow matching it takes 50, with guidance 2.5" in line
    ((level, line),) = told(lora)
    assert level == "WARNING" and "a LoRA learned by flow matching goes with its teacher" in line
    assert [level for level, _ in told(flow, distilled, lora)] == ["WARNING"]
    assert not told(flow, distilled) and not told(flow, lora, base="kairos-tiny-teacher")
    assert not told({"name": "new", "start_from": "random"})


def test_a_share_of_pictures_without_pictures_is_said_to_have_no_effect(tmp_path, monkeypatch, caplog):
    picture = {"frames": 1, "height": 64, "width": 64}
    content = of_base(output=str(tmp_path), stage={"buckets": [CLIP, picture], "images": 0.2})
    recipe = build_recipe(content, "recipe")
    stage, found = recipe.stages[0], []
    monkeypatch.setattr(materials, "load_clips", lambda *_, **__: found)
    for frames, line in (((9,), "images: 0.2 has no effect: the data have no pictures"), ((9, 1), "")):
        caplog.clear()
        found[:] = [SimpleNamespace(bucket=SimpleNamespace(frames=one)) for one in frames]
        materials.clip_sets(recipe, stage, None)
        assert line in caplog.text and bool(line) == bool(caplog.text)


def test_the_benchmark_of_training_runs(tmp_path, monkeypatch):
    file = Path(__file__).parents[1] / "benchmarks" / "training.py"
    options = ["--steps", "2", "--plain-steps", "1", "--clips", "4", "--batch-size", "4", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [str(file), *options, "--output", str(tmp_path / "results.json")])
    runpy.run_path(str(file), run_name="__main__")
    assert json.loads((tmp_path / "results.json").read_text())["ratio"] > 0
