"""What a stage was made of, so that it is not taken for finished when that has changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kairos.errors import UserError
from kairos.training.cache import description, listed
from kairos.training.clips import file_hash
from kairos.training.materials import weights_at
from kairos.training.recipe import Recipe
from kairos.training.stage import Stage
from kairos.weights import open_weights

WORDS = {
    "weights": "other weights than it would start from now",
    "teacher": "another teacher",
    "vae": "latents of another VAE",
    "text": "prompts of another text encoder",
}


def made_of(recipe: Recipe, stage: Stage) -> dict[str, str]:
    """Hashes of the weights that a stage starts from, of its teacher's, and of what made its cache. Pairs of
    preferences have their own (`preference.py`)."""
    teacher = stage.distillation.teacher if stage.distillation is not None else ""
    found = {"weights": hash_of(recipe, recipe.start_of(stage)), "teacher": hash_of(recipe, teacher)}
    if stage.objective != "preference":
        content = listed(recipe.output / "cache", description(recipe.source(stage), stage.buckets))
        found |= {part: content.get(part, "") for part in ("vae", "text")}
    return found


def hash_of(recipe: Recipe, source: str) -> str:
    """Of the weights that `load_start` would load; empty where there are none any more."""
    if source in ("", "random"):
        return source
    path = weights_at(recipe, source)
    path = path / "transformer" if (path / "transformer").is_dir() else path
    if not path.exists():
        return ""
    return " ".join(file_hash(file) for file in sorted({one.file for one in open_weights(path).values()}))


def check_origins(name: str, output: Path, kept: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """Refuse what was made of something else than is there now; what is not known of either says nothing."""
    for part, words in WORDS.items():
        if kept.get(part) and now.get(part) and kept[part] != now[part]:
            raise UserError(f"stage {name} was made from {words}; delete {output} to make it again")


def is_finished(name: str, output: Path, now: Mapping[str, str]) -> bool:
    """Whether the file `finished` is there. Raises UserError where it says other origins."""
    file = output / "finished"
    if not file.exists():
        return False
    check_origins(name, output, json.loads(file.read_text() or "{}"), now)
    return True
