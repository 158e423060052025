"""`kairos rollout`: the file grows and plays wherever it is cut off, worlds go on, and drift is measured."""

import errno
import io
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_pipeline
from PIL import Image

from kairos import UserError, presets, streaming
from kairos.cli import main, roll
from kairos.data import files, growing_video
from kairos.data.growing_video import GrowingVideo
from kairos.data.media import read_metadata, read_video, write_video
from kairos.errors import MachineError
from kairos.pipeline import KairosPipeline
from kairos.presets import load_pipeline
from kairos.request import Request
from kairos.schedulers import FewStepScheduler, draw_noise
from kairos.streaming import DriftLimits, DriftMeter, OverlappingRollout, Rollout, WorldState

CAUSAL = {"causal": "chunk", "pad_dilated": False}
SHORT = ("--seconds", 0.5, "--steps", 1, "--chunk-frames", 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of saved pipelines: chunk-causal, two other such, and one that sees whole clips."""
    folder = tmp_path_factory.mktemp("models")
    random_pipeline(**CAUSAL).save_pretrained(folder / "causal")
    random_pipeline(seed=1, **CAUSAL).save_pretrained(folder / "other")
    random_pipeline().save_pretrained(folder / "whole")
    few = random_pipeline(**CAUSAL)
    few.register_modules(scheduler=FewStepScheduler())
    few.save_pretrained(folder / "few")
    return {name: folder / name for name in ("causal", "other", "whole", "few")}


@lru_cache
def load_once(model: str, **options: Any) -> Any:
    return load_pipeline(model, **options)


@pytest.fixture
def rollout(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> Any:
    """Run the command in an empty folder: (exit status, stdout, stderr). Each model is loaded once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(presets, "load_pipeline", load_once)

    def run(*arguments: object, model: str = "causal") -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["rollout", *map(str, arguments), "--model", str(models[model])])
        printed = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, printed.out, printed.err

    return run


def drifts(name: str = "out") -> list[dict[str, Any]]:
    return json.loads(Path(f"{name}.drift.json").read_text())["chunks"]


def moving_bar(frames: int, start: int = 0) -> np.ndarray:
    video = np.zeros((frames, 64, 64, 3), np.uint8)
    for index in range(frames):
        video[index, :, start + index : start + index + 8] = 220
    return video


class FullDisk(io.FileIO):
    """Grows by `room` bytes, of all files together, and then has no space left."""

    room = 0

    def write(self, data: Any) -> int:
        over = os.fstat(self.fileno()).st_size - self.tell()
        part = memoryview(data)[: over + FullDisk.room]
        if len(data) and not part:
            raise OSError(errno.ENOSPC, "No space left on device")
        FullDisk.room -= max(0, len(part) - over)
        return super().write(part) or 0


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> type[FullDisk]:
    def opened(path: Path, mode: str, buffering: int) -> FullDisk:
        return FullDisk(path, mode)

    monkeypatch.setattr(growing_video, "open", opened, raising=False)
    FullDisk.room = 1 << 40
    return FullDisk


# The file


@pytest.mark.parametrize("fps", [16, 29.97])
def test_a_growing_video_plays_after_each_chunk_and_has_all_frames_in_their_order(
    tmp_path: Path, fps: float
) -> None:
    video = GrowingVideo(tmp_path / "out.mp4", fps, {"about": "a bar"}, scale=4)
    written = 0
    for size in (1, 12, 4):
        video.write(moving_bar(size, written))
        written += size
        for rate in (None, fps):
            frames = read_video(tmp_path / "out.mp4", fps=rate)
            assert len(frames) == video.frames == written
            np.testing.assert_allclose(frames[:, ::4, ::4], moving_bar(written), atol=40)
    assert read_metadata(tmp_path / "out.mp4") == {"about": "a bar"}


def test_a_growing_video_takes_the_place_of_a_file_only_with_its_first_chunk(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_text("the old one")
    video = GrowingVideo(tmp_path / "out.mp4", 16)
    assert (tmp_path / "out.mp4").read_text() == "the old one"
    video.write(moving_bar(1))
    assert len(read_video(tmp_path / "out.mp4")) == 1


def test_a_first_chunk_that_cannot_be_written_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_disk: type[FullDisk]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "out.mp4").write_text("the old one")
    video = GrowingVideo(tmp_path / "out.mp4", 16)
    with monkeypatch.context() as patched, pytest.raises(MachineError, match="no space left on device"):
        patched.setattr(files.os, "fsync", full)
        full_disk.room = 0
        video.write(moving_bar(1))
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_text() == "the old one"
    video.write(moving_bar(1))
    assert len(read_video(tmp_path / "out.mp4")) == 1


