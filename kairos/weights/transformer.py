"""The LinearDiT from its released files: one safetensors or torch file, shards, or diffusers' folder.

Names are the model's own, so there is nothing to translate; sizes are read off the shapes. What shapes do not
tell (dilation, padding, which attention layers are dilated) comes from the caller: a preset, or the defaults.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kairos.data.files import whole_file, whole_files
from kairos.errors import UserError, one_line
from kairos.models.transformer import KairosTransformer3DModel
from kairos.weights.files import CONFIG, StoredTensor, fill, header_config, open_weights, written_config
from kairos.weights.lora import DOWN

logger = logging.getLogger(__name__)

RELEASED_PATTERN = "SSDG"
RELEASED_HEAD_DIM = 128
DIFFUSERS_NAME = "diffusion_pytorch_model"
DIFFUSERS_FILE = f"{DIFFUSERS_NAME}.safetensors"


def load_transformer_file(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    dtype: torch.dtype | None = None,
    otherwise: Mapping[str, Any] | None = None,
    **config: Any,
) -> KairosTransformer3DModel:
    """The LinearDiT of a released file, in evaluation mode on the CPU.

    Args:
        path: a file, the list of its shards, or a folder. `transformer_config` of it counts.
        dtype: of the weights; None keeps the stored one. What must be exact (`A_log`, `dt_bias`) is float32.
        otherwise: values where neither the shapes nor the weights' own configuration tell them.
        config: values that the shapes do not tell (`dilation`, `pad_dilated`, `causal`), or shall override.

    Raises:
        UserError: for files that cannot be read, and naming tensors that are missing, left over or misshapen.
    """
    single = Path(path) if isinstance(path, str | os.PathLike) else None
    if single and (single / "transformer").is_dir():
        single = path = single / "transformer"
    stored = open_weights(path)
    source = str(single or next(iter(stored.values())).file)
    known = {**(otherwise or {}), **transformer_config(single, stored), **config}
    with fitting(source):
        values = infer_transformer_config(stored, source=source, **known) | known
        model = empty_transformer(values, source)
    fill(model, stored, dtype=dtype, float32_parts=model._keep_in_fp32_modules, source=source)
    return model.eval()


def empty_transformer(config: Mapping[str, Any], source: str) -> KairosTransformer3DModel:
    """A LinearDiT without weights. UserError, with `source`, for a configuration that is none of one."""
    with fitting(source), torch.device("meta"):
        return KairosTransformer3DModel(**config)


@contextmanager
def fitting(source: str) -> Iterator[None]:
    """Say in one line that a configuration does not fit the model."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{source}: the configuration does not fit the model: {one_line(error)}") from error


def transformer_config(path: Path | None, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """What a LinearDiT's weights say of its configuration: in the config.json of diffusers' layout, or in the
    header of the one file that they are. Nothing where there is neither, or where it is another model's.

    The layout is told by a folder, or by the name of the files: shards, a variant and torch's have it too.

    Raises:
        UserError: for a config.json that cannot be read.
    """
    ours = KairosTransformer3DModel.__name__
    files = {tensor.file for tensor in stored.values()}
    first = next(iter(stored.values())).file
    if (path is not None and path.is_dir()) or first.name.startswith(DIFFUSERS_NAME):
        file = first.with_name("config.json")
        if file.exists():
            kind, values = written_config(file)
            if kind == ours:
                return values
            logger.warning("%s is of %s and not of the LinearDiT: left aside", file, kind or "no class")
    kind, values = header_config(first) if len(files) == 1 else (None, {})
    return values if kind == ours else {}


def config_text(config: Mapping[str, Any]) -> str:
    """A LinearDiT's configuration as diffusers writes it."""
    said = {name: value for name, value in config.items() if not name.startswith("_")}
    said["_class_name"] = KairosTransformer3DModel.__name__
    return json.dumps(said, indent=2, sort_keys=True) + "\n"


def infer_transformer_config(
    stored: Mapping[str, StoredTensor], *, source: str = "the file", **known: Any
) -> dict[str, Any]:
    """The configuration that the shapes of a LinearDiT's tensors tell, with help from the `known` values.

    Raises:
        UserError: where the tensors are not those of a LinearDiT, or do not follow the layer pattern.
    """
    needed = (
        "patch_embedding.weight",
        "head.head.weight",
        "text_embedding.0.weight",
        "time_embedding.0.weight",
        "blocks.0.ffn.0.weight",
    )
    if missing := [name for name in needed if name not in stored]:
        if any(name.endswith(DOWN) for name in stored):
            raise UserError(
                f"{source} is a LoRA, which is added to a LinearDiT: kairos generate --lora {source}, or for "
                f"other commands kairos train export MODEL OUTPUT --lora {source}"
            )
        shown = ", ".join(list(stored)[:3])
        raise UserError(f"{source} is no LinearDiT: it lacks {', '.join(missing)}; it has {shown}, ...")
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    hidden_size, in_channels, *patch = shapes["patch_embedding.weight"]
    blocks = sorted({int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))})
    delta = [block for block in blocks if f"blocks.{block}.gated_delta.A_log" in shapes]
    config: dict[str, Any] = {
        "in_channels": in_channels,
        "out_channels": shapes["head.head.weight"][0] // _product(patch),
        "patch_size": tuple(patch),
        "hidden_size": hidden_size,
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_layers": blocks[-1] + 1,
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "layer_pattern": known.get("layer_pattern", RELEASED_PATTERN),
    }
    _check_pattern(config["layer_pattern"], blocks, delta, source)
    if delta:
        layer = f"blocks.{delta[0]}.gated_delta"
        (heads,) = shapes[f"{layer}.A_log"]
        keys, values = (shapes.get(f"{layer}.{which}_proj.weight", (0,))[0] for which in "kv")
        config["num_attention_heads"] = heads
        if keys and values:  # where they are not there, the loading names them
            config["gated_delta_head_dim"] = keys // heads
            config["gated_delta_expand_v"] = max(values // keys, 1)
    else:
        config["num_attention_heads"] = max(hidden_size // RELEASED_HEAD_DIM, 1)
    return config


def save_folder(model: KairosTransformer3DModel, folder: str | os.PathLike[str]) -> None:
    """`save_original` in diffusers' layout, its configuration beside the weights."""
    with whole_files(folder) as made:
        save_original(model, made / DIFFUSERS_FILE)
        (made / "config.json").write_text(config_text(model.config), encoding="utf-8")


def save_original(model: KairosTransformer3DModel, path: str | os.PathLike[str]) -> None:
    """Write the weights to one safetensors file under the released names, whole or not at all.

    Raises:
        UserError: for a model with adapters, and where the file cannot be written.
        MachineError: where the disk is full.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if any(".base_layer." in name for name in tensors):  # PEFT's, beside lora_A and lora_B
        raise UserError(
            f"cannot write {path}: adapters have no released names; unload them first, with "
            "model.unload_lora(), and to keep what they do with model.fuse_lora() before that"
        )
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={"format": "pt", CONFIG: config_text(model.config)})


def _check_pattern(pattern: str, blocks: list[int], delta: list[int], source: str) -> None:
    expected = [block for block in blocks if pattern[block % len(pattern)] == "G"]
    if expected != delta:
        found = "".join("G" if block in delta else "S" for block in blocks)
        raise UserError(
            f"{source} has gated delta layers in blocks {delta or 'none'}, layer_pattern {pattern!r} has "
            f"them in {expected or 'none'}; pass layer_pattern with G where they are ({found!r}, or D for S)"
        )


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
