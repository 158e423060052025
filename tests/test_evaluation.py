"""The measures: close to nothing on the truth, bad for broken videos, right about what a caption names."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from kairos.evaluation.models import resized
from kairos.evaluation.reading import blobs_of, read
from kairos.evaluation.scores import agreement, directions, score, visible
from kairos.evaluation.suite import Case, dump
from kairos.evaluation.summary import average, ratio, summarise
from kairos.worlds import COLORS, SCENES, WORLD, simulate
from kairos.worlds.world import drawn, paint

GIVEN, FRAMES = 5, 33


@pytest.fixture(scope="module")
def cases():
    """Three clips of every scene."""
    return {scene: [Case.of(scene, "in", 0, index, FRAMES, 64) for index in range(3)] for scene in SCENES}


def mean_scores(cases, change=lambda frames: frames):
    """The mean of each score over clips whose frames after the given ones are changed."""
    rows = []
    for case in cases:
        frames = case.clip.frames.copy()
        frames[GIVEN:] = change(frames[GIVEN - 1 :])[1:]
        rows.append(case.score(frames, GIVEN))
    return {name: average([row[name] for row in rows], 0)["value"] for name in rows[0]}


def frozen(frames):
    return np.repeat(frames[:1], len(frames), 0)


def shuffled(frames):
    order = np.random.default_rng(0).permutation(len(frames) - 1) + 1
    return frames[[0, *order]]


@pytest.mark.parametrize("scene", SCENES)
def test_the_truth_is_at_its_floor(cases, scene):
    got = mean_scores(cases[scene])
    assert got["velocity_error"] < 0.025
    assert got["conserved"] == got["conserved_frames"] == 1
    assert got["size_error"] < 0.02
    if scene == "collision":
        assert got["contact"] == 1 and got["contact_time_error"] < 0.02
        assert got["penetration"] < 0.05
        assert (
            max(got[f"{what}_{side}"] for what in ("momentum", "energy") for side in ("before", "after"))
            < 0.02
        )
    if scene == "occlusion":
        assert got["permanence"] == 1
    for case in cases[scene]:
        said = case.clip.parameters["said"]
        assert agreement(case.truth, said, case.truth)["all"] == 1
        assert agreement(read(case.clip.frames), said, case.truth)["all"] == 1


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("broken", (frozen, shuffled))
def test_broken_videos_score_badly(cases, scene, broken):
    good, bad = mean_scores(cases[scene]), mean_scores(cases[scene], broken)
    assert bad["velocity_error"] > 0.3 and bad["velocity_error"] > 20 * good["velocity_error"]
    if broken is frozen:
        assert bad["displacement"] < 0.02 < 0.3 < good["displacement"]
    if scene == "collision":
        assert bad["contact_time_error"] > 0.5 and bad["momentum_after"] > 0.1
    if scene == "occlusion":
        assert bad["permanence"] == 0


def test_a_frozen_block_goes_nowhere_though_it_was_to_be_pushed(cases):
    for case in cases["push"]:
        reading = read(frozen(case.clip.frames))
        if any(case.clip.parameters["said"]["directions"]):
            assert agreement(reading, case.clip.parameters["said"], case.truth)["direction"] == 0


def test_a_lost_ball_is_no_gain_even_where_it_would_stand_still(cases):
    case = cases["push"][0]
    empty = case.clip.frames.copy()
    empty[GIVEN:] = case.scenery[GIVEN:]
    scored = case.score(empty, GIVEN)
    assert scored["velocity_error"] >= 1 and scored["conserved"] == scored["conserved_frames"] == 0
    assert scored["displacement"] < 0.05


def test_what_is_not_shown_is_neither_conserved_nor_said_nor_moved():
    """Black frames after the given ones, and pictures full of the ball's own colour."""
    for scene in ("uniform", "occlusion", "collision", "bounce"):
        for index in range(4):
            case = Case.of(scene, "in", 0, index, FRAMES, 64)
            for color in ("black", case.clip.colors[0]):
                frames = case.clip.frames.copy()
                frames[GIVEN:] = COLORS.get(color, (0, 0, 0))
                scored = case.score(frames, GIVEN)
                assert scored["conserved"] == 0, (scene, index, color)
                for name in ("momentum_before", "energy_before", "momentum_after", "energy_after"):
                    assert scored.get(name, 1) == 1 or math.isnan(scored[name])
                frames[:] = COLORS.get(color, (0, 0, 0))
                said = agreement(read(frames, case.scenery), case.clip.parameters["said"], case.truth)
                assert not any(said[name] == 1 for name in ("colors", "count", "direction", "all"))


