"""What a stage was made of, so that it is not taken for finished when that has changed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kairos.data.files import write_atomically
from kairos.errors import UserError
from kairos.training.cache import description, digest, listed
from kairos.training.checkpoint import glance
from kairos.training.clips import file_hash
from kairos.training.materials import weights_at
from kairos.weights import open_weights

if TYPE_CHECKING:
    from kairos.training.recipe import Recipe
    from kairos.training.stage import Stage

logger = logging.getLogger(__name__)

WORDS = {
    "weights": "other weights than it would start from now",
    "teacher": "another teacher",
    "vae": "latents of another VAE",
    "text": "prompts of another text encoder",
    "options": "other options, scenes or seed than the recipe has now",
}


def made_of(recipe: Recipe, stage: Stage) -> dict[str, str]:
    """Hashes of the weights that a stage starts from, of its teacher's, and of what made its cache. Pairs of
    preferences have their own (`preference.py`)."""
    found = {part: hash_of(recipe, source) for part, source in sources_of(recipe, stage).items()}
    return found | ({} if stage.objective == "preference" else cache_of(recipe, stage))


def sources_of(recipe: Recipe, stage: Stage) -> dict[str, str]:
    """What names the weights that a stage starts from, and its teacher's."""
    teacher = stage.distillation.teacher if stage.distillation is not None else ""
    return {"weights": recipe.start_of(stage), "teacher": teacher}


def cache_of(recipe: Recipe, stage: Stage) -> dict[str, str]:
    """Hashes of what made the cache of a stage's clips."""
    content = listed(recipe.output / "cache", description(recipe.source(stage), stage.buckets))
    return {part: content.get(part, "") for part in ("vae", "text")}


def hash_of(recipe: Recipe, source: str) -> str:
    """Of the weights that `load_start` would load; empty where there are none any more."""
    if source in ("", "random"):
        return source
    try:
        path = weights_at(recipe, source)
    except UserError:
        return ""
    if not path.exists():
        return ""
    return " ".join(file_hash(file) for file in sorted({one.file for one in open_weights(path).values()}))


def options_hash(*options: Any) -> str:
    """Of what a recipe says of a part, without what it leaves as it is: options to come change nothing."""
    return digest([said(one) for one in options])


def said(option: Any) -> Any:
    """The values of a dataclass, or of several, that are not its defaults; another option as it is."""
    if isinstance(option, list | tuple):
        return [said(one) for one in option]
    if not is_dataclass(option):
        return option
    values = {field.name: (getattr(option, field.name), field.default) for field in fields(option)}
    return {name: value for name, (value, default) in values.items() if value != default}


def check_origins(name: str, output: Path, kept: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """Refuse what was made of something else than is there now; what is not known of either says nothing."""
    for part, words in WORDS.items():
        if kept.get(part) and now.get(part) and kept[part] != now[part]:
            raise UserError(f"stage {name} was made from {words}; delete {output} to make it again")


def is_at_end(stage: Stage, output: Path, state: Mapping[str, Any]) -> bool:
    """Whether a stage is at its last step, by its checkpoint's `state`, and has its weights."""
    return state.get("step", -1) >= stage.steps and any((output / "ema").glob("*.safetensors"))


def is_trained(recipe: Recipe, stage: Stage) -> bool:
    """`is_at_end` of what lies in the recipe's output."""
    output = recipe.output / stage.name
    return is_at_end(stage, output, glance(output))


def check_successors(recipe: Recipe, stage: Stage) -> None:
    """Refuse to train a stage further where a later one has begun from its weights as they are: that one
    would never go on."""
    step = glance(recipe.output / stage.name).get("step", 0)
    if step >= stage.steps:
        return
    for later in recipe.stages:
        output = recipe.output / later.name
        began = glance(output).get("origins", {})
        for part, source in sources_of(recipe, later).items():
            if source == stage.name and began.get(part):
                raise UserError(
                    f"stage {later.name} was made from other weights than {stage.name} will have at step "
                    f"{stage.steps}; delete {output} to make it again, or leave {stage.name} as it is, at "
                    f"step {step}"
                )


def is_finished(name: str, output: Path, now: Mapping[str, str]) -> bool:
    """Whether the file `finished` is there, and say so. Raises UserError where it says other origins."""
    kept = origins_of(output)
    if kept is None:
        return False
    check_origins(name, output, kept, now)
    logger.info("%s is finished", output)
    return True


def origins_of(output: Path) -> dict[str, str] | None:
    """What the file `finished` says; None where it is not there."""
    file = output / "finished"
    return json.loads(file.read_text() or "{}") if file.exists() else None


def finish(output: Path, origins: Mapping[str, str]) -> None:
    """Write the file `finished`."""
    write_atomically(output / "finished", json.dumps(dict(origins)).encode())
