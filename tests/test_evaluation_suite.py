"""The suite around the measures: models of every kind, records that a run goes on from, results, report."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from kairos import presets
from kairos.cli import main
from kairos.cli.evaluate import COLUMNS, table
from kairos.data.media import read_video, write_video
from kairos.errors import UserError
from kairos.evaluation import scores, suite
from kairos.evaluation.drift import by_second
from kairos.evaluation.models import DiffusersModel, KairosModel, generate
from kairos.evaluation.reading import read
from kairos.evaluation.suite import Case, Settings, evaluate, record_key
from kairos.models import vae as video_vae
from kairos.schedulers import shift_for
from kairos.worlds import simulate
from kairos.worlds.export import export

SMALL = {"scenes": ("uniform", "occlusion"), "splits": ("in", "out"), "clips": 2, "drift_seconds": 0}
ONE_CLIP = Settings(scenes=("uniform",), splits=("in",), clips=1, drift_seconds=0)


class Oracle:
    """Knows the clips: returns the one that begins with the given frames, or a broken version of it."""

    identity = "oracle"

    def __init__(self, change=lambda frames, given: frames, scenes=SMALL["scenes"], splits=SMALL["splits"]):
        self.change, self.calls = change, 0
        self.clips = {
            clip.frames[:5].tobytes(): clip.frames
            for scene in scenes
            for split in splits
            for clip in (simulate(scene, split=split, index=index) for index in range(4))
        }

    def __call__(self, prompt, first_frames, num_frames):
        self.calls += 1
        frames = self.clips[first_frames.tobytes()][:num_frames]
        return self.change(frames, len(first_frames))


def freeze(frames, given):
    return np.concatenate([frames[:given], np.repeat(frames[given - 1 : given], len(frames) - given, 0)])


def shuffle(frames, given):
    return np.concatenate([frames[:given], np.random.default_rng(0).permutation(frames[given:])])


def test_a_callable_that_knows_the_truth_is_at_the_floor_and_broken_ones_are_not(tmp_path):
    good = evaluate(Oracle(), Settings(**SMALL), output=tmp_path)
    for split in SMALL["splits"]:
        for scene in SMALL["scenes"]:
            measures = good["splits"][split]["scenes"][scene]
            assert measures["velocity_error"]["value"] == measures["velocity_error"]["floor_truth"] < 0.04
            assert measures["motion_ratio"]["value"] == 1
            assert measures["conserved"]["value"] == 1
        assert good["splits"][split]["scenes"]["occlusion"]["permanence"]["value"] == 1
    for change in (freeze, shuffle):
        bad = evaluate(Oracle(change), Settings(**SMALL))
        for scene in SMALL["scenes"]:
            measures = bad["splits"]["in"]["scenes"][scene]
            assert measures["velocity_error"]["value"] > 0.5
            assert measures["velocity_error"]["ci"][0] > measures["velocity_error"]["floor_truth"]
        assert bad["splits"]["in"]["scenes"]["occlusion"]["permanence"]["value"] == 0
    assert evaluate(Oracle(freeze), Settings(**SMALL))["scenes"]["uniform"]["motion_ratio"]["value"] < 0.05


def test_results_have_value_interval_and_floors_for_each_split(tmp_path):
    evaluate(Oracle(), Settings(**SMALL), output=str(tmp_path), name="oracle")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["scenes"] == results["splits"]["in"]["scenes"]
    for split in SMALL["splits"]:
        for measures in results["splits"][split]["scenes"].values():
            for entry in measures.values():
                assert {"value", "ci", "floor_truth", "floor_vae", "clips"} <= entry.keys()
                assert entry["ci"][0] <= entry["value"] <= entry["ci"][1]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<video") == 8 and "<svg" in page and "oracle" in page
    assert page.count(">&quot;") == page.count("&quot;: truth | model</figcaption>") == 8
    assert simulate("occlusion", split="out", index=1).caption in page and "on the VAE's" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_the_report_says_what_stands_beside_what_and_of_which_caption(tmp_path):
    class Both(Oracle):
        from_text = True
        reconstruct = staticmethod(lambda videos: videos)

        def __call__(self, prompt, first_frames, num_frames):
            if not len(first_frames):
                return next(iter(self.clips.values()))
            return super().__call__(prompt, first_frames, num_frames)

    caption = simulate("uniform", split="in", index=0).caption
    evaluate(Both(), ONE_CLIP, output=tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert f"&quot;{caption}&quot;: truth | VAE | model<" in page and "on the VAE's reconstruction" in page
    assert f"&quot;{caption}&quot;: from these words alone<" in page
    evaluate(Both(), replace(ONE_CLIP, given=0), output=tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert f"&quot;{caption}&quot;: truth | VAE<" in page and "model<" not in page


def test_the_floor_of_a_vae_is_that_of_its_reconstruction():
    class Freezes(Oracle):
        def reconstruct(self, videos):
            return np.stack([freeze(video, 1) for video in videos])

    measures = evaluate(Freezes(), ONE_CLIP)["scenes"]["uniform"]
    case = Case.of("uniform", "in", 0, 0, 33, 64)
    still = case.score(freeze(case.clip.frames, 1), 5)
    assert measures["velocity_error"]["floor_vae"] == pytest.approx(still["velocity_error"])
    assert measures["velocity_error"]["floor_vae"] > 0.5 > measures["velocity_error"]["floor_truth"]
    assert measures["motion_ratio"]["floor_vae"] < 0.05 and measures["psnr"]["value"] < 40


def test_a_model_that_knows_the_clip_prefers_it_to_its_twin_with_noise_of_each_clips_own():
    class Knowing(Oracle):
        def surprise(self, prompts, videos, given, seeds):
            self.asked.append(tuple(seeds))
            true = [self.clips[video[:given].tobytes()] for video in videos]
            return torch.tensor(np.abs(videos.astype(float) - true).mean((1, 2, 3, 4)))

        def batch(self, prompts, first, num_frames, seeds):
            self.drawn.append(tuple(seeds))
            return np.stack([self.clips[frames.tobytes()] for frames in first])

    def run():
        model = Knowing()
        model.asked, model.drawn = [], []
        measures = evaluate(model, Settings(**SMALL))["scenes"]
        assert all(measures[scene]["expectation"]["value"] == 1 for scene in SMALL["scenes"])
        return model.asked, model.drawn

    asked, drawn = run()
    assert asked[::2] == asked[1::2]  # a clip and its twin have the same noise
    every = [seed for seeds in (*asked[::2], *drawn) for seed in seeds]
    assert len(set(every)) == len(every) == 16
    assert (asked, drawn) == run()


def test_a_video_from_the_caption_has_other_noise_than_the_continuation_of_its_clip():
    class Both:
        from_text, drawn = True, []

        def batch(self, prompts, first, num_frames, seeds):
            self.drawn.extend(seeds)
            return np.zeros((len(prompts), num_frames, *first.shape[2:]), np.uint8)

    model = Both()
    evaluate(model, replace(ONE_CLIP, clips=2))
    assert len(set(model.drawn)) == len(model.drawn) == 4


def test_videos_that_do_not_begin_with_the_given_frames_are_told(caplog):
    def only_what_was_made(frames, given):
        return np.concatenate([frames[given:], np.repeat(frames[-1:], given, 0)])

    with caplog.at_level(logging.WARNING, "kairos.evaluation"):
        evaluate(Oracle(), Settings(**SMALL))
        evaluate(Oracle(freeze), Settings(**SMALL))
        assert not caplog.messages
        evaluate(Oracle(only_what_was_made), Settings(**SMALL))
    assert caplog.messages == [
        "7 of 8 videos do not begin with the 5 given frames, such as uniform-in-0-00000; where they hold "
        "only what comes after those, put the given frames before it"  # one in "out" is too slow to tell
    ]


def test_a_callable_may_take_and_make_any_number_of_frames(chunk_causal_pipeline):
    settings = replace(ONE_CLIP, given=4, num_frames=32)
    measures = evaluate(lambda prompt, first, n: first[-1:].repeat(n, 0), settings)["scenes"]["uniform"]
    assert measures["velocity_error"]["value"] > 0.5
    with pytest.raises(UserError, match=re.escape("num_frames must be 4n + 1, got 32; try 33")):
        evaluate(KairosModel(chunk_causal_pipeline), settings)


def test_drift_leaves_out_the_frames_that_were_given():
    case = Case.of("bounce", "in", 0, 0, 33, 64)
    still = freeze(case.clip.frames, 5)
    reading = read(still, case.scenery)
    first, _ = by_second(still, reading, case.clip, 5)
    assert first["velocity_error"] == scores.velocity_error(reading, case.clip, 5, 16)
    assert first["velocity_error"] > 1.3 * scores.velocity_error(reading, case.clip, 0, 16)


def test_a_run_that_stopped_goes_on_and_one_with_more_clips_keeps_what_there_is(tmp_path):
    class Stopping(Oracle):
        def __call__(self, *arguments):
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().__call__(*arguments)

    settings = Settings(**SMALL, batch=1)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Stopping(), settings, output=tmp_path)
    assert not (tmp_path / "results.json").exists()
    again = Oracle()
    resumed = evaluate(again, settings, output=tmp_path)
    assert again.calls == 8 - 3
    assert resumed == evaluate(Oracle(), settings)
    more = Oracle()
    evaluate(more, Settings(**SMALL | {"clips": 3}), output=tmp_path)
    assert more.calls == 4
    other = Oracle()
    other.identity = "another"
    evaluate(other, settings, output=tmp_path)
    assert other.calls == 8


def test_records_under_other_settings_or_without_videos_from_captions_are_not_taken():
    model = Oracle()
    keys = {record_key(model, ONE_CLIP)}
    for change in ({"seed": 1}, {"num_frames": 29}, {"given": 9}, {"size": 32}):
        keys.add(record_key(model, replace(ONE_CLIP, **change)))
    model.from_text = True
    assert len(keys | {record_key(model, ONE_CLIP)}) == 6


def test_a_student_is_compared_with_its_teacher(tmp_path, caplog):
    settings = Settings(**SMALL)
    caplog.set_level(logging.WARNING, "kairos")
    evaluate(Oracle(), settings, output=tmp_path / "teacher")
    slow = Oracle(lambda frames, given: frames[np.r_[:given, given - 1 + np.arange(1, 29) // 2]])
    results = evaluate(slow, settings, teacher=str(tmp_path / "teacher"))
    assert 0.3 < results["scenes"]["uniform"]["motion_to_teacher"]["value"] < 0.7
    assert not caplog.messages
    evaluate(slow, replace(settings, clips=3, scenes=("uniform",)), teacher=tmp_path / "teacher")
    assert caplog.messages == [f"{tmp_path / 'teacher'} has 4 of the 6 clips; motion is compared on those"]
    with pytest.raises(UserError, match="no results of a model's evaluation"):
        evaluate(slow, settings, teacher=tmp_path)
    for change in ({"seed": 1}, {"given": 9}, {"num_frames": 29}):
        with pytest.raises(
            UserError, match="of other clips: their seed, given frames and frames are 0, 5 and 33"
        ):
            evaluate(slow, replace(settings, **change), teacher=tmp_path / "teacher")
    elsewhere = replace(settings, scenes=("bounce",))
    with pytest.raises(UserError, match="none of these clips"):
        evaluate(slow, elsewhere, teacher=tmp_path / "teacher")


def test_the_table_has_the_columns_that_a_scene_has_a_number_for():
    def headings(*scenes):
        measures = {f"scene {number}": measured for number, measured in enumerate(scenes)}
        view = table({"model": "m", "splits": {"in": {"scenes": measures}}})
        return [column.header for column in view.columns], [list(column.cells)[1:] for column in view.columns]

    error = {"velocity_error": {"value": 0.5, "floor_truth": 0.01, "floor_vae": None}}
    assert headings(error)[0] == ["scene", "velocity", "truth", "own"]
    named, cells = headings(error, error | {"motion_to_teacher": {"value": 0.9}})
    assert named == ["scene", "velocity", "truth", "teacher", "own"]
    assert cells[named.index("teacher")] == ["", "0.90"]


def test_the_whole_table_fits_on_a_terminal_of_eighty_columns(capsys):
    numbers = {"value": 0.111, "floor_truth": 0.012, "floor_vae": 0.012}
    measures = {name: numbers for name, _ in COLUMNS.values()} | {"psnr": numbers | {"value": 41.2}}
    splits = {"interpolation": {"scenes": {"occlusion": measures | {"permanence": numbers}}}}
    Console(width=80).print(table({"model": "m", "splits": splits}))
    said = capsys.readouterr().out
    assert "teacher" in said and "own" in said and "…" not in said


def test_the_report_shows_the_videos_of_its_own_run(tmp_path):
    def report(model):
        evaluate(model, ONE_CLIP, output=tmp_path, name=model.identity)
        return (tmp_path / "report.html").read_text()

    good, still = Oracle(), Oracle(freeze)
    still.identity = "still"
    first, other = report(good), report(still)
    assert first != other and report(good) == first


def test_videos_of_the_first_clips_are_kept_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "SHOWN", 1)
    settings = replace(ONE_CLIP, clips=2, num_frames=13)
    evaluate(lambda prompt, first, n: first[-1:].repeat(n, 0), settings, output=tmp_path)
    assert [file.name for file in tmp_path.glob("videos/*/*/*")] == ["uniform-000.mp4"]


def test_a_plot_has_the_scenes_of_every_split(tmp_path):
    from kairos.evaluation.report import plot

    entry = {"value": 1.0, "ci": [0.5, 1.5], "floor_truth": 0.0, "floor_vae": None}
    measures = {"velocity_error": entry}
    drawn = plot("velocity_error", {"in": {"uniform": measures}, "out": {"collision": measures}})
    assert "uniform" in drawn and "collision" in drawn


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scenes": ("boat",)}, "unknown scene 'boat'; one of uniform"),
        ({"splits": ("test",)}, "unknown split 'test'"),
        ({"clips": 0}, "clips must be at least 1, got 0"),
        ({"given": 4}, "given must be 4n + 1, got 4; try 5"),
        ({"num_frames": 32}, "num_frames must be 4n + 1, got 32; try 33"),
        ({"num_frames": 5}, "num_frames must be above given + 1 = 6, got 5"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"drift_seconds": -1}, "drift_seconds must be at least 0"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(wrong, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Settings(**wrong).check_latents()


def test_a_model_that_returns_something_else_is_refused():
    given = np.zeros((1, 5, 64, 64, 3), np.uint8)
    with pytest.raises(
        UserError, match=re.escape("must return uint8 (9, 64, 64, 3), got uint8 (8, 64, 64, 3)")
    ):
        generate(lambda *_: np.zeros((8, 64, 64, 3), np.uint8), [""], given, 9, [0])
    with pytest.raises(UserError, match="got float64"):
        generate(lambda *_: np.zeros((9, 64, 64, 3)), [""], given, 9, [0])


# --- Kairos


def test_a_pipeline_is_measured_in_all_that_it_can_do(chunk_causal_pipeline, tmp_path):
    model = KairosModel(chunk_causal_pipeline, steps=1)
    settings = Settings(
        scenes=("pendulum",), splits=("in",), clips=2, num_frames=13, size=32, drift_seconds=2, drift_clips=1
    )
    results = evaluate(model, settings, output=tmp_path)
    measures = results["scenes"]["pendulum"]
    for name in ("velocity_error", "motion_ratio", "expectation", "colors", "psnr", "conserved"):
        assert measures[name]["clips"] == 2
    assert measures["velocity_error"]["floor_truth"] < measures["velocity_error"]["value"]
    assert measures["velocity_error"]["floor_vae"] is not None
    drift = results["splits"]["in"]["drift"]["pendulum"]
    assert [row["second"] for row in drift["velocity_error"]] == [1, 2]
    assert drift["velocity_error"][1]["floor_truth"] < 0.1
    assert results == evaluate(KairosModel(chunk_causal_pipeline, steps=1), settings, output=tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results


@pytest.mark.parametrize(("given", "guide_continuation"), [(0, True), (5, True), (0, False)])
def test_the_adapter_makes_what_the_pipeline_makes(chunk_causal_pipeline, given, guide_continuation):
    defaults = chunk_causal_pipeline.config.defaults | {"guide_continuation": guide_continuation}
    chunk_causal_pipeline.register_to_config(defaults=defaults)
    clips = [simulate("uniform", index=index, num_frames=9, size=32) for index in range(2)]
    prompts = [clip.caption for clip in clips]
    first = np.stack([clip.frames[:given] for clip in clips])
    model = KairosModel(chunk_causal_pipeline, steps=2)
    together = model.batch(prompts, first, 9, [3, 4])
    for number, seed in enumerate((3, 4)):
        alone = chunk_causal_pipeline(
            prompts[number],
            video=first[number] if given else None,
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=2,
        ).frames[0]
        assert np.abs(together[number] - alone * 255).max() < 1.5
    torch.manual_seed(4)
    one = model(prompts[1], first[1], 9)
    assert np.abs(one.astype(int) - together[1]).max() <= 1


def test_each_caption_of_a_batch_is_read_with_its_own_picture(chunk_causal_pipeline, monkeypatch):
    seen = []

    def spy(self, prompts, image):
        seen.append((prompts, image.getpixel((0, 0))[0]))
        return torch.zeros(1, 3, 32), torch.ones(1, 3, dtype=torch.bool)

    monkeypatch.setattr(type(chunk_causal_pipeline), "encode_prompt", spy)
    chunk_causal_pipeline.register_to_config(prompt_template="2026")
    first = np.stack([np.full((1, 32, 32, 3), level, np.uint8) for level in (10, 20, 30)])
    KairosModel(chunk_causal_pipeline, steps=1, guidance=1).batch(["a", "b", "c"], first, 5, [1, 2, 3])
    assert seen == [(["a"], 10), (["b"], 20), (["c"], 30)]


def test_measuring_leaves_the_pipelines_own_sampler_as_it_is_for_other_threads(chunk_causal_pipeline):
    before = chunk_causal_pipeline.scheduler.timesteps.clone()
    model, nothing = KairosModel(chunk_causal_pipeline, steps=3), np.zeros((1, 0, 32, 32, 3), np.uint8)
    model.batch(["a ball"], nothing, 5, [0])
    assert torch.equal(chunk_causal_pipeline.scheduler.timesteps, before)


@torch.no_grad()
def test_surprise_is_the_flow_loss_of_clean_given_frames_and_the_same_for_the_same_noise(
    chunk_causal_pipeline,
):
    pipe, generator = chunk_causal_pipeline, torch.Generator().manual_seed(7)
    video = simulate("bounce", index=0, num_frames=13, size=32).frames[None]
    latents = video_vae.encode(pipe.vae, torch.from_numpy(video).permute(0, 4, 1, 2, 3) / 127.5 - 1)
    embeds, mask = pipe.encode_prompt(["a ball"])
    shift, losses = shift_for(4, 4), []
    for even in (0.2, 0.4, 0.6, 0.8):
        sigma = shift * even / (1 + (shift - 1) * even)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = torch.cat((latents[:, :, :2], ((1 - sigma) * latents + sigma * noise)[:, :, 2:]), dim=2)
        times = torch.tensor([[0, 0, 1000 * sigma, 1000 * sigma]])
        velocity = pipe.transformer(noisy, times, embeds, encoder_attention_mask=mask, chunk_frames=(2, 2))
        losses.append((velocity.sample - (noise - latents))[:, :, 2:].square().mean().item())
    model = KairosModel(pipe, steps=1)
    first, second, other = model.surprise(["a ball"] * 3, video.repeat(3, 0), 5, [7, 7, 8]).tolist()
    assert first == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert first == pytest.approx(second, rel=1e-5) and first != pytest.approx(other, rel=1e-3)


def test_surprise_is_at_what_follows_the_given_frames_only(chunk_causal_pipeline):
    model = KairosModel(chunk_causal_pipeline, steps=1)
    videos = simulate("bounce", index=0, num_frames=13, size=32).frames[None]

    def surprise(part):
        def wrong(module, inputs, outputs):
            outputs[0][:, :, part] += 10

        hook = chunk_causal_pipeline.transformer.register_forward_hook(wrong)
        found = model.surprise(["a ball"], videos, 5, [7]).item()
        hook.remove()
        return found

    plain = model.surprise(["a ball"], videos, 5, [7]).item()
    assert surprise(slice(None, 2)) == plain  # five frames are two latent ones
    assert surprise(slice(2, None)) > plain + 50


def test_a_rollout_begins_with_each_clips_own_frames(chunk_causal_pipeline):
    model = KairosModel(chunk_causal_pipeline, steps=1)
    first = np.stack([simulate("bounce", index=index, num_frames=5, size=32).frames for index in range(2)])
    videos = model.rollout(["a ball", "a ball"], first, 21, [1, 2])
    assert videos.shape == (2, 21, 32, 32, 3)
    np.testing.assert_allclose(videos[:, :5], model.reconstruct(first), atol=2)


# --- diffusers


class ImageToVideo:
    """Like diffusers' Wan or LTX image-to-video: one picture goes on, in sizes and lengths of its own."""

    def __call__(
        self, image, prompt=None, height=480, width=832, num_frames=81, generator=None, output_type="pil"
    ):
        self.got = {
            "prompt": prompt,
            "size": image.size,
            "num_frames": num_frames,
            "seed": generator.initial_seed(),
        }
        frame = np.asarray(image)
        assert frame.shape == (height, width, 3) and num_frames % 4 == 1
        return SimpleNamespace(frames=np.repeat(frame[None, None] / 255.0, num_frames, 1))


