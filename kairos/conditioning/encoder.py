"""Prompts, and images with them, through Qwen2.5-VL: its last hidden states, less those of the template."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from PIL import Image
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from kairos.conditioning.cache import EmbeddingCache
from kairos.conditioning.loading import explained
from kairos.conditioning.templates import PromptTemplate
from kairos.errors import UserError, listed

logger = logging.getLogger(__name__)

IMAGE_PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}
"""An image in the prompt is scaled to an area in this range (transformers calls the areas edges)."""

CACHE = EmbeddingCache()


@torch.no_grad()
def encode_prompts(
    text_encoder: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    template: PromptTemplate,
    processor: Any = None,
    images: Sequence[Image.Image | None] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Embed prompts. One that was embedded lately comes from a cache.

    Args:
        prompts: B texts. One that is too long for the template loses its end, with a warning.
        processor: turns images into patches: a Qwen2-VL image processor, or a processor that has one.
        images: one for each prompt, or None where a prompt has none.
        device, dtype: of the result; the encoder is moved to `device` where it has work. None: the encoder's.

    Returns:
        The embeddings (B, T, C), padded on the right with zeros, and their mask (B, T), true for real tokens.

    Raises:
        UserError: where images are given and no processor, or they do not belong together.
    """
    images = [None] * len(prompts) if images is None else images
    if not prompts or len(images) != len(prompts):
        raise UserError(
            f"give at least one prompt, and an image for each, got {len(prompts)} and {len(images)}"
        )
    layout = _Layout(text_encoder, tokenizer, template, processor)
    chats = [layout.chat(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
    known: dict[Hashable, Tensor] = {}
    missing: dict[Hashable, _Chat] = {}
    for chat in chats:
        if (embedding := CACHE.get(text_encoder, chat.key)) is not None:
            known[chat.key] = embedding
        else:
            missing[chat.key] = chat
    if missing:
        encoded = _encode(text_encoder, list(missing.values()), tokenizer.pad_token_id or 0, device)
        for key, states in zip(missing, encoded, strict=True):
            known[key] = states[layout.dropped :]
            CACHE.put(text_encoder, key, known[key])
    embeddings = [known[chat.key] for chat in chats]
    longest = max(len(embedding) for embedding in embeddings)
    shape = (len(prompts), longest, embeddings[0].shape[-1])
    embeds = torch.zeros(shape, device=device or text_encoder.device, dtype=dtype or text_encoder.dtype)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool, device=embeds.device)
    for row, embedding in enumerate(embeddings):
        embeds[row, : len(embedding)] = embedding.to(embeds)
        mask[row, : len(embedding)] = True
    return embeds, mask


def load_text_encoder(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerBase, Any]:
    """Encoder, tokenizer and image processor (None where the folder has none) of a Qwen2.5-VL folder.

    Args:
        path: a folder in transformers' layout, or with `text_encoder/`, `tokenizer/` and maybe `processor/`.
        dtype: of the weights; None keeps the stored one. Quantised weights keep theirs.

    Raises:
        UserError: for a folder that cannot be read, and naming weights that are missing, left over or
            misshapen.
    """
    path = Path(path)
    folders = {
        name: path / name if (path / name).is_dir() else path for name in ("text_encoder", "tokenizer")
    }
    config = folders["text_encoder"] / "config.json"
    if not config.exists():
        raise UserError(f"no text encoder in {path}: {config.name} is missing; give a folder of Qwen2.5-VL")
    with explained("text encoder", folders["text_encoder"]):
        loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folders["text_encoder"],
            dtype="auto" if dtype is None or '"quantization_config"' in config.read_text() else dtype,
            variant=_variant(folders["text_encoder"]),
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below
        )
    encoder, info = loaded
    verbs = {
        "missing_keys": "lacks",
        "unexpected_keys": "has no place for",
        "mismatched_keys": "has misshapen",
    }
    for kind, verb in verbs.items():
        if names := sorted(entry if isinstance(entry, str) else entry[0] for entry in info[kind]):
            raise UserError(f"the text encoder in {folders['text_encoder']} {verb} {listed(names)}")
    if not any((folders["tokenizer"] / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(
            f"no tokenizer in {folders['tokenizer']}: neither tokenizer.json nor vocab.json is there"
        )
    with explained("tokenizer", folders["tokenizer"]):
        tokenizer = AutoTokenizer.from_pretrained(folders["tokenizer"], local_files_only=True)
    processor = None
    for folder in (path / "processor", path):
        if (folder / "preprocessor_config.json").exists():
            with explained("image processor", folder):
                processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
            break
    return encoder.eval(), tokenizer, processor


def _variant(folder: Path) -> str | None:
    """The variant that the weights were saved as, such as "bf16" of model.bf16.safetensors, if all were."""
    layout = re.compile(r"model(?:\.(.+?))?(?:-\d+-of-\d+)?\.safetensors")
    found = {match[1] for file in folder.iterdir() if (match := layout.fullmatch(file.name))}
    return found.pop() if len(found) == 1 else None


@dataclass(frozen=True)
class _Chat:
    """The tokens of one prompt in its template, and the patches of its image."""

    ids: list[int]
    key: tuple[tuple[int, ...], int, str]
    pixels: dict[str, Tensor] | None


class _Layout:
    """Puts prompts and images into a template, in tokens.

    The parts are tokenised one by one: a prompt cannot write control tokens, and only the prompt is cut off.
    """

    def __init__(
        self,
        text_encoder: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
        processor: Any,
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.image_token = getattr(text_encoder.config, "image_token_id", None)
        self.image_processor = getattr(processor, "image_processor", processor)
        self.prefix, self.suffix = self._ids(template.prefix), self._ids(template.suffix)
        self.dropped = len(self.prefix)
        if self.dropped != template.drop_tokens:
            logger.warning(
                "template %s begins with %d tokens; this tokenizer, not the released one, makes it %d",
                template.name,
                template.drop_tokens,
                self.dropped,
            )

    def chat(self, prompt: str, image: Image.Image | None) -> _Chat:
        pixels = None if image is None else self._pixels(image)
        picture = [] if pixels is None else self._picture(pixels)
        if pixels is not None and prompt.strip():
            prompt = self.template.lead_with_image + prompt
        words = self._ids(prompt, split_special_tokens=True)
        room = self.template.max_tokens - len(picture) - len(self.suffix)
        if len(words) > room:
            logger.warning(
                "the prompt has %d tokens and the model takes %d: its end is left out, from %r on",
                len(words),
                room,
                self.tokenizer.decode(words[room:])[:60],
            )
        ids = self.prefix + picture + words[:room] + self.suffix
        digest = _digest(pixels) if pixels else ""
        return _Chat(ids, (tuple(ids), self.dropped, digest), pixels)

    def _ids(self, text: str, **options: Any) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, **options)["input_ids"] if text else []

    def _pixels(self, image: Image.Image) -> dict[str, Tensor]:
        """`pixel_values` (patches, C) and `image_grid_thw` (1, 3)."""
        if self.image_processor is None:
            raise UserError(
                f"template {self.template.name} puts the image into the prompt, and this model has no image "
                "processor; load it with its preprocessor_config.json, or use template 2025-12"
            )
        try:
            patches = self.image_processor(
                images=[image.convert("RGB")], size=dict(IMAGE_PIXELS), return_tensors="pt"
            )
        except ValueError as error:
            raise UserError(f"the image of {image.width} x {image.height} cannot be used: {error}") from error
        return {name: patches[name] for name in ("pixel_values", "image_grid_thw")}

    def _picture(self, pixels: dict[str, Tensor]) -> list[int]:
        """The tokens that stand for an image: one for each patch after merging, between two marks."""
        start, *placeholder, end = self._ids("<|vision_start|><|image_pad|><|vision_end|>")
        if placeholder != [self.image_token]:
            raise UserError(
                f"the tokenizer writes an image as {placeholder}, the text encoder knows it as "
                f"{self.image_token}: they are of different models"
            )
        count = int(pixels["image_grid_thw"].prod()) // self.image_processor.merge_size**2
        return [start, *placeholder * count, end]


def _digest(pixels: dict[str, Tensor]) -> str:
    """Of the patches and of how they lie: a plain image has the same patches upright and across."""
    digest = hashlib.sha256()
    for name in sorted(pixels):
        digest.update(pixels[name].numpy().tobytes())
    return digest.hexdigest()


def _encode(
    text_encoder: Qwen2_5_VLForConditionalGeneration,
    chats: Sequence[_Chat],
    padding: int,
    device: torch.device | str | None,
) -> list[Tensor]:
    """The last hidden states of each chat, (T, C), all its tokens."""
    if device is None:
        device = text_encoder.device
    elif not _is_hooked(text_encoder) and text_encoder.device != torch.device(device):
        # It may have been moved away after an earlier call. (Hooks move it themselves.)
        text_encoder.to(device)  # type: ignore[arg-type]
    lengths = [len(chat.ids) for chat in chats]
    ids = torch.full((len(chats), max(lengths)), padding, device=device)
    mask = torch.zeros_like(ids)
    for row, chat in enumerate(chats):
        ids[row, : len(chat.ids)] = torch.tensor(chat.ids)
        mask[row, : len(chat.ids)] = 1
    vision: dict[str, Tensor] = {}
    if pictures := [chat.pixels for chat in chats if chat.pixels is not None]:
        vision = {name: torch.cat([one[name] for one in pictures]).to(device) for name in pictures[0]}
        vision["mm_token_type_ids"] = (ids == text_encoder.config.image_token_id).int() * mask.int()
    hidden = _hidden_states(text_encoder, input_ids=ids, attention_mask=mask, **vision)
    return [states[:length] for states, length in zip(hidden, lengths, strict=True)]


@apply_forward_hook
def _hidden_states(text_encoder: Qwen2_5_VLForConditionalGeneration, **inputs: Tensor) -> Tensor:
    """The last hidden states (B, T, C), after the last norm.

    Of the model inside: no logits are wanted, and for hidden states the outer one keeps those of every layer,
    by hooks with which it cannot be pickled. But an encoder that something is wrapped around, or that was
    compiled or hooked as a whole, is called as a whole.
    """
    plain = isinstance(text_encoder, Qwen2_5_VLForConditionalGeneration)
    if plain and text_encoder._compiled_call_impl is None and not hasattr(text_encoder, "_diffusers_hook"):
        return text_encoder.model(**inputs, use_cache=False).last_hidden_state
    made = text_encoder(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    return made.hidden_states[-1]


def _is_hooked(module: torch.nn.Module) -> bool:
    """Whether accelerate or diffusers moves the module's weights when they are needed."""
    return hasattr(module, "_hf_hook") or any(hasattr(part, "_diffusers_hook") for part in module.modules())