def test_momentum_before_the_contact_is_that_of_frames_that_were_made(cases):
    for case in cases["collision"]:
        frames = frozen(case.clip.frames[GIVEN - 1 :])
        scored = case.score(np.concatenate([case.clip.frames[: GIVEN - 1], frames]), GIVEN)
        early = case.clip.parameters["contact_time"] < (GIVEN + 1) * case.clip.dt
        assert math.isnan(scored["energy_before"]) if early else scored["energy_before"] > 0.9


def test_what_the_given_frames_show_is_not_the_models():
    """Freezing all once the balls have met, or the ball is out from behind its wall, earns nothing."""
    hit = Case.of("collision", "in", 0, 0, FRAMES, 64)
    for given, shown in ((13, False), (17, True)):  # the contact is in frame 12.6
        frames = hit.clip.frames.copy()
        frames[given:] = frames[given - 1]
        scored = hit.score(frames, given)
        assert math.isnan(scored["contact"]) is math.isnan(scored["contact_time_error"]) is shown
        assert scored["energy_after"] > 0.9
    hidden = Case.of("occlusion", "in", 0, 1, FRAMES, 64)
    whole = math.ceil(hidden.clip.parameters["hidden_times"][3] / hidden.clip.dt)
    assert math.isnan(hidden.score(hidden.clip.frames, whole)["permanence"])
    assert hidden.score(hidden.clip.frames, 9)["permanence"] == 1


def test_a_ball_is_missed_once_it_should_be_out_from_behind_the_wall(cases):
    case = cases["occlusion"][0]
    hidden = math.ceil(case.clip.parameters["hidden_times"][0] / case.clip.dt)
    frames = case.clip.frames.copy()
    frames[hidden:] = case.scenery[hidden:]
    scored = case.score(frames, GIVEN)
    assert scored["conserved"] == 0
    out = visible(case.clip)[hidden:, 0].sum()
    assert scored["conserved_frames"] == pytest.approx(1 - out / (FRAMES - GIVEN)) and out >= 2


def repainted(scene, index, change, split="in"):
    """The clip's frames with its motion changed: a ball that goes another way through the same scene."""
    world, motion, colors, _ = drawn(scene, split, 0, index, FRAMES, 64)
    return paint(world, change(motion), colors, size=64)


def faster(share):
    """A change of motion: so many times as fast from the last given frame on."""

    def change(motion):
        start = motion.positions[GIVEN - 1]
        positions = start + share * (motion.positions - start)
        positions[:GIVEN] = motion.positions[:GIVEN]
        return replace(motion, positions=positions)

    return change


def test_a_ball_that_leaves_early_by_its_own_motion_is_not_missed():
    case = Case.of("uniform", "in", 0, 31, FRAMES, 64)
    frames = repainted("uniform", 31, faster(1.5))
    gone = read(frames).blobs.sum(0) == 0
    assert (gone & visible(case.clip)[:, 0]).any()
    assert case.score(frames, GIVEN)["conserved"] == 1


@pytest.mark.parametrize("index", (117, 202))
def test_a_ball_that_vanishes_beside_the_border_on_its_way_in_is_missed(index):
    case, last = Case.of("uniform", "in", 0, index, FRAMES, 64), 2
    place, radius = case.clip.positions[last, 0, 0], case.clip.radii[0]
    assert min(place, WORLD - place) < radius + 0.5
    frames = np.concatenate([case.clip.frames[: last + 1], case.scenery[last + 1 :]])
    assert case.score(frames, last + 1)["conserved_frames"] == 0