class VideoToVideo:
    """Like Cosmos and LTX-condition: takes a picture or the start of a video."""

    def __call__(self, prompt, image=None, video=None, num_frames=9, generator=None):
        video = [image] if video is None else video
        self.got = len(video)
        rest = [video[-1]] * (num_frames - len(video))
        return ([[*video, *rest]],)


def test_an_image_to_video_pipeline_goes_on_from_the_last_given_frame():
    pipeline = ImageToVideo()
    model = DiffusersModel(pipeline, height=128, width=192)
    clip = simulate("uniform", split="in", index=0)
    (video,) = generate(model, [clip.caption], clip.frames[None, :5], 33, [11])
    assert pipeline.got == {"prompt": clip.caption, "size": (192, 128), "num_frames": 29, "seed": 11}
    np.testing.assert_array_equal(video[:4], clip.frames[:4])
    assert np.abs(video[4].astype(int) - clip.frames[4]).mean() < 1
    assert not model.from_text


def test_a_pipeline_that_goes_on_with_videos_gets_all_given_frames():
    pipeline = VideoToVideo()
    model = DiffusersModel(pipeline)
    clip = simulate("uniform", split="in", index=0)
    (video,) = generate(model, [clip.caption], clip.frames[None, :5], 33, [0])
    assert pipeline.got == 5
    np.testing.assert_array_equal(video[:5], clip.frames[:5])
    generate(DiffusersModel(pipeline, given="image"), [""], clip.frames[None, :5], 33, [0])
    assert pipeline.got == 1


