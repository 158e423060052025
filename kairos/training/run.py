"""One stage of a recipe, from its configuration to the loop."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kairos.models.transformer import KairosTransformer3DModel
from kairos.training.cache import Encoders
from kairos.training.checkpoint import load_checkpoint
from kairos.training.clips import SimulatorSource
from kairos.training.flow import FlowMatching
from kairos.training.frames import FrameErrors
from kairos.training.loop import train
from kairos.training.materials import clip_sets, load_encoders, load_start, read_again, sampler_of
from kairos.training.objective import Objective
from kairos.training.origins import check_origins, is_at_end, made_of
from kairos.training.parallel import Processes, prepare
from kairos.training.plan import model_config
from kairos.training.recipe import Recipe
from kairos.training.stage import Distillation, Preference, Stage
from kairos.training.visible import visible_root

logger = logging.getLogger(__name__)


def run_stage(recipe: Recipe, number: int, here: Processes) -> None:
    """Train the LinearDiT through one stage; nothing where its checkpoint is at the last step."""
    stage = replace(recipe.stages[number], seed=recipe.seed + recipe.stages[number].seed)
    output = recipe.output / stage.name
    state = load_checkpoint(output) if output.is_dir() else None
    origins = made_of(recipe, stage) if here.first else {}
    if state is not None:
        check_origins(stage.name, output, state.get("origins", {}), origins)
    if state is not None and is_at_end(stage, output, state):
        logger.info("%s is finished", output)
        return
    del state
    model = starting_model(recipe, stage)
    if stage.lora is not None:
        from kairos.training.lora import add_lora

        add_lora(model, stage.lora, stage.seed)
    elif stage.train:
        train_only(model, stage)
    encoders = load_encoders(recipe)
    objective, clips = build_objective(recipe, stage, model, encoders, output, here)
    encoders = replace(encoders, text_encoder=None, tokenizer=None)  # of several GB, and done with
    prepare(model, here, checkpointing=stage.checkpointing, compiled=stage.compile)
    make_samples = None
    if stage.samples_every and clips is not None:
        from kairos.training.samples import SampleVideos

        scheduler, defaults = sampler_of(recipe, stage)
        fps, precision = recipe.fps_of(stage), stage.precision
        make_samples = SampleVideos(clips, encoders, here, scheduler, defaults, fps=fps, precision=precision)
    try:
        train(model, objective, stage, output, here=here, make_samples=make_samples, origins=origins)
    finally:
        objective.close()


def starting_model(recipe: Recipe, stage: Stage) -> Any:
    """What the stage's `start_from` says ("random": nothing); else the stage before, the base, or nothing."""
    source = recipe.start_of(stage)
    if source not in ("", "random"):
        return load_start(recipe, source)
    torch.manual_seed(recipe.seed)
    return KairosTransformer3DModel(**model_config(recipe))


def train_only(model: Any, stage: Stage) -> None:
    """Freeze all but the parts that the stage names."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in stage.train))


def build_objective(
    recipe: Recipe, stage: Stage, model: Any, encoders: Encoders, output: Path, here: Processes
) -> tuple[Objective, Any]:
    """The objective, and clips to make samples of."""
    if stage.objective == "preference":
        return preference(recipe, stage, model, encoders, output, here), None
    sets = clip_sets(recipe, stage, encoders)
    longest = max(sets, key=lambda clips: clips.bucket.frames)
    root = None
    if stage.visible:
        root = visible_root(encoders.vae.to(here.device), longest, stage.visible, stage.seed).to(here.device)
    if stage.objective == "distillation":
        from kairos.training.distillation import DistillationObjective

        model.to(here.device)
        options = stage.distillation or Distillation()
        teacher = load_start(recipe, options.teacher, teaches=True) if options.teacher else None
        frames = None
        if options.frames:
            moving = [clips for clips in sets if clips.latent_frames > 2]
            readable = read_again(recipe, stage, moving)
            frames = FrameErrors(encoders.vae, readable, options.frame_clips, here.device)
        return DistillationObjective(model, sets, stage, options, here, teacher, root, frames), longest
    if stage.state is not None:
        from kairos.training.state import StateObjective

        source = recipe.source(stage)
        assert isinstance(source, SimulatorSource)
        return StateObjective(model, sets, stage, stage.state, source, here, root), longest
    return FlowMatching(sets, stage, here, root), longest


def preference(
    recipe: Recipe, stage: Stage, model: Any, encoders: Encoders, output: Path, here: Processes
) -> Objective:
    """Pairs of a manifest, or of the model's own rollouts; they are made once."""
    from kairos.schedulers import FewStepScheduler
    from kairos.training.preference import (
        PreferenceObjective,
        load_pairs,
        manifest_pairs,
        rollout_pairs,
    )

    options, bucket, folder = stage.preference or Preference(), stage.buckets[0], output / "pairs"
    if here.first:
        for part in (encoders.vae, encoders.text_encoder):
            part.to(here.device)
        if options.manifest is not None:
            manifest_pairs(folder, options.manifest, bucket, encoders, recipe.fps_of(stage), here.device)
        else:
            source = recipe.source(stage)
            assert isinstance(source, SimulatorSource)
            scheduler, defaults = sampler_of(recipe, stage)
            if isinstance(scheduler, FewStepScheduler):
                options = replace(options, guidance_scale=1.0)  # it was distilled to do without
            pipeline = encoders.pipeline(model.eval().to(here.device), scheduler, defaults)
            pipeline.set_progress_bar_config(disable=True)
            rollout_pairs(
                folder, pipeline, encoders, source, bucket, options, seed=stage.seed, device=here.device
            )
        encoders.text_encoder.to("cpu")
    here.wait()
    model.to(here.device)
    return PreferenceObjective(model, load_pairs(folder, bucket, encoders), stage, options, here)
