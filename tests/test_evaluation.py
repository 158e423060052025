"""The measures: close to nothing on the truth, large on broken videos, right about what a caption names."""

from __future__ import annotations

import numpy as np
import pytest

from kairos.evaluation.measure import balls_in, blob_sizes, caption_agreement, track, velocity_error
from kairos.evaluation.physics import evaluate, summary
from kairos.worlds import WORLD, simulate

SCENES = ("uniform", "collision", "parabola")


@pytest.mark.parametrize("scene", SCENES)
def test_the_truth_has_a_small_velocity_error_and_broken_videos_a_large_one(scene):
    clips = [simulate(scene, split="in", index=index) for index in range(6)]
    order = np.random.default_rng(0).permutation(33)
    truth, frozen, shuffled = (
        np.nanmean([velocity_error(change(clip.frames), clip, 5) for clip in clips])
        for change in (lambda f: f, lambda f: np.repeat(f[:1], 33, 0), lambda f: f[order])
    )
    assert truth < 0.03
    assert frozen > 1 and shuffled > 1


def test_a_centre_is_found_to_a_fraction_of_a_pixel_and_the_area_is_the_balls():
    clip = simulate("uniform", split="in", index=3)
    path = track(clip.frames, clip.colors[0])
    radius = clip.radii[0]
    inside = ((clip.positions[:, 0] > radius) & (clip.positions[:, 0] < WORLD - radius)).all(-1)
    assert np.abs(path.centers - clip.positions[:, 0])[inside].max() < 0.1 * WORLD / 64
    np.testing.assert_allclose(path.areas[inside], np.pi * radius**2, rtol=0.02)


@pytest.mark.parametrize("scene", SCENES)
def test_the_truth_agrees_with_its_caption(scene):
    for index in range(20):
        clip = simulate(scene, split="in", index=index)
        assert all(caption_agreement(clip.frames, clip.parameters["said"]).values()), clip.caption


def test_wrong_colours_counts_and_directions_are_noticed():
    clip = next(
        clip
        for clip in (simulate("uniform", split="in", index=index) for index in range(60))
        if clip.parameters["said"]["directions"][0] and clip.colors[0] in ("red", "blue")
    )
    said = clip.parameters["said"]
    assert not caption_agreement(clip.frames[:, :, ::-1], said)["direction"]
    assert not caption_agreement(clip.frames[..., ::-1], said)["colors"]
    twice = np.minimum(clip.frames, np.roll(clip.frames, 32, axis=1))
    assert not caption_agreement(twice, said)["count"]
    frozen = np.repeat(clip.frames[:1], 33, 0)
    assert not caption_agreement(frozen, said)["direction"]


def test_a_floor_is_no_ball():
    clip = simulate("parabola", split="in", index=0)
    assert balls_in(clip.frames[0]) == [clip.colors[0]]


def test_blobs_are_counted_apart():
    mask = np.zeros((8, 8), bool)
    mask[0, :3] = mask[4:6, 4:6] = mask[7, 0] = True
    assert sorted(blob_sizes(mask)) == [1, 3, 4]


def test_the_interval_of_a_summary_holds_its_mean_and_is_a_function_of_the_seed():
    entry = summary([0.0, 1.0, 2.0, float("nan")], seed=1)
    assert entry["value"] == 1.0 and entry["ci"][0] <= 1.0 <= entry["ci"][1]
    assert entry == summary([0.0, 1.0, 2.0, float("nan")], seed=1)


def test_any_pipeline_is_measured_beside_its_floors(chunk_causal_pipeline):
    seen = []
    result = evaluate(
        chunk_causal_pipeline,
        scenes=("uniform",),
        clips=1,
        steps=1,
        keep=lambda kind, scene, index, frames: seen.append((kind, frames.shape)),
    )
    entry = result["scenes"]["uniform"]["velocity_error"]
    assert entry["floor_truth"] < entry["value"]
    assert {kind for kind, _ in seen} == {"truth", "vae", "continuation", "t2v"}
    assert {shape for _, shape in seen} == {(9, 32, 32, 3)}