def test_a_pipeline_is_asked_for_what_its_call_names_in_the_unit_of_its_vae():
    class Other:
        """Like LTX and Sana: no picture is the default and yet refused, eight frames to a latent one."""

        vae_temporal_compression_ratio = 8
        components: dict[str, Any] = {}

        def __call__(self, prompt, image=None, frames=81, generator=None):
            assert image is not None
            self.got = frames
            return SimpleNamespace(frames=[[image] * frames])

    pipeline, clip = Other(), simulate("uniform", split="in", index=0)
    (video,) = generate(DiffusersModel(pipeline), [""], clip.frames[None, :5], 33, [0])
    assert pipeline.got == 33 and video.shape == (33, 64, 64, 3)  # 29 are needed
    DiffusersModel(pipeline, frames_unit=4)("", clip.frames[:5], 33)
    assert pipeline.got == 29
    assert "colors" not in evaluate(DiffusersModel(pipeline), ONE_CLIP)["scenes"]["uniform"]
    assert DiffusersModel(pipeline, from_text=True).from_text


def test_an_option_that_the_pipeline_does_not_know_is_refused():
    with pytest.raises(
        UserError, match="ImageToVideo takes no guidence_scale; it takes image, prompt, height"
    ):
        DiffusersModel(ImageToVideo(), guidence_scale=7.0)

    class Any:
        def __call__(self, image, **options):
            self.got = options["guidence_scale"]
            return SimpleNamespace(frames=[[image] * 9])

    pipeline = Any()
    DiffusersModel(pipeline, guidence_scale=7.0)("", np.zeros((5, 64, 64, 3), np.uint8), 13)
    assert pipeline.got == 7.0


