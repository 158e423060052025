"""The command line, around a pipeline that draws noise in no time."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kairos import presets
from kairos.cli import main, show
from kairos.cli.jobs import keep_inputs
from kairos.cli.machine import device_and_dtype
from kairos.cli.run import RunOptions, vae_precision
from kairos.data import files
from kairos.data.media import read_metadata, read_video, write_video
from kairos.errors import UserError
from kairos.schedulers import FewStepScheduler

ROOT = Path(__file__).parent.parent


class FakePipeline:
    """Takes what KairosPipeline takes, remembers it, and returns coarse noise of the generator's."""

    def __init__(self) -> None:
        self.defaults = {"height": 32, "width": 32, "num_frames": 5, "fps": 16}
        self.defaults |= {"num_inference_steps": 2, "guidance_scale": 3.0}
        self.config = SimpleNamespace(defaults=self.defaults, prompt_template="tiny")
        self.device = self._execution_device = torch.device("cpu")
        self.transformer, self.text_encoder = nn.Linear(2, 2), nn.Linear(2, 2)
        self.text_encoder.model = nn.Identity()
        self.vae = nn.Sequential()
        self.vae.dtype = torch.float32
        self.vae.encoder = self.vae.decoder = nn.Identity()
        self.scheduler = SimpleNamespace(timesteps=[1000, 500])
        self.calls: list[dict[str, Any]] = []
        self.failure: BaseException | None = None

    def set_progress_bar_config(self, **_: Any) -> None: ...

    def register_to_config(self, prompt_template: str) -> None:
        self.config.prompt_template = prompt_template

    def __call__(self, prompt: str, *, generator: torch.Generator, **call: Any) -> Any:
        self.calls.append({"prompt": prompt, "template": self.config.prompt_template, **call})
        if self.failure is not None:
            raise self.failure
        size = (1, call["num_frames"], call["height"], call["width"], 3)
        return SimpleNamespace(frames=torch.rand(size, generator=generator).numpy())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePipeline:
    """The pipeline that every model name loads, an empty working folder, and no downloaded models."""
    monkeypatch.setattr(presets.hub, "find", lambda *_: None)
    pipeline = FakePipeline()
    monkeypatch.setattr(presets, "load_pipeline", lambda *_, **__: pipeline)
    monkeypatch.chdir(tmp_path)
    return pipeline


@pytest.fixture
def loading_is_an_error(monkeypatch: pytest.MonkeyPatch, fake: FakePipeline) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded for input that cannot be used")

    monkeypatch.setattr(presets, "load_pipeline", load)


def test_a_prompt_becomes_a_video_with_its_request_inside(kairos: Any, fake: FakePipeline) -> None:
    status, said, _ = kairos("generate", "a red ball", "-o", "out.mp4", "--seed", 3)
    assert status == 0
    assert said.startswith("out.mp4: 5 frames of 32 x 32 at 16 fps, shown at 256 x 256")
    assert read_video("out.mp4").shape == (5, 256, 256, 3)
    metadata = read_metadata("out.mp4")
    assert metadata["request"] == {
        "prompt": "a red ball",
        "seed": 3,
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "fps": 16,
    }
    assert metadata["mode"] == "t2v"
    assert metadata["model"]["name"] == "kairos-tiny"
    assert len(metadata["model"]["hash"]) == 16
    assert metadata["dtype"] == "float32"
    assert set(metadata["versions"]) == {"kairos", "python", "torch", "diffusers", "transformers"}


def test_the_same_command_twice_gives_the_same_file(kairos: Any, fake: FakePipeline) -> None:
    for name in ("a.mp4", "b.mp4"):
        kairos("generate", "a red ball", "-o", name)
    kairos("generate", "a red ball", "-o", "c.mp4", "--seed", 1)
    first, again, other = (Path(name).read_bytes() for name in ("a.mp4", "b.mp4", "c.mp4"))
    assert first == again != other


