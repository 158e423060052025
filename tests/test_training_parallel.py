"""Two processes under FSDP2 train as one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_parts import clip_set, small_model, small_stage

from kairos.training.checkpoint import load_checkpoint
from kairos.training.flow import FlowMatching
from kairos.training.loop import train

PROGRAM = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from training_parts import clip_set, small_model, small_stage
from kairos.training.flow import FlowMatching
from kairos.training.loop import train
from kairos.training.parallel import prepare, processes
folder = Path({folder!r})
stage = small_stage(**json.loads({stage!r}))
losses = []
class Recorded(FlowMatching):
    def loss(self, model, step, part):
        loss, clips = super().loss(model, step, part)
        losses.append(self.processes.mean(loss))
        return loss, clips
with processes() as here:
    model = small_model()
    prepare(model, here, checkpointing=True, compiled=False, precision=stage.precision)
    clips = clip_set(folder / "cache" / str(here.rank))
    train(model, Recorded([clips], stage, here), stage, folder / "two", here=here)
    if here.first:
        (folder / "losses.json").write_text(json.dumps(losses))
"""


@pytest.mark.parametrize("muon_lr", [None, 0.01])
def test_two_processes_have_the_loss_curve_of_one(tmp_path, muon_lr):
    options = {"steps": 6, "precision": "float32", "muon_lr": muon_lr, "ema": 0.9}
    stage, alone = small_stage(**options), []

    class Recorded(FlowMatching):
        def loss(self, model, step, part):
            loss, clips = super().loss(model, step, part)
            alone.append(loss.item())
            return loss, clips

    ema = train(small_model(), Recorded([clip_set(tmp_path / "one")], stage), stage, tmp_path / "alone")
    file = tmp_path / "program.py"
    file.write_text(
        PROGRAM.format(tests=str(Path(__file__).parent), folder=str(tmp_path), stage=json.dumps(options))
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=0",
        str(file),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    together = json.loads((tmp_path / "losses.json").read_text())
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), atol=1e-4, rtol=0)

    # One process goes on from the checkpoint of two.
    state = load_checkpoint(tmp_path / "two")
    assert state["step"] == 6
    for name, value in ema.items():
        torch.testing.assert_close(state["ema"][name], value, atol=1e-4, rtol=1e-3)
    longer = small_stage(**(options | {"steps": 8}))
    train(small_model(), FlowMatching([clip_set(tmp_path / "on")], longer), longer, tmp_path / "two")
    assert load_checkpoint(tmp_path / "two")["step"] == 8
