"""Mappings of YAML as frozen dataclasses: unknown keys, missing ones and wrong types in one line each."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union

from kairos.errors import UserError
from kairos.request import did_you_mean

T = TypeVar("T")

KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "a mapping",
    Path: "a path",
}


def check_keys(mapping: Any, known: Iterable[str], where: str) -> None:
    """Refuse what is no mapping, and a key that is not known, naming the nearest one that is."""
    if not isinstance(mapping, dict):
        raise UserError(f"{where} must hold a mapping, got {mapping!r}")
    known = list(known)
    for key in mapping:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(str(key), known)}")


def arguments(
    function: Callable[..., Any], mapping: Any, where: str, *, finite: bool = True
) -> dict[str, Any]:
    """A mapping from YAML as arguments of `function`. Raises UserError for what is not an optional one, and
    for a value of another type."""
    parameters = inspect.signature(function).parameters.values()
    check_keys(mapping, [p.name for p in parameters if p.default is not p.empty], where)
    hints = typing.get_type_hints(function)
    return {key: convert(hints[key], value, f"{where}.{key}", finite) for key, value in mapping.items()}


def at_least(least: float, holder: Any, *names: str, where: str = "", of: str = "") -> None:
    """Refuse attributes that are below the least value."""
    for name in names:
        if getattr(holder, name) < least:
            raise UserError(f"{where}{name}{of} must be at least {least}, got {getattr(holder, name)}")


def above_0(holder: Any, *names: str, where: str = "", of: str = "") -> None:
    """Refuse attributes that are not above 0; None says nothing."""
    for name in names:
        value = getattr(holder, name)
        if value is not None and value <= 0:
            raise UserError(f"{where}{name}{of} must be above 0, got {value}")


def build(cls: type[T], mapping: Any, where: str, **more: Any) -> T:
    """The dataclass `cls` of a mapping from YAML; `more` are values that the file does not say.

    Raises:
        UserError: for a key that is not known, one that is missing, and a value of another type.
    """
    if not is_dataclass(cls):
        raise TypeError(f"{cls} is no dataclass")
    mapping = {} if mapping is None else mapping
    known = [field for field in fields(cls) if field.name not in more]
    check_keys(mapping, [field.name for field in known], where)
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = dict(more)
    for field in known:
        if field.name in mapping:
            values[field.name] = convert(hints[field.name], mapping[field.name], f"{where}.{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{where}: the key {field.name!r} is missing")
    return cls(**values)


def convert(kind: Any, value: Any, where: str, finite: bool = True) -> Any:
    """`value` as the annotation `kind` has it: numbers, texts, paths, tuples, mappings and dataclasses."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        if bool in inner and isinstance(value, bool):
            return value
        return convert(next(part for part in inner if part is not type(None)), value, where, finite)
    if is_dataclass(kind):
        return build(kind, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} must be a list, got {value!r}")
        return tuple(convert(inner[0], one, f"{where}[{number}]") for number, one in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a mapping, got {value!r}")
        return {str(key): convert(inner[1], one, f"{where}.{key}") for key, one in value.items()}
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, str):  # YAML takes 1e-5 for a text
        with suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isnan(value) or (finite and math.isinf(value)):
            raise UserError(f"{where} must be a finite number, got {value}")
        return value
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is Any:
        return value
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where} must be {KINDS.get(kind, kind.__name__)}, got {value!r}")
    return value
