"""Runs a recipe: every step of a model's making in order, each with what the ones before have made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from kairos.data.files import lock, prepare_folder
from kairos.errors import UserError
from kairos.schedulers import FewStepScheduler
from kairos.training.cache import build_cache, description
from kairos.training.check import check_run, check_there
from kairos.training.conditioner import train_conditioner
from kairos.training.decoder import GIVEN, train_decoder
from kairos.training.materials import (
    clip_sets,
    encoders_of_base,
    load_encoders,
    load_start,
    made_before,
    read_again,
    sampler_before,
    sampler_of,
    save_whole,
)
from kairos.training.origins import cache_of, finish, hash_of, is_finished, is_trained, options_hash
from kairos.training.parallel import Processes, processes
from kairos.training.plan import check_memory
from kairos.training.recipe import Recipe
from kairos.training.run import run_stage
from kairos.training.stage import Stage
from kairos.training.vae import train_vae
from kairos.weights import load_vae_file

logger = logging.getLogger(__name__)


def run_recipe(recipe: Recipe, only: tuple[str, ...] = ()) -> None:
    """Run the steps of `recipe`, or those named in `only`, in order.

    One that has finished is not run again; one that was stopped goes on from its checkpoint.
    """
    for name in only:
        if name not in recipe.steps:
            raise UserError(f"unknown stage {name!r}; stages are {', '.join(recipe.steps)}")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    steps = [name for name in recipe.steps if not only or name in only]
    stages = [stage for stage in recipe.stages if stage.name in steps]
    with processes() as here, ExitStack() as held:
        check_run(recipe, stages, here.world)
        for stage in stages:
            if not is_trained(recipe, stage):
                check_memory(recipe, stage, here)
        if here.first:
            check_there(recipe, steps)
            warn_of_rates(recipe, stages)
            warn_of_samplers(recipe, stages)
            prepare_folder(recipe.output)
            busy = f"another kairos train works in {recipe.output}; wait for it, or name another output"
            held.enter_context(lock(recipe.output, busy))
        for name in steps:
            if here.first:
                logger.info("stage %s", name)
            run_step(recipe, name, here)
            here.wait()


def run_step(recipe: Recipe, name: str, here: Processes) -> None:
    """One stage of the recipe. What is not the LinearDiT is made by the first process alone."""
    alone: dict[str, Callable[[Recipe, Processes], None]] = {
        "vae": make_vae,
        "conditioner": make_conditioner,
        "cache": make_cache,
        "decoder": make_decoder,
        "assemble": assemble,
    }
    if name in alone:
        if here.first:
            alone[name](recipe, here)
    else:
        numbers = [stage.name for stage in recipe.stages]
        run_stage(recipe, numbers.index(name), here)


def make_vae(recipe: Recipe, here: Processes) -> None:
    start = None
    if recipe.base:
        start = load_vae_file(encoders_of_base(recipe.base)[0], dtype=torch.float32)
    train_vae(
        recipe.output / "vae",
        stages=recipe.vae,
        scenes=recipe.scenes,
        seed=recipe.seed,
        start=start,
        device=here.device,
    )


def make_conditioner(recipe: Recipe, here: Processes) -> None:
    output, options = recipe.output / "conditioner", recipe.conditioner or {}
    origins = {"options": options_hash(options, recipe.scenes, recipe.seed)}
    if is_finished("conditioner", output, origins):
        return
    measured = train_conditioner(output, scenes=recipe.scenes, seed=recipe.seed, **options)
    finish(output, origins)
    logger.info("prompt encoder: %s", measured)


def make_cache(recipe: Recipe, here: Processes) -> None:
    """Latents and embeddings of every stage's clips."""
    encoders = load_encoders(recipe)
    done: list[Any] = []
    for stage in recipe.stages:
        if stage.objective == "preference":
            continue  # its pairs are made when it runs, by the model that it starts from
        source = recipe.source(stage)
        what = description(source, stage.buckets)
        if what in done:
            continue
        done.append(what)
        buckets = [replace(bucket, batch_size=0) for bucket in stage.buckets]
        report = build_cache(
            recipe.output / "cache",
            source,
            buckets,
            encoders,
            described=what,
            batch_size=1 if here.device.type == "cpu" else 128,  # one clip's features fit a core's cache
            device=here.device,
        )
        if not report["made"] and not report["kept"]:
            raise UserError(
                f"stage {stage.name}: none of its clips can be used; see {recipe.output / 'cache'}"
            )


