"""Requests: what may be asked for, and how what may not is told."""

import json
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from kairos.errors import UserError
from kairos.request import Request, read_requests, shell_command

REFERENCE = {
    "prompt": "your prompt here",
    "input_image": "",
    "negative_prompt": "",
    "seed": 7,
    "tiled": True,
    "height": 480,
    "width": 640,
    "num_frames": 81,
    "cfg_scale": 5.0,
    "num_inference_steps": 50,
}


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def read(path: Path, defaults: dict[str, int] | None = None) -> list[Request]:
    """The requests of a file in which none is bad."""
    requests = []
    for request in read_requests(path, defaults):
        if isinstance(request, UserError):
            raise request
        requests.append(request)
    return requests


def test_the_reference_dictionary_is_understood(tmp_path: Path) -> None:
    (request,) = read(write(tmp_path / "request.json", REFERENCE))
    assert request == Request(
        prompt="your prompt here",
        seed=7,
        tiled=True,
        height=480,
        width=640,
        num_frames=81,
        guidance_scale=5.0,
        num_inference_steps=50,
    )


def test_a_request_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text('{"prompt": "ein Bäll"}', encoding="utf-8-sig")
    assert read(tmp_path / "request.json") == [Request(prompt="ein Bäll")]


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ({"prompt": "a ball"}, "t2v"),
        ({"prompt": "a ball", "input_image": ""}, "t2v"),
        ({"prompt": "a ball", "input_image": "a.png"}, "ti2v"),
        ({"prompt": "", "input_image": "a.png"}, "i2v"),
        ({"prompt": " ", "input_image": "a.png"}, "i2v"),
        ({"prompt": "a ball", "input_video": "a.mp4"}, "continuation"),
        ({"input_video": "a.mp4"}, "continuation"),
    ],
)
def test_the_mode_is_told_by_what_is_empty(given: dict, mode: str) -> None:
    assert Request.from_dict(given).mode == mode


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing to make a video of: give a prompt, an image or a video"),
        ({"prompt": " "}, "nothing to make a video of"),
        ({"prompt": "x", "num_frames": 80}, "num_frames must be 4n + 1, got 80; try 81 or 77"),
        ({"prompt": "x", "num_frames": 0}, "num_frames must be 4n + 1, got 0; try 1 or 5"),
        ({"prompt": "x", "num_frames": 4 * 10**18 + 1}, "num_frames must be at most 100001, got 4000"),
        ({"input_video": "b.mp4", "input_frames": 4 * 10**18 + 1}, "input_frames must be at most 100001"),
        (
            {"input_image": "a.png", "num_frames": 1},
            "num_frames counts the image too, so it must be 5 or more",
        ),
        ({"input_video": "a.mp4", "num_frames": 1}, "num_frames counts the first frame of the video too"),
        ({"prompt": "x", "height": 8}, "height must be at least 16, got 8"),
        ({"prompt": "x", "width": -64}, "width must be at least 16, got -64"),
        ({"prompt": "x", "width": 10**9}, "width must be at most 16384, got 1000000000"),
        ({"prompt": "x", "seed": -1}, "seed must be at least 0, got -1"),
        ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"prompt": "x", "cfg_scale": float("nan")}, "guidance_scale must be at least 0, got nan"),
        ({"prompt": "x", "cfg_scale": float("inf")}, "guidance_scale must be at most 100, got inf"),
        ({"prompt": "x", "cfg_scale": 10**400}, "guidance_scale is out of range, got 1000"),
        ({"prompt": "x", "seed": 10**400}, "seed must be at most 9223372036854775807, got 1000"),
        ({"prompt": "x", "fps": 0}, "fps must be at least 1, got 0"),
        ({"prompt": 5}, "prompt must be a text, got 5"),
        ({"prompt": "x", "num_frames": "81"}, 'num_frames must be a whole number, got "81"'),
        ({"prompt": "x", "height": 64.0}, "height must be a whole number, got 64.0"),
        ({"prompt": "x", "seed": True}, "seed must be a whole number, got true"),
        ({"prompt": "x", "tiled": 1}, "tiled must be true or false, got 1"),
        ({"prompt": "x", "cfg_scale": [5]}, "guidance_scale must be a number, got [5]"),
        ({"prompt": "x", "num_frame": 81}, "unknown key 'num_frame'; did you mean 'num_frames'?"),
        ({"prompt": "x", "cfgscale": 5}, "unknown key 'cfgscale'; did you mean 'cfg_scale'?"),
        ({"prompt": "x", "zzzz": 5}, "unknown key 'zzzz'; known are prompt, input_image"),
        (
            {"prompt": "x", "cfg_scale": 5, "guidance_scale": 5},
            "'cfg_scale' and 'guidance_scale' mean the same",
        ),
        ({"input_image": "a.png", "input_video": "b.mp4"}, "exclude each other"),
        ({"prompt": "x", "input_frames": 5}, "there is no input_video"),
        ({"input_video": "b.mp4", "input_frames": 5, "num_frames": 5}, "must be above that, got 5"),
        ({"prompt": "x", "output": "../out.mp4"}, "output must be a name inside the output folder"),
        ({"prompt": "x", "output": "out.avi"}, "output must end in .mp4"),
        ({"prompt": "x\udc80"}, "prompt holds the control character '\\udc80'"),
        ({"prompt": "\x1b[2J"}, "prompt holds the control character '\\x1b'"),
        ({"input_image": "a\0.png"}, "input_image holds the control character '\\x00'"),
    ],
)
def test_what_cannot_be_is_told_with_the_value_the_rule_and_the_fix(given: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Request.from_dict(given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "x",\n "seed" 1}', "Expecting ':' delimiter at line 2, column 9"),
        ("", "Expecting value at line 1, column 1"),
        ("[]", "the list is empty"),
        ('"a ball"', 'a request must be a dictionary, got "a ball"'),
        ([{"prompt": "x"}, {"prompt": "x", "sed": 1}], "request 2: unknown key 'sed'; did you mean 'seed'?"),
        ([{"prompt": "x"}, 3], "request 2: a request must be a dictionary, got 3"),
        ('{"prompt": "x", "prompt": "y"}', "the key 'prompt' is there twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "x", "seed": ' + "1" * 5000 + "}", "a number with too many digits"),
    ],
)
def test_a_bad_request_file_is_told_in_one_line_with_the_place(
    tmp_path: Path, content: object, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        read(write(tmp_path / "request.json", content))
    assert message in str(caught.value)
    assert "request.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_unreadable_and_binary_request_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="request file not found"):
        read_requests(tmp_path / "missing.json")
    with pytest.raises(UserError, match="cannot read request file"):
        read_requests(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\x00\xfe")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_requests(tmp_path / "binary.json")


def test_null_leaves_a_value_to_the_model() -> None:
    assert Request.from_dict({"prompt": "x", "height": None, "seed": None}) == Request(prompt="x")


def test_defaults_fill_in_only_what_a_request_does_not_say(tmp_path: Path) -> None:
    path = write(tmp_path / "list.json", [{"prompt": "x"}, {"prompt": "x", "frames": 5}])
    assert [request.num_frames for request in read(path, {"num_frames": 9})] == [9, 5]


def test_a_model_completes_a_request_with_what_it_does_not_say() -> None:
    defaults = {"height": 64, "width": 96, "num_frames": 33, "fps": 16}
    defaults |= {"num_inference_steps": 20, "guidance_scale": 3.0}
    request = Request("a ball", width=32, guidance_scale=0, seed=7)
    whole = request.completed(defaults)
    assert whole == Request(**defaults | {"prompt": "a ball", "width": 32, "guidance_scale": 0, "seed": 7})
    assert whole.completed({name: 1 for name in defaults}) == whole
    assert [request.completed(defaults | {"num_frames": n}).num_frames for n in (30, 33, 34)] == [33, 33, 37]
    given = Request(input_video="start.mp4", input_frames=33)
    with pytest.raises(UserError, match="num_frames counts the 33 given frames too"):
        given.completed(defaults)


def test_inputs_are_looked_for_in_the_working_folder_then_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = tmp_path / "requests"
    beside.mkdir()
    monkeypatch.chdir(tmp_path)
    path = write(beside / "request.json", {"input_image": "a.png"})
    (beside / "a.png").touch()
    assert read(path)[0].input_image == str(beside / "a.png")
    (tmp_path / "a.png").touch()
    assert read(path)[0].input_image == "a.png"


def test_what_counts_instead_is_taken_before_a_request_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "a.png").touch()
    path = write(
        tmp_path / "list" / "a.json", [{"seed": 3, "frames": 80}, {"sed": 3}, {"input_image": "a.png"}]
    )
    completed, unknown, other = read_requests(path, None, {"image": "a.png", "frames": 5, "seed": None})
    # What the command names is where it says, not beside the file.
    assert completed == Request(input_image="a.png", seed=3, num_frames=5)
    assert "request 2: unknown key 'sed'" in str(unknown)
    assert other == Request(input_image="a.png", num_frames=5)


def test_a_request_survives_its_dictionary() -> None:
    request = Request.from_dict(REFERENCE)
    assert Request.from_dict(request.to_dict()) == request
    assert Request(prompt="x").to_dict() == {"prompt": "x", "seed": 0}


def test_the_shell_command_is_quoted() -> None:
    request = Request(
        prompt='it\'s a "ball"; rm -rf $HOME', seed=3, guidance_scale=0.0, num_frames=9, tiled=True
    )
    words = shlex.split(shell_command(request, "my out.mp4", {"model": "kairos-tiny", "dtype": None}))
    assert words == [
        *("kairos", "generate", "--seed", "3", "--frames", "9", "--guidance", "0", "--tiled"),
        *("--model", "kairos-tiny", "--output", "my out.mp4", 'it\'s a "ball"; rm -rf $HOME'),
    ]


def test_a_command_says_all_that_a_request_does() -> None:
    said = {
        **{"negative_prompt": "blur", "seed": 3, "num_frames": 9, "height": 32, "width": 48},
        **{"num_inference_steps": 7, "guidance_scale": 2.5, "fps": 12.5, "tiled": True, "template": "tiny"},
    }
    own = (
        "--negative blur --seed 3 --frames 9 --height 32 --width 48 --steps 7 --guidance 2.5 --fps 12.5 "
        "--tiled --template tiny --output o.mp4 ball"
    )
    every = {"prompt", "output", *said}
    for given, flags in (
        ({"input_image": "a.png"}, "--image a.png"),
        ({"input_video": "a.mp4", "input_frames": 5}, "--video a.mp4 --video-frames 5"),
    ):
        request = Request.from_dict({"prompt": "ball", **said, **given})
        assert shell_command(request, "o.mp4", {}) == f"kairos generate {flags} {own}"
        every |= given.keys()
    assert every == {field.name for field in fields(Request)}


def test_a_prompt_that_looks_like_an_option_is_still_a_prompt() -> None:
    request = Request(prompt="--a dash", negative_prompt="-blur")
    assert shlex.split(shell_command(request, "out.mp4", {}))[2:] == [
        *("--negative=-blur", "--seed", "0", "--output", "out.mp4", "--", "--a dash")
    ]