def test_every_option_reaches_the_pipeline(kairos: Any, fake: FakePipeline) -> None:
    size = ("--frames", 9, "--height", 48, "--width", 64, "--fps", 8, "--scale", 1)
    sampling = ("--steps", 7, "--guidance", 1.5, "--negative", "blur", "--template", "2026")
    status, _, _ = kairos("generate", "x", *size, *sampling, "--tiled", "--free-encoder", "-o", "out.mp4")
    (call,) = fake.calls
    assert status == 0
    assert (call["num_frames"], call["height"], call["width"]) == (9, 48, 64)
    assert (call["num_inference_steps"], call["guidance_scale"]) == (7, 1.5)
    assert (call["negative_prompt"], call["template"]) == ("blur", "2026")
    assert (call["tiled"], call["after_encoding"]) == (True, "free")
    assert read_video("out.mp4").shape == (9, 48, 64, 3)
    assert fake.config.prompt_template == "tiny"


@pytest.mark.parametrize(("prompt", "mode"), [("a ball", "both"), ("", "image")])
def test_an_image_becomes_the_first_frame(kairos: Any, fake: FakePipeline, prompt: str, mode: str) -> None:
    Image.new("RGB", (20, 10), "red").save("image.png")
    status, _, _ = kairos("generate", prompt, "--image", "image.png", "-o", "out.mp4")
    assert status == 0
    assert fake.calls[0]["image"].size == (20, 10)
    assert fake.calls[0]["prompt"] == prompt


@pytest.mark.parametrize(
    ("options", "kept"), [((), 5), (("--video-frames", 1), 1), (("--frames", 17), 9), (("--frames", 33), 9)]
)
def test_a_video_is_continued_from_its_first_frames(
    kairos: Any, fake: FakePipeline, options: tuple, kept: int
) -> None:
    fake.defaults["num_frames"] = 9
    write_video("given.mp4", np.zeros((10, 32, 32, 3), np.uint8), fps=16)
    status, _, _ = kairos("generate", "--video", "given.mp4", "-o", "out.mp4", *options)
    assert status == 0
    assert len(fake.calls[0]["video"]) == kept


def test_a_video_is_taken_at_the_models_rate(kairos: Any, fake: FakePipeline) -> None:
    fake.defaults["num_frames"] = 33
    write_video("given.mp4", np.zeros((10, 32, 32, 3), np.uint8), fps=32)
    kairos("generate", "--video", "given.mp4", "-o", "out.mp4")
    assert len(fake.calls[0]["video"]) == 5


def test_more_frames_than_the_video_has_are_refused(kairos: Any, fake: FakePipeline) -> None:
    write_video("given.mp4", np.zeros((3, 32, 32, 3), np.uint8), fps=16)
    options = ("--video-frames", 5, "--frames", 9)
    status, _, complaint = kairos("generate", "--video", "given.mp4", *options, "-o", "out.mp4")
    assert status == 2
    assert complaint.splitlines()[-1] == "error: 5 frames of given.mp4 are asked for, and it has 3 at 16 fps"


def test_without_output_the_file_is_named_after_the_prompt(kairos: Any, fake: FakePipeline) -> None:
    kairos("generate", "A red ball: rolls!", "--seed", 4)
    kairos("generate", "über/../etc", "-o", "folder/")
    assert Path("a-red-ball-rolls-4.mp4").exists()
    assert [path.name for path in Path("folder").iterdir()] == ["über-etc-0.mp4"]


def test_what_a_video_is_made_from_is_not_written_over(
    kairos: Any, fake: FakePipeline, loading_is_an_error: None
) -> None:
    write_video("mine.mp4", np.zeros((5, 32, 32, 3), np.uint8), fps=16)
    before = Path("mine.mp4").read_bytes()
    status, _, complaint = kairos("generate", "x", "--video", "mine.mp4", "-o", "./mine.mp4")
    assert (status, Path("mine.mp4").read_bytes()) == (2, before)
    assert complaint == "error: mine.mp4 would be written over what it is made from; choose another name\n"
    keep_inputs(Path("mine.mp4"), "on another machine.png", "")


def test_a_prompt_of_any_script_names_a_file(kairos: Any, fake: FakePipeline) -> None:
    assert kairos("generate", "\u4e00\u4e2a\u7ea2\u7403\u6eda\u5411\u53f3\u8fb9" * 20)[0] == 0
    (made,) = Path().glob("*.mp4")
    assert made.name.startswith("\u4e00\u4e2a\u7ea2\u7403") and len(made.name.encode()) < 120


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full disk to print to")
def test_a_full_disk_behind_what_is_printed_is_the_machines_failure() -> None:
    command = [sys.executable, "-m", "kairos", "models", "list"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr.startswith("error: no space left on device\n")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["runs/events", b"runs/events"])
