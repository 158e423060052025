"""The pipeline: modes, determinism, given frames, rounding, cancelling, saving."""

from __future__ import annotations

import json
import logging
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

from kairos import FewStepScheduler, KairosPipeline, UserError
from kairos.models import vae as video_vae
from kairos.pipeline import chunk_ends


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


@pytest.fixture
def picture() -> Image.Image:
    gradient = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    return Image.fromarray(gradient)


def test_a_prompt_becomes_frames_in_zero_to_one(pipeline):
    frames = pipeline("a red ball", generator=seeded()).frames
    assert frames.shape == (1, 9, 32, 32, 3)
    assert frames.min() >= 0 and frames.max() <= 1


def test_one_seed_gives_one_video_and_another_seed_another(pipeline):
    first, again, other = (pipeline("a ball", generator=seeded(s)).frames for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


def test_the_prompt_and_the_negative_prompt_change_the_video(pipeline):
    plain = pipeline("a ball", generator=seeded()).frames
    assert not np.array_equal(plain, pipeline("two blue balls", generator=seeded()).frames)
    assert not np.array_equal(plain, pipeline("a ball", negative_prompt="blur", generator=seeded()).frames)


def test_an_image_stays_the_first_latent_frame(pipeline, picture):
    latents = pipeline("", image=picture, generator=seeded(), output_type="latent").frames
    expected = pipeline._encode_frames([picture], 32, 32, torch.device("cpu"), False)
    assert torch.equal(latents[:, :, :1], expected)


def test_a_video_is_continued_from_its_latent_frames(chunk_causal_pipeline, picture):
    video = np.stack([np.asarray(picture)] * 5)
    latents = chunk_causal_pipeline("go on", video=video, generator=seeded(), output_type="latent").frames
    expected = chunk_causal_pipeline._encode_frames(
        [Image.fromarray(f) for f in video], 32, 32, torch.device("cpu"), False
    )
    assert expected.shape[2] == 2
    assert torch.equal(latents[:, :, :2], expected)


def test_clean_frames_are_told_as_time_zero(pipeline, picture, monkeypatch):
    seen = []
    forward = type(pipeline.transformer).forward

    def spy(self, hidden_states, timestep, *args, **kwargs):
        seen.append(timestep.clone())
        return forward(self, hidden_states, timestep, *args, **kwargs)

    monkeypatch.setattr(type(pipeline.transformer), "forward", spy)
    pipeline("x", image=picture, generator=seeded())
    assert all(t.shape == (1, 3) and t[0, 0] == 0 and (t[0, 1:] > 0).all() for t in seen)


def test_a_model_may_be_guided_to_its_first_frame_alone(chunk_causal_pipeline, monkeypatch):
    pipeline, steps = chunk_causal_pipeline, 3
    everywhere = pipeline("x", guidance_scale=4, generator=seeded(), output_type="latent").frames
    monkeypatch.setitem(pipeline.config.defaults, "guide_continuation", False)
    frames_seen = []
    forward = type(pipeline.transformer).forward

    def spy(self, hidden_states, *args, **kwargs):
        frames_seen.append(hidden_states.shape[2])
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(type(pipeline.transformer), "forward", spy)
    options = {"guidance_scale": 4, "num_inference_steps": steps}
    latents = pipeline("x", **options, generator=seeded(), output_type="latent").frames
    assert frames_seen == [1] * 2 * steps + [2] * steps + [latents.shape[2]] * steps
    assert not torch.equal(latents, everywhere)
    rollout = pipeline.stream("x", **options, chunk_frames=2, generator=seeded())
    next(rollout), next(rollout)
    assert len(rollout.state.prompt[0]) == 1


def test_sizes_are_rounded_up_and_said_so(pipeline, caplog):
    logging.getLogger("kairos").setLevel(logging.WARNING)
    with caplog.at_level(logging.WARNING, logger="kairos.pipeline"):
        frames = pipeline("x", height=30, width=17, num_frames=6, generator=seeded()).frames
    assert frames.shape == (1, 9, 32, 32, 3)
    assert "30 x 17 is rounded up to 32 x 32" in caplog.text
    assert "6 frames are rounded up to 9" in caplog.text
    pipeline._rounded_size(32.5, 32)
    assert "32.5 x 32 is rounded up to 48 x 32" in caplog.text


def test_a_size_far_from_the_models_own_is_warned_of(pipeline, caplog):
    logging.getLogger("kairos").setLevel(logging.WARNING)
    with caplog.at_level(logging.WARNING, logger="kairos.pipeline"):
        pipeline("x", height=16, width=16, num_frames=9, generator=seeded())
    assert "16 x 16 is 0.25 times the area this model was made for" in caplog.text


def test_several_prompts_and_videos_come_in_one_batch_that_equals_single_calls(pipeline):
    together = pipeline(
        ["a ball", "two balls fall"], num_videos_per_prompt=2, generator=[seeded(s) for s in range(4)]
    ).frames
    alone = pipeline("two balls fall", generator=seeded(3)).frames
    assert together.shape[0] == 4
    np.testing.assert_allclose(together[3], alone[0], atol=1e-4)


def count_forwards(pipeline, monkeypatch) -> list[int]:
    calls: list[int] = []
    forward = type(pipeline.transformer).forward
    monkeypatch.setattr(
        type(pipeline.transformer), "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k)
    )
    return calls


def test_guidance_of_one_runs_the_model_once_a_step(pipeline, monkeypatch):
    calls = count_forwards(pipeline, monkeypatch)
    pipeline("x", guidance_scale=1, num_inference_steps=3, generator=seeded())
    assert len(calls) == 3
    pipeline("x", guidance_scale=3, num_inference_steps=3, generator=seeded())
    assert len(calls) == 9


def test_a_few_step_scheduler_takes_four_steps_without_guidance(pipeline, monkeypatch):
    pipeline.scheduler = FewStepScheduler()
    calls = count_forwards(pipeline, monkeypatch)
    pipeline("x", guidance_scale=5, num_inference_steps=7, generator=seeded())
    assert len(calls) == 4


def test_one_seed_gives_one_video_of_a_few_step_model_too(pipeline):
    pipeline.scheduler = FewStepScheduler()
    first, again = (pipeline("a ball", generator=seeded(1)).frames for _ in range(2))
    assert np.array_equal(first, again)
    both = pipeline(["a ball", "a ball"], generator=[seeded(2), seeded(1)]).frames
    np.testing.assert_allclose(both[1], first[0], atol=1e-4)
    assert not np.allclose(both[0], first[0], atol=1e-2)


def test_a_chunk_causal_model_makes_the_first_two_frames_one_by_one(chunk_causal_pipeline):
    pipe, first = chunk_causal_pipeline, []

    def watch(pipe, step, timestep, kwargs):
        first.append((step, kwargs["latents"].shape[2], kwargs["latents"].clone()))

    latents = pipe("x", generator=seeded(), output_type="latent", callback_on_step_end=watch).frames
    assert [(step, frames) for step, frames, _ in first] == [(0, 1), (1, 1), (2, 2), (3, 2), (4, 3), (5, 3)]
    assert torch.equal(latents[:, :, 0], first[1][2][:, :, 0])
    assert torch.equal(latents[:, :, 1], first[3][2][:, :, 1])


@pytest.mark.parametrize(
    ("known", "frames", "ends"), [(0, 1, [1]), (0, 2, [1, 2]), (0, 9, [1, 2, 9]), (1, 9, [2, 9]), (2, 9, [9])]
)
def test_chunks_end_behind_the_frames_that_are_made_one_by_one(chunk_causal_pipeline, known, frames, ends):
    assert chunk_ends(chunk_causal_pipeline.transformer, frames, known) == ends


def test_a_callback_can_stop_the_sampling_and_change_the_latents(pipeline):
    steps = []

    def stop_after_two(pipe, step, timestep, kwargs):
        steps.append(step)
        return {"latents": torch.zeros_like(kwargs["latents"]), "interrupt": step == 1}

    latents = pipeline(
        "x",
        num_inference_steps=6,
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=stop_after_two,
    ).frames
    assert steps == [0, 1]
    assert not latents.any()


def test_a_video_that_is_stopped_in_its_first_chunk_begins_no_other(chunk_causal_pipeline):
    pipe, steps = chunk_causal_pipeline, []

    def stop_at_once(pipe, step, timestep, kwargs):
        steps.append(step)
        return {"interrupt": True}

    pipe("x", generator=seeded(), callback_on_step_end=stop_at_once)
    assert steps == [0]
    pipe("x", generator=seeded(), callback_on_step_end=lambda p, step, t, kw: steps.append(step))
    assert steps == [0, 0, 1, 2, 3, 4, 5]


def test_a_callback_is_told_how_many_steps_there_are_in_all_chunks(chunk_causal_pipeline, picture):
    told = []

    def note(pipe, step, timestep, kwargs):
        told.append((step, kwargs["total"]))
        return kwargs  # as diffusers' callbacks do

    chunk_causal_pipeline("x", generator=seeded(), callback_on_step_end=note)
    assert told == [(step, 6) for step in range(6)]
    told.clear()
    chunk_causal_pipeline("x", image=picture, generator=seeded(), callback_on_step_end=note)
    assert told == [(step, 4) for step in range(4)]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (True, "must answer a dictionary or None, got True"),
        ("stop", "must answer a dictionary or None, got 'stop'"),
        ({"latent": torch.zeros(1)}, "may answer latents and interrupt, got latent$"),
        (torch.zeros(1, 16, 3, 4, 4), "must answer a dictionary or None, got tensor"),
        ({"latents": np.zeros((1, 16, 3, 4, 4))}, r"a tensor \(1, 16, 3, 4, 4\), got ndarray"),
        ({"latents": torch.zeros(1, 16, 3, 8, 8)}, r"a tensor \(1, 16, 3, 4, 4\), got \(1, 16, 3, 8, 8\)"),
    ],
)
def test_an_answer_of_a_callback_that_cannot_be_used_is_refused(pipeline, answer, message):
    with pytest.raises(UserError, match=message):
        pipeline("x", generator=seeded(), callback_on_step_end=lambda *_: answer)


