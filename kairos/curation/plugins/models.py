"""Scores by models of `transformers`: aesthetics, NSFW, embeddings. `model` is a folder or a hub's name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from kairos.curation.views import Stage, Views
from kairos.errors import UserError


@dataclass(frozen=True)
class ModelStage(Stage):
    """`model`: a folder, or a name that transformers can load."""

    inputs = ("samples",)
    model: str = ""

    def __post_init__(self) -> None:
        if not self.model:
            raise UserError("model is missing; give a folder or a name that transformers can load")


@dataclass(frozen=True)
class Nsfw(ModelStage):
    """An image classifier; the score is the greatest probability of `label` over the samples."""

    name = "nsfw"
    outputs = ("nsfw",)
    label: str = "nsfw"

    def measure(self, views: Views) -> dict[str, Any]:
        import torch

        model, processor = _loaded(self.model, "AutoModelForImageClassification")
        labels = {str(name).lower(): int(number) for number, name in model.config.id2label.items()}
        if self.label.lower() not in labels:
            raise ValueError(f"{self.model} has no label {self.label!r}; it has {', '.join(labels)}")
        with torch.inference_mode():
            logits = model(**processor(images=list(views.samples), return_tensors="pt")).logits
        return {"nsfw": round(float(logits.softmax(-1)[:, labels[self.label.lower()]].max()), 5)}


@dataclass(frozen=True)
class Embedding(ModelStage):
    """The mean over the samples of a vision model's embedding; near duplicates are found by it as well."""

    name = "embedding"
    outputs = ("embedding",)

    def measure(self, views: Views) -> dict[str, Any]:
        mean = _embedded(self.model, views).mean(axis=0)
        return {"embedding": [round(float(value), 5) for value in mean / (np.linalg.norm(mean) + 1e-12)]}


@dataclass(frozen=True)
class Aesthetics(ModelStage):
    """LAION's kind of predictor: a linear head, about 1 to 10, on unit CLIP embeddings.

    `head` is a safetensors file with `weight` (1, d) and `bias` (1,).
    """

    name = "aesthetics"
    outputs = ("aesthetics",)
    head: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not Path(self.head).is_file():
            raise UserError(f"head must be a safetensors file with weight and bias, got {self.head!r}")

    def measure(self, views: Views) -> dict[str, Any]:
        from safetensors.numpy import load_file

        head = load_file(self.head)
        scores = _embedded(self.model, views) @ head["weight"].reshape(-1) + head["bias"].reshape(())
        return {"aesthetics": round(float(scores.mean()), 4)}


def _embedded(model_name: str, views: Views) -> np.ndarray[Any, Any]:
    """(S, d) unit embeddings of the samples."""
    import torch

    model, processor = _loaded(model_name, "AutoModel")
    pictures = processor(images=list(views.samples), return_tensors="pt")
    with torch.inference_mode():
        if hasattr(model, "get_image_features"):
            found = model.get_image_features(**pictures)
            features = getattr(found, "pooler_output", found)
        else:
            found = model(**pictures)
            pooled = getattr(found, "pooler_output", None)
            features = pooled if pooled is not None else found.last_hidden_state[:, 0]
    return torch.nn.functional.normalize(features.float(), dim=-1).numpy()


@lru_cache(maxsize=4)
def _loaded(name: str, kind: str) -> tuple[Any, Any]:
    """A model and its image processor, once in a process."""
    import transformers

    model = getattr(transformers, kind).from_pretrained(name).eval()
    return model, transformers.AutoImageProcessor.from_pretrained(name)