def test_a_pipelines_records_are_those_of_its_weights():
    first, second = ImageToVideo(), ImageToVideo()
    first.components = {"net": nn.Linear(2, 2), "scheduler": object()}
    second.components = {"net": nn.Linear(2, 2), "away": nn.Linear(2, 2, device="meta")}
    assert DiffusersModel(first).identity == DiffusersModel(first).identity
    assert DiffusersModel(first).identity != DiffusersModel(second).identity


def test_records_of_another_model_or_precision_are_not_taken(tmp_path):
    frozen = evaluate(lambda prompt, first, n: first[-1:].repeat(n, 0), ONE_CLIP, output=tmp_path, name="a")
    black = evaluate(
        lambda prompt, first, n: first[-1:].repeat(n, 0) * 0, ONE_CLIP, output=tmp_path, name="b"
    )
    assert frozen["key"] != black["key"]
    kept = [results["scenes"]["uniform"]["conserved"]["value"] for results in (frozen, black)]
    assert kept == [1, 0]

    def checkpoint(shade):
        return lambda prompt, first, n: first[-1:].repeat(n, 0) * np.uint8(shade)

    both = [evaluate(checkpoint(shade), ONE_CLIP, output=tmp_path) for shade in (1, 0)]
    assert [results["scenes"]["uniform"]["conserved"]["value"] for results in both] == [1, 0]

    pipeline = presets.load_pipeline("kairos-tiny", dtype=torch.float32)
    identity = KairosModel(pipeline).identity
    others = presets.load_pipeline("kairos-tiny", dtype=torch.float32)
    others.scheduler = others.scheduler.from_config(others.scheduler.config, shift=1.0)
    assert KairosModel(others).identity != identity
    pipeline.to(torch.bfloat16)
    assert KairosModel(pipeline).identity == f"{identity}-bfloat16"