def test_a_full_disk_is_the_machines_failure_whatever_library_finds_it_full(
    kairos: Any, fake: FakePipeline, name: str | bytes
) -> None:
    fake.failure = OSError(28, "No space left on device", name)
    status, _, complaint = kairos("generate", "x", "-o", "out.mp4")
    assert (status, complaint) == (1, "error: no space left on device: runs/events\n")


def test_a_configuration_may_name_the_output(kairos: Any, fake: FakePipeline) -> None:
    Path("config.py").write_text('\ufeffoutput = "named.mp4"\n', encoding="utf-8")  # as Windows writes it
    assert kairos("generate", "x", "--config", "config.py")[0] == 0
    assert kairos("generate", "x", "--config", "config.py", "-o", "folder/")[0] == 0
    assert Path("named.mp4").exists() and Path("folder", "named.mp4").exists()


def test_a_scale_that_no_video_can_have_is_refused_before_sampling(kairos: Any, fake: FakePipeline) -> None:
    size = ("--height", 512, "--width", 512, "--scale", 64)
    status, _, complaint = kairos("generate", "x", *size, "-o", "out.mp4")
    assert status == 2
    assert "512 x 512 enlarged 64 times is 32768 x 32768" in complaint
    assert fake.calls == []


def test_a_few_step_model_says_and_records_its_own_steps(kairos: Any, fake: FakePipeline) -> None:
    fake.scheduler = FewStepScheduler()
    status, _, said = kairos("generate", "x", "--steps", 50, "-o", "out.mp4")
    assert (status, said) == (0, "warning: this model samples in 4 steps, whatever is asked for\n")
    assert read_metadata("out.mp4")["request"]["num_inference_steps"] == 4
    assert kairos("generate", "x", "-o", "out.mp4")[2] == ""
    assert read_metadata("out.mp4")["request"]["num_inference_steps"] == 4


@pytest.mark.parametrize(
    ("few_step", "said"),
    [
        (True, ["this model samples without guidance", "without guidance a negative prompt changes nothing"]),
        (False, []),
    ],
)
def test_what_a_model_without_guidance_does_not_use_is_said_and_not_recorded(
    kairos: Any, fake: FakePipeline, few_step: bool, said: list[str]
) -> None:
    fake.scheduler = FewStepScheduler() if few_step else fake.scheduler
    steps = len(fake.scheduler.timesteps)
    options = ("--steps", steps, "--guidance", 7, "--negative", "blur")
    status, _, warnings = kairos("generate", "x", *options, "-o", "out.mp4")
    assert status == 0 and warnings.count("warning") == len(said)
    assert all(part in warnings for part in said)
    used = read_metadata("out.mp4")["request"]
    assert used["guidance_scale"] == (1 if few_step else 7)
    assert used.get("negative_prompt", "") == ("" if few_step else "blur")


@pytest.mark.parametrize(("given", "guided"), [((), True), (("--image", "image.png"), False)])
def test_a_model_that_is_guided_to_its_first_frame_alone_says_where_it_is_not(
    kairos: Any, fake: FakePipeline, given: tuple, guided: bool
) -> None:
    fake.defaults["guide_continuation"] = False
    Image.new("RGB", (32, 32), "red").save("image.png")
    asked = ("--guidance", 7, "--negative", "blur")
    status, _, said = kairos("generate", "x", *given, *asked, "-o", "out.mp4")
    assert status == 0
    assert ("goes on from given frames and samples without guidance" in said) is not guided
    assert ("a negative prompt changes nothing" in said) is not guided
    used = read_metadata("out.mp4")["request"]
    assert (used["guidance_scale"], used.get("negative_prompt", "")) == ((7, "blur") if guided else (1, ""))
    assert kairos("generate", "x", *given, "-o", "out.mp4")[2] == ""  # nothing asked for, nothing said
    assert read_metadata("out.mp4")["request"]["guidance_scale"] == (3 if guided else 1)


