"""Trains kairos-tiny's prompt encoder: a byte-level BPE and a small Qwen2.5-VL, on the captions of the
worlds.

It learns the next token, and to say from the last token what the caption names (scene, colours, sizes,
directions, speeds). The heads that say it are thrown away; what they needed stays in the hidden states.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from kairos.data.files import whole_files
from kairos.training.minimise import minimise
from kairos.training.muon import Muon, split_parameters
from kairos.training.origins import options_hash
from kairos.training.precision import has_bfloat16
from kairos.worlds import simulate

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
]
PER_BALL = ("colors", "sizes", "directions", "speeds")
BALLS = 2
HIDDEN_SIZE = 128


def train_conditioner(
    output: Path,
    *,
    scenes: tuple[str, ...] = ("uniform", "collision", "parabola"),
    captions: int = 12_000,
    vocabulary: int = 640,
    steps: int = 800,
    batch_size: int = 96,
    seed: int = 0,
) -> dict[str, float]:
    """Write `output`/tokenizer and `output`/text_encoder; returns the accuracy of each label on unseen
    captions. A run that was stopped goes on from the checkpoint in `output`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    corpus = [caption_of(scenes, "train", seed, index) for index in range(captions)]
    tokenizer = train_tokenizer([vary(text, rng) for text, _ in corpus], vocabulary)
    encoder = build_text_encoder(tokenizer)
    answers = label_answers([said for _, said in corpus])
    heads = nn.ModuleDict({name: nn.Linear(HIDDEN_SIZE, len(a)) for name, a in answers.items()})
    both = nn.ModuleDict({"encoder": encoder, "heads": heads})
    optimizer = Muon(
        split_parameters(both, muon_lr=0.01, adamw_lr=3e-3, exclude=("embed", "lm_head", "heads."))
    )
    both.train()
    logger.info("prompt encoder of %.2f M parameters", sum(p.numel() for p in encoder.parameters()) / 1e6)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        picked = [corpus[i] for i in rng.integers(len(corpus), size=batch_size)]
        ids, mask = tokenise(tokenizer, [vary(text, rng) for text, _ in picked])
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16("cpu")):
            hidden = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
            next_token = encoder.lm_head(hidden[:, :-1]).float()
        following = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
        value = F.cross_entropy(next_token.flatten(0, 1), following.flatten())
        last = last_token(hidden.float(), mask)
        for name, target in label_targets([said for _, said in picked], answers).items():
            value = value + 0.5 * F.cross_entropy(heads[name](last), target)
        return value

    def rate(step: int) -> float:
        return min(1, (step + 1) / 30) * min(1, (steps - step) / (0.4 * steps))

    words = {"options": options_hash(scenes, seed, captions, vocabulary)}  # others would have other numbers
    minimise(output, both, optimizer, steps, loss, rate, seed=seed, origins=words)
    both.eval()
    measured = measure(encoder, heads, tokenizer, answers, scenes, seed)
    with whole_files(output) as made:
        tokenizer.save_pretrained(made / "tokenizer")
        encoder.bfloat16().save_pretrained(made / "text_encoder")
    return measured


def caption_of(scenes: tuple[str, ...], split: str, seed: int, index: int) -> tuple[str, dict[str, Any]]:
    """A caption and what it says; the pictures are made as small as they may be, since nobody looks."""
    clip = simulate(scenes[index % len(scenes)], split=split, seed=seed, index=index, num_frames=1, size=16)
    return clip.caption, clip.parameters["said"]


def vary(text: str, rng: np.random.Generator) -> str:
    """The caption as people type it: now and then capitals, no articles, a full stop, or nothing at all."""
    chance = rng.random(5)
    if chance[0] < 0.1:
        words = [word for word in text.split() if word not in ("a", "an", "the", "one")]
        text = " ".join(words)
    if chance[1] < 0.15:
        text = text[:1].upper() + text[1:]
    elif chance[1] < 0.2:
        text = text.upper()
    if chance[2] < 0.15:
        text += "."
    return text


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text can be written, the words of the worlds are one token each."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def build_text_encoder(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL at a ten-thousandth of its size; its eye is as small as it can be, since prompts hold no
    picture."""
    ids = {token: int(tokenizer.get_vocab()[token]) for token in SPECIAL_TOKENS}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": HIDDEN_SIZE,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def tokenise(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) and their mask, in the layout of the "tiny" prompt template."""
    encoded = tokenizer(
        [f"<|im_start|>{text}<|im_end|>" for text in texts], padding=True, return_tensors="pt"
    )
    return encoded["input_ids"], encoded["attention_mask"].bool()


def last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """The hidden state (B, C) of each text's last token."""
    return hidden[torch.arange(len(hidden)), mask.sum(1) - 1]


def labels(said: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(label, answer) for everything a caption may name; "" is for what it leaves open."""
    yield "scene", said["scene"] or ""
    for name in PER_BALL:
        for ball in range(BALLS):
            values = said[name]
            yield f"{name}-{ball}", (values[ball] or "") if ball < len(values) else "none"


def label_answers(corpus: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Every answer that a label can have."""
    answers: dict[str, set[str]] = {}
    for said in corpus:
        for name, answer in labels(said):
            answers.setdefault(name, set()).add(answer)
    return {name: sorted(found) for name, found in answers.items()}


def label_targets(batch: list[dict[str, Any]], answers: dict[str, list[str]]) -> dict[str, Tensor]:
    """The number of each answer; one that no caption of the training had is -1, which nobody guesses."""
    columns: dict[str, list[int]] = {name: [] for name in answers}
    for said in batch:
        for name, answer in labels(said):
            known = answers[name]
            columns[name].append(known.index(answer) if answer in known else -1)
    return {name: torch.tensor(column) for name, column in columns.items()}


@torch.no_grad()
def measure(
    encoder: Qwen2_5_VLForConditionalGeneration,
    heads: nn.ModuleDict,
    tokenizer: PreTrainedTokenizerFast,
    answers: dict[str, list[str]],
    scenes: tuple[str, ...],
    seed: int,
    captions: int = 600,
) -> dict[str, float]:
    """The share of right answers for each label on captions of the split "in", and `all`: nothing wrong in
    one."""
    corpus = [caption_of(scenes, "in", seed, index) for index in range(captions)]
    ids, mask = tokenise(tokenizer, [text for text, _ in corpus])
    last = last_token(encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
    targets = label_targets([said for _, said in corpus], answers)
    right = {name: heads[name](last).argmax(-1) == target for name, target in targets.items()}
    shares = {name: hits.float().mean().item() for name, hits in right.items()}
    shares["all"] = torch.stack(list(right.values())).all(0).float().mean().item()
    return {name: math.floor(share * 1e4) / 1e4 for name, share in shares.items()}
