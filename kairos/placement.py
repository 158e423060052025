"""Carries out a plan of `kairos.memory`: weights in eight bits, parts off the device, streamed or in tiles.

The hooks are those of diffusers and accelerate, the eight bits those of torchao.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from kairos.errors import UserError
from kairos.memory import STREAMED, WHOLE, Plan
from kairos.models.gated_delta_net import PRECISE
from kairos.pipeline import KairosPipeline

logger = logging.getLogger(__name__)


def place(pipeline: KairosPipeline, plan: Plan, device: torch.device) -> KairosPipeline:
    """Put the pipeline's parts, which lie in the machine's memory, where the plan says."""
    places = {part.name: part.place for part in plan.parts}
    if WHOLE in places.values():
        pipeline.enable_model_cpu_offload(device=device)
        return pipeline
    for name, where in places.items():
        module = getattr(pipeline, name)
        if where == STREAMED:
            stream(module, device, by_blocks=name == "transformer")
        else:
            module.to(device)
    return pipeline


def stream(module: nn.Module, device: torch.device, *, by_blocks: bool) -> None:
    """Have the module's blocks (or its single layers) on `device` only while they work."""
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
        low_cpu_mem_usage=on_gpu,
        **size,
    )


def quantize(pipeline: KairosPipeline, kind: str) -> None:
    """Weights of the large products in eight bits, in place: of the LinearDiT's blocks and of the encoder.

    kind: "int8" (a scale for each output channel) or "fp8" (e4m3, the same). They are widened again where
    they are used: activations stay as they are, and so do norms, gates, convolutions, modulation and the
    recurrence.

    Raises:
        UserError: where torchao is missing.
    """
    if kind not in ("int8", "fp8"):
        raise UserError(f"quantize must be int8 or fp8, got {kind!r}")
    # torchao remarks on kernels of other machines when it is imported.
    noisy = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [log.level for log in noisy]
    for log in noisy:
        log.setLevel(logging.ERROR)
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError("--quantize needs torchao; run: pip install 'kairos-world[quantize]'") from error
    finally:
        for log, level in zip(noisy, levels, strict=True):
            log.setLevel(level)
    how = Int8WeightOnlyConfig(version=2) if kind == "int8" else Float8WeightOnlyConfig()
    for block in pipeline.transformer.blocks:
        quantize_(block, how, filter_fn=is_large_product)
    if pipeline.text_encoder is not None:
        quantize_(pipeline.text_encoder, how, filter_fn=is_large_product)


def is_large_product(module: nn.Module, name: str) -> bool:
    """Whether a layer may lose bits: a linear one, but no gate of the delta rule."""
    return isinstance(module, nn.Linear) and name.split(".")[-1] not in (*PRECISE, "lm_head")
