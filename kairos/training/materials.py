"""What a stage is given: the weights that it starts from, its encoders, its clips, and its sampler."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kairos import presets, sizes
from kairos.conditioning import TEMPLATES, load_text_encoder
from kairos.data.files import whole_files
from kairos.errors import UserError
from kairos.models.vae import quickest_dtype
from kairos.schedulers import FewStepScheduler, FlowMatchScheduler
from kairos.training.cache import ClipSet, Encoders, description, load_clips
from kairos.training.clips import ClipReference, Skipped
from kairos.training.stage import Distillation, Stage
from kairos.weights import load_transformer_file, load_vae_file

if TYPE_CHECKING:
    from kairos.training.recipe import Recipe

logger = logging.getLogger(__name__)

UNSHAPED = ("layer_pattern", "window_frames", "dilation", "pad_dilated", "eps", "causal")
"""What the shapes of a LinearDiT's weights do not tell."""


def load_start(recipe: Recipe, source: str, dtype: str = "float32", *, teaches: bool = False) -> Any:
    """The LinearDiT that `source` names: a stage of the recipe, a model, a file or a folder.

    The recipe's `model` overrides what it says of itself, unless it `teaches`: a teacher may be larger than
    what learns from it, and see whole clips where that sees chunks.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), **({} if teaches else recipe.model)}
    path = weights_at(recipe, source)
    if source in [stage.name for stage in recipe.stages]:
        if not (path / "config.json").exists():
            raise UserError(f"stage {source} has no weights in {path}; run it first")
        return load_transformer_file(path, **options)
    otherwise = released_config(source)
    if is_weights(source):
        otherwise = base_config(recipe) | recipe.model
        otherwise = {key: otherwise[key] for key in UNSHAPED if key in otherwise}
    return load_transformer_file(path, otherwise=otherwise, **options)


def weights_at(recipe: Recipe, source: str) -> Path:
    """The file or folder of the LinearDiT that `source` names. UserError for a model that is not here."""
    if source in [stage.name for stage in recipe.stages]:
        return recipe.output / source / "ema"
    return weights_of(source)


def weights_of(source: str) -> Path:
    """The file or folder of the LinearDiT of a model, by name, file or folder. UserError as `locate`."""
    if is_weights(source):
        own = Path(source) / "transformer"
        return own if own.is_dir() else Path(source)
    return presets.locate(source).part("transformer")


def is_weights(source: str) -> bool:
    """Whether it is a file or a folder that says of itself what it is, and no model by name or preset."""
    return Path(source).exists() and not (Path(source) / presets.MARK).exists()


def is_whole(source: str) -> bool:
    """Whether it is a whole model, by name or folder, and no weights alone."""
    marks = (presets.MARK, "model_index.json")
    return bool(source) and (presets.is_name(source) or any((Path(source) / mark).exists() for mark in marks))


def save_whole(pipeline: Any, folder: Path) -> None:
    """A folder in diffusers' layout, whole or not at all. Where a part came from is nobody's business."""
    with whole_files(folder) as made:
        pipeline.save_pretrained(made)
        for file in (made / "model_index.json", *made.glob("*/config.json")):
            config = json.loads(file.read_text())
            config.pop("_name_or_path", None)
            file.write_text(json.dumps(config, indent=2) + "\n")


def released_config(source: str) -> dict[str, Any]:
    """What a released model says that its weights do not; nothing of weights, and of what says it itself."""
    model = None if is_weights(source) else presets.locate(source)
    return model.config() if model is not None and model.released else {}


def base_config(recipe: Recipe) -> dict[str, Any]:
    """What the configuration of the base's LinearDiT says; nothing without a base."""
    return presets.locate(recipe.base).config() if recipe.base else {}


def load_encoders(recipe: Recipe) -> Encoders:
    """VAE and text encoder: the recipe's own, or those of its base."""
    if not recipe.vae or recipe.conditioner is None:
        vae_file, text_folder, template = encoders_of_base(recipe.base)
    if recipe.vae:
        vae_file = made_before(recipe, "vae")
    if recipe.conditioner is not None:
        text_folder, template = made_before(recipe, "conditioner"), "tiny"
    encoder, tokenizer, processor = load_text_encoder(text_folder, dtype=encoder_dtype(text_folder))
    if TEMPLATES[template].image_in_prompt and processor is None:
        raise UserError(
            f"the prompts of {recipe.base} hold pictures, and {text_folder} has no image processor"
        )
    return Encoders(load_vae_file(vae_file, dtype=vae_dtype()), encoder, tokenizer, template, processor)


def made_before(recipe: Recipe, part: str) -> Path:
    """The folder of what an earlier step of the recipe has finished."""
    if not (recipe.output / part / "finished").exists():
        raise UserError(f"{recipe.output} has no {part} yet; run the recipe's stage {part} first")
    return recipe.output / part