@pytest.mark.parametrize("answer", [None, False, 0, [], {}, {"total": 1, "step": 2}])
def test_an_answer_of_a_callback_that_says_nothing_changes_nothing(pipeline, answer):
    plain = pipeline("x", num_inference_steps=1, generator=seeded()).frames
    told = pipeline(
        "x", num_inference_steps=1, generator=seeded(), callback_on_step_end=lambda *_: answer
    ).frames
    assert np.array_equal(plain, told)


def test_a_pipeline_can_be_sent_to_another_process_before_its_first_call_and_after(pipeline):
    fresh = pickle.dumps(pipeline)
    made = pipeline("a ball", generator=seeded()).frames
    used = pickle.dumps(pipeline)
    for sent in map(pickle.loads, (fresh, used)):
        assert np.array_equal(sent("a ball", generator=seeded()).frames, made)


def test_calls_in_several_threads_do_not_disturb_each_other(chunk_causal_pipeline):
    """A callback of the first waits inside its first step until the second call is through."""
    pipe = chunk_causal_pipeline
    alone = [
        pipe("x", num_inference_steps=n, generator=seeded(), output_type="latent").frames for n in (5, 3)
    ]
    begun, through = threading.Event(), threading.Event()

    def wait(pipe, step, timestep, kwargs):
        begun.set()
        assert through.wait(60)

    with ThreadPoolExecutor(1) as pool:
        options = {"num_inference_steps": 5, "generator": seeded(), "output_type": "latent"}
        first = pool.submit(pipe, "x", callback_on_step_end=wait, **options)
        assert begun.wait(60)

        def stop(pipe, step, timestep, kwargs):
            return {"interrupt": True}

        second = pipe("x", num_inference_steps=3, generator=seeded(), output_type="latent").frames
        pipe("x", generator=seeded(), callback_on_step_end=stop)
        through.set()
        assert torch.equal(first.result().frames, alone[0])
    assert torch.equal(second, alone[1])


