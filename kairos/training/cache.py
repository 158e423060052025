"""Latents and prompt embeddings of the physics clips, computed once and kept in safetensors shards.

A shard is a function of (scenes, seed, its number, the two encoders): building can stop, go on, and run beside a
training that reads the shards already there.
"""

from __future__ import annotations

import hashlib
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
from kairos.training.vae import use_one_pass_norm
from kairos.worlds import simulate

logger = logging.getLogger(__name__)

SHARD_CLIPS = 240
PROMPT_TOKENS = 40
"""Captions of the grammar are shorter; embeddings are padded to this length."""


@dataclass
class Cache:
    """Clips in memory: latents (N, 16, F, h, w), embeddings (N, T, C) and their mask (N, T), and the empty prompt."""

    latents: Tensor
    prompt_embeds: Tensor
    prompt_mask: Tensor
    empty_embeds: Tensor
    empty_mask: Tensor

    def __len__(self) -> int:
        return len(self.latents)


def fingerprint(*folders: Path) -> str:
    """A short hash of the weights in `folders`: shards of other encoders are refused."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("config.json")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def build_cache(
    output: Path,
    *,
    vae_path: Path,
    conditioner_path: Path,
    scenes: tuple[str, ...],
    shards: range,
    num_frames: int = 33,
    size: int = 64,
    seed: int = 0,
    batch_size: int = 8,
) -> None:
    """Write the shards that `output` does not hold yet, the scenes taking turns, `SHARD_CLIPS` clips in each."""
    vae = AutoencoderKLWan.from_pretrained(vae_path).to(torch.bfloat16).eval()
    use_one_pass_norm(vae)
    text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        conditioner_path / "text_encoder", dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(conditioner_path / "tokenizer")
    encoders = fingerprint(vae_path, conditioner_path / "text_encoder")
    output.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        file = output / f"{shard:05d}.safetensors"
        if file.exists():
            continue
        latents, captions = [], []
        for first in range(0, SHARD_CLIPS, batch_size):
            clips = [
                simulate(
                    scenes[(shard * SHARD_CLIPS + first + slot) % len(scenes)],
                    split="train",
                    seed=seed,
                    index=shard * SHARD_CLIPS + first + slot,
                    num_frames=num_frames,
                    size=size,
                )
                for slot in range(batch_size)
            ]
            frames = torch.stack([torch.from_numpy(clip.frames) for clip in clips])
            video = frames.permute(0, 4, 1, 2, 3).to(torch.bfloat16) / 127.5 - 1
            latents.append(encode(vae, video).to(torch.bfloat16))
            captions += [clip.caption for clip in clips]
        embeds, mask = encode_prompts(text_encoder, tokenizer, [*captions, ""], template=TEMPLATES["tiny"])
        if embeds.shape[1] > PROMPT_TOKENS:
            raise UserError(f"a caption has {embeds.shape[1]} tokens; the cache holds {PROMPT_TOKENS}")
        padding = PROMPT_TOKENS - embeds.shape[1]
        embeds = torch.nn.functional.pad(embeds, (0, 0, 0, padding)).to(torch.bfloat16)
        mask = torch.nn.functional.pad(mask, (0, padding))
        tensors = {
            "latents": torch.cat(latents),
            "prompt_embeds": embeds[:-1].contiguous(),
            "prompt_mask": mask[:-1].contiguous(),
            "empty_embeds": embeds[-1:].clone(),
            "empty_mask": mask[-1:].clone(),
        }
        partial = file.with_suffix(".partial")
        save_file(tensors, partial, metadata={"encoders": encoders})
        os.replace(partial, file)
        logger.info("wrote %s", file.name)


def load_cache(folder: Path, encoders: str) -> Cache:
    """All shards of `folder`, which must come from the encoders with that fingerprint."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"no latents in {folder}; build the cache first")
    shards = []
    for file in files:
        with safe_open(file, framework="pt") as shard:
            if shard.metadata()["encoders"] != encoders:
                raise UserError(f"{file} was made by other encoders than {encoders}; delete the folder and build it again")
            shards.append({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    together = {name: torch.cat([shard[name] for shard in shards]) for name in ("latents", "prompt_embeds", "prompt_mask")}
    return Cache(**together, empty_embeds=shards[0]["empty_embeds"], empty_mask=shards[0]["empty_mask"])