def test_a_growing_video_keeps_its_size(tmp_path: Path) -> None:
    video = GrowingVideo(tmp_path / "out.mp4", 16)
    video.write(moving_bar(1))
    with pytest.raises(ValueError, match=r"all frames must be \(64, 64\) high and wide, got \(64, 32\)"):
        video.write(moving_bar(4)[:, :, :32])
    video.write(moving_bar(4, 1))
    assert len(read_video(tmp_path / "out.mp4")) == 5


def test_a_chunk_that_finds_the_disk_full_leaves_those_before_it(
    tmp_path: Path, full_disk: type[FullDisk]
) -> None:
    video = GrowingVideo(tmp_path / "out.mp4", 16)
    video.write(moving_bar(5))
    before = (tmp_path / "out.mp4").read_bytes()
    full_disk.room = 100
    with pytest.raises(MachineError, match="no space left on device; free some space"):
        video.write(moving_bar(4, 5))
    assert (tmp_path / "out.mp4").read_bytes() == before
    full_disk.room = 1 << 40
    video.write(moving_bar(4, 5))
    assert len(read_video(tmp_path / "out.mp4")) == video.frames == 9


def test_a_killed_rollout_leaves_a_video_and_a_drift_log_that_can_be_read(
    models: dict[str, Path], tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "kairos",
        "rollout",
        "a ball",
        "--forever",
        "--steps",
        "1",
        "--chunk-frames",
        "1",
    ]
    command += ["--model", str(models["causal"]), "-o", "out.mp4"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment()) as process:
        try:
            wait_for(tmp_path / "out.drift.json", process)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    frames = read_video(tmp_path / "out.mp4")
    chunks = json.loads((tmp_path / "out.drift.json").read_text())["chunks"]
    assert len(frames) % 4 == 1
    assert len(frames) - sum(chunk["frames"] for chunk in chunks) in (0, 4)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}


def wait_for(log: Path, process: subprocess.Popen[bytes]) -> None:
    """Until three chunks are in the log."""
    until = time.monotonic() + 120
    while not log.exists() or log.read_text().count('"chunk"') < 3:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)


# The world


def test_ending_with_a_saved_state_and_going_on_gives_the_frames_of_an_unbroken_run(rollout: Any) -> None:
    settings = ("--steps", 1, "--chunk-frames", 1, "--scale", 1)
    assert rollout("a ball", *settings, "--seconds", 1, "-o", "unbroken.mp4")[0] == 0
    assert rollout("a ball", *settings, "--seconds", 0.5, "-o", "1.mp4", "--save-state", "world")[0] == 0
    status, said, complaint = rollout("--from-state", "world", "--seconds", 0.5, "-o", "2.mp4", "--scale", 1)
    assert (status, complaint) == (0, "")
    assert said == "2.mp4: 8 frames, 0.5 s at 16 fps\n"
    parts = np.concatenate([read_video("1.mp4"), read_video("2.mp4")])
    assert np.array_equal(parts, read_video("unbroken.mp4")[: len(parts)])
    assert len(parts) == 9 + 8


def test_futures_begin_together_in_a_grid_and_part(rollout: Any) -> None:
    assert rollout("a ball", *SHORT, "--futures", 3, "--scale", 4, "-o", "out.mp4")[0] == 0
    video = read_video("out.mp4")[:, 1::4, 1::4].astype(int)
    assert video.shape[1:3] == (2 * 32 + roll.GRID_GAP, 2 * 32 + roll.GRID_GAP)
    first, second, empty = video[:, :32, :32], video[:, :32, 34:], video[:, 34:, 34:]
    apart = np.abs(first - second).mean(axis=(1, 2, 3))
    assert apart[0] < 1.5
    assert apart[-1] > 3 * apart[0]
    assert empty.mean() < 3
    assert [len(chunk["videos"]) for chunk in drifts()] == [3, 3, 3]


def test_the_first_future_is_the_rollout_without_others(rollout: Any) -> None:
    begun = ("a ball", *SHORT, "--seed", 3, "--scale", 4)
    plain = ("--from-state", "world", "--seconds", 0.5, "--scale", 4)
    assert rollout(*begun, "--save-state", "world", "-o", "plain.mp4")[0] == 0
    assert rollout(*plain, "-o", "later.mp4")[0] == 0
    for name, arguments in (("plain", begun), ("later", plain)):
        expected = read_video(f"{name}.mp4")
        assert rollout(*arguments, "--futures", 1, "-o", "one.mp4")[0] == 0
        assert np.array_equal(read_video("one.mp4"), expected)
        assert rollout(*arguments, "--futures", 3, "-o", "three.mp4")[0] == 0
        three, one = (video[-4:, 1::4, 1::4].astype(int) for video in (read_video("three.mp4"), expected))
        apart = [np.abs(three[:, :32, left : left + 32] - one).mean() for left in (0, 34)]
        assert 3 * apart[0] < apart[1]