def test_the_image_is_part_of_the_prompt_where_the_template_says_so(pipeline, picture, monkeypatch):
    seen = []

    def spy(encoder, tokenizer, prompts, *, images, **options):
        seen.append((prompts, images))
        return torch.zeros(len(prompts), 3, pipeline.transformer.config.text_dim), torch.ones(len(prompts), 3)

    monkeypatch.setattr("kairos.pipeline.encode_prompts", spy)
    for template, expected in (("2026", [picture]), ("2025-12", None)):
        pipeline.register_to_config(prompt_template=template)
        seen.clear()
        pipeline("x", image=picture, negative_prompt="y", guidance_scale=2, generator=seeded())
        assert seen == [(["x"], expected), (["y"], None)]


def test_what_it_made_can_be_continued(chunk_causal_pipeline):
    pipe = chunk_causal_pipeline
    frames = pipe("x", generator=seeded()).frames[0][:5]
    pictures = pipe("x", generator=seeded(), output_type="pil").frames[0][:5]
    ways = frames, (frames * 255).round().astype(np.uint8), pictures, torch.from_numpy(frames)
    first, *others = (pipe("x", video=video, generator=seeded()).frames for video in ways)
    for other in others:
        assert np.array_equal(first, other)


def test_a_picture_is_seen_on_white_and_sixteen_bits_are_scaled(pipeline):
    clear = Image.new("RGBA", (32, 32), (200, 0, 0, 0))
    grey = Image.fromarray(np.full((32, 32), 30000, np.uint16))
    expected = Image.new("RGB", (32, 32), "white"), Image.new("RGB", (32, 32), (117, 117, 117))
    for given, same in zip((clear, grey), expected, strict=True):
        made = [pipeline("x", image=image, generator=seeded()).frames for image in (given, same)]
        assert np.array_equal(*made)


