"""The WAN2.1 VAE from its original file, Wan2.1_VAE.pth, or from diffusers' folder.

The original keeps the blocks of all levels in one sequence; diffusers names them by level.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from kairos.errors import UserError, one_line
from kairos.weights.files import StoredTensor, fill, open_weights, written_config

ORIGINAL_FILE = "Wan2.1_VAE.pth"

_RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
_RESIDUAL |= {"shortcut": "conv_shortcut"}
_TOP = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_ENDS = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
_MIDDLE = {
    "middle.0": "mid_block.resnets.0",
    "middle.1": "mid_block.attentions.0",
    "middle.2": "mid_block.resnets.1",
}


def load_vae_file(path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> AutoencoderKLWan:
    """The VAE of Wan2.1_VAE.pth (or the same tensors in safetensors), or of a folder in diffusers' layout.

    The width and depth of an original file are read off its shapes, so that smaller ones load as well.

    Args:
        path: the file, a folder with config.json, or a folder that holds `vae/` or Wan2.1_VAE.pth.
        dtype: of the weights; None keeps the stored one.

    Raises:
        UserError: for files that cannot be read, and naming tensors that are missing, left over or misshapen.
    """
    path = Path(path)
    if (path / "vae" / "config.json").exists():
        path = path / "vae"
    if (path / "config.json").exists():
        kind, config = written_config(path / "config.json")
        if kind not in (None, "AutoencoderKLWan"):
            raise UserError(
                f"{path / 'config.json'} is of {kind}, not of AutoencoderKLWan; name another folder"
            )
        stored = open_weights(path)
    else:
        original = path / ORIGINAL_FILE if (path / ORIGINAL_FILE).exists() else path
        stored = open_weights(original)
        config = infer_vae_config(stored, source=str(original))
        names = {name: diffusers_name(name, config["num_res_blocks"]) for name in stored}
        stored = {names[name]: tensor for name, tensor in stored.items()}
    try:
        with torch.device("meta"):
            vae = AutoencoderKLWan.from_config(config)
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path}: the configuration fits no WAN2.1 VAE: {one_line(error)}") from error
    fill(vae, stored, dtype=dtype, source=str(path))
    return vae.eval()


def infer_vae_config(stored: Mapping[str, StoredTensor], *, source: str = "the file") -> dict[str, Any]:
    """The configuration of a WAN2.1 VAE under its original names, from the shapes of its encoder.

    Raises:
        UserError: where the tensors are not those of a WAN2.1 VAE.
    """
    needed = (
        "conv2.weight",
        "encoder.conv1.weight",
        "decoder.conv1.weight",
        "encoder.downsamples.0.residual.6.weight",
    )
    if missing := [name for name in needed if name not in stored]:
        shown = ", ".join(list(stored)[:3])
        raise UserError(f"{source} is no WAN2.1 VAE: it lacks {', '.join(missing)}; it has {shown}, ...")
    base_dim = stored["encoder.conv1.weight"].shape[0]
    widths: list[list[int]] = [[]]
    temporal: list[bool] = []
    number = 0
    while True:
        part = f"encoder.downsamples.{number}"
        if f"{part}.residual.6.weight" in stored:
            widths[-1].append(stored[f"{part}.residual.6.weight"].shape[0])
        elif f"{part}.resample.1.weight" in stored:
            temporal.append(f"{part}.time_conv.weight" in stored)
            widths.append([])
        else:
            break
        number += 1
    if not widths[-1] or len({len(level) for level in widths}) != 1:
        raise UserError(
            f"{source} is no WAN2.1 VAE: its levels have {[len(level) for level in widths]} blocks"
        )
    return {
        "base_dim": base_dim,
        "z_dim": stored["conv2.weight"].shape[0],
        "dim_mult": [level[-1] // base_dim for level in widths],
        "num_res_blocks": len(widths[0]),
        "temperal_downsample": temporal,
    }


def diffusers_name(name: str, num_res_blocks: int) -> str:
    """The name in diffusers' AutoencoderKLWan of an original tensor; what is not known keeps its name."""
    side, _, rest = name.partition(".")
    if side in _TOP:
        return f"{_TOP[side]}.{rest}"
    rest = _replaced_start(rest, _ENDS | _MIDDLE)
    if match := re.fullmatch(r"downsamples\.(\d+)\.(.+)", rest):
        rest = f"down_blocks.{match[1]}.{match[2]}"
    elif match := re.fullmatch(r"upsamples\.(\d+)\.(.+)", rest):
        # A level of the decoder has one block more than one of the encoder, and then its resampling.
        level, place = divmod(int(match[1]), num_res_blocks + 2)
        block = "upsamplers.0" if place == num_res_blocks + 1 else f"resnets.{place}"
        rest = f"up_blocks.{level}.{block}.{match[2]}"
    for old, new in _RESIDUAL.items():
        rest = rest.replace(f".{old}.", f".{new}.")
    return f"{side}.{rest}"


def _replaced_start(name: str, starts: Mapping[str, str]) -> str:
    for old, new in starts.items():
        if name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name
