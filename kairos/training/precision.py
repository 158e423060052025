"""In what precision a device multiplies quickly."""

from __future__ import annotations

import torch

from kairos.models.vae_layers import computed_in


def has_bfloat16(device: str) -> bool:
    """Whether a device of this type ("cuda", "cpu") has products in bfloat16: GPUs, and CPUs from AVX-512 on.

    Without them torch multiplies number by number: 2 GFLOP/s on two cores of an EPYC with AVX2, where float32
    has over 100.
    """
    return device != "cpu" or computed_in(torch.bfloat16) == torch.bfloat16
