"""Latents of the physics clips, computed once and kept in safetensors shards; prompts are embedded when
they are read.

A shard is a function of (scenes, seed, its number, the VAE): building can stop, go on, and run beside a
training that reads the shards already there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from kairos.conditioning import TEMPLATES, encode_prompts
from kairos.errors import UserError
from kairos.models.vae import encode
from kairos.models.vae_layers import quicken
from kairos.worlds import simulate

logger = logging.getLogger(__name__)

SHARD_CLIPS = 240


@dataclass
class Cache:
    """Clips in memory: latents (N, 16, F, h, w), embeddings (N, T, C) with their mask (N, T), and the empty
    prompt's."""

    latents: Tensor
    prompt_embeds: Tensor
    prompt_mask: Tensor
    empty_embeds: Tensor
    empty_mask: Tensor

    def __len__(self) -> int:
        return len(self.latents)


def fingerprint(folder: Path) -> str:
    """A short hash of the model in `folder`: latents of another VAE are refused."""
    digest = hashlib.sha256()
    for file in [*sorted(folder.glob("*.safetensors")), folder / "config.json"]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def build_cache(
    output: Path,
    *,
    vae_path: Path,
    scenes: tuple[str, ...],
    shards: range,
    num_frames: int = 33,
    size: int = 64,
    seed: int = 0,
    batch_size: int = 8,
) -> None:
    """Write the shards that `output` does not hold yet, the scenes taking turns, `SHARD_CLIPS` clips in
    each."""
    vae = AutoencoderKLWan.from_pretrained(vae_path).to(torch.bfloat16).eval()
    quicken(vae)
    encoder = fingerprint(vae_path)
    output.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        file = output / f"{shard:05d}.safetensors"
        if file.exists():
            continue
        latents, captions = [], []
        for first in range(shard * SHARD_CLIPS, (shard + 1) * SHARD_CLIPS, batch_size):
            clips = [
                simulate(
                    scenes[index % len(scenes)],
                    split="train",
                    seed=seed,
                    index=index,
                    num_frames=num_frames,
                    size=size,
                )
                for index in range(first, first + batch_size)
            ]
            frames = torch.stack([torch.from_numpy(clip.frames) for clip in clips])
            video = frames.permute(0, 4, 1, 2, 3).to(torch.bfloat16) / 127.5 - 1
            latents.append(encode(vae, video).to(torch.bfloat16))
            captions += [clip.caption for clip in clips]
        partial = file.with_suffix(".partial")
        metadata = {"vae": encoder, "captions": json.dumps(captions)}
        save_file({"latents": torch.cat(latents)}, partial, metadata=metadata)
        os.replace(partial, file)
        logger.info("wrote %s", file.name)


@torch.no_grad()
def load_cache(folder: Path, *, vae_path: Path, conditioner_path: Path) -> Cache:
    """All shards of `folder`, which must come from the VAE at `vae_path`, their prompts embedded."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"no latents in {folder}; build the cache first")
    encoder = fingerprint(vae_path)
    latents, captions = [], []
    for file in files:
        with safe_open(file, framework="pt") as shard:
            metadata = shard.metadata()
            if metadata["vae"] != encoder:
                raise UserError(
                    f"{file} was made by another VAE than {vae_path}; delete the folder and build it again"
                )
            latents.append(shard.get_tensor("latents"))
            captions += json.loads(metadata["captions"])
    text_encoder = (
        Qwen2_5_VLForConditionalGeneration.from_pretrained(conditioner_path / "text_encoder").float().eval()
    )
    tokenizer = AutoTokenizer.from_pretrained(conditioner_path / "tokenizer")
    # Longest first in one list of distinct captions: batches of equal length waste no padding.
    distinct = sorted(set(captions), key=len)
    place = {caption: number for number, caption in enumerate(distinct)}
    parts = [
        encode_prompts(text_encoder, tokenizer, distinct[i : i + 256], template=TEMPLATES["tiny"])
        for i in range(0, len(distinct), 256)
    ]
    longest = max(embeds.shape[1] for embeds, _ in parts)
    embeds = torch.cat([pad_tokens(embeds.to(torch.bfloat16), longest) for embeds, _ in parts])
    mask = torch.cat([pad_tokens(mask, longest) for _, mask in parts])
    empty_embeds, empty_mask = encode_prompts(text_encoder, tokenizer, [""], template=TEMPLATES["tiny"])
    order = torch.tensor([place[caption] for caption in captions])
    return Cache(
        latents=torch.cat(latents),
        prompt_embeds=embeds[order],
        prompt_mask=mask[order],
        empty_embeds=pad_tokens(empty_embeds.to(torch.bfloat16), longest),
        empty_mask=pad_tokens(empty_mask, longest),
    )


def pad_tokens(tensor: Tensor, length: int) -> Tensor:
    """(N, T, ...) padded with zeros to (N, length, ...)."""
    missing = length - tensor.shape[1]
    return torch.cat([tensor, tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], 1)
