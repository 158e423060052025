"""LoRA files into a model: their updates are added to the weights, so sampling costs nothing more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from kairos.errors import UserError, one_line

FILE = "lora.safetensors"


def parse_lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:WEIGHT -> the file and its weight, 1 where none is said.

    A folder means its lora.safetensors.

    Raises:
        UserError: where there is no such file, and for a weight that is no number.
    """
    name, colon, last = text.rpartition(":")
    weight = 1.0
    if colon and not Path(text).exists():
        try:
            weight = float(last)
        except ValueError:
            raise UserError(f"--lora must be FILE or FILE:WEIGHT, a number, got {text!r}") from None
    else:
        name = text
    path = Path(name)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no LoRA at {path}")
    return path, weight


def apply_loras(model: Any, loras: Sequence[tuple[Path, float]]) -> None:
    """Add weight * alpha / rank * B A of every file to the model's weights, in place; all or none.

    Raises:
        UserError: for a file that is no LoRA, or one of another model.
    """
    updates: list[tuple[nn.Parameter, Any]] = []
    for path, weight in loras:
        layers = dict(model.named_modules())
        tensors, scale = read_lora(path)
        for name in sorted(tensors):
            if not name.endswith("lora_A.weight"):
                continue
            layer = name.removesuffix(".lora_A.weight")
            target = getattr(layers.get(layer), "weight", None)
            down, up = tensors[name], tensors.get(f"{layer}.lora_B.weight")
            if target is None or up is None:
                raise UserError(f"{path} does not fit this model: it has {name}, and the model no {layer}")
            update = weight * scale * up.float() @ down.float()
            if update.shape != target.shape:
                raise UserError(
                    f"{path} does not fit this model: {layer} is {tuple(target.shape)}, "
                    f"its update {tuple(update.shape)}"
                )
            updates.append((target, update))
    for target, update in updates:
        target.data = (target.data.float() + update.to(target.device)).to(target.dtype)


def read_lora(path: Path) -> tuple[dict[str, Any], float]:
    """The tensors of a LoRA by name, and alpha / rank."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name.removeprefix("transformer."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a LoRA in safetensors: {one_line(error)}") from error
    downs = [tensor for name, tensor in tensors.items() if name.endswith("lora_A.weight")]
    if not downs:
        raise UserError(f"{path} holds no LoRA: none of its tensors ends in lora_A.weight")
    said = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    rank = downs[0].shape[0]
    return tensors, float(said.get("lora_alpha", rank)) / rank
