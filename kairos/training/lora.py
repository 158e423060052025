"""LoRA by PEFT: what is added to a model for training, and the file that comes of it.

The file has the names (`transformer.blocks.0.self_attn.q.lora_A.weight`) and the metadata that diffusers'
`load_lora_adapter` asks for, and `kairos generate --lora` reads.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save
from torch import Tensor

from kairos.errors import UserError, one_line
from kairos.training.stage import LoRA
from kairos.weights.lora import PREFIX

ADAPTER = "default"


def add_lora(model: Any, options: LoRA, seed: int = 0) -> None:
    """Freeze the model and add low-rank updates that begin as nothing. UserError for unknown targets.

    One of each update's two matrices begins as random numbers: those of the seed, in every process.
    """
    config = LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=list(options.targets))
    model.requires_grad_(False)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's alone: a GPU's is nobody's to change here
            model.add_adapter(config, adapter_name=ADAPTER)
    except ValueError as error:
        raise UserError(f"lora.targets {list(options.targets)} name no layer: {one_line(error)}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def lora_bytes(model: Any, weights: dict[str, Tensor]) -> bytes:
    """lora.safetensors of trained tensors. Alpha is multiplied in: not every reader asks for it."""
    config = model.peft_config[ADAPTER]
    scale = config.lora_alpha / config.r
    said = {"r": config.r, "lora_alpha": config.r, "target_modules": sorted(config.target_modules)}
    named = {
        PREFIX + name.replace(f".{ADAPTER}.", "."): (
            tensor * scale if "lora_B" in name else tensor
        ).contiguous()
        for name, tensor in weights.items()
    }
    metadata = json.dumps({PREFIX + name: value for name, value in said.items()})
    return save(named, metadata={"format": "pt", "lora_adapter_metadata": metadata})