def test_a_pipelines_name_in_results_tells_its_parts_its_steps_and_its_guidance(pipeline):
    names = {KairosModel(pipeline).identity}
    names |= {KairosModel(pipeline, steps=7).identity, KairosModel(pipeline, guidance=4.5).identity}
    for part in ("transformer", "vae", "text_encoder"):
        next(getattr(pipeline, part).parameters()).data.mul_(1.5)
        names.add(KairosModel(pipeline).identity)
    assert len(names) == 6


def test_a_few_step_model_says_that_its_steps_are_its_own(caplog):
    pipeline = presets.load_pipeline("kairos-tiny")
    with caplog.at_level(logging.WARNING, "kairos.evaluation"):
        assert KairosModel(pipeline, steps=4, guidance=1).steps == 4 and not caplog.messages
        assert KairosModel(pipeline, steps=7).steps == 4
    assert caplog.messages == ["this model samples in 4 steps without guidance, whatever is asked for"]


def test_nothing_to_measure_is_refused():
    with pytest.raises(UserError, match="without given frames only a model with from_text"):
        evaluate(lambda prompt, first, n: first, replace(ONE_CLIP, given=0))


def test_a_diffusers_pipeline_runs_through_the_suite_and_freezing_scores_badly():
    settings = Settings(scenes=("uniform",), splits=("in",), clips=2)
    results = evaluate(DiffusersModel(ImageToVideo(), name="still"), settings, name="still")
    measures = results["scenes"]["uniform"]
    assert measures["motion_ratio"]["value"] < 0.1 and measures["velocity_error"]["value"] > 0.5
    assert "colors" not in measures and "expectation" not in measures and "psnr" not in measures