def test_a_ball_that_is_behind_the_wall_early_is_not_missed():
    case = Case.of("occlusion", "in", 0, 41, FRAMES, 64)
    frames = repainted("occlusion", 41, faster(2.5))
    before = np.arange(FRAMES) * case.clip.dt < case.clip.parameters["hidden_times"][0]
    gone = read(frames, case.scenery).blobs.sum(0) == 0
    assert (gone & before & visible(case.clip)[:, 0]).any()
    assert case.score(frames, GIVEN)["conserved"] == 1


@pytest.mark.parametrize("share", (0.8, 1.25))
def test_a_ball_that_comes_out_smaller_or_larger_is_not_permanent(share):
    case = Case.of("occlusion", "in", 0, 0, FRAMES, 64)
    _, gone, back, _ = case.clip.parameters["hidden_times"]
    behind = round((gone + back) / 2 / case.clip.dt)
    frames = case.clip.frames.copy()
    other = repainted("occlusion", 0, lambda motion: replace(motion, radii=share * motion.radii))
    frames[behind:] = other[behind:]
    assert case.score(frames, GIVEN)["permanence"] == 0


def test_a_ball_that_stays_behind_the_wall_or_comes_out_changed_is_not_permanent(cases):
    case = cases["occlusion"][0]
    clip = case.clip
    back = math.ceil(clip.parameters["hidden_times"][2] / clip.dt)
    kept, other = clip.frames.copy(), clip.frames.copy()
    kept[back:] = case.scenery[back:]
    other[back:] = other[back:, :, :, ::-1]
    for frames in (kept, other):
        scored = case.score(frames, GIVEN)
        assert scored["permanence"] == 0
    late = clip.frames[[*range(back), *[back - 1] * 4, *range(back, FRAMES - 4)]]
    assert case.score(late, GIVEN)["permanence"] == 0
    little = clip.frames[[*range(back), back - 1, *range(back, FRAMES - 1)]]
    assert case.score(little, GIVEN)["permanence"] == 1


@pytest.mark.parametrize(("split", "index"), [("in", 0), ("in", 1), ("out", 16)])
def test_a_ball_that_passes_in_front_of_the_wall_is_not_permanent(split, index):
    """Also where it would be hidden so shortly that no frame shows it (the last one)."""
    case = Case.of("occlusion", split, 0, index, FRAMES, 64)
    frames = repainted(
        "occlusion", index, lambda motion: replace(motion, behind=motion.before, before=()), split
    )
    scored = case.score(frames, GIVEN)
    assert scored["conserved"] == 1 and scored["permanence"] == 0


def test_balls_that_pass_through_each_other_overlap_and_do_not_part(cases):
    from kairos.worlds.impossible import impossible_twin

    pair = impossible_twin("collision", index=0)
    assert pair.violation == "passes through"
    case = cases["collision"][0]
    good, bad = case.score(pair.possible, GIVEN), case.score(pair.impossible, GIVEN)
    assert bad["penetration"] > 0.3 > good["penetration"]
    assert bad["momentum_after"] > 0.2 or bad["contact_time_error"] > 0.2


def test_a_centre_is_found_to_a_fraction_of_a_pixel_and_the_area_is_the_balls(cases):
    for case in cases["ramp"] + cases["uniform"]:
        clip, radius = case.clip, case.clip.radii[0]
        path = case.truth.ball(clip.colors[0])
        inside = ((clip.positions[:, 0] > radius) & (clip.positions[:, 0] < WORLD - radius)).all(-1)
        assert np.abs(path.centers - clip.positions[:, 0])[inside].max() < 0.1 * WORLD / 64
        np.testing.assert_allclose(path.areas[inside], np.pi * radius**2, rtol=0.03)