def make_decoder(recipe: Recipe, here: Processes) -> None:
    """The VAE whose decoder has seen what the last stage makes of its own clips."""
    assert recipe.decoder is not None
    output, stage = recipe.output / "decoder", recipe.stages[-1]
    origins = {"weights": hash_of(recipe, stage.name), **cache_of(recipe, stage)}
    made_of = origins | {"options": options_hash(recipe.decoder, recipe.seed)}
    if is_finished("decoder", output, made_of):
        return
    encoders = load_encoders(recipe)
    long = [one for one in clip_sets(recipe, stage, encoders) if one.latent_frames > GIVEN]
    if not long:
        raise UserError(f"decoder: stage {stage.name} has no clips of more than 5 frames")
    clips = long[0]
    scheduler, defaults = sampler_of(recipe, stage)
    train_decoder(
        output,
        recipe.decoder,
        encoders.vae,
        load_start(recipe, stage.name),
        clips,
        read_again(recipe, stage, [clips]),
        scheduler=scheduler,
        defaults=defaults,
        precision=stage.precision,
        seed=recipe.seed,
        origins=origins,
        here=here,
    )
    finish(output, made_of)


def assemble(recipe: Recipe, here: Processes) -> None:
    """One folder in diffusers' layout, of the last stage that trained a whole LinearDiT."""
    if (stage := recipe.assembled) is None:
        logger.info("LoRA alone: use %s", recipe.output / recipe.stages[-1].name / "ema" / "lora.safetensors")
        return
    decoder = made_before(recipe, "decoder") if recipe.decoder is not None else None
    transformer = load_start(recipe, stage.name, "bfloat16")
    encoders = load_encoders(recipe)
    if decoder is not None:
        encoders = replace(encoders, vae=load_vae_file(decoder))
    for part in (encoders.vae, encoders.text_encoder):
        part.to(torch.bfloat16)
    pipeline = encoders.pipeline(transformer, *sampler_of(recipe, stage))
    save_whole(pipeline, folder := recipe.output / recipe.name)
    logger.info("%s is ready: kairos generate --model %s ...", folder, folder)


def warn_of_rates(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Say where the finished model would play its videos faster or slower than it has seen them."""
    finished = recipe.fps_of(recipe.assembled or recipe.stages[-1]) if stages else 0.0
    for stage in stages:
        fps = recipe.data_fps(stage)
        if fps is not None and fps != finished:
            logger.warning(
                "stage %s learns from clips at %g fps, and the finished model says %g; give data.fps and "
                "defaults.fps one value",
                stage.name,
                fps,
                finished,
            )


def warn_of_samplers(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Say where flow matching follows a distillation: a model then takes many steps, and a LoRA learned so is
    none for few."""
    for stage in stages:
        start = recipe.start_of(stage)
        if stage.objective != "flow" or start in ("", "random"):
            continue
        few, _ = sampler_before(recipe, stage)
        if not isinstance(few, FewStepScheduler):
            continue
        steps = len(few.config.sampling_times)
        if stage.lora is not None:
            logger.warning(
                "stage %s: %s was distilled to %d steps, and a LoRA learned by flow matching goes with its "
                "teacher; start from that",
                stage.name,
                start,
                steps,
            )
        elif recipe.assembled is not None and recipe.taught_by(recipe.assembled) == stage:
            _, now = sampler_of(recipe, stage)
            logger.info(
                "stage %s: %s was distilled to %d steps; after flow matching it takes %d, with guidance %g; "
                "defaults may say others",
                stage.name,
                start,
                steps,
                now["num_inference_steps"],
                now["guidance_scale"],
            )