def encoders_of_base(base: str) -> tuple[Path, Path, str]:
    """Where a model's VAE and text encoder lie, and the template of its prompts."""
    model = presets.locate(base)
    if model.released:
        return model.part("vae"), model.part("text_encoder"), model.released.template
    return model.saved, model.saved, str(model.index().get("prompt_template"))


def vae_dtype() -> Any:
    """bfloat16 where it is the quicker one; else float32, which is more exact as well."""
    return torch.bfloat16 if torch.cuda.is_available() else quickest_dtype("cpu") or torch.float32


def encoder_dtype(folder: Path) -> Any:
    """bfloat16 for a large encoder beside a GPU, whose memory is for training; else float32, which is more
    exact and on a CPU quicker. `folder` is the encoder's, or a whole model's."""
    own = folder / "text_encoder"
    size = sum(file.stat().st_size for file in (own if own.is_dir() else folder).rglob("*.safetensors"))
    return torch.bfloat16 if torch.cuda.is_available() and size > 1e9 else torch.float32


def clip_sets(recipe: Recipe, stage: Stage, encoders: Encoders) -> list[ClipSet]:
    """The cached clips of a stage."""
    source = recipe.source(stage)
    what = description(source, stage.buckets)
    sets = load_clips(recipe.output / "cache", stage.buckets, encoders, described=what)
    there = {clips.bucket.frames == 1 for clips in sets}
    if stage.images and {bucket.frames == 1 for bucket in stage.buckets} - there:
        only, lacking = ("pictures", "clips") if True in there else ("clips", "pictures")
        logger.warning(
            "stage %s: images: %g has no effect: the data have no %s, and every batch is of %s",
            stage.name,
            stage.images,
            lacking,
            only,
        )
    return sets


def read_again(recipe: Recipe, stage: Stage, sets: Sequence[ClipSet]) -> dict[str, ClipReference]:
    """Where the frames of a stage's cached clips are read, by their keys."""
    found = recipe.source(stage).references([clips.bucket for clips in sets], Skipped())
    references = {reference.key: reference for reference in found}
    gone = sum(key not in references for clips in sets for key in clips.keys)
    if gone:
        raise UserError(
            f"stage {stage.name}: {gone} cached clips are not in the data any more; run the stage cache"
        )
    return references


def sampler_of(recipe: Recipe, stage: Stage) -> tuple[Any, dict[str, Any]]:
    """The sampler of what a stage has trained, and the defaults of its pipeline.

    Preferences and a LoRA leave a model the sampler that it had. Flow matching makes one of many steps.
    """
    if stage.objective == "preference" or stage.lora is not None:
        return sampler_before(recipe, stage)
    base, said = base_defaults(recipe, stage), defaults_said(recipe, stage)
    if stage.objective == "distillation":
        options = stage.distillation or Distillation()
        few = {"num_inference_steps": len(options.sampling_times), "guidance_scale": 1.0}
        scheduler = FewStepScheduler(sampling_times=options.sampling_times, shift=options.shift)
        return scheduler, base | said | few
    if isinstance(own_sampler(recipe.base), FewStepScheduler):
        base |= {name: sizes.RELEASED_DEFAULTS[name] for name in ("num_inference_steps", "guidance_scale")}
    return FlowMatchScheduler(), base | said


def sampler_before(recipe: Recipe, stage: Stage) -> tuple[Any, dict[str, Any]]:
    """The sampler of what a stage starts from, and its defaults; weights alone have the base's."""
    start, named = recipe.start_of(stage), {one.name: one for one in recipe.stages}
    if start in named:
        return sampler_of(recipe, named[start])
    said = defaults_said(recipe, stage)
    for source in (start, recipe.base):
        if (own := own_sampler(source)) is not None:
            return own, presets.defaults_of(source) | said
    return FlowMatchScheduler(), base_defaults(recipe, stage) | said


def base_defaults(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """What the pipeline of a stage takes from the base; without one, clips are as long and large as the
    longest that the stage learned from."""
    if recipe.base:
        return presets.defaults_of(recipe.base)
    longest = max(stage.buckets, key=lambda bucket: (bucket.frames, bucket.height * bucket.width))
    size = {"height": longest.height, "width": longest.width, "num_frames": longest.frames}
    return presets.all_defaults(size)


def defaults_said(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """What the recipe says of the pipeline of a stage."""
    return recipe.defaults.said() | {"fps": recipe.fps_of(stage)}


def own_sampler(source: str) -> FewStepScheduler | FlowMatchScheduler | None:
    """The sampler of a model by name or folder; None for weights alone, which say nothing of it."""
    if not is_whole(source):
        return None
    model = presets.locate(source)
    if model.released:
        return FewStepScheduler() if model.released.scheduler == "few_step" else FlowMatchScheduler()
    config = presets.read_json(model.saved / "scheduler" / "scheduler_config.json")
    kind = FewStepScheduler if config.get("_class_name") == FewStepScheduler.__name__ else FlowMatchScheduler
    return kind.from_config(config)