@pytest.mark.parametrize("size", (80, 100, 480))
def test_places_stay_exact_where_64_does_not_divide_the_picture(size):
    large, small = (Case.of("uniform", "in", 0, 0, FRAMES, side) for side in (size, 64))
    assert large.score(large.clip.frames, GIVEN)["velocity_error"] < 0.015
    assert small.score(resized(large.clip.frames, 64, 64), GIVEN)["velocity_error"] < 0.015


def test_a_larger_picture_of_the_same_world_reads_the_same(cases):
    case = cases["parabola"][0]
    large = case.clip.frames.repeat(4, 1).repeat(4, 2)
    np.testing.assert_allclose(read(large, case.scenery).centers, case.truth.centers)


def test_wrong_colours_counts_and_directions_are_noticed():
    clip = next(
        clip
        for clip in (simulate("uniform", split="in", index=index) for index in range(60))
        if clip.parameters["said"]["directions"][0] and clip.colors[0] in ("red", "blue")
    )
    said, truth = clip.parameters["said"], read(clip.frames)
    assert not agreement(read(clip.frames[:, :, ::-1]), said, truth)["direction"]
    assert not agreement(read(clip.frames[..., ::-1]), said, truth)["colors"]
    twice = np.minimum(clip.frames, np.roll(clip.frames, 32, axis=1))
    assert not agreement(read(twice), said, truth)["count"]
    assert not agreement(read(frozen(clip.frames)), said, truth)["direction"]


def test_a_direction_that_the_truth_does_not_show_is_not_judged():
    """A ball that is struck before it has got anywhere goes the other way first."""
    clip = simulate("collision", split="out", index=37)
    said, truth = clip.parameters["said"], read(clip.frames)
    assert said["directions"] == ["right", "left"] and directions(truth, said) == ["left", "left"]
    assert agreement(truth, said, truth)["all"] == agreement(truth, said, truth)["direction"] == 1
    assert agreement(read(clip.frames[:, :, ::-1]), said, truth)["direction"] == 0


def test_a_flood_of_colour_is_something_else_than_what_was_said(cases):
    case = cases["uniform"][0]
    said, color = case.clip.parameters["said"], case.clip.colors[0]
    away = slice(44, 64) if case.clip.positions[0, 0, 1] > WORLD / 2 else slice(0, 20)
    for other in ("green", color):
        frames = case.clip.frames.copy()
        frames[:, away] = COLORS[other]
        reading = read(frames, case.scenery)
        assert (reading.floods == 1).all()
        assert agreement(reading, said, case.truth)["count"] == 0
        frames[: FRAMES - 1] = case.clip.frames[: FRAMES - 1]
        scored = case.score(frames, GIVEN)
        assert scored["conserved"] == 0
        assert scored["conserved_frames"] == pytest.approx(1 - 1 / (FRAMES - GIVEN))


def test_what_a_caption_leaves_open_is_not_judged():
    clip = simulate("uniform", split="in", index=0)
    color, side = clip.colors[0], clip.parameters["directions"][0]
    reading = read(clip.frames)
    said = {"count": 1, "colors": [color], "directions": [None]}
    assert (
        math.isnan(agreement(reading, said, reading)["direction"])
        and agreement(reading, said, reading)["all"] == 1
    )
    unnamed = {"count": 1, "colors": [None], "directions": [side]}
    assert math.isnan(agreement(reading, unnamed, reading)["colors"])
    judged = agreement(reading, unnamed, reading)
    assert judged["direction"] == judged["all"] == 1
    backwards = agreement(read(clip.frames[::-1]), unnamed, reading)
    assert backwards["direction"] == backwards["all"] == 0


@pytest.mark.parametrize("scene", ("pendulum", "push", "occlusion", "ramp"))
def test_grey_things_are_no_balls(cases, scene):
    reading = read(cases[scene][0].scenery)
    assert not reading.blobs.any()


def test_every_colour_is_told_from_the_others():
    names = list(COLORS)
    frame = np.full((1, 64, 64, 3), 240, np.uint8)
    for place, name in enumerate(names):
        frame[0, 8 : 8 + 12, 8 * place : 8 * place + 6] = COLORS[name]
    assert read(frame).shown(0) == names