def test_the_seeds_of_futures_are_counted_over_all_videos_and_the_first_of_each_keeps_its_own() -> None:
    world = next_world(random_pipeline(**CAUSAL), ["a ball", "a cube"], seeds=[8, 9])
    states = roll.forked(world, 2, 5).generators
    fresh = [generator.get_state() for generator in roll.generators(5, 4)]
    expected = [world.generators[0], fresh[1], world.generators[1], fresh[3]]
    assert torch.equal(states, torch.stack(expected))


def next_world(pipeline: Any, prompts: list[str], seeds: list[int]) -> WorldState:
    """After the first chunk."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    begun = pipeline.stream(prompts, num_inference_steps=1, generator=generators)
    next(begun)
    return begun.state


def test_a_kept_world_has_several_futures_and_the_seed_tells_them(rollout: Any) -> None:
    rollout("a ball", *SHORT, "--save-state", "world", "-o", "out.mp4")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        again = (
            "--from-state",
            "world",
            "--seconds",
            0.2,
            "--futures",
            2,
            "--seed",
            seed,
            "-o",
            f"{name}.mp4",
        )
        assert rollout(*again)[0] == 0
    a, b, c = (read_video(f"{name}.mp4") for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_the_prompt_changes_at_its_second(rollout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[tuple[int, str]] = []
    monkeypatch.setattr(
        Rollout, "change_prompt", lambda self, prompt: changed.append((self.state.frames, prompt))
    )
    later = ("--prompt-at", "0.5s", "it falls", "--prompt-at", "0.2 s it stops")
    assert rollout("a ball", "--seconds", 0.8, *SHORT[2:], *later, "-o", "out.mp4")[0] == 0
    assert changed == [(2, "it stops"), (3, "it falls")]


def test_of_changes_of_prompt_due_in_one_chunk_the_last_is_made_and_the_others_are_said_to_change_nothing(
    rollout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: list[str] = []
    monkeypatch.setattr(Rollout, "change_prompt", lambda self, prompt: changed.append(prompt))
    at_once = ("--prompt-at", "0.1s it stops", "--prompt-at", "0.25s it falls")
    status, _, said = rollout("a ball", *SHORT, *at_once, "-o", "out.mp4")
    assert (status, changed) == (0, ["it falls"])
    assert said == "warning: --prompt-at 0.1s changed nothing: the next one came before the next chunk\n"


def test_interrupting_keeps_the_chunks_and_their_state(rollout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Rollout.__next__

    def interrupted(self: Rollout) -> np.ndarray:
        if self.state.frames == 3:
            raise KeyboardInterrupt
        return made(self)

    monkeypatch.setattr(Rollout, "__next__", interrupted)
    forever = ("--forever", *SHORT[2:], "--save-state", "world")
    status, said, complaint = rollout("a ball", *forever, "-o", "out.mp4")
    assert (status, complaint) == (130, "error: interrupted\n")
    assert said == "out.mp4: 9 frames, 0.6 s at 16 fps\n"
    assert len(read_video("out.mp4")) == 9
    assert WorldState.load("world").frames == 3


def test_a_full_disk_ends_the_rollout_in_one_line_and_what_was_written_plays(
    rollout: Any, full_disk: type[FullDisk]
) -> None:
    full_disk.room = 60_000
    forever = ("--forever", *SHORT[2:], "--save-state", "world")
    status, _, complaint = rollout("a ball", *forever, "-o", "out.mp4")
    assert status == 1
    assert complaint.startswith("error: cannot write out.")
    assert "no space left on device; free some space" in complaint
    assert complaint.count("\n") == 1
    assert len(read_video("out.mp4")) == 1 + 4 * (WorldState.load("world").frames - 1) > 1


def test_a_rollout_is_shown_and_made_again(rollout: Any, models: dict[str, Path], capsys: Any) -> None:
    begun = ("a ball", *SHORT, "--prompt-at", "0.1s it's falling", "--save-state", "world", "-o", "1.mp4")
    went_on = (
        "it stops",
        "--from-state",
        "world",
        "--seconds",
        0.5,
        "--futures",
        2,
        "--seed",
        3,
        "-o",
        "2.mp4",
    )
    for name, arguments in (("1.mp4", begun), ("2.mp4", went_on)):
        assert rollout(*arguments)[0] == 0
        made = Path(name).read_bytes()
        with pytest.raises(SystemExit) as left:
            main(["show", name])
        assert left.value.code == 0
        words = shlex.split(capsys.readouterr().out.splitlines()[-1])
        assert words[:2] == ["kairos", "rollout"]
        again = [word for word in words[2:] if word not in ("--model", str(models["causal"]))]
        Path(name).unlink()
        assert rollout(*again)[0] == 0
        assert Path(name).read_bytes() == made


def test_the_command_shown_for_a_rollout_without_an_end_makes_as_much_of_it_as_there_is(
    rollout: Any, capsys: Any, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Rollout.__next__

    def interrupted(self: Rollout) -> np.ndarray:
        if self.state.frames == 3:
            raise KeyboardInterrupt
        return made(self)

    for length in (("--forever",), ("--seconds", 60)):
        with monkeypatch.context() as patched:
            patched.setattr(Rollout, "__next__", interrupted)
            assert rollout("a ball", *length, *SHORT[2:], "-o", "out.mp4")[0] == 130
        frames = read_video("out.mp4")
        with pytest.raises(SystemExit):
            main(["show", "out.mp4"])
        words = shlex.split(capsys.readouterr().out.splitlines()[-1])
        assert "--forever" not in words
        assert words[words.index("--seconds") + 1] == "0.5625"
        again = [word for word in words[2:] if word not in ("--model", str(models["causal"]))]
        assert rollout(*again)[0] == 0
        assert np.array_equal(read_video("out.mp4"), frames)


def test_what_ends_a_rollout_early_leaves_its_state(rollout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that is taken away, the memory that is used up: the world behind the last chunk is kept."""
    made = Rollout.__next__
    for failure, status in ((UserError("cannot write out.mp4: it is gone"), 2), (MemoryError(), 1)):

        def failing(self: Rollout, failure: Exception = failure) -> np.ndarray:
            if self.state.frames == 3:
                raise failure
            return made(self)

        monkeypatch.setattr(Rollout, "__next__", failing)
        forever = ("--forever", *SHORT[2:], "--save-state", "world")
        assert rollout("a ball", *forever, "-o", "out.mp4")[0] == status
        assert WorldState.load("world").frames == 3
        Path("world").unlink()


