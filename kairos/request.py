"""What to make: one frozen request, checked when it is made, and the JSON files that hold requests.

A file holds one dictionary, as in the reference README, or a list of them:

    {"prompt": "a red ball rolls right", "input_image": "", "seed": 0, "num_frames": 33, "cfg_scale": 5}
"""

from __future__ import annotations

import difflib
import json
import os
import shlex
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path, PurePath
from typing import Any

from kairos.errors import UserError

MAX_FRAMES = 100_001  # more than an hour and a half at 16 fps; longer ones are rolled out
MIN_SIZE = 16  # pixels: one token of a model with 8x8 latents in patches of 2x2

ALIASES = {
    "cfg_scale": "guidance_scale",
    "guidance": "guidance_scale",
    "steps": "num_inference_steps",
    "frames": "num_frames",
    "image": "input_image",
    "video": "input_video",
    "negative": "negative_prompt",
    "save_name": "output",
}
"""Other names that JSON files may use for a field. `cfg_scale` is the reference README's."""


@dataclass(frozen=True)
class Request:
    """One video to make; None leaves a value to the model. Raises UserError for what cannot be."""

    prompt: str = ""
    input_image: str = ""
    """The first frame: an image file, or "" for none."""
    input_video: str = ""
    """The start of the video: a video file, or "" for none. It and `input_image` exclude each other."""
    input_frames: int | None = None
    """How many frames of `input_video` to begin with, 4n + 1."""
    negative_prompt: str = ""
    seed: int = 0
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    """4n + 1, the given frames included."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    fps: float | None = None
    tiled: bool = False
    """Encode and decode frames in tiles, to save memory."""
    template: str | None = None
    """The prompt template, where it is not to be the model's own."""
    output: str = ""
    """The mp4's name in the output folder; "" names it after the request file or the prompt."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = _of_type(field.name, str(field.type), getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if not (self.prompt.strip() or self.input_image or self.input_video):
            raise UserError("nothing to make a video of: give a prompt, an image or a video")
        if self.input_image and self.input_video:
            raise UserError("input_image and input_video exclude each other: keep one of them")
        if self.input_frames is not None and not self.input_video:
            raise UserError("input_frames says how much of input_video to use, and there is no input_video")
        for field in fields(self):
            if isinstance(text := getattr(self, field.name), str):
                check_text(field.name, text)
        _check_within("seed", self.seed, 0, 2**63 - 1)
        for name in ("height", "width"):
            _check_within(name, getattr(self, name), MIN_SIZE, 16384)
        for name in ("num_frames", "input_frames"):
            _check_frames(name, getattr(self, name))
            _check_within(name, getattr(self, name), 1, MAX_FRAMES)
        if self.input_frames and self.num_frames and self.input_frames >= self.num_frames:
            raise UserError(
                f"num_frames counts the {self.input_frames} given frames too, so it must be above that, "
                f"got {self.num_frames}"
            )
        if (self.input_image or self.input_video) and self.num_frames == 1:
            given = "image" if self.input_image else "first frame of the video"
            raise UserError(f"num_frames counts the {given} too, so it must be 5 or more, got 1")
        _check_within("num_inference_steps", self.num_inference_steps, 1, 1000)
        _check_within("guidance_scale", self.guidance_scale, 0, 100)
        _check_within("fps", self.fps, 1, 240)
        _check_output(self.output)

    @property
    def mode(self) -> str:
        """Which of prompt, image and video are given: "t2v", "i2v", "ti2v" or "continuation"."""
        if self.input_video:
            return "continuation"
        if self.input_image:
            return "ti2v" if self.prompt.strip() else "i2v"
        return "t2v"

    def completed(self, defaults: Mapping[str, Any]) -> Request:
        """The request with every value that it left to the model, whose defaults are these: frames rounded up
        to 4n + 1, as the pipeline does."""
        return replace(
            self,
            height=self.height or int(defaults["height"]),
            width=self.width or int(defaults["width"]),
            num_frames=self.num_frames or -(-(int(defaults["num_frames"]) - 1) // 4) * 4 + 1,
            num_inference_steps=self.num_inference_steps or int(defaults["num_inference_steps"]),
            guidance_scale=defaults["guidance_scale"] if self.guidance_scale is None else self.guidance_scale,
            fps=self.fps or defaults["fps"],
        )

    def to_dict(self) -> dict[str, Any]:
        """What was said, without what was left to the model: JSON that `from_dict` reads."""
        blank = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if name == "seed" or value != blank[name]}

    @classmethod
    def from_dict(cls, dictionary: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Request:
        """The request of a dictionary, aliases allowed; `defaults` fill in what it does not say.

        Raises UserError for an unknown key, with the nearest right one, and for values that cannot be.
        """
        return cls(**{**field_values(defaults or {}), **field_values(dictionary)})


def field_values(dictionary: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary by the names of Request's fields, without None; unknown keys are refused."""
    known = [field.name for field in fields(Request)]
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value in dictionary.items():
        name = ALIASES.get(key, key)
        if name not in known:
            raise UserError(f"unknown key {key!r}{did_you_mean(key, [*known, *ALIASES])}")
        if name in origin:
            raise UserError(f"{origin[name]!r} and {key!r} mean the same; keep one of them")
        origin[name] = key
        if value is not None:
            values[name] = value
    return values


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'X'?`, or the known words where none is near."""
    known = list(known)
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(known)}"


def read_requests(
    path: str | os.PathLike[str],
    defaults: Mapping[str, Any] | None = None,
    instead: Mapping[str, Any] | None = None,
) -> list[Request | UserError]:
    """The requests of a JSON file, a dictionary or a list of them, and in its place the error of a bad one.

    `input_image` and `input_video` are relative to the working folder, as in the reference, or else to the
    file. `instead`: what is not None counts instead of what a request says. Raises UserError for a file that
    is missing or not JSON (with line and column).
    """
    path, said = Path(path), field_values(instead or {})
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        raise UserError(f"request file not found: {path}") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"cannot read request file {path}: {reason}") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path} is not valid JSON: {error.msg} at {where}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be a request") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except ValueError:  # Python's limit of 4,300 digits
        raise UserError(f"{path} holds a number with too many digits") from None

    dictionaries = content if isinstance(content, list) else [content]
    if not dictionaries:
        raise UserError(f"{path} holds no request: the list is empty")
    requests: list[Request | UserError] = []
    for number, dictionary in enumerate(dictionaries, start=1):
        where = f"{path}: " if content is not dictionaries else f"{path}, request {number}: "
        try:
            if not isinstance(dictionary, dict):
                raise UserError(f"a request must be a dictionary, got {_shown(dictionary)}")
            request = Request.from_dict(field_values(dictionary) | said, defaults)
        except UserError as error:
            requests.append(error if _is_good(dictionary, defaults) else UserError(f"{where}{error}"))
            continue
        files: dict[str, Any] = {
            name: _beside(path, getattr(request, name))
            for name in ("input_image", "input_video")
            if name not in said
        }
        requests.append(replace(request, **files))
    return requests


def _is_good(dictionary: Any, defaults: Mapping[str, Any] | None) -> bool:
    """Whether it is a request by itself: then it is not what is wrong."""
    try:
        return isinstance(dictionary, dict) and bool(Request.from_dict(dictionary, defaults))
    except UserError:
        return False


def shell_command(
    request: Request | None, output: str, options: Mapping[str, Any], command: str = "generate"
) -> str:
    """The `kairos` command that makes the request, quoted for a shell.

    `options` are those of the command that are not part of the request: model, dtype and so on. One with a
    list of values is repeated. A rollout from a state has no request.
    """
    arguments = ["kairos", command]
    flags: dict[str, Any] = {} if request is None else _request_flags(request)
    flags |= {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    flags["--output"] = output
    single = [
        (flag, one)
        for flag, value in flags.items()
        for one in (value if isinstance(value, list) else [value])
    ]
    for flag, value in single:
        if value is True:
            arguments.append(flag)
        elif value is not None and value is not False and value != "":
            text = str(value).removesuffix(".0") if isinstance(value, float) else str(value)
            # In one word where it could be taken for an option itself.
            arguments += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    if request is not None and request.prompt:
        arguments += ["--", request.prompt] if request.prompt.startswith("-") else [request.prompt]
    return shlex.join(arguments)


def _request_flags(request: Request) -> dict[str, Any]:
    return {
        "--image": request.input_image,
        "--video": request.input_video,
        "--video-frames": request.input_frames,
        "--negative": request.negative_prompt,
        "--seed": request.seed,
        "--frames": request.num_frames,
        "--height": request.height,
        "--width": request.width,
        "--steps": request.num_inference_steps,
        "--guidance": request.guidance_scale,
        "--fps": request.fps,
        "--tiled": request.tiled,
        "--template": request.template,
    }


def _of_type(name: str, kind: str, value: Any) -> Any:
    """The value as its field's type; whole numbers do for fractions, nothing else does for anything else."""
    if value is None and kind.endswith("| None"):
        return None
    kind = kind.removesuffix(" | None")
    words = {"str": "a text", "int": "a whole number", "float": "a number", "bool": "true or false"}
    right = isinstance(value, {"str": str, "int": int, "float": int | float, "bool": bool}[kind])
    if not right or (isinstance(value, bool) and kind != "bool"):
        raise UserError(f"{name} must be {words[kind]}, got {_shown(value)}")
    try:
        return float(value) if kind == "float" else value
    except OverflowError:
        raise UserError(f"{name} is out of range, got {_shown(value)}") from None


def _check_within(name: str, value: float | None, least: float, most: float) -> None:
    if value is None:
        return
    shown = str(value)[:60]
    if not value >= least:  # nan is not
        raise UserError(f"{name} must be at least {least}, got {shown}")
    if value > most:
        raise UserError(f"{name} must be at most {most}, got {shown}")


def _check_frames(name: str, frames: int | None) -> None:
    if frames is None or (frames >= 1 and frames % 4 == 1):
        return
    below = (frames - 1) // 4 * 4 + 1
    advice = f"try {below + 4} or {below}" if below >= 1 else "try 1 or 5"
    raise UserError(f"{name} must be 4n + 1, got {frames}; {advice}")


def check_text(name: str, text: str) -> None:
    """Refuse half characters, and what would drive a terminal that shows the request."""
    bad = [c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\r\t"]
    if bad:
        raise UserError(f"{name} holds the control character {bad[0]!r}; take it out")


def _check_output(output: str) -> None:
    if output and (PurePath(output).is_absolute() or ".." in PurePath(output).parts):
        raise UserError(f"output must be a name inside the output folder, got {output!r}")
    if output and PurePath(output).suffix.lower() != ".mp4":
        raise UserError(f"output must end in .mp4, got {output!r}")


def _beside(request_file: Path, path: str) -> str:
    """The path as it is if it leads somewhere, else as seen from the request file if that does."""
    beside = request_file.parent / path
    # os.path: a name too long for the system is one that does not exist
    return str(beside) if path and not os.path.exists(path) and os.path.exists(beside) else path


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the key {name!r} is there twice")
    return dict(pairs)


def _shown(value: Any) -> str:
    """A value as it stands in JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
