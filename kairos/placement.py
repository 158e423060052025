"""Carries out a plan of `kairos.memory`: weights in fewer bits, parts off the device, streamed or in tiles.

The hooks are those of diffusers and accelerate, eight bits those of torchao, four those of bitsandbytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kairos.errors import UserError
from kairos.memory import QUANTIZED, STREAMED, WHOLE, Plan
from kairos.models.gated_delta_net import PRECISE
from kairos.pipeline import KairosPipeline

logger = logging.getLogger(__name__)

FOUR_BIT_BLOCK = 64
"""Weights that share a scale in nf4."""


def place(pipeline: KairosPipeline, plan: Plan, device: torch.device) -> KairosPipeline:
    """Put the pipeline's parts, which lie in the machine's memory, where the plan says."""
    places = {part.name: part.place for part in plan.parts}
    if WHOLE in places.values():
        pipeline.enable_model_cpu_offload(device=device)
        return pipeline
    for name, where in places.items():
        module = getattr(pipeline, name)
        if where == STREAMED:
            # Of the encoder the model inside, which is what works: its head makes words.
            working = module.model if name == "text_encoder" else module
            stream(working, device, by_blocks=name == "transformer")
        else:
            module.to(device)
    return pipeline


def stream(module: nn.Module, device: torch.device, *, by_blocks: bool) -> None:
    """Have the module's blocks (or its single layers) on `device` only while they work.

    Blocks work in every step and are pinned once: pinned anew for each copy, they would hold up the others.
    What works once for a prompt is not: pinned memory comes in powers of two, twice what the encoder takes.
    """
    from diffusers.hooks import apply_group_offloading

    on_gpu = device.type == "cuda"
    size: dict[str, Any] = {"num_blocks_per_group": 1} if by_blocks else {}
    apply_group_offloading(
        module,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level" if by_blocks else "leaf_level",
        use_stream=on_gpu,
        non_blocking=on_gpu,
        low_cpu_mem_usage=not by_blocks,
        **size,
    )


def quantize(pipeline: KairosPipeline, kind: str) -> None:
    """Fewer bits for the weights of the large products, in place: of the LinearDiT's blocks, of the encoder.

    kind: one of `kairos.memory.QUANTIZED`. int8 and fp8 (e4m3) have a scale for each output channel, int4 is
    nf4 for the encoder alone, beside int8 blocks. Weights are widened again where they are used: activations
    stay as they are, and so do norms, gates, convolutions, modulation and the recurrence.

    Raises:
        UserError: where torchao or, for int4, bitsandbytes is missing.
    """
    if kind not in QUANTIZED:
        raise UserError(f"quantize must be one of {', '.join(QUANTIZED)}, got {kind!r}")
    bits = QUANTIZED[kind]
    for block in pipeline.transformer.blocks:
        in_eight_bits(block, bits["transformer"])
    if pipeline.text_encoder is None:
        return
    if bits["text_encoder"] == "int4":
        in_four_bits(pipeline.text_encoder)
    else:
        in_eight_bits(pipeline.text_encoder, bits["text_encoder"])


def in_eight_bits(module: nn.Module, kind: str) -> None:
    """The module's large products in "int8" or "fp8", in place, by torchao."""
    # torchao remarks on kernels of other machines when it is imported.
    with quiet("torchao", "torch.utils._pytree"):
        try:
            from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
        except ImportError as error:
            raise UserError("--quantize needs torchao; run: pip install 'kairos-world[quantize]'") from error
    how = Int8WeightOnlyConfig(version=2) if kind == "int8" else Float8WeightOnlyConfig()
    quantize_(module, how, filter_fn=is_large_product)


def in_four_bits(module: nn.Module) -> None:
    """The module's large products in nf4, in place, by bitsandbytes (QLoRA, arXiv 2305.14314)."""
    with quiet("bitsandbytes"):
        try:
            from bitsandbytes.nn import Linear4bit, Params4bit
        except ImportError as error:
            raise UserError(
                "--quantize int4 needs bitsandbytes; run: pip install 'kairos-world[quantize]'"
            ) from error
    for name, layer in list(module.named_modules()):
        # Rows that are no whole number of blocks lose twice as much on a CPU.
        if not is_large_product(layer, name) or layer.in_features % FOUR_BIT_BLOCK:
            continue
        small = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        small.weight = Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4")
        small.bias = layer.bias
        module.set_submodule(name, small.to(layer.weight.device))  # this is where the bits go


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Errors alone from these loggers."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def is_large_product(module: nn.Module, name: str) -> bool:
    """Whether a layer may lose bits: a linear one, but no gate of the delta rule."""
    return isinstance(module, nn.Linear) and name.split(".")[-1] not in (*PRECISE, "lm_head")