def test_frames_that_are_no_numbers_end_the_rollout_before_they_are_written(
    rollout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Rollout.__next__
    for good in (0, 1):
        monkeypatch.setattr(
            Rollout,
            "__next__",
            lambda self, good=good: made(self) * (1 if self.state.frames <= good else np.nan),
        )
        status, _, complaint = rollout("a ball", *SHORT, "-o", f"{good}.mp4")
        assert (status, complaint.count("\n")) == (2, 1)
        assert "the frames are no finite numbers" in complaint
        assert Path(f"{good}.mp4").exists() == Path(f"{good}.drift.json").exists() == bool(good)
    assert len(read_video("1.mp4")) == len(drifts("1")) == 1


def test_a_state_takes_the_place_of_no_file_of_the_rollout(rollout: Any) -> None:
    Path("link").symlink_to(".")
    for state, written in (("link/out.mp4", "out.mp4"), ("out.drift.json", "out.drift.json")):
        status, _, complaint = rollout("a ball", *SHORT, "--save-state", state, "-o", "out.mp4")
        assert (status, complaint.count("\n")) == (2, 1)
        assert f"--save-state {state} would replace {written}; name another file" in complaint
    assert not Path("out.mp4").exists()


def test_a_rollout_is_not_written_over_what_it_is_made_from(rollout: Any) -> None:
    rollout("a ball", *SHORT, "--save-state", "world.mp4", "-o", "x.mp4")
    Image.new("RGB", (32, 32)).save("image.drift.json", format="PNG")
    Path("link.mp4").symlink_to("x.mp4")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--from-state", "world.mp4", "-o", "world.mp4"), "world.mp4"),
        (("--image", "image.drift.json", "-o", "image.mp4"), "image.drift.json"),
        (("--video", "x.mp4", "-o", "x.mp4"), "x.mp4"),
        (("--video", "link.mp4", "-o", "x.mp4"), "x.mp4"),
        (("--video", "x.mp4", "--save-state", "x.mp4", "-o", "out.mp4"), "x.mp4"),
    ]
    before = {path: path.read_bytes() for path in Path().iterdir()}
    for arguments, written in cases:
        status, said, complaint = rollout(*arguments, *SHORT[:2])
        assert (status, said, complaint.count("\n")) == (2, "", 1)
        assert f"{written} would be written over what it is made from" in complaint
    assert {path: path.read_bytes() for path in Path().iterdir()} == before
    goes_on = ("--from-state", "world.mp4", "--save-state", "world.mp4", *SHORT[:2], "-o", "out.mp4")
    assert rollout(*goes_on)[0] == 0
    assert WorldState.load("world.mp4").frames == 3 + 3 - 1


def test_a_change_of_prompt_after_the_last_chunks_begin_is_said_to_change_nothing(rollout: Any) -> None:
    for second in ("1000000.5", "0.4"):  # the last chunk is on screen from 0.3125 s to 0.5625 s
        status, _, said = rollout(
            "a ball", *SHORT, "--prompt-at", f"{second}s it stops", "-o", f"{second}.mp4"
        )
        assert status == 0
        assert said == f"warning: no chunk begins after --prompt-at {second}s, which changed nothing\n"
    rollout("a ball", *SHORT, "--prompt-at", "1000000.5s it stops", "-o", "out.mp4")
    assert read_metadata("out.mp4")["rollout"]["prompt_at"] == ["1000000.5s it stops"]


