"""Several checkpoints of one model into one: average, TIES, DARE, one tensor at a time.

Inputs are mapped and the output is written as a stream, so memory holds a few tensors and never a model.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kairos.data.files import prepare_file, whole_file
from kairos.errors import UserError
from kairos.request import did_you_mean
from kairos.weights.files import CONFIG, StoredTensor, open_weights
from kairos.weights.transformer import config_text, transformer_config

METHODS = ("average", "ties", "dare")
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


def merge_files(
    models: Sequence[tuple[str, float]],
    output: Path,
    *,
    method: str = "average",
    base: str | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> None:
    """Merge `models`, (path, weight) each, and write `output` in safetensors, whole or not at all, with the
    configuration of the first.

    Args:
        method: "average", weighted, of the weights; "ties" (arXiv 2306.01708) and "dare" (arXiv 2311.03099),
            of the differences from `base`, weighted.
        density: the share of the differences that ties (the largest) and dare (any) keep.
        seed: of dare's choice.

    Raises:
        UserError: for methods that are not known, a missing base, models of different names or shapes.
    """
    if method not in METHODS:
        raise UserError(f"no method {method!r}{did_you_mean(method, METHODS)}")
    if not 0 < density <= 1:
        raise UserError(f"density must be above 0 and at most 1, got {density}")
    if method != "average" and base is None:
        raise UserError(f"{method} needs --base, the model that the others were trained from")
    for path, weight in models:
        if not math.isfinite(weight):
            raise UserError(f"the weight of a model must be a finite number, got {path}:{weight}")
    if method == "average" and abs(sum(weight for _, weight in models)) < 1e-9:
        raise UserError("the weights of an average must not add up to 0")
    prepare_file(output)
    opened = [open_weights(path) for path, _ in models]
    reference = open_weights(base) if base is not None else opened[0]
    if any("lora_" in name for name in reference):
        raise UserError(
            f"{base or models[0][0]} is a LoRA, products of two matrices, which cannot be merged one by one; "
            "add several to a model: kairos train export MODEL OUTPUT --lora A:0.5 --lora B:0.5"
        )
    for (path, _), stored in zip(models, opened, strict=True):
        check_alike(reference, stored, path)
    weights = [weight for _, weight in models]

    def merged(name: str) -> Tensor:
        parts = [stored[name].read() for stored in opened]
        if not parts[0].is_floating_point():
            return parts[0]
        if method == "average":
            total = sum(weight * part.float() for weight, part in zip(weights, parts, strict=True))
            return (total / sum(weights)).to(parts[0].dtype)  # type: ignore[union-attr]
        start = reference[name].read().float()
        differences = torch.stack(
            [weight * (part.float() - start) for weight, part in zip(weights, parts, strict=True)]
        )
        if method == "ties":
            change = ties(differences, density)
        else:
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            change = dare(differences, density, generator)
        return (start + change).to(parts[0].dtype)

    config = transformer_config(Path(models[0][0]), opened[0])
    metadata = {CONFIG: config_text(config)} if config else {}
    write_stream(output, [(name, opened[0][name], merged) for name in sorted(opened[0])], metadata)


def ties(differences: Tensor, density: float) -> Tensor:
    """Trim each difference to its largest `density`, elect a sign by mass, average those that agree.

    (models, ...) -> (...)
    """
    if not differences.numel():
        return differences.sum(0)
    flat = differences.reshape(len(differences), -1)
    kept = max(1, round(density * flat.shape[1]))
    threshold = flat.abs().kthvalue(flat.shape[1] - kept + 1, dim=1, keepdim=True).values
    trimmed = torch.where(flat.abs() >= threshold, flat, 0)
    sign = trimmed.sum(0).sign()
    agree = (trimmed.sign() == sign) & (sign != 0)
    total = torch.where(agree, trimmed, 0).sum(0)
    return (total / agree.sum(0).clamp(min=1)).view(differences.shape[1:])


def dare(differences: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each number with probability `density`, enlarged by 1 / density, and add up.

    (models, ...) -> (...)
    """
    keep = torch.rand(differences.shape, generator=generator) < density
    return (differences * keep / density).sum(0)


def check_alike(reference: dict[str, StoredTensor], stored: dict[str, StoredTensor], path: str) -> None:
    """Refuse a model with other tensors than the first one's."""
    for name in reference:
        if name not in stored:
            raise UserError(f"{path} is of another model than the others: it lacks {name}")
        if stored[name].shape != reference[name].shape:
            raise UserError(
                f"{path} is of another model than the others: {name} is {stored[name].shape}, "
                f"not {reference[name].shape}"
            )
    if extra := [name for name in stored if name not in reference]:
        raise UserError(f"{path} is of another model than the others: it has {extra[0]} besides")


def write_stream(
    output: Path, tensors: Sequence[tuple[str, StoredTensor, object]], metadata: dict[str, str]
) -> None:
    """A safetensors file, one tensor after the other: the header needs shapes and types alone."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, stored, _ in tensors:
        dtype = stored.read().dtype
        if dtype not in DTYPES:
            raise UserError(
                f"{name} in {stored.file} is {str(dtype).removeprefix('torch.')}, and a merge takes "
                f"{', '.join(str(known).removeprefix('torch.') for known in DTYPES)}; convert it first"
            )
        size = torch.Size(stored.shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(stored.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with whole_file(output) as partial, partial.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for data in streamed(tensors):
            file.write(data)


def streamed(tensors: Sequence[tuple[str, StoredTensor, object]]) -> Iterator[bytes]:
    for name, _, make in tensors:
        tensor: Tensor = make(name).contiguous()  # type: ignore[operator]
        yield tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
