"""LoRA files into a model: their updates are added to the weights, so sampling costs nothing more."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from kairos.errors import UserError, one_line

FILE = "lora.safetensors"
PREFIX, DOWN, UP = "transformer.", ".lora_A.weight", ".lora_B.weight"
PEFT_PREFIX = "base_model.model."
OTHER_SCALES = ("alpha_pattern", "use_rslora", "use_dora")
"""What PEFT's metadata may say that makes more of a layer's scale than alpha / rank."""


def split_weight(text: str, what: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT -> the file and its weight, 1 where none is said.

    Raises:
        UserError: for a weight that is no number, of `what`.
    """
    name, colon, last = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        weight = float(last)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"{what} must be FILE or FILE:WEIGHT, a number, got {text!r}")
    return name, weight


def parse_lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:WEIGHT -> the file and its weight. A folder means its lora.safetensors.

    Raises:
        UserError: where there is no such file, and for a weight that is no number.
    """
    name, weight = split_weight(text, "--lora")
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
    updates: list[tuple[nn.Parameter, float, Any, Any]] = []
    for path, weight in loras:
        layers = dict(model.named_modules())
        tensors, alpha = read_lora(path)
        for name in sorted(name for name in tensors if name.endswith(DOWN)):
            layer = name.removesuffix(DOWN)
            target = getattr(layers.get(layer), "weight", None)
            down, up = tensors.pop(name), tensors.pop(layer + UP, None)
            if target is None or up is None:
                raise UserError(f"{path} does not fit this model: it has {name}, and the model no {layer}")
            rank = len(down) if down.ndim == 2 else 0
            if not rank or target.shape != (len(target), down.shape[1]) or up.shape != (len(target), rank):
                raise UserError(
                    f"{path} does not fit this model: {layer} is {tuple(target.shape)}, "
                    f"its update {tuple(up.shape)} by {tuple(down.shape)}"
                )
            own = tensors.pop(f"{layer}.alpha", None)
            if own is not None and own.numel() != 1:
                raise UserError(f"{path}: {layer}.alpha must be one number, got {tuple(own.shape)}")
            scale = float(own if own is not None else rank if alpha is None else alpha) / rank
            updates.append((target, weight * scale, up, down))
        if tensors:
            raise UserError(f"{path} holds more than a LoRA's products: {', '.join(sorted(tensors)[:3])}")
    for target, scale, up, down in updates:  # a product has the layer's full size: one at a time
        update = scale * up.float() @ down.float()
        target.data = (target.data.float() + update.to(target.device)).to(target.dtype)


def read_lora(path: Path) -> tuple[dict[str, Any], float | None]:
    """The tensors of a LoRA by name, and the alpha of all its layers, None where that is their rank.

    Diffusers' pipelines save both with the part's name before them.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a LoRA in safetensors: {one_line(error)}") from error
    if any(name.startswith(PEFT_PREFIX) for name in tensors):
        raise UserError(
            f"{path} has PEFT's own names ({PEFT_PREFIX}...); save it with model.save_lora_adapter"
        )
    if not any(name.endswith(DOWN) for name in tensors):
        raise UserError(f"{path} holds no LoRA: none of its tensors ends in {DOWN[1:]}")
    try:
        said = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        said = {name.removeprefix(PREFIX): value for name, value in said.items()}
        alpha = said.get("lora_alpha")
        alpha = None if alpha is None else float(alpha)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has lora_adapter_metadata that cannot be read: {one_line(error)}") from error
    if other := [name for name in OTHER_SCALES if said.get(name)]:
        raise UserError(f"{path} scales its layers by {', '.join(other)}; merge it with PEFT instead")
    return tensors, alpha