def test_a_few_step_model_says_and_records_its_own_steps(rollout: Any) -> None:
    status, _, said = rollout("a ball", *SHORT[:2], "--steps", 9, "-o", "out.mp4", model="few")
    assert (status, said) == (0, "warning: this model samples in 4 steps, whatever is asked for\n")
    assert read_metadata("out.mp4")["request"]["num_inference_steps"] == 4


# What is refused


def test_input_that_cannot_be_used_is_refused_in_one_line(rollout: Any, models: dict[str, Path]) -> None:
    rollout("a ball", *SHORT, "--save-state", "world", "-o", "taken.mp4")
    Path("torn").write_bytes(Path("world").read_bytes()[:5000])
    cases: list[tuple[str, tuple[object, ...], str]] = [
        ("causal", ("--from-state", "torn", *SHORT[:2]), "torn is not a whole world state"),
        ("causal", ("--from-state", "nothing", *SHORT[:2]), "no world state at nothing"),
        ("other", ("--from-state", "world", *SHORT[:2]), f"begun with ({str(models['causal'])!r})"),
        ("causal", ("--from-state", ".", *SHORT[:2]), "cannot read .: "),
        ("causal", ("--from-state", "world", *SHORT), "leave out num_inference_steps, chunk_frames"),
        ("causal", ("a", *SHORT, "--prompt-at", "0s b"), "is before the first chunk"),
        ("causal", ("a", *SHORT, "--prompt-at", "12s"), 'takes a second and a text, such as "12s'),
        ("causal", ("a", "--prompt-at", "12s", *SHORT), 'takes a second and a text, such as "12s'),
        ("causal", ("a", *SHORT, "--prompt-at", "soon b"), 'takes a second and a text, such as "12s'),
        ("causal", ("a", *SHORT, "--prompt-at", "1s \x1b[2J"), "--prompt-at holds the control character"),
        ("causal", ("a", *SHORT, "--prompt-at", "1s \udcff"), "--prompt-at holds the control character"),
        ("causal", ("a", *SHORT, "--save-state", "\udcff"), "save_state holds the control character"),
        ("causal", ("a",), "--seconds N, or --forever"),
        ("causal", ("a", "--forever", "--seconds", 1), "--seconds N, or --forever"),
        ("causal", ("a", "--seconds", -1), "seconds must be above 0, got -1"),
        ("causal", ("a", "--seconds", 1, "--futures", 0), "futures must be at least 1, got 0"),
        ("causal", SHORT, "nothing to make a video of"),
        ("whole", ("a", *SHORT, "--save-state", "w"), "--save-state needs a chunk-causal model"),
        ("whole", ("a", *SHORT, "--futures", 2), "--futures needs a chunk-causal model"),
        ("whole", ("--from-state", "world", *SHORT[:2]), "--from-state needs a chunk-causal model"),
    ]
    for model, arguments, message in cases:
        status, said, complaint = rollout(*arguments, "-o", "out.mp4", model=model)
        assert (status, said) == (2, ""), arguments
        assert message in complaint
        assert complaint.startswith("error: ")
        assert complaint.count("\n") == 1
    assert not Path("out.mp4").exists()