def test_given_latents_stay_as_they_are(pipeline):
    noise = torch.randn(1, 16, 3, 4, 4, generator=seeded())
    before = noise.clone()
    first, again = (pipeline("a ball", latents=noise, output_type="latent").frames for _ in range(2))
    assert torch.equal(noise, before)
    assert torch.equal(first, again)


def test_every_output_type_holds_the_same_frames(pipeline):
    array = pipeline("x", generator=seeded()).frames
    tensor = pipeline("x", generator=seeded(), output_type="pt").frames
    (pictures,) = pipeline("x", generator=seeded(), output_type="pil").frames
    np.testing.assert_array_equal(array, tensor.permute(0, 1, 3, 4, 2).numpy())
    np.testing.assert_array_equal((array[0, 3] * 255).round().astype(np.uint8), np.asarray(pictures[3]))


def test_saving_and_loading_gives_the_same_video(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = KairosPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.config.prompt_template == "tiny"
    assert again.config.defaults["num_frames"] == 9
    np.testing.assert_array_equal(
        pipeline("a ball", generator=seeded()).frames, again("a ball", generator=seeded()).frames
    )


def test_weights_of_a_file_are_aligned_wherever_they_lie_in_it(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = KairosPipeline.from_pretrained(tmp_path)
    for module in (again.transformer, again.vae, again.text_encoder):
        assert not any(parameter.data_ptr() % 64 for parameter in module.parameters())


def test_a_pipeline_is_saved_and_loaded_without_its_text_encoder(pipeline, tmp_path):
    embeds = pipeline.encode_prompt("a ball"), pipeline.encode_prompt("")
    made = pipeline("a ball", generator=seeded(), after_encoding="free").frames
    pipeline.save_pretrained(tmp_path)
    again = KairosPipeline.from_pretrained(tmp_path)
    assert again.text_encoder is None
    again.set_progress_bar_config(disable=True)
    frames = again(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], generator=seeded()).frames
    assert np.array_equal(frames, made)


@pytest.mark.parametrize("tiled", [True, False])
def test_tiles_reach_the_vae_both_ways(pipeline, picture, monkeypatch, tiled):
    told = []

    def watched(name):
        work = getattr(video_vae, name)

        def telling(*arguments, tiled):
            told.append((name, tiled))
            return work(*arguments, tiled=tiled)

        return telling

    for name in ("encode", "decode"):
        monkeypatch.setattr(video_vae, name, watched(name))
    pipeline("a ball", image=picture, tiled=tiled, num_inference_steps=1)
    assert told == [("encode", tiled), ("decode", tiled)]


def test_float16_that_the_vae_cannot_hold_becomes_float32_or_is_said(pipeline):
    parts = pipeline.components
    parts["vae"].half()
    halved = KairosPipeline(**parts, prompt_template="tiny", defaults=pipeline.config.defaults)
    halved.set_progress_bar_config(disable=True)
    assert halved.vae.dtype == torch.float32
    halved.vae.half()
    halved("x", generator=seeded())  # as it happens these weights stay small
    with torch.no_grad():
        halved.vae.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(UserError, match=r"float16 does not hold .* pipeline.vae.to\(torch.float32\)"):
        halved("x", generator=seeded())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defaults": {"heigth": 3}}, "no default 'heigth'; did you mean 'height'"),
        ({"defaults": {"height": "x"}}, "default height must be a number, got 'x'"),
        ({"vae": None}, "needs a vae, got None"),
        ({"scheduler": EulerDiscreteScheduler()}, "must be a FlowMatchScheduler .* EulerDiscreteScheduler"),
    ],
)
def test_parts_and_defaults_that_cannot_work_are_refused_when_a_pipeline_is_made(pipeline, change, message):
    with pytest.raises(UserError, match=message):
        KairosPipeline(**pipeline.components | {"prompt_template": "tiny"} | change)


