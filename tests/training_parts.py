"""A small model and a few clips for it, shared by the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kairos import KairosTransformer3DModel
from kairos.training.cache import ClipSet, ShardWriter, stored_rows
from kairos.training.clips import Bucket
from kairos.training.stage import Stage

MIX = {"t2v": 0.45, "ti2v": 0.24, "continuation": 0.16, "rollout": 0.15}
BUCKET = Bucket(17, 32, 32)


def small_model(**config: Any) -> KairosTransformer3DModel:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "ffn_dim": 64,
        "num_layers": 4,
        "gated_delta_head_dim": 8,
        "text_dim": 12,
        "freq_dim": 16,
        "pad_dilated": False,
        "causal": "chunk",
    }
    return KairosTransformer3DModel(**(sizes | config))


def stirred(seed: int = 0, **config: Any) -> KairosTransformer3DModel:
    """A model whose branches all do something."""
    model = small_model(**config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def clip_set(folder: Path, count: int = 4, bucket: Bucket = BUCKET) -> ClipSet:
    """Clips of noise: latents (16, 5, 4, 4) for the bucket of 17 x 32 x 32, prompts of 2 to 5 tokens."""
    generator = torch.Generator().manual_seed(0)
    frames, height, width = (bucket.frames - 1) // 4 + 1, bucket.height // 8, bucket.width // 8
    latents = ShardWriter(folder / bucket.name, "latents", {"vae": "v"})
    prompts = ShardWriter(folder / "prompts", "embeds", {"text": "t"})
    keys = [f"clip-{number}" for number in range(count)]
    for number, key in enumerate(keys):
        shape = (1, 16, frames, height, width)
        latents.add(key, torch.randn(shape, generator=generator).bfloat16())
        prompts.add(f"caption {number}", torch.randn(2 + number % 4, 12, generator=generator).bfloat16())
    prompts.add("", torch.zeros(1, 12).bfloat16())
    latents.close()
    prompts.close()
    rows = stored_rows(folder / bucket.name, "vae", "v")
    embeds = stored_rows(folder / "prompts", "text", "t")
    return ClipSet(bucket, [rows[key] for key in keys], [f"caption {i}" for i in range(count)], embeds, keys)


def small_stage(**changes: Any) -> Stage:
    values: dict[str, Any] = {
        "name": "small",
        "steps": 8,
        "decay_steps": 4,
        "batch_size": 4,
        "warmup_steps": 2,
        "mix": MIX,
        "muon_lr": 0.01,
        "buckets": (BUCKET,),
        "text_dropout": 0.15,
    }
    return Stage(**(values | changes))