def test_what_is_known_without_the_model_is_refused_before_it_is_loaded(
    rollout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout("a ball", *SHORT, "--futures", 2, "--save-state", "world", "-o", "taken.mp4")
    monkeypatch.setattr(roll, "load", None)
    Path("folder.drift.json").mkdir()
    cases: list[tuple[str, tuple[object, ...], str]] = [
        ("whole", ("a", *SHORT, "--save-state", "w", "-o", "out.mp4"), "needs a chunk-causal model"),
        ("causal", ("a", *SHORT, "-o", "folder.mp4"), "cannot write folder.drift.json: it is a folder"),
        ("causal", ("a", *SHORT, "--height", 512, "--scale", 64, "-o", "out.mp4"), "is 32768 x 2048"),
        ("causal", ("a", *SHORT, "--futures", 100, "--scale", 60, "-o", "out.mp4"), "is 20280 x 20280"),
        (
            "causal",
            ("--from-state", "world", *SHORT[:2], "--futures", 50, "--scale", 60, "-o", "out.mp4"),
            "is 20280 x 20280",
        ),
    ]
    for model, arguments, message in cases:
        status, _, complaint = rollout(*arguments, model=model)
        assert (status, complaint.count("\n")) == (2, 1), arguments
        assert message in complaint
    assert not Path("out.mp4").exists()


def test_a_command_whose_ranks_would_write_the_same_files_is_refused_under_torchrun(
    rollout: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, complaint = rollout("a", *SHORT, "-o", "out.mp4")
    assert (status, complaint) == (2, "error: kairos rollout is one process: start it without torchrun\n")
    for words in (["evaluate", "-o", "out"], ["batch", "list.json"], ["curate", "select", "out"]):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 2
        assert "is one process: start it without torchrun" in capsys.readouterr().err
    assert not [*Path().iterdir()]
    with pytest.raises(SystemExit, match="0"):
        main(["rollout", "--help"])
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert rollout("a", *SHORT, "-o", "out.mp4")[0] == 0


# Models that see whole clips


def test_a_model_that_sees_whole_clips_goes_on_from_its_last_frames_and_says_so(
    rollout: Any, pipeline: Any
) -> None:
    status, _, complaint = rollout("a ball", "--seconds", 1, "--steps", 1, "-o", "out.mp4", model="whole")
    assert status == 0
    assert "this is an approximation: each clip goes on from the last 5 frames" in complaint
    assert len(read_video("out.mp4")) == 9 + 4 + 4

    calls = []
    call = type(pipeline).__call__

    class Watched(type(pipeline)):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            calls.append(options)
            return call(self, *arguments, **options)

    pipeline.__class__ = Watched
    overlapping = OverlappingRollout(
        pipeline, "a ball", num_inference_steps=1, generator=torch.Generator().manual_seed(0)
    )
    first, second, _ = (next(overlapping) for _ in range(3))
    assert (first.shape[1], second.shape[1]) == (9, 4)
    assert np.array_equal(calls[1]["video"], (first[0, -5:] * 255).round().astype(np.uint8))
    assert calls[2]["video"].shape == calls[1]["video"].shape


def test_a_plan_in_tiles_is_kept_to_and_a_warning_is_given_once(
    rollout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, call, tiled = roll.planned, KairosPipeline.__call__, []

    def in_tiles(*arguments: Any, **options: Any) -> Any:
        return replace(plan(*arguments, **options), tiled=True)

    def watched(self: KairosPipeline, *arguments: Any, **options: Any) -> Any:
        tiled.append(options["tiled"])
        return call(self, *arguments, **options)

    monkeypatch.setattr(roll, "planned", in_tiles)
    monkeypatch.setattr(KairosPipeline, "__call__", watched)
    status, _, complaint = rollout(
        "a ball", "--seconds", 1, "--steps", 1, "--height", 20, "--memory", 8, "-o", "out.mp4", model="whole"
    )
    assert status == 0
    assert tiled == [True] * 3
    assert complaint.count("20 x 32 is rounded up to 32 x 32") == 1


def test_only_what_a_later_clip_repeats_is_left_unsaid_and_only_in_its_own_thread(
    pipeline: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = logging.getLogger("kairos.pipeline")
    in_first, in_second = threading.Event(), threading.Event()

    def call(self: KairosPipeline, prompt: str, **_: Any) -> Any:
        if prompt == "first":  # begins before the second's clip and ends within it
            in_first.set()
            in_second.wait(10)
        elif prompt == "second":
            in_first.wait(10)
            in_second.set()
            first.join(10)
        told.warning("of %s", prompt)
        return SimpleNamespace(frames=np.zeros((1, 9, 8, 8, 3), np.float32))

    monkeypatch.setattr(KairosPipeline, "__call__", call)
    rollouts = [OverlappingRollout(pipeline, prompt) for prompt in ("alone", "alone")]
    for rollout, prompt in zip(rollouts, ("first", "second"), strict=True):
        next(rollout)
        rollout.change_prompt(prompt)
    first = threading.Thread(target=next, args=rollouts[:1])
    first.start()
    second = threading.Thread(target=next, args=rollouts[1:])
    second.start()
    in_second.wait(10)
    told.warning("of another thread")
    second.join(10)
    assert caplog.messages == ["of alone", "of alone", "of another thread"]
    told.warning("afterwards")
    assert caplog.messages[-1] == "afterwards"


def test_futures_are_planned_for_as_videos_made_at_once(rollout: Any, monkeypatch: Any) -> None:
    told = []

    def planned(*arguments: Any, videos: int, **options: Any) -> Any:
        told.append(videos)
        raise UserError("that is enough")

    monkeypatch.setattr(roll, "planned", planned)
    for futures in ([], ["--futures", 3]):
        assert rollout("a ball", "--seconds", 1, *futures, "--memory", 8, "-o", "out.mp4")[0] == 2
    assert told == [1, 3]


def test_a_rollout_is_planned_for_the_most_frames_that_it_takes_at_once(
    rollout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Request] = []

    def planned(requests: list[Request], *arguments: Any, **options: Any) -> Any:
        told.extend(requests)
        raise UserError("that is enough")

    write_video("given.mp4", moving_bar(28)[:, :32, :32], fps=8, scale=1)
    settings = ("--steps", 3, "--chunk-frames", 5, "--guidance", 1)
    assert rollout("a ball", "--seconds", 0.1, *settings, "--save-state", "world", "-o", "x.mp4")[0] == 0
    monkeypatch.setattr(roll, "planned", planned)
    cases: list[tuple[str, tuple[object, ...], int]] = [
        ("causal", ("a ball", "--chunk-frames", 1), 9),
        ("causal", ("a ball",), 13),
        ("causal", ("a ball", "--chunk-frames", 10), 41),
        ("causal", ("--from-state", "world"), 21),
        ("causal", ("--video", "given.mp4"), 53),  # 56 frames at the model's rate, but for three
        ("whole", ("--video", "given.mp4"), 9),
        ("whole", ("a ball", "--chunk-frames", 10), 49),
    ]
    for model, arguments, frames in cases:
        options = ("--seconds", 1, "--memory", 8, "-o", "out.mp4")
        assert rollout(*arguments, *options, model=model)[0] == 2
        assert told[-1].num_frames == frames, arguments
    assert (told[3].num_inference_steps, told[3].guidance_scale) == (3, 1)


def test_a_chunk_causal_rollout_is_never_planned_in_tiles(rollout: Any, monkeypatch: Any) -> None:
    plans = []

    def load(options: Any, device: Any, dtype: Any, plan: Any) -> Any:
        plans.append(plan)
        raise UserError("that is enough")

    monkeypatch.setattr(roll, "load", load)
    options = ("a ball", "--seconds", 1, "--height", 1024, "--width", 1024, "-o", "out.mp4")
    for model in ("whole", "causal"):
        assert "that is enough" in rollout(*options, "--memory", 1.6, model=model)[2]
    assert [(plan.tiled, plan.dtype) for plan in plans] == [(True, "float32"), (False, "bfloat16")]
    assert "do not fit in 1 GB" in rollout(*options, "--memory", 1)[2]


def test_an_overlapping_rollout_refuses_what_it_cannot_do(pipeline: Any) -> None:
    for options, message in (
        ({"overlap": 4}, "overlap must be 4n \\+ 1, got 4"),
        ({"overlap": 0}, "overlap must be 4n \\+ 1, got 0"),
        ({"overlap": -3}, "overlap must be 4n \\+ 1, got -3"),
        ({"overlap": 9}, "less than a clip's 9 frames, got 9"),
        ({"chunk_frames": 0}, "chunk_frames must be at least 1, got 0"),
        ({"chunk_frames": 1.5}, "chunk_frames must be a whole number, got 1.5"),
        ({"overlap": "5"}, "overlap must be 4n \\+ 1, got '5'"),
    ):
        with pytest.raises(UserError, match=message):
            OverlappingRollout(pipeline, "a ball", **options)
    with pytest.raises(UserError, match="once there is a first chunk"):
        OverlappingRollout(pipeline, "a ball").change_prompt("it falls")


def test_the_clips_of_an_overlapping_rollout_have_noise_of_their_own(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []

    def watched(*arguments: Any) -> torch.Tensor:
        drawn.append(draw_noise(*arguments))
        return drawn[-1]

    monkeypatch.setattr("kairos.pipeline.draw_noise", watched)
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        clips = OverlappingRollout(pipeline, "a ball", num_inference_steps=1, generator=generator)
        next(clips), next(clips)
    first, second, *again = drawn
    assert not torch.equal(first, second) and all(map(torch.equal, (first, second), again))


def test_the_prompt_of_an_overlapping_rollout_changes_from_the_next_clip_on(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, asked = KairosPipeline.encode_prompt, []

    def watched(self: Any, prompt: str, **options: Any) -> Any:
        asked.append(prompt)
        return encode(self, prompt, **options)

    monkeypatch.setattr(KairosPipeline, "encode_prompt", watched)
    clips = OverlappingRollout(pipeline, "a ball", num_inference_steps=1, guidance_scale=1)
    next(clips)
    clips.change_prompt("it falls")
    next(clips)
    assert asked == ["a ball", "it falls"]


def test_a_rollout_goes_on_from_the_end_of_a_video(rollout: Any) -> None:
    Image.new("RGB", (32, 32), (200, 30, 30)).save("red.png")
    assert rollout("--image", "red.png", *SHORT, "--scale", 1, "-o", "1.mp4")[0] == 0
    for model in ("causal", "whole"):
        assert rollout("--video", "1.mp4", *SHORT, "--scale", 1, "-o", "2.mp4", model=model)[0] == 0
        np.testing.assert_allclose(read_video("2.mp4")[0].shape, (32, 32, 3))


def test_no_more_of_a_video_is_kept_than_is_gone_on_from(tmp_path: Path, pipeline: Any) -> None:
    video = np.repeat(np.arange(12, dtype=np.uint8)[:, None, None, None] * 20, 3, axis=3)
    write_video(tmp_path / "given.mp4", np.tile(video, (1, 32, 32, 1)), fps=16)
    request = Request(input_video=str(tmp_path / "given.mp4"))
    every = read_video(tmp_path / "given.mp4")[3:]
    assert np.array_equal(roll.end_of_video(request, pipeline, most=5), every[-5:])
    assert np.array_equal(roll.end_of_video(request, pipeline, most=13), every)


def test_a_long_videos_frames_are_kept_in_the_size_that_is_made(
    rollout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 7, 9, 3), np.uint8)
    write_video("given.mp4", noise.repeat(10, axis=1).repeat(10, axis=2), fps=16, scale=1)
    begun, kept = streaming.stream, []

    def stream(*arguments: Any, video: Any, **options: Any) -> Any:
        kept.append([image.size for image in video])
        world = begun(*arguments, video=video, **options)
        plain = begun(*arguments, video=read_video("given.mp4")[3:], **options)
        assert torch.equal(world.state.given, plain.state.given)
        assert all(map(torch.equal, world.state.prompt, plain.state.prompt))
        return world

    monkeypatch.setattr(streaming, "stream", stream)
    status, _, complaint = rollout("--video", "given.mp4", "--height", 20, *SHORT, "-o", "out.mp4")
    assert status == 0
    assert kept == [[(90, 70)] + [(32, 32)] * 8]
    assert complaint.count("20 x 32 is rounded up to 32 x 32") == 1


# Drift


def picture(frames: int = 4) -> np.ndarray:
    """A red square on grey, moving, in [0, 1]."""
    video = np.full((frames, 32, 32, 3), 0.5)
    for index in range(frames):
        video[index, 8:16, 4 + index : 12 + index] = (0.9, 0.1, 0.1)
    return video


def test_a_video_that_stays_as_it_is_has_not_drifted() -> None:
    meter = DriftMeter()
    for _ in range(3):
        drift = meter.measure(picture())
        assert DriftLimits().broken_by(drift) is None
    assert drift.colour == pytest.approx(0)
    assert [drift.contrast, drift.sharpness, drift.fidelity] == pytest.approx([1, 1, 1])


def test_the_parts_of_colour_that_are_still_there_are_counted_to_the_pixel() -> None:
    still, half = picture(1), picture(1)
    half[:, :, :16] = (0.0, 1.0, -0.1)  # what leaves [0, 1] by rounding falls into the outer levels
    meter = DriftMeter()
    meter.measure(still)
    assert meter.measure(half).fidelity == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("decay", "measure"),
    [
        (lambda video: np.zeros_like(video), "brightness"),
        (lambda video: np.clip(video + np.array([0.4, 0, -0.4]), 0, 1), "colour"),
        (lambda video: 0.5 + 0.2 * (video - 0.5), "contrast"),
        (lambda video: video + 0.2 * np.random.default_rng(0).standard_normal(video.shape), "sharpness"),
        (lambda video: video + np.array([0.3, -0.3] * 2)[:, None, None, None], "motion"),
        (lambda video: video + 0.13, "fidelity"),
    ],
)
def test_each_measure_tells_its_own_decay(decay: Any, measure: str) -> None:
    meter, still = DriftMeter(), DriftMeter()
    meter.measure(picture())
    still.measure(picture())
    drift, none = meter.measure(np.clip(decay(picture()), 0, 1)), still.measure(picture())
    only = DriftLimits(**{n: (-1.0, 1e9) for n in vars(drift) if n != measure})
    assert only.broken_by(none) is None
    assert str(only.broken_by(drift)).startswith(f"{measure} is ")


def test_motion_is_counted_across_the_borders_of_chunks() -> None:
    whole, parts = DriftMeter(), DriftMeter()
    parts.measure(picture(3)[:2])
    motion = whole.measure(picture(3)).motion
    assert motion > 0
    assert parts.measure(picture(3)[2:]).motion == pytest.approx(motion)


def test_a_measure_that_is_no_number_breaks_its_limit() -> None:
    drift = DriftMeter().measure(picture())
    for name in vars(drift):
        assert str(DriftLimits().broken_by(replace(drift, **{name: np.nan}))).startswith(f"{name} is nan")


def test_a_rollout_that_drifts_is_stopped_where_that_is_asked_for(
    rollout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Rollout.__next__
    monkeypatch.setattr(
        Rollout, "__next__", lambda self: made(self) * (0.0 if self.state.frames >= 3 else 1.0)
    )
    monkeypatch.setattr(DriftLimits, "broken_by", lambda _, d: "too dark" if d.brightness < 0.02 else None)
    status, _, complaint = rollout(
        "a ball", "--forever", "--stop-on-drift", *SHORT[2:], "--save-state", "world", "-o", "out.mp4"
    )
    assert (status, complaint) == (0, "warning: stopped, for the video has drifted: too dark\n")
    assert [chunk["frames"] for chunk in drifts()] == [1, 4, 4]
    assert drifts()[-1]["start_s"] == 0.3125
    assert WorldState.load("world").frames == 3
