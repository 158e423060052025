"""torch.compile of the LinearDiT's repeated block: once for each kind of block, for every length."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from diffusers import AutoencoderKLWan

from kairos.errors import MachineError
from kairos.models.transformer import KairosTransformer3DModel
from kairos.models.vae_layers import channels_last


def compile_blocks(transformer: KairosTransformer3DModel, backend: str = "inductor") -> None:
    """Compile the blocks in place, with dynamic shapes; it happens at the first call.

    Norm, modulation and gate become one pass over memory. Windowed attention and the gated delta rule stay as
    they are: their kernels are chosen by shape, and their loops follow the length.

    Raises:
        MachineError: where the compiler's own compiler is missing.
    """
    if backend == "inductor":
        check_compiler(transformer.device.type)
    # One program for each kind of block, with and without a past, for one frame and for more.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    transformer.compile_repeated_blocks(dynamic=True, backend=backend)


def compile_decoder(vae: AutoencoderKLWan) -> None:
    """Compile the VAE's decoder in place, with channels last as a GPU's convolutions want them.

    Compiling was not tried on a GPU. On a CPU oneDNN's convolutions are as quick as they are.
    """
    channels_last(vae).decoder.compile()


def check_compiler(device: str) -> None:
    """Refuse where nothing here can compile for the device."""
    if device == "cuda":
        if find_spec("triton") is None:
            raise MachineError("--compile needs triton on a GPU, and it is not installed; leave it out")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        raise MachineError(
            "--compile needs a C++ compiler such as g++, and none was found; leave it out"
        ) from error
