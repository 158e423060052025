"""What is wrong with a recipe, told before any of it runs: a stage may be hours away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kairos.errors import UserError
from kairos.models.vae import SPATIAL
from kairos.training.clips import (
    ManifestSource,
    SimulatorSource,
    WebdatasetSource,
    check_square,
    read_entry,
    read_lines,
)
from kairos.training.materials import base_config, encoders_of_base, weights_at
from kairos.training.origins import check_successors, is_trained, sources_of
from kairos.training.plan import stage_config
from kairos.training.stage import Preference, Stage
from kairos.weights.transformer import empty_transformer

if TYPE_CHECKING:
    from kairos.training.recipe import Recipe


def check_stage(recipe: Recipe, stage: Stage, before: Sequence[str]) -> None:
    """Refuse what a stage could not do, and options that would do nothing; `before` names earlier stages."""

    def refuse(rule: str) -> None:
        raise UserError(f"stage {stage.name}: {rule}")

    if not stage.buckets:
        refuse("the key 'buckets' is missing")
    for objective in ("distillation", "preference"):
        if getattr(stage, objective) is not None and stage.objective != objective:
            refuse(f"{objective} goes with objective: {objective}, got objective: {stage.objective}")
    if stage.objective == "distillation" and (stage.lora is not None or stage.train):
        refuse("distillation trains all weights; leave out lora and train")
    if stage.objective == "preference" and len(stage.buckets) > 1:
        refuse(f"preference has one bucket, got {len(stage.buckets)}; make a stage of each")
    pictures = [bucket for bucket in stage.buckets if bucket.frames == 1]
    if stage.images and not pictures:
        refuse(f"images is the share of buckets of one frame, got {stage.images} and no such bucket")
    if not stage.images and pictures and len(pictures) < len(stage.buckets):
        refuse(f"images is 0, so bucket {pictures[0].name} would never be drawn; give it a share")
    for bucket in stage.buckets:
        if stage.batch_of(bucket) % stage.accumulate:
            refuse(
                f"batch_size must be a multiple of accumulate, got {stage.batch_of(bucket)} and "
                f"{stage.accumulate}"
            )
    if stage.decay_steps > stage.steps:
        refuse(f"decay_steps must be at most steps, got {stage.decay_steps} and {stage.steps}")
    if stage.warmup_steps > stage.steps and stage.warmup_steps != Stage.warmup_steps:
        refuse(f"warmup_steps must be at most steps, got {stage.warmup_steps} and {stage.steps}")
    check_source(recipe, stage, refuse)
    named = {one.name: one for one in recipe.stages}
    teacher = stage.distillation.teacher if stage.distillation is not None else ""
    for key, source in (("start_from", stage.start_from), ("distillation.teacher", teacher)):
        if source in named and source not in before:
            refuse(f"{key} must name an earlier stage, got {source!r}")
    for name in (recipe.start_of(stage), teacher):
        if name in named and named[name].lora is not None:
            refuse(f"{name} makes a LoRA, no weights to start from; let start_from name a whole model")


def check_source(recipe: Recipe, stage: Stage, refuse: Callable[[str], None]) -> None:
    """Refuse clips that a stage cannot learn from."""
    options = stage.preference or Preference()
    if stage.objective == "preference" and options.manifest is not None:
        return
    source = recipe.source(stage)
    if isinstance(source, SimulatorSource):
        for bucket in stage.buckets:
            check_square(bucket)
    elif stage.state is not None:
        refuse("only the simulator knows states; leave out state")
    elif stage.objective == "preference":
        refuse(
            "rollouts can be measured in the simulator's scenes alone; give data.source simulator, or "
            "preference.manifest"
        )
    if stage.objective == "preference" and options.given_frames >= stage.buckets[0].frames:
        frames = stage.buckets[0].frames
        refuse(f"preference.given_frames must be below the bucket's {frames}, got {options.given_frames}")


def learns_from_clips(stage: Stage) -> bool:
    """Whether a stage trains a whole LinearDiT on cached clips that are longer than the start of a sample."""
    long = any(bucket.frames > 5 for bucket in stage.buckets)
    return stage.objective != "preference" and stage.lora is None and long


def check_run(recipe: Recipe, stages: Sequence[Stage], world: int) -> None:
    """Refuse what these stages could not do with their model, on `world` processes; nothing is loaded. One
    that has finished does nothing more."""
    for stage in stages:
        if is_trained(recipe, stage):
            continue
        model = empty_transformer(stage_config(recipe, stage), f"stage {stage.name}")
        check_model(recipe, stage, model)
        parts = stage.accumulate * world
        for bucket in stage.buckets:
            if (size := stage.batch_of(bucket)) % parts:
                raise UserError(
                    f"stage {stage.name}: batch_size must be a multiple of accumulate times processes, got "
                    f"{size}, {stage.accumulate} and {world}"
                )


def check_model(recipe: Recipe, stage: Stage, model: Any) -> None:
    """Refuse what a stage could not do with `model`, of its configuration."""

    def refuse(rule: str) -> None:
        raise UserError(f"stage {stage.name}: {rule}")

    names = [name for name, _ in model.named_parameters()]
    if stage.has_rollouts and model.config.causal != "chunk":
        refuse('the task rollout needs model.causal "chunk"; give its share to continuation')
    if stage.lora is not None:
        from kairos.training.lora import add_lora

        add_lora(model, stage.lora)
    for part in stage.train:
        if not any(part in name for name in names):
            refuse(f"train names {part!r}, which no parameter has in its name")
    if stage.state is not None and not 0 <= stage.state.block < len(model.blocks):
        refuse(f"state.block must be from 0 to {len(model.blocks) - 1}, got {stage.state.block}")
    if (width := text_dim(recipe)) not in (None, model.config.text_dim):
        refuse(f"model.text_dim must be that of the prompt encoder, {width}, got {model.config.text_dim}")
    for bucket in stage.buckets:
        for side, patch in zip((bucket.height, bucket.width), model.config.patch_size[1:], strict=True):
            if side % (SPATIAL * patch):
                refuse(
                    f"sides of bucket {bucket.name} must be multiples of {SPATIAL * patch} pixels, a token's"
                )


def text_dim(recipe: Recipe) -> int | None:
    """Width of the prompt embeddings; None where it is not known yet."""
    if recipe.conditioner is not None:
        from kairos.training.conditioner import HIDDEN_SIZE

        return HIDDEN_SIZE
    return base_config(recipe).get("text_dim")


def check_there(recipe: Recipe, steps: Sequence[str]) -> None:
    """Refuse data and models that are not here, where one of these steps would ask for them, and training
    that would leave a later stage without the weights that it began with."""
    if recipe.base:
        encoders_of_base(recipe.base)
    for stage in recipe.stages:
        if stage.name in steps and not is_trained(recipe, stage):
            for source in sources_of(recipe, stage).values():
                if source not in ("", "random"):
                    weights_at(recipe, source)
            check_pairs(recipe, stage)
            check_successors(recipe, stage)
        if "cache" in steps and stage.objective != "preference":
            check_data(recipe.source(stage))


def check_pairs(recipe: Recipe, stage: Stage) -> None:
    """Refuse a manifest of pairs that is not here or cannot be used, unless the pairs are made."""
    manifest = stage.preference.manifest if stage.preference is not None else None
    if manifest is None:
        return
    from kairos.training.preference import read_list, read_pairs

    if read_list(recipe.output / stage.name / "pairs"):
        return
    if not manifest.is_file():
        raise UserError(f"stage {stage.name}: no manifest at {manifest}")
    read_pairs(manifest, stage.buckets[0])


def check_data(source: Any) -> None:
    """Refuse a manifest or a folder that is not here, and lines of a manifest that are no clips."""
    if isinstance(source, ManifestSource):
        for line, entry in read_lines(source.file):
            read_entry(entry, f"{source.file}, line {line}")
    if isinstance(source, WebdatasetSource) and not source.folder.is_dir():
        raise UserError(f"no folder of shards at {source.folder}")