def test_a_strip_of_mixed_colour_between_two_balls_is_no_ball():
    frame = np.full((64, 64, 3), 240, np.uint8)
    frame[20:30, 10:20], frame[20:30, 22:32] = COLORS["red"], COLORS["yellow"]
    between, apart, thick = frame.copy(), frame.copy(), frame.copy()
    between[22:28, 20:22] = apart[50:56, 20:22] = thick[22:28, 20:23] = COLORS["orange"]
    assert sorted(read(between[None]).shown(0)) == ["red", "yellow"]
    assert (
        sorted(read(apart[None]).shown(0))
        == sorted(read(thick[None]).shown(0))
        == ["orange", "red", "yellow"]
    )


def test_a_ball_of_a_few_pixels_is_one_also_where_it_touches_another():
    case = Case.of("collision", "out", 0, 42, FRAMES, 64)
    assert case.clip.radii.min() < 0.32
    assert case.score(case.clip.frames, 0)["conserved"] == 1


def test_blobs_are_counted_apart():
    mask = np.zeros((8, 8), bool)
    mask[0, :3] = mask[4:6, 4:6] = mask[7, 0] = True
    assert sorted(part.sum() for part in blobs_of(mask)) == [1, 3, 4]


def test_nothing_can_be_said_of_a_clip_without_a_visible_ball(cases):
    case = cases["uniform"][0]
    gone = Case.of("uniform", "out", 0, 0, FRAMES, 64)
    away = type(gone.clip)(**{**vars(gone.clip), "positions": gone.clip.positions + 100})
    assert math.isnan(score(case.truth, away, GIVEN, case.truth)["velocity_error"])


def test_a_mean_has_an_interval_that_holds_it_and_is_a_function_of_the_seed():
    entry = average([0.0, 1.0, 2.0, math.nan], seed=1)
    assert entry["value"] == 1.0 and entry["ci"][0] <= 1.0 <= entry["ci"][1] and entry["clips"] == 3
    assert entry == average([0.0, 1.0, 2.0, math.nan], seed=1)
    motion = ratio(np.array([1.0, 2.0, math.nan]), np.array([2.0, 2.0, 1.0]), seed=1)
    assert motion["value"] == 0.75 and motion["ci"] == [0.5, 1.0]


def test_an_interval_has_a_width_where_all_clips_are_alike_and_none_where_there_is_but_one():
    sure = average([1.0] * 16, seed=0, answers=True)["ci"]
    assert sure == pytest.approx([0.806, 1.0], abs=1e-3) and sure[1] == 1
    assert average([0.0] * 16, seed=0, answers=True)["ci"] == pytest.approx([0.0, 0.194], abs=1e-3)
    assert average([1.0, 0.0, 1.0, 1.0], seed=0, answers=True)["ci"] == pytest.approx(
        [0.301, 0.954], abs=1e-3
    )
    assert average([1.0], seed=0, answers=True)["ci"] == pytest.approx([0.207, 1.0], abs=1e-3)
    assert average([0.0] * 16, seed=0)["ci"] == [0, 0]  # a length, which happens to be 0
    assert average([0.3], seed=0)["ci"] == [None, None]
    assert ratio(np.array([1.0]), np.array([2.0]), seed=0) == {"value": 0.5, "ci": [None, None], "clips": 1}


def test_a_loss_that_is_no_number_counts_for_neither_clip_also_after_it_was_stored():
    pairs = [("stops", 1.0, 2.0), ("stops", 2.0, 1.0), ("stops", math.nan, 1.0), ("hovers", 1.0, math.inf)]
    records = [
        {"expectation": {"violation": kind, "possible": good, "impossible": bad}} for kind, good, bad in pairs
    ]
    found = summarise(records, 0)["expectation"]
    assert (found["value"], found["clips"]) == (0.5, 2)
    assert found["violations"] == {"hovers": None, "stops": 0.5}
    assert summarise(json.loads(dump(records)), 0)["expectation"] == found
    assert "expectation" not in summarise(records[2:], 0)