def test_frames_that_are_no_numbers_become_no_video(
    kairos: Any, fake: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    black = SimpleNamespace(frames=torch.full((1, 5, 32, 32, 3), torch.nan).numpy())
    monkeypatch.setattr(FakePipeline, "__call__", lambda *_, **__: black)
    status, _, complaint = kairos("generate", "x", "-o", "out.mp4")
    assert status == 2 and "no finite numbers" in complaint and not Path("out.mp4").exists()


def test_the_vaes_precision_is_its_own_where_a_precision_is_said() -> None:
    assert vae_precision(RunOptions(dtype="float16", vae_dtype="bfloat16"), "cpu") == torch.bfloat16
    assert vae_precision(RunOptions(dtype="float32"), torch.device("cpu")) is None


def test_a_precision_that_the_processor_does_not_multiply_is_said_to_be_slow(
    kairos: Any, fake: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known, warnings in ((torch.bfloat16, 0), (torch.float32, 1)):
        monkeypatch.setattr("kairos.models.vae_layers.computed_in", lambda dtype, known=known: known)
        status, _, said = kairos("generate", "x", "--dtype", "bfloat16", "--device", "cpu", "-o", "out.mp4")
        assert status == 0 and said.count("this processor has no products in bfloat16") == warnings


@pytest.mark.parametrize("option", ["-o", "--model", "--weights", "--image", "--lora"])
def test_a_path_that_may_not_be_entered_is_bad_input(
    kairos: Any, fake: FakePipeline, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """As the superuser, who may enter all: so the system's answer is made here."""
    refused = os.stat

    def stat(path: Any, *arguments: Any, **options: Any) -> Any:
        if "secret" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return refused(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    status, _, complaint = kairos("generate", "x", option, "secret/file.mp4")
    assert status == 2 and complaint.count("\n") == 1
    assert "ermission denied" in complaint and "secret" in complaint


def test_a_rewritten_prompt_stands_in_the_file_beside_the_words_it_came_from(
    kairos: Any, fake: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kairos.conditioning import rewrite

    monkeypatch.setattr(rewrite.Rewriter, "__call__", lambda _, prompt, **__: f"{prompt}, written out")
    status, _, _ = kairos("generate", "a ball", "--rewrite", "http://127.0.0.1:1/v1", "-o", "out.mp4")
    assert status == 0
    assert fake.calls[0]["prompt"] == "a ball, written out"
    metadata = read_metadata("out.mp4")
    assert metadata["request"]["prompt"] == "a ball, written out"
    assert metadata["rewritten"] == {"from": "a ball", "by": "http://127.0.0.1:1/v1"}


def test_a_request_file_becomes_a_folder_of_videos(kairos: Any, fake: FakePipeline) -> None:
    requests = [{"prompt": "x"}, {"prompt": "y", "cfg_scale": 2}, {"prompt": "z", "output": "named.mp4"}]
    Path("list.json").write_text(json.dumps(requests))
    status, said, _ = kairos("generate", "--request", "list.json", "-o", "videos")
    assert status == 0
    assert sorted(path.name for path in Path("videos").iterdir()) == ["list-1.mp4", "list-2.mp4", "named.mp4"]
    assert [call["guidance_scale"] for call in fake.calls] == [3.0, 2.0, 3.0]
    assert len(said.splitlines()) == 3


def test_a_single_request_may_name_its_file(kairos: Any, fake: FakePipeline) -> None:
    Path("one.json").write_text('{"prompt": "x"}')
    kairos("generate", "--request", "one.json", "-o", "here.mp4")
    kairos("generate", "--request", "one.json")
    assert Path("here.mp4").exists()
    assert Path("output/one.mp4").exists()


def test_the_command_wins_over_the_file_and_the_file_over_the_configuration(
    kairos: Any, fake: FakePipeline
) -> None:
    Path("config.py").write_text(
        '"""Mine."""\n\nsteps = 11\nnum_frames = 9\nheight = 48\nmodel = "kairos-tiny"\n'
    )
    Path("one.json").write_text('{"prompt": "x", "num_frames": 13, "height": 64}')
    status, _, _ = kairos("generate", "--config", "config.py", "--request", "one.json", "--height", 80)
    (call,) = fake.calls
    assert status == 0
    assert (call["num_inference_steps"], call["num_frames"], call["height"]) == (11, 13, 80)


def test_options_complete_a_request_that_could_not_be_without_them(kairos: Any, fake: FakePipeline) -> None:
    Image.new("RGB", (32, 32)).save("first.png")
    Path("one.json").write_text('{"seed": 3, "num_frames": 80}')
    status, _, _ = kairos("generate", "--request", "one.json", "--image", "first.png", "--frames", 5)
    (call,) = fake.calls
    assert (status, call["num_frames"], call["image"].size) == (0, 5, (32, 32))
    status, said, complaint = kairos("generate", "--request", "one.json", "--frames", 6)
    assert (status, said, complaint.count("\n")) == (2, "", 1)
    Path("one.json").write_text('{"prompt": "a ball"}')
    status, _, complaint = kairos("generate", "--request", "one.json", "--frames", 6)
    assert status == 2 and complaint.startswith("error: num_frames must be 4n + 1, got 6")
    Path("one.json").write_text('{"prompt": "a ball", "num_frames": 6}')
    status, _, complaint = kairos("generate", "--request", "one.json", "--seed", 2)
    assert status == 2 and complaint.startswith("error: one.json: num_frames must be 4n + 1, got 6")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"video": "given.mp4", "frames": 1}, "num_frames counts the first frame of the video too"),
        ({"video": "given.mp4", "input_frames": 33}, "num_frames counts the 33 given frames too"),
        ({"video": "given.mp4", "input_frames": 5}, "5 frames of given.mp4 are asked for, and it has 3"),
        ({"prompt": "x", "height": 9000, "width": 9000, "frames": 5}, "a video's side is at most 16384"),
    ],
)
def test_all_requests_are_checked_against_the_model_before_it_is_loaded(
    kairos: Any, loading_is_an_error: None, second: dict, message: str
) -> None:
    write_video("given.mp4", np.zeros((3, 32, 32, 3), np.uint8), fps=16)
    Path("list.json").write_text(json.dumps([{"prompt": "x"}, second]))
    status, said, complaint = kairos("generate", "--request", "list.json", "--scale", 2)
    assert (status, said) == (2, "")
    assert message in complaint and complaint.count("\n") == 1


BAD_INPUT = {
    "nothing at all": ((), "nothing to make a video of"),
    "an unknown model": (("x", "--model", "kairos-tiney"), "kairos-tiney"),
    "a missing image": (("x", "--image", "no.png"), "image not found: no.png"),
    "an unreadable image": (("x", "--image", "text.png"), "cannot read image text.png"),
    "a missing video": (("x", "--video", "no.mp4"), "video not found: no.mp4"),
    "an unreadable video": (("x", "--video", "text.png"), "cannot read video text.png"),
    "a wrong number of frames": (("x", "--frames", "80"), "num_frames must be 4n + 1, got 80; try 81 or 77"),
    "a size too small": (("x", "--height", "8"), "height must be at least 16, got 8"),
    "no number": (("x", "--seed", "many"), "Invalid value for '--seed'"),
    "an unknown option": (("x", "--sede", "1"), "No such option: --sede"),
    "an unknown dtype": (
        ("x", "--dtype", "float17"),
        "dtype must be one of auto, float32, bfloat16, float16",
    ),
    "a device that is not there": (("x", "--device", "cuda:99"), "device 'cuda:99' cannot be used"),
    "a device that holds no numbers": (("x", "--device", "meta"), "device 'meta' cannot be used"),
    "a device whose module is not there": (("x", "--device", "hpu"), "device 'hpu' cannot be used"),
    "a device that is no device": (("x", "--device", "toaster"), "device 'toaster' cannot be used"),
    "an unknown template": (("x", "--template", "1999"), "1999"),
    "an output of another kind": (("x", "-o", "out.avi"), "--output must end in .mp4"),
    "an output folder in a file": (("x", "-o", "text.png/out.mp4"), "cannot write text.png"),
    "an output folder that is read-only": (("x", "-o", "/proc/kairos/out.mp4"), "cannot write /proc/kairos"),
    "a missing request file": (("--request", "no.json"), "request file not found: no.json"),
    "malformed JSON": (
        ("--request", "broken.json"),
        "not valid JSON: Expecting ',' delimiter at line 1, column 16",
    ),
    "an unknown key": (("--request", "typo.json"), "unknown key 'num_frame'; did you mean 'num_frames'?"),
    "a bad request in a list": (
        ("--request", "list.json"),
        "list.json, request 2: height must be at least 16",
    ),
    "a list for one file": (("--request", "good.json", "-o", "out.mp4"), "must be a folder for 2 requests"),
    "one file twice in a list": (("--request", "twice.json"), "requests 1 and 2 both write output/a.mp4"),
    "a prompt beside a file": (("x", "--request", "good.json"), "give a prompt or --request, not both"),
    "a missing configuration": (("x", "--config", "no.py"), "configuration not found: no.py"),
    "an unknown configuration name": (
        ("x", "--config", "typo.py"),
        "line 1: unknown name 'hight'; did you mean",
    ),
    "a configuration that computes": (("x", "--config", "code.py"), "line 1: height must be a plain value"),
    "a configuration that is no value": (("x", "--config", "key.py"), "line 1: model must be a plain value"),
    "a configuration that imports": (("x", "--config", "import.py"), "only lines of the form name = value"),
    "a configuration of another type": (("x", "--config", "type.py"), "line 1: model must be a text, got 5"),
    "a scale that is a truth": (("x", "--config", "truth.py"), "line 1: scale must be a whole number"),
    "a name said twice in a configuration": (
        ("x", "--config", "again.py"),
        "line 2: seed stands there twice",
    ),
    "two names for one thing": (("x", "--config", "two.py"), "'frames' and 'num_frames' mean the same"),
    "a configuration that cannot be": (
        ("x", "--config", "eighty.py"),
        "eighty.py: num_frames must be 4n + 1",
    ),
    "an output that is a folder": (("--request", "folder.json", "-o", "."), "taken.mp4: it is a folder"),
    "an output with too long a name": (("x", "-o", "x" * 300 + ".mp4"), "too long"),
    "an image with too long a name": (("x", "--image", "x" * 300), "too long"),
    "weights that are empty": (("x", "--weights", ""), "weights must name a file or a folder"),
    "weights that are not there": (("x", "--weights", "no.safetensors"), "weights not found: no.safetensors"),
    "weights whose name is no text": (("x", "--weights", "\udcff"), "weights holds the control character"),
    "a LoRA whose name is no text": (("x", "--lora", "\udcff"), "lora holds the control character"),
    "a scale that is none": (("x", "--scale", "0"), "scale must be a whole number from 1 to 64, got 0"),
    "a model that is not downloaded": (
        ("x", "--model", "kairos-4b-480p"),
        "kairos models download kairos-4b-480p",
    ),
    "a configuration that is not Python": (("x", "--config", "broken.json"), "not valid Python at line 1"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_line_and_status_2_before_a_model_is_loaded(
    kairos: Any, loading_is_an_error: None, case: str
) -> None:
    arguments, message = BAD_INPUT[case]
    Path("text.png").write_text("no picture")
    Path("broken.json").write_text('{"prompt": "x" "seed": 1}')
    Path("typo.json").write_text('{"prompt": "x", "num_frame": 5}')
    Path("list.json").write_text('[{"prompt": "x"}, {"prompt": "x", "height": 1}]')
    Path("good.json").write_text('[{"prompt": "x"}, {"prompt": "y"}]')
    Path("twice.json").write_text('[{"prompt": "x", "output": "a.mp4"}, {"prompt": "y", "output": "a.mp4"}]')
    Path("typo.py").write_text("hight = 48\n")
    Path("code.py").write_text("height = 2 * 480\n")
    Path("import.py").write_text("import os\n")
    Path("key.py").write_text("model = {[]: 1}\n")
    Path("folder.json").write_text('{"prompt": "x", "output": "taken.mp4"}')
    Path("taken.mp4").mkdir()
    Path("type.py").write_text("model = 5\n")
    Path("eighty.py").write_text("num_frames = 80\n")
    Path("truth.py").write_text("scale = True\n")
    Path("again.py").write_text("seed = 1\nseed = 2\n")
    Path("two.py").write_text("frames = 5\nnum_frames = 9\n")

    status, said, complaint = kairos("generate", *arguments)
    assert (status, said) == (2, "")
    assert message in complaint
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    assert [path.name for path in Path().rglob("*.mp4")] == ["taken.mp4"]
    assert not list(Path().rglob("*.part"))


def test_a_full_disk_is_the_machines_failure(
    kairos: Any, fake: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", no_space)
    status, _, complaint = kairos("generate", "x", "-o", "videos/out.mp4")
    assert status == 1
    assert complaint.startswith("error: cannot write videos/out.mp4: no space left on device; free some")
    assert complaint.count("\n") == 1
    assert list(Path("videos").iterdir()) == []


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more."),
        MemoryError(),
    ],
)
def test_too_little_memory_is_the_machines_failure(
    kairos: Any, fake: FakePipeline, failure: BaseException
) -> None:
    fake.failure = failure
    status, _, complaint = kairos("generate", "x", "-o", "out.mp4")
    assert status == 1
    assert complaint.startswith("error: not enough memory")
    assert complaint.count("\n") == 1


@pytest.mark.parametrize(("command", "less"), [("run", "checkpointing"), ("cache", "shorter buckets")])
def test_too_little_memory_for_training_is_told_in_its_words(
    kairos: Any, monkeypatch: pytest.MonkeyPatch, command: str, less: str
) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("kairos.training.steps.run_recipe", fails)
    recipe = Path(__file__).parents[1] / "recipes" / "kairos-tiny.yaml"
    status, _, complaint = kairos("train", command, recipe)
    assert status == 1
    assert "not enough memory on the device; try " in complaint and less in complaint
    assert "--tiled" not in complaint


def test_a_gpu_that_is_named_is_the_current_one_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[Any] = []
    monkeypatch.setattr(torch, "empty", lambda *_, device: torch.zeros(1))  # it can be used
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for device in ("cpu", "cuda", "cuda:1"):
        assert device_and_dtype(device, "float16") == (torch.device(device), torch.float16)
    assert current == [torch.device("cuda:1")]


def test_too_little_memory_on_the_cpu_is_told_in_one_line(kairos: Any, fake: FakePipeline) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    fake.failure = caught.value
    assert kairos("generate", "x", "-o", "out.mp4")[0] == 1


def test_our_own_bugs_show_their_traceback(fake: FakePipeline) -> None:
    fake.failure = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        main(["generate", "x", "-o", "out.mp4"])


def test_verbose_says_where_the_time_went(kairos: Any, fake: FakePipeline) -> None:
    status, _, said = kairos("generate", "x", "-o", "out.mp4", "--verbose")
    assert status == 0
    for stage in ("import", "load", "sample", "write", "total", "peak memory"):
        assert stage in said


def test_show_prints_the_request_and_a_command_that_makes_the_same_file(
    kairos: Any, fake: FakePipeline
) -> None:
    kairos(
        "generate",
        'it\'s a "ball"; [bold]x[/]',
        "--negative",
        "-blur",
        "--seed",
        5,
        "-o",
        "my out.mp4",
        "--scale",
        2,
    )
    made = Path("my out.mp4").read_bytes()
    status, said, _ = kairos("show", "my out.mp4")
    assert status == 0
    assert 'it\'s a "ball"; [bold]x[/]' in said
    command = shlex.split(said.splitlines()[-1])
    Path("my out.mp4").unlink()
    assert command[0] == "kairos"
    assert kairos(*command[1:])[0] == 0
    assert Path("my out.mp4").read_bytes() == made


def test_show_prints_every_option_that_changes_the_frames(kairos: Any, fake: FakePipeline) -> None:
    kairos("generate", "a ball", "-o", "out.mp4")
    metadata = json.loads(kairos("show", "out.mp4", "--json")[1])
    metadata |= {"vae_dtype": "bfloat16", "quantize": "int8", "step_cache": 0.1, "compiled": True}
    command = show._command(Path("out.mp4"), metadata | {"loras": ["one.safetensors", "two:0.5"]})
    for said in (
        "--vae-dtype bfloat16",
        "--quantize int8",
        "--step-cache 0.1",
        "--compile",
        "--lora two:0.5",
    ):
        assert said in command


def test_show_takes_every_character_that_a_prompt_may_have(kairos: Any, fake: FakePipeline) -> None:
    kairos("generate", "a ball", "-o", "out.mp4")
    metadata = json.loads(kairos("show", "out.mp4", "--json")[1])
    texts = ["1s a\u3000b\nc", "2s \u00a0\u202f", "3s \U0001f468\u200d\U0001f469"]
    command = show._command(Path("out.mp4"), metadata | {"rollout": {"prompt_at": texts}})
    words = shlex.split(command)
    assert [words[at + 1] for at, word in enumerate(words) if word == "--prompt-at"] == texts
    for wrong in ("1s \x1b[2J", "1s \udcff", {}):
        with pytest.raises(UserError, match="carries metadata that is not a request"):
            show._command(Path("out.mp4"), metadata | {"rollout": {"prompt_at": [wrong]}})


def test_what_the_output_cannot_encode_is_escaped(fake: FakePipeline, tmp_path: Path) -> None:
    name = "é ü日本.mp4"
    with pytest.raises(SystemExit):
        main(["generate", "ein Ball, é", "-o", name])
    for option in ((), ("--json",)):
        shown = subprocess.run(
            [sys.executable, "-m", "kairos", "show", name, *option],
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            check=False,
        )
        assert (shown.returncode, shown.stderr) == (0, b"")
    assert json.loads(shown.stdout)["request"]["prompt"] == "ein Ball, é"


def test_show_prints_json(kairos: Any, fake: FakePipeline) -> None:
    kairos("generate", "x", "-o", "out.mp4")
    _, said, _ = kairos("show", "out.mp4", "--json")
    assert json.loads(said) == read_metadata("out.mp4")


def test_show_of_another_video_is_bad_input(kairos: Any, fake: FakePipeline) -> None:
    write_video("foreign.mp4", np.zeros((1, 32, 32, 3), np.uint8), fps=16)
    clearing = {"request": {"prompt": "x"}, "model": {"name": "\x1b[2J"}}
    for name, metadata in {"odd": {"request": 5, "model": {"name": "x"}}, "clearing": clearing}.items():
        write_video(f"{name}.mp4", np.zeros((1, 32, 32, 3), np.uint8), fps=16, metadata=metadata)
    for name in ("foreign.mp4", "odd.mp4", "clearing.mp4", "missing.mp4"):
        status, said, complaint = kairos("show", name)
        assert (status, said, complaint.count("\n")) == (2, "", 1)
        assert name in complaint
        assert "\x1b" not in complaint


def test_the_version_is_printed(kairos: Any) -> None:
    from kairos import __version__

    assert kairos("--version") == (0, f"kairos {__version__}\n", "")


def test_help_lists_the_commands_in_under_a_second() -> None:
    started = time.perf_counter()
    said = subprocess.run(
        [sys.executable, "-m", "kairos", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    # The command takes 0.3 s; the margin is for a machine that is busy with other things.
    assert time.perf_counter() - started < 3
    for command in ("generate", "show", "models"):
        assert command in said


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from kairos.cli import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'av', 'numpy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'{heavy} imported' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, cwd=ROOT)


@pytest.mark.parametrize("collects", [True, False])
def test_importing_the_libraries_collects_no_garbage_and_leaves_the_collector_as_it_was(collects) -> None:
    program = (
        "import gc, sys\n"
        "import kairos.cli.machine as machine\n"
        f"if not {collects}: gc.disable()\n"
        "before = sum(part['collections'] for part in gc.get_stats())\n"
        "machine.import_libraries()\n"
        "assert sum(part['collections'] for part in gc.get_stats()) <= before + 1\n"
        f"assert gc.isenabled() == {collects} and 'kairos.pipeline' in sys.modules\n"
        "frozen = gc.get_freeze_count()\n"
        "kept = [[] for _ in range(1000)]\n"
        "machine.import_libraries()\n"
        "assert frozen > 100_000 and gc.get_freeze_count() == frozen, 'only the first time'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


SLOW_PIPELINE = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may have it ignored
sys.path.insert(0, {tests!r})
from test_cli import FakePipeline
from kairos import presets
from kairos.cli import main
from kairos.data import files

class Slow(FakePipeline):
    def __call__(self, *args, **call):
        if {stage!r} == "sample":
            print("ready", flush=True)
            time.sleep(60)
        return super().__call__(*args, **call)

def slow_sync(handle):
    print("ready", flush=True)
    time.sleep(60)

if {stage!r} == "write":
    files.os.fsync = slow_sync
presets.load_pipeline = lambda *_, **__: Slow()
main(["generate", "x", "-o", "out.mp4"])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("stage", ["sample", "write"])
def test_ctrl_c_leaves_no_file(tmp_path: Path, stage: str) -> None:
    program = textwrap.dedent(SLOW_PIPELINE).format(stage=stage, tests=str(ROOT / "tests"))
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in complaint
    assert complaint.splitlines()[-1] == "error: interrupted"
    assert list(tmp_path.iterdir()) == []