def test_a_pipeline_that_cannot_go_on_or_makes_too_little_is_told():
    class TextToVideo:
        def __call__(self, prompt, num_frames=9): ...

    with pytest.raises(UserError, match="TextToVideo takes no video"):
        DiffusersModel(TextToVideo())

    class Short:
        def __call__(self, prompt, image, generator=None):
            return SimpleNamespace(frames=[[image] * 9])

    given = np.zeros((5, 64, 64, 3), np.uint8)
    with pytest.raises(UserError, match="Short makes 9 frames, 29 are needed"):
        DiffusersModel(Short())("", given, 33)
    assert DiffusersModel(Short())("", given, 13).shape == (13, 64, 64, 3)


# --- the command


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as leaving:
            main(["evaluate", *map(str, arguments)])
        return leaving.value.code, *capsys.readouterr()

    return run


def test_the_command_measures_a_model_and_says_so_in_a_table(
    command, chunk_causal_pipeline, monkeypatch, tmp_path
):
    monkeypatch.setattr(presets, "load_pipeline", lambda *_, **__: chunk_causal_pipeline)
    monkeypatch.setattr(presets, "defaults_of", lambda _: chunk_causal_pipeline.config.defaults)
    choice = ("--scenes", "uniform", "--split", "in", "--clips", 1, "--steps", 1, "--drift-seconds", 0)
    status, out, _ = command(*choice, "-o", tmp_path / "results")
    assert status == 0 and "uniform" in out and "velocity" in out
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["model"] == "kairos-tiny" and results["num_frames"] == 9
    assert max(map(len, out.splitlines()[:6])) <= 80


