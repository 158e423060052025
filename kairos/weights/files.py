"""Weights as they lie in files: safetensors or torch's, one or many, read one tensor at a time.

The kind of a file is told by its first bytes, not by its name. Torch's files are read with
`weights_only=True`, so that they cannot run code.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kairos.errors import UserError, listed, one_line

WRAPPERS = ("state_dict", "model", "module")
"""Keys under which training programs keep the state dict in a larger dictionary."""

PREFIXES = ("pipe.dit.", "dit.", "model.", "module.", "_orig_mod.")
"""What wrappers put before every name."""

CONFIG = "config"
"""What a model's configuration is called in the header of a safetensors file of ours."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its shape, known from the header, and how to read it."""

    shape: tuple[int, ...]
    file: Path
    read: Callable[[], Tensor]


def open_weights(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> dict[str, StoredTensor]:
    """The tensors of a file, of several, of a folder of shards or of an index (`*.index.json`), by name.

    Prefixes that all names share (`model.`, `pipe.dit.`, ...) are taken off. Nothing but headers is read yet.

    Raises:
        UserError: for files that are missing, torn or no weights, and for a tensor that is there twice.
    """
    if isinstance(path, str | os.PathLike):
        files = _files_of(Path(path))
    else:
        files = [Path(file) for file in path]
        if not files:
            raise UserError("no weights: the list of files is empty")
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _open_file(file).items():
            if name in stored:
                raise UserError(
                    f"{name} is both in {stored[name].file} and in {file}; name the one file to load"
                )
            stored[name] = tensor
    if not stored:
        raise UserError(f"{files[0]} holds no tensors")
    return _without_prefixes(stored)


def fill(
    model: nn.Module,
    stored: Mapping[str, StoredTensor],
    *,
    dtype: torch.dtype | None = None,
    float32_parts: Collection[str] = (),
    source: str | os.PathLike[str] = "",
) -> None:
    """Put the stored tensors in the place of the model's, which may be on the meta device; all or nothing.

    Args:
        dtype: what floating tensors are converted to, one at a time; None keeps them as stored.
        float32_parts: parts of a dotted name, such as "A_log", whose tensors become float32 in any case.
        source: what the error calls the weights.

    Raises:
        UserError: naming the tensors that are missing, left over or of another shape.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = []
    if missing := [name for name in wanted if name not in stored]:
        problems.append(f"lacks {listed(missing)}")
    if extra := [name for name in stored if name not in wanted]:
        problems.append(f"has {listed(extra)} that the model has not")
    if wrong := [name for name, shape in wanted.items() if name in stored and stored[name].shape != shape]:
        misfits = [f"{name} {_sizes(stored[name].shape)} instead of {_sizes(wanted[name])}" for name in wrong]
        problems.append(f"has {listed(misfits)}")
    if problems:
        place = source or next(iter(stored.values())).file if stored else source
        raise UserError(f"{place} does not fit {type(model).__name__}: it {'; it '.join(problems)}")
    for name in wanted:
        tensor = stored[name].read()
        kind = tensor.dtype
        if tensor.is_floating_point():
            exact = not set(float32_parts).isdisjoint(name.split("."))
            kind = torch.float32 if exact else dtype or kind
        # Copied in any case. What is read lies in the file: one that is written over or cut short would take
        # the living model's weights with it. And it begins there anywhere, while products of tensors that
        # are not aligned differ in their last bit.
        _place(model, name, tensor.to(kind, copy=True))


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Give the model this tensor as it is; load_state_dict would walk through the whole model for each."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if (parameter := owner._parameters.get(leaf)) is not None:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
    else:
        owner._buffers[leaf] = tensor


def _files_of(path: Path) -> list[Path]:
    """The files of weights that a path means: itself, the shards of an index, or those in a folder."""
    if path.name.endswith(".index.json"):
        return _indexed(path)
    if not path.is_dir():
        return [path]
    if index := sorted(path.glob("*.safetensors.index.json")):
        return _indexed(index[0])
    for endings in ((".safetensors",), (".pt", ".pth", ".bin")):
        files = sorted(
            file for file in path.iterdir() if file.suffix in endings and not file.name.startswith(".")
        )
        if files:
            files = _without_variants(files)
            _check_complete(files)
            return files
    raise UserError(f"{path} holds no .safetensors, .pt or .pth file")


def _without_variants(files: list[Path]) -> list[Path]:
    """Without the variants of diffusers' layout (`.bf16`), where its plain files lie beside them."""
    layout = "diffusion_pytorch_model"
    plain = [file for file in files if not re.fullmatch(rf"{layout}\..+\.\w+", file.name)]
    return plain if any(file.name.startswith(layout) for file in plain) else files


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of shards; download it again") from error
    if not files:
        raise UserError(f"{index} names no shards; download it again")
    if missing := [file.name for file in files if not file.exists()]:
        raise UserError(f"{index} names {listed(missing)}, not there; download the model again")
    return files


def _check_complete(files: Iterable[Path]) -> None:
    """Shards called NAME-00002-of-00003 must all be there."""
    names = {file.name for file in files}
    for name in sorted(names):
        if match := re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.\w+)", name):
            start, number, middle, last, ending = match.groups()
            width = len(number)
            expected = [f"{start}{i:0{width}d}{middle}{last}{ending}" for i in range(1, int(last) + 1)]
            if missing := [shard for shard in expected if shard not in names]:
                raise UserError(
                    f"shards are missing beside {name}: {listed(missing)}; download the model again"
                )