def test_defaults_may_be_numbers_of_numpy_and_hold_what_others_put_there(pipeline):
    own = {"height": np.int64(48), "guidance_scale": np.float32(2), "colour": 3}
    made = KairosPipeline(**pipeline.components, prompt_template="tiny", defaults=own)
    assert json.loads(json.dumps(made.config.defaults)) | own == made.config.defaults
    assert made("x", num_inference_steps=1, num_frames=1).frames.shape[2] == 48


def test_another_scheduler_is_refused_when_it_is_set(pipeline):
    with pytest.raises(UserError, match="got EulerDiscreteScheduler"):
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler = FewStepScheduler.from_config(pipeline.scheduler.config)


def test_a_freed_text_encoder_is_missed_with_a_clear_line(pipeline):
    embeds = pipeline.encode_prompt(["a ball"]), pipeline.encode_prompt([""])
    with_text = pipeline("a ball", generator=seeded(), after_encoding="free").frames
    assert pipeline.text_encoder is None
    with pytest.raises(UserError, match="text encoder was freed"):
        pipeline("a cube", generator=seeded())
    with_embeds = pipeline(
        prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], generator=seeded()
    ).frames
    np.testing.assert_array_equal(with_text, with_embeds)


def test_the_text_encoder_is_moved_off_the_device_after_encoding_where_that_is_asked(pipeline, monkeypatch):
    moved, move = [], pipeline.text_encoder.to
    monkeypatch.setattr(pipeline.text_encoder, "to", lambda device: moved.append(device) or move(device))
    pipeline("a ball", num_inference_steps=1)
    assert not moved
    pipeline("a ball", num_inference_steps=1, after_encoding="cpu")
    assert moved == ["cpu"] and pipeline.text_encoder is not None


def test_prompts_may_be_a_tuple_and_no_negative_prompt_an_empty_one(pipeline):
    generators = [seeded(0), seeded(1)]
    listed = pipeline(["a ball", "a cube"], generator=generators).frames
    generators = [seeded(0), seeded(1)]
    assert np.array_equal(
        pipeline(("a ball", "a cube"), negative_prompt=None, generator=generators).frames, listed
    )


