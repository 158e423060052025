"""Write docs/cli.md from the commands themselves. A test holds that it is current."""

from pathlib import Path
from typing import Any

import typer

from kairos.cli.app import app

TARGET = Path(__file__).parent.parent / "docs" / "cli.md"
HEAD = """# The command line

Made by `python tools/cli_reference.py`; do not edit.

Every command leaves with status 0 when it is done, 2 when its input cannot be used, 1 when the machine failed
(a full disk, too little memory) and 130 when it was interrupted. Errors are one line on stderr. `generate`
writes a video whole or not at all, `rollout` chunk after chunk. Both carry what they were made from: `kairos
show out.mp4` prints it.
"""


def reference() -> str:
    """The whole page, in Markdown."""
    sections = [HEAD]
    _describe(typer.main.get_command(app), "kairos", sections)
    return "\n".join(sections)


def _describe(command: Any, name: str, sections: list[str]) -> None:
    commands = getattr(command, "commands", {})
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = [name, *(["COMMAND"] if commands else ["[OPTIONS]"] if options else [])]
    usage += [_syntax(p) if p.required else f"[{_syntax(p)}]" for p in arguments]
    sections.append(f"## {name}\n\n{_text(command.help)}\n\n    {' '.join(usage)}\n")
    rows = [(f"`{_cell(_syntax(p))}`", _help(p)) for p in arguments]
    for p in options:
        flags = ", ".join(f"`{flag}`" for flag in p.opts)
        rows.append((flags + (f" {_cell(p.metavar)}" if p.metavar else ""), _help(p)))
    if rows:
        lines = [f"| {what} | {_cell(text)} |" for what, text in rows]
        sections.append("\n".join(["| argument | |", "|---|---|", *lines]) + "\n")
    for inner in commands:
        _describe(commands[inner], f"{name} {inner}", sections)


def _syntax(argument: Any) -> str:
    return argument.metavar or argument.name.upper()


def _help(parameter: Any) -> str:
    """What `--help` says of it, its default too."""
    default = parameter.default
    if not parameter.show_default or default is None or default is False or default in ("", []):
        return parameter.help or ""
    return f"{parameter.help or ''} Default: {default}."


def _text(text: str | None) -> str:
    paragraphs = (text or "").strip().split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
