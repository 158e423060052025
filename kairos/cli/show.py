"""`kairos show`: what an mp4 was made from, and the command that makes it again."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from kairos.cli.console import out
from kairos.cli.options import option
from kairos.errors import UserError

RUN_OPTIONS = {
    name: name for name in ("model", "weights", "dtype", "vae_dtype", "scale", "quantize", "step_cache")
}
RUN_OPTIONS |= {"loras": "lora", "compiled": "compile"}
"""What the metadata says of a run, and the option that asks for it."""

ROLLOUT_OPTIONS = (
    "seconds",
    "stop_on_drift",
    "chunk_frames",
    "futures",
    "save_state",
    "from_state",
    "seed",
    "prompt_at",
)


def show(
    video: Annotated[Path, typer.Argument(show_default=False, help="An mp4 that kairos wrote.")],
    as_json: Annotated[bool, option("Print the metadata as it is.", None, "--json")] = False,
) -> None:
    """Print the request that a video was made from, and the command that makes it again."""
    from kairos.data.media import read_metadata

    metadata = read_metadata(video)
    if as_json:
        out.print(json.dumps(metadata, indent=2, ensure_ascii=not out.encoding.startswith("utf")))
        return
    command = None if "sample" in metadata else _command(video, metadata)  # no command makes one of training
    for name, value in _rows(metadata):
        out.print(Text(f"{_printable(name):>20}", style="bold"), _printable(value))
    if command is not None:
        out.print()
        out.print(command)


def _command(video: Path, metadata: dict[str, Any]) -> str:
    from kairos.data.growing_video import frame_count
    from kairos.request import Request, check_text, shell_command

    try:
        options = {flag: metadata[name] for name, flag in RUN_OPTIONS.items() if metadata.get(name)}
        options["model"] = metadata["model"]["name"]
        rollout = metadata.get("rollout")
        if rollout is not None:
            options |= {name: rollout[name] for name in ROLLOUT_OPTIONS if name in rollout}
            frames, fps = frame_count(video)
            if frames / fps < rollout.get("seconds", math.inf):  # it was to go on for ever, or was cut short
                options["seconds"] = frames / fps
        for name, value in options.items():
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, str):
                    check_text(name, one)
                elif not isinstance(one, int | float):
                    raise UserError(f"{name} is {_printable(one)}")
        begun_from_state = rollout is not None and "from_state" in rollout
        request = None if begun_from_state else Request.from_dict(metadata["request"])
        return shell_command(request, str(video), options, "generate" if rollout is None else "rollout")
    except (AttributeError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{video} carries metadata that is not a request of kairos: {error}") from error


def _printable(value: Any) -> str:
    """A value for the terminal; what would drive the terminal is escaped."""
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value)


def _rows(metadata: dict[str, Any]) -> list[tuple[str, Any]]:
    """What there is to show, a line each: the request first, then what it ran on."""
    rows = list(metadata.get("request", {}).items())
    for name, value in metadata.items():
        if isinstance(value, dict) and name != "request":
            rows += [(f"{name} {key}" if name == "model" else key, entry) for key, entry in value.items()]
        elif name != "request":
            rows.append((name, value))
    return rows