def test_one_negative_prompt_serves_all_prompts(pipeline):
    positive, negative = pipeline.encode_prompt(["a ball", "a cube"]), pipeline.encode_prompt("blur")
    assert len(negative[0]) == 1
    generators = [seeded(0), seeded(1)]
    embedded = pipeline(prompt_embeds=positive, negative_prompt_embeds=negative, generator=generators).frames
    texts = pipeline(["a ball", "a cube"], negative_prompt="blur", generator=(seeded(0), seeded(1))).frames
    np.testing.assert_allclose(embedded, texts, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": -4}, "must be positive"),
        ({"num_frames": -3}, "at least 1, got -3; try 9$"),
        ({"output_type": "gif"}, "output_type"),
        ({"after_encoding": "burn"}, "after_encoding"),
        ({"latents": torch.zeros(1, 16, 2, 4, 4)}, "latents must have the shape"),
        ({"video": np.zeros((4, 32, 32, 3), np.uint8)}, "4n \\+ 1 frames, got 4"),
        ({"video": np.zeros((9, 32, 32, 3), np.uint8)}, "num_frames must be larger"),
        ({"generator": [seeded()] * 3}, "one for each of the 1 videos"),
        ({"height": 0}, "must be positive"),
        ({"width": float("nan")}, "must be positive"),
        ({"num_frames": 0}, "at least 1, got 0; try 9$"),
        ({"num_frames": float("inf")}, "at least 1, got inf; try 9$"),
        ({"num_frames": "9"}, "num_frames must be a number of at least 1, got '9'"),
        ({"height": "64"}, "must be positive numbers, got '64' x 32"),
        ({"num_inference_steps": 4.7}, "num_inference_steps must be a whole number, got 4.7"),
        ({"num_inference_steps": "4"}, "must be a whole number, got '4'"),
        ({"num_inference_steps": float("nan")}, "must be a whole number, got nan"),
        ({"num_inference_steps": float("inf")}, "must be a whole number, got inf"),
        ({"num_inference_steps": 0}, "must be at least 1, got 0"),
        ({"num_videos_per_prompt": 1.5}, "num_videos_per_prompt must be a whole number, got 1.5"),
        ({"step_cache": "x"}, "step_cache must be above 0, such as 0.1, got 'x'"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a number, at most 100, got inf"),
        ({"guidance_scale": float("nan")}, "at most 100, got nan"),
        ({"guidance_scale": 1e30}, "at most 100, got 1e\\+30"),
        ({"generator": 0}, r"torch.Generator, got 0; .* give torch.Generator\(\).manual_seed\(0\)"),
        ({"latents": np.zeros((1, 16, 3, 4, 4))}, "latents must have the shape .* as a tensor, got ndarray"),
        ({"prompt": "", "prompt_embeds": torch.zeros(1, 2, 32)}, "must be a pair .* got \\(1, 2, 32\\)"),
        ({"negative_prompt_embeds": (torch.zeros(1, 2, 32), None)}, r"got \(\(1, 2, 32\), NoneType\)"),
        ({"negative_prompt_embeds": (torch.zeros(1, 2, 8), torch.ones(1, 2))}, r"\(B, T, 32\)"),
        ({"negative_prompt": ["a", "b"]}, "one for each of the 1 prompts, got 2"),
        ({"prompt": None}, "a text or a list of texts, got None"),
        ({"prompt": []}, "a text or a list of texts, got \\[\\]"),
        ({"negative_prompt": 3}, "a text or a list of texts, got 3"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt must be at least 1, got 0"),
        ({"prompt_embeds": (torch.zeros(1, 2, 8), torch.ones(1, 2))}, "exclude each other"),
        ({"image": "a.png"}, "must be a PIL image, got str"),
        ({"image": Image.new("RGB", (0, 0))}, "has no pixels"),
        ({"image": Image.new("F", (8, 8))}, "32-bit greys"),
        ({"video": []}, "4n \\+ 1 frames, got 0$"),
        ({"video": np.zeros((5, 32, 32), np.uint8)}, r"\(k, H, W, 3\) .* got \(5, 32, 32\) uint8"),
        ({"video": np.zeros((5, 32, 32, 4), np.uint8)}, "got \\(5, 32, 32, 4\\)"),
        ({"video": np.zeros((5, 32, 32, 3), np.int64)}, "int64"),
        ({"video": np.full((5, 32, 32, 3), 2.0)}, "must be in \\[0, 1\\]"),
        ({"video": np.full((5, 32, 32, 3), np.nan)}, "must be in \\[0, 1\\]"),
    ],
)
def test_input_that_cannot_be_used_is_refused_in_one_line(pipeline, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        pipeline(**{"prompt": "x"} | arguments)
    assert "\n" not in str(caught.value)


def test_an_image_and_a_video_together_are_refused(pipeline, picture):
    with pytest.raises(UserError, match="exclude each other"):
        pipeline("x", image=picture, video=np.zeros((5, 32, 32, 3), np.uint8))
