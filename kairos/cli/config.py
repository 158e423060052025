"""Configurations: small Python files of `name = value` lines, read without being run.

    # configs/kairos_tiny/kairos_tiny_config.py
    model = "kairos-tiny"
    num_frames = 33

They name the model and give values that a request does not say.
"""

import ast
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kairos.errors import UserError
from kairos.request import ALIASES, Request, did_you_mean, field_values

OPTIONS = {"model": str, "weights": str, "device": str, "dtype": str, "scale": int}


@dataclass(frozen=True)
class Config:
    """Values for the options of `kairos generate` and defaults for its requests."""

    options: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)


def read_config(path: str | os.PathLike[str]) -> Config:
    """The values of a configuration file. Raises UserError for anything but known names = literals."""
    path = Path(path)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8-sig"), filename=str(path))
    except FileNotFoundError:
        raise UserError(f"configuration not found: {path}") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"cannot read configuration {path}: {reason}") from error
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        where = f" at line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UserError(f"{path} is not valid Python{where}: {error.args[0]}") from None

    options: dict[str, Any] = {}
    said: dict[str, Any] = {}
    for statement in tree.body:
        match statement:
            case ast.Expr(value=ast.Constant(value=str())):  # the file's docstring
                continue
            case ast.Assign(targets=[ast.Name(id=name)], value=expression):
                value = _literal(path, name, expression)
            case _:
                raise UserError(
                    f"{path}, line {statement.lineno}: only lines of the form name = value may stand here"
                )
        where = f"{path}, line {statement.lineno}"
        if name in options or name in said:
            raise UserError(f"{where}: {name} stands there twice")
        if name in OPTIONS:
            if type(value) is not OPTIONS[name]:
                kind = {str: "a text", int: "a whole number"}[OPTIONS[name]]
                raise UserError(f"{where}: {name} must be {kind}, got {value!r}")
            options[name] = value
            continue
        known = [*OPTIONS, *Request.__dataclass_fields__, *ALIASES]
        if name not in known:
            raise UserError(f"{where}: unknown name {name!r}{did_you_mean(name, known)}")
        said[name] = value
    try:
        request = field_values(said)
        Request.from_dict({"prompt": "a ball"} | request)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Config(options, request)


def _literal(path: Path, name: str, expression: ast.expr) -> Any:
    try:
        return ast.literal_eval(expression)
    except (ValueError, TypeError):
        where = f"{path}, line {expression.lineno}"
        raise UserError(f"{where}: {name} must be a plain value, such as 480 or 'kairos-tiny'") from None
