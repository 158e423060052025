"""The simulator's state beside the flow: maps of where balls are, and a model that learns to know it."""

from __future__ import annotations

import pytest
import torch
from training_parts import BUCKET, clip_set, small_model, small_stage

from kairos import UserError
from kairos.training.clips import SimulatorSource
from kairos.training.loop import train
from kairos.training.stage import StateMaps
from kairos.training.state import SPREAD, StateObjective, state_maps
from kairos.worlds import COLORS, WORLD, simulate

SOURCE = SimulatorSource(("uniform", "collision", "occlusion"), clips=6)


def simulated(tmp_path):
    """The clips of noise of the other tests, under names of the simulator's clips."""
    clips = clip_set(tmp_path)
    clips.keys[:] = [ref.key for ref, _ in zip(SOURCE.references([BUCKET], None), clips.keys, strict=False)]
    return clips


def objective(model, clips, stage):
    return StateObjective(model, [clips], stage, stage.state, SOURCE)


def test_a_map_has_its_bump_where_the_ball_is():
    reference = next(SOURCE.references([BUCKET], None))
    clip = simulate("uniform", num_frames=BUCKET.frames)
    maps = state_maps(SOURCE, [reference.key], 5, 8, 8).view(5, 8, 8, len(COLORS), 4)
    color = list(COLORS).index(clip.colors[0])
    others = [index for index in range(len(COLORS)) if index != color]
    assert not maps[..., others, :].any()
    axis = (torch.arange(8) + 0.5) * WORLD / 8
    for frame in (0, 1, 8, 16):
        x, y = torch.from_numpy(clip.positions[frame, 0])
        latent, part = (0, 0) if frame == 0 else ((frame + 3) // 4, (frame - 1) % 4)
        bump = maps[latent, :, :, color, part]
        squares = (axis - x) ** 2 + (WORLD - axis - y)[:, None] ** 2
        torch.testing.assert_close(bump, torch.exp(-squares / (2 * SPREAD**2)).float())
    assert torch.equal(maps[0, ..., 0], maps[0, ..., 3])  # one frame, four times


def test_a_hidden_ball_is_on_its_map():
    index = next(i for i in range(6) if SOURCE.scenes[i % 3] == "occlusion")
    key = f"occlusion/train/0/{index}/33x64x64"
    clip = simulate("occlusion", index=index)
    frame = int(10 * (clip.parameters["hidden_times"][1] + clip.parameters["hidden_times"][2]) / 2)
    maps = state_maps(SOURCE, [key], 9, 4, 4).view(9, 16, len(COLORS), 4)
    assert maps[(frame + 3) // 4].amax() > 0.5


def test_the_state_is_learnt_and_training_goes_on_to_the_bit(tmp_path):
    clips = simulated(tmp_path)
    options = {"state": StateMaps(block=2), "mix": {"continuation": 1.0}, "precision": "float32"}

    def run(folder, *lengths):
        errors, final = [], None
        for steps in lengths:
            model = small_model()
            stage = small_stage(steps=steps, decay_steps=0, **options)
            task = objective(model, clips, stage)
            final = train(model, task, stage, tmp_path / folder)
            errors.append(task.report(model, steps)["state_error"])
        return final, errors

    whole, (error,) = run("whole", 40)
    halves, (first, second) = run("halves", 4, 40)
    assert all(torch.equal(whole[name], halves[name]) for name in whole) and error == second
    assert error < 0.7 * first
    assert not any("head." in name and "head.head" not in name and "head.mod" not in name for name in whole)


def test_maps_have_a_place_for_each_token_whatever_its_size(tmp_path):
    clips, stage = simulated(tmp_path), small_stage(state=StateMaps(block=2), mix={"continuation": 1.0})
    for patch in ((1, 1, 1), (1, 4, 4)):
        model = small_model(patch_size=patch)
        task = objective(model, clips, stage)
        loss, _ = task.loss(model, 0, 0)
        assert loss.isfinite() and task.report(model, 0)["state_error"] > 0


def test_states_go_with_flow_matching():
    with pytest.raises(UserError, match="state goes with the objective flow, got 'distillation'"):
        small_stage(state=StateMaps(), objective="distillation")
