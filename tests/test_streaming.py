"""A rollout is one pass cut into chunks; its state is small, constant, and can be kept and forked."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_pipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kairos import FewStepScheduler, UserError
from kairos.models import vae as video_vae
from kairos.pipeline import KairosPipeline
from kairos.sizes import decoder_state_bytes, state_bytes
from kairos.streaming import Rollout, StreamingVAEDecoder, WorldState, resume, stream


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def take(rollout: Rollout, chunks: int) -> np.ndarray:
    return np.concatenate(list(islice(rollout, chunks)), axis=1)


@pytest.fixture(scope="module")
def pipe() -> KairosPipeline:
    """Chunk-causal, with a dilation so short that a few chunks fill every window."""
    pipeline = random_pipeline(causal="chunk", pad_dilated=False, dilation=2)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipe_guided_once(pipe: KairosPipeline) -> KairosPipeline:
    """The same, guided to its first frame alone."""
    pipeline = KairosPipeline(**pipe.components, prompt_template="tiny")
    pipeline.register_to_config(defaults=pipe.config.defaults | {"guide_continuation": False})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8))


@torch.no_grad()
def one_pass(
    pipe: KairosPipeline, sizes: list[int], *, given: Tensor | None, prompt: str, guidance: float
) -> np.ndarray:
    """The frames of `sizes` latent frames, each chunk sampled by passes over the whole video so far."""
    generator = seeded(5)
    prompts = [pipe.encode_prompt([text]) for text in (prompt, "blur")]
    latents = torch.zeros(1, 16, 0, 4, 4) if given is None else given
    for index in range(0 if given is None else 1, len(sizes)):
        chunk = torch.randn(1, 16, sizes[index], 4, 4, generator=generator)
        chunks = tuple(sizes[: index + 1])
        pipe.scheduler.set_timesteps(2, latent_frames=min(latents.shape[2], 2) + 1, tokens_per_frame=4)
        for time in pipe.scheduler.timesteps:
            clip = torch.cat((latents, chunk), dim=2)
            timestep = torch.zeros(1, clip.shape[2])
            timestep[:, latents.shape[2] :] = time
            positive, negative = (
                pipe.transformer(
                    clip, timestep, embeds, encoder_attention_mask=mask, chunk_frames=chunks
                ).sample
                for embeds, mask in prompts
            )
            velocity = (negative + guidance * (positive - negative))[:, :, -sizes[index] :]
            chunk = pipe.scheduler.step(velocity, time, chunk).prev_sample
        latents = torch.cat((latents, chunk), dim=2)
    video = video_vae.decode(pipe.vae, latents)
    return (video / 2 + 0.5).permute(0, 2, 3, 4, 1).numpy()


@pytest.mark.parametrize("chunk_frames", [1, 2, 5])
def test_a_stream_equals_one_pass_over_the_whole_video(pipe, chunk_frames):
    rollout = pipe.stream(
        "a ball",
        negative_prompt="blur",
        chunk_frames=chunk_frames,
        guidance_scale=3,
        generator=seeded(5),
    )
    chunks = -(-9 // chunk_frames)
    expected = one_pass(pipe, [1, 1] + [chunk_frames] * chunks, given=None, prompt="a ball", guidance=3)
    found = take(rollout, 2 + chunks)
    assert found.shape == (1, 5 + 4 * chunks * chunk_frames, 32, 32, 3)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("frames", [1, 9])
def test_given_frames_come_first_and_are_the_past_of_the_rest(pipe, picture, frames):
    given = {"image": picture} if frames == 1 else {"video": [picture.rotate(10 * i) for i in range(frames)]}
    pictures = [picture] if frames == 1 else given["video"]
    latents = pipe._encode_frames(pictures, 32, 32, torch.device("cpu"), False)
    rollout = stream(pipe, "a ball", **given, negative_prompt="blur", guidance_scale=3, generator=seeded(5))
    known = (frames - 1) // 4 + 1
    sizes = [known, *([1] if known == 1 else []), 3, 3]
    expected = one_pass(pipe, sizes, given=latents, prompt="a ball", guidance=3)
    first = next(rollout)
    assert first.shape[1] == frames
    rest = take(rollout, len(sizes) - 1)
    np.testing.assert_allclose(np.concatenate((first, rest), axis=1), expected, atol=1e-4)


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_stopping_saving_loading_and_going_on_equals_not_stopping_to_the_bit(
    pipe, picture, tmp_path, stop_after
):
    def begin() -> Rollout:
        return stream(pipe, "a ball", image=picture, chunk_frames=2, generator=seeded())

    unbroken = take(begin(), 5)
    rollout = begin()
    first = [next(rollout) for _ in range(stop_after)]
    rollout.state.save(tmp_path / "world.safetensors")
    again = resume(pipe, WorldState.load(tmp_path / "world.safetensors"))
    frames = np.concatenate([*first, take(again, 5 - stop_after)], axis=1)
    assert np.array_equal(frames, unbroken)


def test_a_loaded_world_lies_in_memory_as_a_made_one_does(pipe, tmp_path):
    rollout = stream(pipe, "a ball", num_inference_steps=1, generator=seeded())
    next(rollout)
    for length in range(8):  # of the heading, behind which a file's tensors begin
        named = replace(rollout.state, model="m" * (16 + 8 * length))
        named.save(tmp_path / "world")
        tensors = WorldState.load(tmp_path / "world")._tensors().values()
        assert {tensor.data_ptr() % 64 for tensor in tensors} == {0}


def test_a_fork_with_the_same_generator_has_equal_futures_and_with_others_different_ones(pipe):
    rollout = stream(pipe, "a ball", generator=seeded())
    next(rollout)
    world = rollout.state
    alone = next(rollout)
    twins = next(resume(pipe, world.fork(2)))
    assert twins.shape[0] == 2
    assert np.array_equal(twins[0], twins[1])
    np.testing.assert_allclose(twins[0], alone[0], atol=1e-5)
    others = next(resume(pipe, world.fork(2), generator=[seeded(1), seeded(2)]))
    assert not np.allclose(others[0], others[1], atol=1e-2)


def test_videos_of_a_batch_are_those_that_come_alone(pipe):
    prompts = ["a ball", "two blue balls fall"]
    together = take(stream(pipe, prompts, generator=[seeded(1), seeded(2)]), 2)
    for video, prompt, seed in zip(together, prompts, (1, 2), strict=True):
        np.testing.assert_allclose(video, take(stream(pipe, prompt, generator=seeded(seed)), 2)[0], atol=1e-4)


def test_videos_of_one_batch_without_generators_are_different(pipe):
    frames = next(stream(pipe, ["a ball"] * 2))
    assert not np.allclose(frames[0], frames[1], atol=1e-2)


@pytest.mark.parametrize(("template", "read"), [("2026", True), ("2025-12", False)])
def test_the_image_is_part_of_the_prompt_where_the_template_says_so(
    pipe, picture, monkeypatch, template, read
):
    seen = []

    def spy(encoder, tokenizer, prompts, *, images, **options):
        seen.append((prompts, images))
        return torch.zeros(len(prompts), 3, pipe.transformer.config.text_dim), torch.ones(len(prompts), 3)

    monkeypatch.setattr("kairos.pipeline.encode_prompts", spy)
    other = KairosPipeline(**pipe.components, prompt_template=template, defaults=pipe.config.defaults)
    stream(other, "x", image=picture, negative_prompt="y", guidance_scale=2)
    assert seen == [(["x"], [picture] if read else None), (["y"], None)]


def test_the_state_is_as_large_after_a_thousand_chunks_as_after_ten(pipe, tmp_path):
    rollout = stream(pipe, "a ball", chunk_frames=2, num_inference_steps=1, generator=seeded())
    sizes = []
    for chunks in (10, 15):
        take(rollout, chunks)
        sizes.append(rollout.state.nbytes)
    rollout.state.save(tmp_path / "25")
    transformer = replace(rollout.state.transformer, frames=2000)
    later = resume(pipe, replace(rollout.state, transformer=transformer))
    frames = next(later)
    later.state.save(tmp_path / "1001")
    assert np.isfinite(frames).all() and later.state.frames == 2002
    assert {*sizes, later.state.nbytes} == {sizes[0]}
    assert (tmp_path / "25").stat().st_size == (tmp_path / "1001").stat().st_size


def test_the_size_of_the_state_is_the_one_computed_beforehand(pipe):
    rollout = stream(pipe, "a ball", guidance_scale=1, num_inference_steps=1)
    take(rollout, 4)
    layers = rollout.state.transformer.layers
    found = sum(tensor.nbytes for layer in layers for tensor in vars(layer).values())
    assert found == state_bytes(pipe.transformer.config, tokens_per_frame=4, dtype="float32")
    decoder = sum(feature.nbytes for feature in rollout.state.decoder if isinstance(feature, Tensor))
    assert decoder == decoder_state_bytes(pipe.vae.config, latents=16, dtype="float32")


def test_what_a_state_holds_is_not_a_view_of_more(pipe):
    rollout = stream(pipe, "a ball", num_inference_steps=1)
    take(rollout, 3)
    for layer in rollout.state.transformer.layers:
        for tensor in vars(layer).values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_the_prompt_may_change_between_chunks(pipe):
    def frames(change: str | None) -> np.ndarray:
        rollout = stream(pipe, "a ball", generator=seeded())
        next(rollout)
        if change:
            rollout.change_prompt(change)
        return next(rollout)

    assert np.array_equal(frames(None), frames("a ball"))
    assert not np.allclose(frames(None), frames("two blue balls fall and bounce"), atol=1e-4)


@pytest.mark.parametrize("forked", [False, True])
def test_the_prompts_of_a_batch_change_as_those_of_its_videos_alone(pipe, forked):
    changes = ["two blue balls fall and bounce", "a cube"]
    options = {"negative_prompt": "blur", "guidance_scale": 3}
    if forked:
        begun = stream(pipe, "a ball", generator=seeded(), **options)
        next(begun)
        together = resume(pipe, begun.state.fork(2), generator=[seeded(1), seeded(2)])
        alone = [resume(pipe, begun.state, generator=seeded(seed)) for seed in (1, 2)]
    else:
        prompts = ["a ball", "three green balls"]
        together = stream(pipe, prompts, generator=[seeded(1), seeded(2)], **options)
        alone = [stream(pipe, prompts[i], generator=seeded(i + 1), **options) for i in (0, 1)]
        for rollout in (together, *alone):
            next(rollout)
    together.change_prompt(changes)
    found = next(together)
    for index, (rollout, change) in enumerate(zip(alone, changes, strict=True)):
        world = rollout.state
        rollout.change_prompt(change)
        expected = next(rollout)[0]
        np.testing.assert_allclose(found[index], expected, atol=1e-4)
        assert not np.allclose(expected, next(resume(pipe, world))[0], atol=1e-3)


def test_a_model_guided_to_its_first_frame_alone_goes_on_without_guidance(pipe_guided_once):
    pipe = pipe_guided_once
    prompts, options = ["a ball", "two blue balls"], {"negative_prompt": "blur", "guidance_scale": 3}
    world = stream(pipe, prompts, generator=[seeded(1), seeded(2)], **options).state
    assert (world.settings.branches, len(world.prompt[0]), world.given.shape[2]) == (1, 2, 1)
    generators = [seeded(1), seeded(2)]
    made = pipe(prompts, num_frames=1, generator=generators, output_type="latent", **options).frames
    torch.testing.assert_close(world.given, made, atol=1e-5, rtol=0)
    assert torch.equal(world.generators, torch.stack([generator.get_state() for generator in generators]))
    plain = pipe(
        prompts, num_frames=1, generator=[seeded(1), seeded(2)], output_type="latent", guidance_scale=1
    )
    assert not torch.allclose(world.given, plain.frames, atol=1e-2)


def test_a_model_guided_to_its_first_frame_alone_is_not_guided_where_that_is_given(
    pipe_guided_once, picture, monkeypatch
):
    encode, encoded = KairosPipeline.encode_prompt, []

    def watched(self, prompts, **options):
        encoded.append(prompts)
        return encode(self, prompts, **options)

    monkeypatch.setattr(KairosPipeline, "encode_prompt", watched)
    options = {"image": picture, "generator": seeded()}
    guided = stream(pipe_guided_once, "a ball", negative_prompt="blur", guidance_scale=3, **options)
    plain = stream(pipe_guided_once, "a ball", guidance_scale=1, **options)
    assert encoded == [["a ball"]] * 2
    assert np.array_equal(take(guided, 3), take(plain, 3))


def test_a_size_or_a_chunk_far_from_the_models_own_is_warned_of(pipe, caplog):
    stream(pipe, "a ball")
    assert not caplog.messages
    stream(pipe, "a ball", height=64, width=64, chunk_frames=5)
    assert [message.split(" than ")[0] for message in caplog.messages] == [
        "64 x 64 is 4 times the area this model was made for (32 x 32); expect a worse video",
        "21 frames are many more",
    ]


def test_an_interrupted_chunk_leaves_the_world_as_it_was(pipe, monkeypatch):
    rollout, unbroken = (stream(pipe, "a ball", generator=seeded()) for _ in range(2))
    expected = take(unbroken, 2)
    next(rollout)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StreamingVAEDecoder, "decode", stop)
        with pytest.raises(KeyboardInterrupt):
            next(rollout)
    assert np.array_equal(next(rollout), expected[:, -4:])


def test_a_few_step_model_streams_and_resumes(tmp_path):
    pipeline = random_pipeline(causal="chunk", pad_dilated=False)
    pipeline.scheduler = FewStepScheduler()
    rollout, unbroken = (stream(pipeline, "a ball", generator=seeded()) for _ in range(2))
    expected = take(unbroken, 2)
    next(rollout)
    assert rollout.state.settings.branches == 1
    rollout.state.save(tmp_path / "world")
    assert np.array_equal(next(resume(pipeline, WorldState.load(tmp_path / "world"))), expected[:, -4:])


@pytest.mark.parametrize("sizes", [(1,) * 6, (2, 3, 1), (6,), (1, 5)])
@torch.no_grad()
def test_decoding_in_parts_equals_decoding_at_once(pipe, sizes):
    latents = torch.randn(2, 16, 6, 4, 4, generator=seeded())
    decoder = StreamingVAEDecoder(pipe.vae)
    parts = [decoder.decode(part) for part in latents.split(sizes, dim=2)]
    assert parts[0].shape == (2, 3, 4 * (sizes[0] - 1) + 1, 32, 32)
    expected = video_vae.decode(pipe.vae, latents)
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, atol=1e-5, rtol=0)


def test_two_decoders_go_on_from_one_memory(pipe):
    latents = torch.randn(1, 16, 2, 4, 4, generator=seeded())
    decoder = StreamingVAEDecoder(pipe.vae)
    decoder.decode(latents)
    kept = decoder.features
    first = decoder.decode(latents)
    assert torch.equal(StreamingVAEDecoder(pipe.vae, kept).decode(latents), first)


def test_a_bfloat16_pipeline_goes_on_from_the_state_that_it_saved(tmp_path):
    pipeline = random_pipeline(causal="chunk", pad_dilated=False).to(torch.bfloat16)
    rollout = stream(pipeline, "a ball", generator=seeded())
    next(rollout)
    rollout.state.save(tmp_path / "world")
    state = WorldState.load(tmp_path / "world")
    assert state.transformer.layers[0].keys.dtype == torch.bfloat16
    assert state.transformer.layers[3].recurrent_state.dtype == torch.float32
    assert np.array_equal(next(resume(pipeline, state)), next(rollout))


def test_a_state_of_another_model_is_refused(pipe):
    other = random_pipeline(seed=1, causal="chunk", pad_dilated=False, dilation=2)
    rollout = stream(pipe, "a ball", num_inference_steps=1)
    next(rollout)
    with pytest.raises(UserError, match=r"belongs to model [0-9a-f]{16}, this one is [0-9a-f]{16}") as caught:
        resume(other, rollout.state)
    assert "\n" not in str(caught.value)


def test_a_state_belongs_to_its_vae_too(pipe):
    other = KairosPipeline(
        **pipe.components | {"vae": random_pipeline(seed=1).vae},
        prompt_template="tiny",
        defaults=pipe.config.defaults,
    )
    with pytest.raises(UserError, match="belongs to model"):
        resume(other, stream(pipe, "a ball", num_inference_steps=1).state)


def test_a_rollout_is_set_to_no_world_but_one_of_its_model(pipe):
    other = random_pipeline(seed=1, causal="chunk", pad_dilated=False, dilation=2)
    rollout, worlds = (stream(pipe, "a ball", num_inference_steps=1, generator=seeded()) for _ in range(2))
    with pytest.raises(UserError, match="belongs to model"):
        rollout.state = stream(other, "a ball", num_inference_steps=1).state
    with pytest.raises(UserError, match="goes on from a WorldState"):
        rollout.state = None
    first = next(rollout)
    rollout.state = worlds.state
    assert np.array_equal(next(rollout), first)


def test_a_world_is_shown_in_a_line_and_compared_by_what_it_is(pipe):
    rollout = stream(pipe, "a ball", num_inference_steps=1)
    next(rollout)
    world = rollout.state
    assert len(repr(world)) < 300 and "chunk_frames=3" in repr(world)
    assert repr(world.transformer) == "TransformerState(frames=1)"
    assert world == rollout.state and world != world.fork(1)
    assert world.transformer == rollout.state.transformer != world.fork(1).transformer


def test_a_state_of_another_model_says_where_the_right_one_is_named(pipe, tmp_path):
    other = random_pipeline(seed=1, causal="chunk", pad_dilated=False, dilation=2)
    world = stream(pipe, "a ball", num_inference_steps=1).state
    with pytest.raises(UserError, match=r"begun with \(kairos show of its video names it\)"):
        resume(other, world)
    replace(world, model_name="kairos-tiny").fork(2).save(tmp_path / "world")
    with pytest.raises(UserError, match=r"load the one that it was begun with \('kairos-tiny'\)"):
        resume(other, WorldState.load(tmp_path / "world"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, world: world["settings"].update(chunk_frames=1.5), "are no whole numbers"),
        (lambda tensors, world: world["settings"].update(guidance_scale="x"), "'>' not supported"),
        (lambda tensors, world: world["settings"].update(guidance_scale=5.0), "must have 2 rows"),
        (lambda tensors, world: world.update(latent_size=[8, 8]), "the past has the shape"),
        (lambda tensors, world: shorten(tensors, "generators", 100), "RNG state size"),
        (lambda tensors, world: tensors["generators"].fill_(255), "Invalid mt19937 state"),
        (lambda tensors, world: shorten(tensors, "prompt.mask", 2), "the prompt has the shapes"),
    ],
)
def test_a_file_whose_parts_are_not_of_one_world_is_refused_when_it_is_read(pipe, tmp_path, change, message):
    rollout = stream(pipe, "a ball", num_inference_steps=1, guidance_scale=1)
    next(rollout)
    rollout.state.save(tmp_path / "world")
    with safe_open(tmp_path / "world", framework="pt") as file:
        metadata = file.metadata()
    tensors, world = load_file(tmp_path / "world"), json.loads(metadata["world"])
    change(tensors, world)
    save_file(tensors, tmp_path / "world", metadata | {"world": json.dumps(world)})
    with pytest.raises(UserError, match=f"is not a whole world state: .*{message}.*; save it again"):
        WorldState.load(tmp_path / "world")


def shorten(tensors: dict[str, Tensor], name: str, length: int) -> None:
    tensors[name] = tensors[name][:, :length].contiguous()


def test_files_that_hold_no_whole_state_are_refused_in_one_line(pipe, tmp_path):
    rollout = stream(pipe, "a ball", num_inference_steps=1)
    next(rollout)
    whole = tmp_path / "world.safetensors"
    rollout.state.save(whole)
    content = whole.read_bytes()
    cases = {
        "torn": (content[: len(content) // 2], "not a whole world state"),
        "empty": (b"", "not a whole world state"),
        "text": (b"hello, this is not a state at all", "not a whole world state"),
        "newer": (content.replace(b'"version":"1"', b'"version":"9"'), "version 9 of the format"),
        "weights": (content.replace(b"kairos-world-state", b"kairos-other-thing"), "not a world state"),
        "damaged": (content.replace(b'"decoder.0"', b'"transform"'), "not a whole world state"),
        "misnamed": (content.replace(b'"transformer.0.', b'"transformer.x.'), "not a whole world state"),
        "partial": (content.replace(b'"decoder.0"', b'"decoder.x"'), "not a whole world state"),
    }
    for name, (data, message) in cases.items():
        assert data != content
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message) as caught:
            WorldState.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no world state at"):
        WorldState.load(tmp_path / "missing")
    with pytest.raises(UserError, match="cannot read"):
        WorldState.load(tmp_path)


def test_input_that_cannot_be_used_is_refused_in_one_line(pipe, picture):
    cases = [
        ({"chunk_frames": 0}, "chunk_frames must be at least 1, got 0"),
        ({"num_inference_steps": -1}, "num_inference_steps must be at least 1, got -1"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"generator": [seeded(), seeded()]}, "a generator for each of the 1 videos, got 2"),
        ({"generator": 0}, "must be a torch.Generator, got 0"),
        ({"prompt": None}, "a text or a list of texts, got None"),
        ({"prompt": 3}, "a text or a list of texts, got 3"),
        ({"chunk_frames": "3"}, "chunk_frames must be a whole number, got '3'"),
        ({"chunk_frames": 1.5}, "chunk_frames must be a whole number, got 1.5"),
        ({"num_inference_steps": float("nan")}, "num_inference_steps must be a whole number, got nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a number, at most 100, got inf"),
        ({"negative_prompt": ["blur"] * 2, "guidance_scale": 3}, "one negative prompt, or one for each of"),
        ({"image": picture, "video": [picture] * 5}, "exclude each other"),
        ({"video": [picture] * 4}, "4n \\+ 1 frames, got 4"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            stream(pipe, **{"prompt": "a ball"} | arguments)
        assert "\n" not in str(caught.value)
    rollout = stream(pipe, "a ball", num_inference_steps=1)
    with pytest.raises(UserError, match="give the first prompt to stream"):
        rollout.change_prompt("now it stops")
    next(rollout)
    with pytest.raises(UserError, match="one for each of the 1 videos, got 2"):
        rollout.change_prompt(["it stops", "it goes"])
    with pytest.raises(UserError, match="a text or a list of texts, got None"):
        rollout.change_prompt(None)
    with pytest.raises(UserError, match="the number of futures must be at least 1, got 0"):
        rollout.state.fork(0)
    with pytest.raises(UserError, match=r"number of futures must be a whole number, got 1\.5"):
        rollout.state.fork(1.5)
    with pytest.raises(UserError, match=r"a WorldState, such as WorldState\.load reads, got 'x'"):
        resume(pipe, "x")


def test_negative_prompts_and_generators_are_given_as_the_pipeline_takes_them(pipe):
    def begin(**options) -> WorldState:
        return stream(pipe, ["a ball", "a cube"], guidance_scale=3, **options).state

    one, each, none, empty = (
        begin(negative_prompt=negative).prompt for negative in ("blur", ["blur", "blur"], None, "")
    )
    assert all(map(torch.equal, one, each)) and all(map(torch.equal, none, empty))
    assert not torch.equal(one[0], empty[0])
    generators = seeded(1), seeded(2)
    assert torch.equal(begin(generator=generators).generators, begin(generator=list(generators)).generators)


def test_a_model_that_sees_the_future_is_refused(pipeline):
    with pytest.raises(UserError, match="needs a model made with causal="):
        stream(pipeline, "a ball")


def test_the_example_of_the_documentation_runs_as_it_stands(tmp_path, monkeypatch):
    page = Path(__file__).parent.parent / "docs" / "streaming.md"
    (example, *_) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    made: dict = {}
    exec(example, made)
    assert made["futures"].state.batch == 4
    assert made["frames"].shape == (1, 12, 64, 64, 3)
