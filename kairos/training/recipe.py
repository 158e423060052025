"""A recipe: one YAML file that names every stage of a model's making, and the command that runs them in
order.

A stage that has finished is not run again; one that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import difflib
import json
import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kairos.errors import UserError

logger = logging.getLogger(__name__)

STAGES = ("vae", "conditioner", "cache", "transformer", "assemble")


@dataclass(frozen=True)
class Recipe:
    """What `kairos train FILE` does. The inner mappings are the keyword arguments of each stage."""

    name: str
    output: Path
    scenes: tuple[str, ...]
    seed: int = 0
    threads: int | None = None
    vae: dict[str, Any] = field(default_factory=dict)
    conditioner: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)
    transformer: dict[str, Any] = field(default_factory=dict)
    assemble: dict[str, Any] = field(default_factory=dict)


def read_recipe(path: Path) -> Recipe:
    """The recipe of a YAML file; an unknown key is refused with the nearest right one."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise UserError('training needs more packages; pip install "kairos-world[train]"') from None
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no recipe at {path}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of stages")
    known = [f.name for f in fields(Recipe)]
    check_keys(content, known, path.name)
    for required in ("name", "output", "scenes"):
        if required not in content:
            raise UserError(f"{path.name}: the key {required!r} is missing")
    return Recipe(**content | {"output": Path(content["output"]), "scenes": tuple(content["scenes"])})


def check_keys(mapping: dict[str, Any], known: list[str], where: str) -> None:
    """Refuse a key that is not known, naming the nearest one that is."""
    for key in mapping:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
            raise UserError(f"{where}: unknown key {key!r}{hint}")


def run_recipe(recipe: Recipe, only: tuple[str, ...] = STAGES) -> None:
    """Run the stages of `recipe` named in `only`, in order."""
    import torch

    for stage in only:
        if stage not in STAGES:
            raise UserError(f"unknown stage {stage!r}; stages are {', '.join(STAGES)}")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    runs = {
        "vae": _vae,
        "conditioner": _conditioner,
        "cache": _cache,
        "transformer": _transformer,
        "assemble": _assemble,
    }
    for stage in STAGES:
        if stage in only:
            logger.info("stage %s", stage)
            runs[stage](recipe)


def _vae(recipe: Recipe) -> None:
    from kairos.training.vae import VAEStage, train_vae

    output = recipe.output / "vae"
    if (output / "finished").exists():
        logger.info("%s is finished", output)
        return
    names = [f.name for f in fields(VAEStage)]
    for number, stage in enumerate(recipe.vae["stages"]):
        check_keys(stage, names, f"vae.stages[{number}]")
    stages = tuple(VAEStage(**stage) for stage in recipe.vae["stages"])
    train_vae(output, stages=stages, scenes=recipe.scenes, seed=recipe.seed)
    (output / "finished").touch()


def _conditioner(recipe: Recipe) -> None:
    from kairos.training.conditioner import train_conditioner

    output = recipe.output / "conditioner"
    if (output / "text_encoder").exists():
        logger.info("%s is finished", output)
        return
    measured = train_conditioner(output, scenes=recipe.scenes, seed=recipe.seed, **recipe.conditioner)
    logger.info("prompt encoder: %s", measured)


def _cache(recipe: Recipe) -> None:
    from kairos.training.cache import build_cache

    build_cache(
        recipe.output / "cache",
        vae_path=recipe.output / "vae",
        scenes=recipe.scenes,
        shards=range(recipe.cache["shards"]),
        num_frames=recipe.cache.get("num_frames", 33),
        seed=recipe.seed,
    )


def _transformer(recipe: Recipe) -> None:
    import torch

    from kairos.models.transformer import KairosTransformer3DModel
    from kairos.training import transformer as training
    from kairos.training.cache import load_cache

    options = dict(recipe.transformer)
    torch.manual_seed(recipe.seed)
    model = KairosTransformer3DModel(**options.pop("model"))
    check_keys(options, [f.name for f in fields(training.Recipe)], "transformer")
    training.train_transformer(
        model,
        lambda: load_cache(
            recipe.output / "cache",
            vae_path=recipe.output / "vae",
            conditioner_path=recipe.output / "conditioner",
        ),
        recipe.output / "transformer",
        training.Recipe(seed=recipe.seed, **options),
    )


def _assemble(recipe: Recipe) -> None:
    import torch
    from diffusers import AutoencoderKLWan
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    from kairos.models.transformer import KairosTransformer3DModel
    from kairos.pipeline import KairosPipeline
    from kairos.schedulers import FlowMatchScheduler

    conditioner = recipe.output / "conditioner"
    dtype = torch.bfloat16
    pipeline = KairosPipeline(
        transformer=KairosTransformer3DModel.from_pretrained(
            recipe.output / "transformer" / "ema", torch_dtype=dtype
        ),
        vae=AutoencoderKLWan.from_pretrained(recipe.output / "vae", torch_dtype=dtype),
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(
            conditioner / "text_encoder", dtype=dtype
        ),
        tokenizer=AutoTokenizer.from_pretrained(conditioner / "tokenizer"),
        scheduler=FlowMatchScheduler(),
        prompt_template="tiny",
        defaults=recipe.assemble["defaults"],
    )
    folder = recipe.output / recipe.name
    pipeline.save_pretrained(folder)
    for file in folder.glob("*/config.json"):  # where a part came from is nobody's business
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n")
