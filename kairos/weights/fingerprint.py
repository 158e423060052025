"""A short name for weights: the same for the same model, another for another."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import nn

_SAMPLES = (
    64  # numbers taken from each tensor: any training changes some of them, and 4 B weights take a second
)


def fingerprint(modules: Mapping[str, nn.Module]) -> str:
    """16 hexadecimal digits that stand for the modules' weights and configurations.

    Of each tensor it reads the name, the shape and 64 numbers evenly spread, rounded to bfloat16: so it does
    not depend on the file's layout, the device, or whether a model was loaded in float32 or bfloat16. float16
    rounds to other numbers, and so to another name.
    """
    digest = hashlib.sha256()
    for name, module in sorted(modules.items()):
        config = getattr(module, "config", None)
        if isinstance(config, Mapping):  # diffusers' models; what starts with _ tells where they came from
            said = {key: value for key, value in config.items() if not key.startswith("_")}
            digest.update(json.dumps([name, said], sort_keys=True, default=str).encode())
        # What torch.compile wraps has a longer name and the same weights.
        tensors = {key.replace("_orig_mod.", ""): tensor for key, tensor in module.state_dict().items()}
        for key, tensor in sorted(tensors.items()):
            flat = tensor.detach().flatten()
            last, count = max(flat.numel() - 1, 0), min(_SAMPLES, flat.numel())
            index = torch.linspace(0, last, count, dtype=torch.float64, device="cpu")
            sample = flat[index.round().long().to(flat.device)].to("cpu", torch.bfloat16)
            digest.update(f"{name}.{key}{tuple(tensor.shape)}".encode())
            digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