def test_what_a_model_makes_by_itself_is_known_before_it_is_loaded(command, monkeypatch):
    def load(*_, **__):
        raise UserError("loaded")

    monkeypatch.setattr(presets, "load_pipeline", load)
    monkeypatch.setattr(presets, "defaults_of", lambda _: {"num_frames": 81, "height": 64})
    assert "loaded" in command("--given", 41)[2]
    assert "num_frames must be above given + 1 = 86, got 81" in command("--given", 85)[2]
    assert "given must be 4n + 1, got 6; try 5" in command("--given", 6)[2]


def test_exported_videos_are_scored_without_a_model(command, tmp_path):
    export(tmp_path / "data", scenes=("uniform", "occlusion"), splits=("in",), clips=2)
    status, out, error = command("--videos", "data", "-o", "scored")
    assert status == 0 and "occlusion" in out and "do not begin" not in error
    assert command("--videos", "data", "--given", 3)[0] == 0
    measures = json.loads((tmp_path / "scored" / "results.json").read_text())["scenes"]
    for scene in ("uniform", "occlusion"):
        assert measures[scene]["velocity_error"]["value"] < 0.08
        assert measures[scene]["conserved"]["value"] == 1
    assert measures["occlusion"]["permanence"]["value"] == 1
    write_video(
        tmp_path / "data" / "uniform-in-0-00000.mp4",
        simulate("uniform", split="in", num_frames=38).frames[5:],
        fps=16,
    )
    error = command("--videos", "data")[2]
    assert "1 of 1 videos do not begin with the 5 given frames, such as uniform-in-0-00000" in error
    (tmp_path / "data" / "uniform-in-0-00000.mp4").unlink()
    status, out, _ = command("--videos", "data", "--given", 0, "-o", "said")
    assert (
        json.loads((tmp_path / "said" / "results.json").read_text())["scenes"]["uniform"]["all"]["value"] == 1
    )


