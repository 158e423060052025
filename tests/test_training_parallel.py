"""Two processes under FSDP2 train as one does, and distil together."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_parts import MIX, clip_set, small_model, small_stage, stirred

from kairos.training import parallel
from kairos.training.checkpoint import load_checkpoint
from kairos.training.distillation import DistillationObjective
from kairos.training.flow import FlowMatching
from kairos.training.loop import train
from kairos.training.run import train_only
from kairos.training.stage import Distillation, Stage
from kairos.weights import load_transformer_file

# AdamW, and Muon, whose step needs whole matrices. Muon gets no second frames by themselves: their gradients
# have few directions, and in the others it makes whole steps of what bfloat16 rounds off. Its rate is low:
# that differs from processor to processor. Last a part of the model, in bfloat16.
OPTIONS = {
    name: {"steps": 6, "precision": "float32", "muon_lr": rate, "ema": 0.9, "mix": mix}
    for name, rate, mix in (("adamw", None, MIX), ("muon", 0.003, MIX | {"ti2v": 0.0}))
}
OPTIONS["part"] = OPTIONS["adamw"] | {"steps": 1, "precision": "bfloat16", "train": ["blocks.3."]}

PROGRAM = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_training_parallel import OPTIONS, consistent, watch
from training_parts import clip_set, small_model, small_stage, stirred
from kairos.training.distillation import DistillationObjective
from kairos.training.flow import FlowMatching
from kairos.training.loop import train
from kairos.training.parallel import prepare, processes
from kairos.training.run import train_only
from kairos.training.stage import Distillation
folder = Path({folder!r})
losses = {{}}
class Recorded(FlowMatching):
    def loss(self, model, step, part):
        loss, clips = super().loss(model, step, part)
        losses[name].append(self.processes.means(loss[None])[0])
        return loss, clips
with processes() as here:
    clips = clip_set(folder / "cache" / str(here.rank))
    for name, options in OPTIONS.items():
        stage, losses[name], model = small_stage(**options), [], small_model()
        if stage.train:
            train_only(model, stage)
        prepare(model, here, checkpointing=True, compiled=False)
        train(model, Recorded([clips], stage, here), stage, folder / name, here=here)
    losses["consistent"] = []
    for steps in (2, 3):  # stopped, and gone on with
        alike, pupil = consistent(steps), stirred()
        taught = DistillationObjective(pupil, [clips], alike, alike.distillation, here)
        watch(taught, losses["consistent"])
        prepare(pupil, here, checkpointing=False, compiled=False)
        train(pupil, taught, alike, folder / "consistent", here=here)
    options = Distillation(adversarial=0.5, score=0.1, truth=1.0, teacher_steps=2, motion_clips=2)
    stage, model = small_stage(steps=3, distillation=options, precision="float32"), small_model()
    student = DistillationObjective(model, [clips], stage, options, here)
    prepare(model, here, checkpointing=False, compiled=False)
    train(model, student, stage, folder / "distilled", here=here)
    if here.first:
        (folder / "losses.json").write_text(json.dumps(losses))
"""


def consistent(steps: int) -> Stage:
    """A distillation by consistency alone, whose noise is that of its batches."""
    options = Distillation(matching=0.0, guidance_scale=2.0, teacher_steps=2, motion_clips=2)
    return small_stage(
        steps=steps, decay_steps=0, distillation=options, precision="float32", muon_lr=None, ema=0.9
    )


def watch(objective: DistillationObjective, losses: list[float]) -> None:
    """Note the losses of an objective, in the mean over the processes."""
    loss = objective.loss

    def noted(*asked: Any) -> tuple[Tensor, int]:
        value, clips = loss(*asked)
        losses.append(objective.processes.means(value[None])[0])
        return value, clips

    objective.loss = noted  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def twofold(tmp_path_factory) -> tuple[Path, dict[str, list[float]]]:
    """What two processes have made, all in one start of them: the folder, and the losses of each training."""
    folder = tmp_path_factory.mktemp("twofold")
    file = folder / "program.py"
    file.write_text(PROGRAM.format(tests=str(Path(__file__).parent), folder=str(folder)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "losses.json").read_text())


def test_two_processes_have_the_loss_curve_of_one(twofold, tmp_path):
    folder, together = twofold
    clips = clip_set(tmp_path / "one")
    for name, options in OPTIONS.items():
        stage, alone = small_stage(**options), []

        class Recorded(FlowMatching):
            def loss(self, model, step, part, alone=alone):
                loss, count = super().loss(model, step, part)
                alone.append(loss.item())
                return loss, count

        model = small_model()
        if stage.train:
            train_only(model, stage)
        ema = train(model, Recorded([clips], stage), stage, tmp_path / f"{name}-alone")
        torch.testing.assert_close(torch.tensor(together[name]), torch.tensor(alone), atol=1e-4, rtol=0)
        # One process goes on from the checkpoint of two, which have written a whole model beside it.
        state = load_checkpoint(folder / name)
        assert state["step"] == stage.steps
        written = load_transformer_file(folder / name / "ema")
        for key, value in model.named_parameters():
            assert torch.equal(written.get_parameter(key), state["ema"].get(key, value)), key
        for key, value in ema.items():
            torch.testing.assert_close(state["ema"][key], value, atol=1e-3, rtol=1e-2)
        longer = small_stage(**(options | {"steps": stage.steps + 1}))
        train(model, FlowMatching([clips], longer), longer, folder / name)
        assert load_checkpoint(folder / name)["step"] == longer.steps


def test_the_others_wait_for_what_the_first_process_makes_however_long_it_takes(monkeypatch):
    asked, waited = {}, []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(parallel.dist, "new_group", lambda **options: asked.update(options) or "patient")
    monkeypatch.setattr(parallel.dist, "barrier", waited.append)
    monkeypatch.setattr(parallel.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(parallel.dist, "destroy_process_group", lambda: None)
    with parallel.processes() as here:
        here.wait()
    assert waited == ["patient"] and asked["timeout"] > timedelta(days=7)


def test_two_processes_distil_together(twofold, tmp_path):
    """Each has noise of its own; their steps are the same, for both must ask the networks equally often. What
    asks for no noise is what one process does, also where the two go on from their checkpoint."""
    folder, together = twofold
    stage, model, alone = consistent(3), stirred(), []
    taught = DistillationObjective(model, [clip_set(tmp_path / "one")], stage, stage.distillation)
    watch(taught, alone)
    average = train(model, taught, stage, tmp_path / "alone")
    assert len(alone) == 3 and max(alone) > 1e-3
    losses = torch.tensor(together["consistent"])
    torch.testing.assert_close(losses, torch.tensor(alone), atol=1e-4, rtol=1e-3)
    kept = load_checkpoint(folder / "consistent")["ema"]
    for name, value in average.items():
        torch.testing.assert_close(kept[name], value, atol=1e-3, rtol=1e-2)
    state, start = load_checkpoint(folder / "distilled"), small_model().state_dict()
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["ema"].values())
    assert any(not torch.equal(value, start[key]) for key, value in state["ema"].items())