def _open_file(file: Path) -> dict[str, StoredTensor]:
    try:
        with file.open("rb") as handle:
            head = handle.read(512)
    except FileNotFoundError:
        raise UserError(f"no such file of weights: {file}") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {(error.strerror or str(error)).lower()}") from error
    if not head:
        raise UserError(f"{file} is empty; download it again")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` or download the file"
        )
    if head.lstrip()[:1] == b"<":
        raise UserError(f"{file} is a web page, not weights; download it again")
    if (
        head.startswith((b"PK\x03\x04", b"\x80")) and head[8:9] != b"{"
    ):  # a zip or a pickle, no safetensors header
        return _open_torch(file)
    return _open_safetensors(file)


def _open_safetensors(file: Path) -> dict[str, StoredTensor]:
    try:
        handle = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not weights, or only a part of them: {one_line(error)}") from error

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: handle.get_tensor(name)

    return {
        name: StoredTensor(tuple(handle.get_slice(name).get_shape()), file, reader(name))
        for name in handle.keys()  # noqa: SIM118
    }


def _may_hold_tensors(content: Any) -> bool:
    """Whether it is a dictionary with tensors, or with such a dictionary, and no notes beside the weights."""
    return isinstance(content, dict) and any(isinstance(value, Tensor | dict) for value in content.values())


def _open_torch(file: Path) -> dict[str, StoredTensor]:
    content = _load_torch(file)
    while isinstance(content, dict) and (
        inner := next((content[key] for key in WRAPPERS if _may_hold_tensors(content.get(key))), None)
    ):
        content = inner
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not named tensors")

    def reader(tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor

    return {
        str(name): StoredTensor(tuple(tensor.shape), file, reader(tensor))
        for name, tensor in content.items()
        if isinstance(tensor, Tensor)
    }


def _load_torch(file: Path) -> Any:
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # files from before torch 1.6 cannot be mapped
                raise
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} is not weights: it is torn, or holds more than plain tensors") from error
    except MemoryError:
        raise
    except Exception as error:  # a torn pickle fails in any way there is
        raise UserError(f"{file} is not weights, or only a part of them: {one_line(error)}") from error


def _without_prefixes(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in stored):
            return _without_prefixes({name.removeprefix(prefix): tensor for name, tensor in stored.items()})
    return stored


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def written_config(file: Path) -> tuple[str | None, dict[str, Any]]:
    """A config.json in diffusers' layout: the class that it is of, if it says one, and its values.

    Raises:
        UserError: for a file that is not one.
    """
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a configuration in JSON; download it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a configuration: it holds a {type(config).__name__}, no names")
    return _class_and_values(config)


def header_config(file: Path) -> tuple[str | None, dict[str, Any]]:
    """The same of the header of a safetensors file; nothing where it says nothing, or another thing."""
    try:
        with safe_open(file, framework="pt") as opened:
            config = json.loads((opened.metadata() or {}).get(CONFIG, "{}"))
    except (OSError, ValueError, SafetensorError):
        config = {}
    return _class_and_values(config if isinstance(config, dict) else {})


def _class_and_values(config: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    return config.get("_class_name"), {key: value for key, value in config.items() if key[:1] != "_"}