def test_videos_are_each_clips_only_one_and_of_one_length(command, tmp_path):
    export(tmp_path / "data", scenes=("uniform",), splits=("in",), clips=2, seed=3)
    for video in (tmp_path / "data" / "clips").glob("*.mp4"):
        frames = read_video(video)
        write_video(tmp_path / "data" / video.name, freeze(frames, 5), fps=16)
    assert command("--videos", "data", "-o", "scored")[0] == 0
    results = json.loads((tmp_path / "scored" / "results.json").read_text())
    assert results["videos"] == 2 and results["seeds"] == [3] and results["num_frames"] == 33
    assert (
        results["scenes"]["uniform"]["motion_ratio"]["value"] < 0.05
    )  # the truth in clips/ is not the model's
    assert "<video" not in (tmp_path / "scored" / "report.html").read_text()

    write_video(tmp_path / "data" / "uniform-in-3-1.mp4", frames, fps=16)
    status, _, error = command("--videos", "data")
    assert status == 2 and "uniform-in-3-00001.mp4 and uniform-in-3-1.mp4 in data are of one clip" in error
    (tmp_path / "data" / "uniform-in-3-1.mp4").unlink()
    write_video(tmp_path / "data" / "uniform-in-3-00001.mp4", frames[:9], fps=16)
    status, _, error = command("--videos", "data")
    assert status == 2 and "at one length" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "chemistry"), "unknown suite 'chemistry'"),
        (("--scenes", "boat"), "unknown scene 'boat'"),
        (("--scenes", "uniform,uniform"), "a scene is named twice"),
        (("--splits", ","), "name at least one split"),
        (("--clips", "0"), "clips must be at least 1"),
        (("--videos", "nowhere"), "no folder of videos: nowhere"),
        (("--videos", "."), "no video in . is named as a clip"),
        (("--videos", ".", "--model", "kairos-tiny"), "--model goes with a model; --videos scores"),
        (("--videos", ".", "--steps", "4"), "--steps goes with a model; --videos scores"),
        (("--videos", ".", "--drift-seconds", "4"), "--drift-seconds goes with a model; --videos scores"),
        (("--frames", "0"), "num_frames must be above"),
        (("--steps", "0"), "num_inference_steps must be at least 1, got 0"),
        (("--guidance", "nan"), "guidance_scale must be at least 0, got nan"),
        (("--guidance", "-3"), "guidance_scale must be at least 0, got -3"),
        (("--model", "kairos-huge"), "kairos-huge"),
    ],
)
def test_bad_input_gets_one_line_and_exit_status_2(command, arguments, message):
    status, _, error = command(*arguments)
    assert status == 2 and message in error and "Traceback" not in error
