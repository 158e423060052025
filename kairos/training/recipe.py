"""A recipe: one YAML file that names every stage of a model's making. `steps.py` runs them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kairos.data.config import above_0, arguments, at_least, build
from kairos.errors import UserError
from kairos.training.decoder import DecoderStage
from kairos.training.stage import Stage
from kairos.training.vae import VAEStage
from kairos.worlds import SCENES

if TYPE_CHECKING:
    from kairos.training.clips import ClipSource

BEFORE, AFTER = ("vae", "conditioner", "cache"), ("decoder", "assemble")

NAME = re.compile(r"[^-./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*")
"""Of a recipe or a stage: each is a folder's as well."""


@dataclass(frozen=True)
class Defaults:
    """What a call of the finished pipeline takes where it is not told; None leaves it to the base."""

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guide_continuation: bool | None = None

    def __post_init__(self) -> None:
        where = "defaults."
        above_0(self, "height", "width", "num_frames", "fps", "num_inference_steps", where=where)
        if (self.guidance_scale or 0) < 0:
            raise UserError(f"defaults.guidance_scale must be at least 0, got {self.guidance_scale}")
        for name in ("height", "width"):
            if (getattr(self, name) or 0) % 16:
                raise UserError(f"defaults.{name} must be a multiple of 16 pixels, got {getattr(self, name)}")
        if self.num_frames is not None and self.num_frames % 4 != 1:
            raise UserError(f"defaults.num_frames must be 4n + 1, got {self.num_frames}")

    def said(self) -> dict[str, float | bool]:
        """Those that are there."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Recipe:
    """What `kairos train FILE` does.

    Attributes:
        output: folder of everything that is made.
        base: a model, by name or folder, that lends its VAE, its text encoder and the weights to start from.
        scenes: what a VAE and a prompt encoder made here learn from.
        vae: stages of a VAE made from nothing, or from the base's.
        conditioner: options of a prompt encoder made from nothing (`train_conditioner`).
        data: the clips, {"source": simulator | manifest | webdataset, ...}, see `kairos.training.clips`.
        model: the LinearDiT's configuration; beside `base`, what is different from it.
        stages: of the LinearDiT, in order.
        decoder: a stage of the VAE's decoder on what the LinearDiT of the last stage makes.
        defaults: of the finished pipeline.
        seed: of everything; a stage's own is added to it.
        threads: of the CPU.
    """

    name: str
    output: Path
    base: str = ""
    scenes: tuple[str, ...] = ()
    vae: tuple[VAEStage, ...] = ()
    conditioner: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    decoder: DecoderStage | None = None
    defaults: Defaults = Defaults()
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        at_least(0, self, "seed")
        if self.threads is not None:
            at_least(1, self, "threads")

    @property
    def steps(self) -> tuple[str, ...]:
        """What there is to run, in order."""
        named = [stage.name for stage in self.stages]
        there = {
            "vae": bool(self.vae),
            "conditioner": self.conditioner is not None,
            "cache": bool(named),
            "decoder": self.decoder is not None,
            "assemble": bool(named),
        }
        return tuple(part for part in (*BEFORE, *named, *AFTER) if there.get(part, True))

    def start_of(self, stage: Stage) -> str:
        """What a stage begins with: an earlier stage, a model, a file, a folder; "random" or "": nothing."""
        number = [one.name for one in self.stages].index(stage.name)
        return stage.start_from or (self.stages[number - 1].name if number else self.base)

    def source(self, stage: Stage) -> ClipSource:
        """Where the clips of a stage come from."""
        from kairos.training.clips import build_source

        where = f"stage {stage.name}: data" if stage.data else "data"
        return build_source(dict(stage.data or self.data), where)

    def data_fps(self, stage: Stage) -> float | None:
        """Of the clips of a stage, where their source has a rate."""
        there = stage.data or self.data
        return getattr(self.source(stage), "fps", None) if there else None

    @property
    def assembled(self) -> Stage | None:
        """The stage whose weights are the finished pipeline's: the last one of a whole LinearDiT."""
        return next((stage for stage in reversed(self.stages) if stage.lora is None), None)

    def taught_by(self, stage: Stage) -> Stage:
        """The stage whose rate and sampler a stage's weights have: preferences leave a model both."""
        named = {one.name: one for one in self.stages}
        while stage.objective == "preference" and self.start_of(stage) in named:
            stage = named[self.start_of(stage)]
        return stage

    def fps_of(self, stage: Stage) -> float:
        """Of what a stage has trained: what is said, else that of its clips, else the base's."""
        from kairos import presets, sizes

        base = presets.defaults_of(self.base) if self.base else sizes.RELEASED_DEFAULTS
        return self.defaults.fps or self.data_fps(self.taught_by(stage)) or base["fps"]


def read_recipe(path: Path) -> Recipe:
    """The recipe of a YAML file. Raises UserError, in one line, for what cannot be used."""
    try:
        from kairos.data.yaml_text import read_yaml
    except ModuleNotFoundError:
        raise UserError('training needs more packages; pip install "kairos-world[train]"') from None
    content = read_yaml(path, "recipe")
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of keys to values")
    return build_recipe(content, path.name)


def build_recipe(content: dict[str, Any], where: str) -> Recipe:
    """The recipe of a mapping, checked as far as it can be without data."""
    from kairos.models.transformer import KairosTransformer3DModel
    from kairos.training.check import check_stage, learns_from_clips

    recipe = build(Recipe, content, where)
    recipe = replace(
        recipe, model=arguments(KairosTransformer3DModel.__init__, recipe.model, f"{where}.model")
    )
    if recipe.conditioner is not None:
        from kairos.training.conditioner import train_conditioner

        for taken in ("scenes", "seed"):
            if taken in recipe.conditioner:
                raise UserError(f"{where}.conditioner: {taken} is the recipe's own; put it at the top")
        options = arguments(train_conditioner, recipe.conditioner, f"{where}.conditioner")
        for name, value in options.items():
            if value < 1:
                raise UserError(f"{where}.conditioner.{name} must be at least 1, got {value}")
    if (recipe.vae or recipe.conditioner is not None) and not recipe.scenes:
        raise UserError(f"{where}: the key 'scenes' is missing: a VAE and a conditioner learn from scenes")
    for scene in recipe.scenes:
        if scene not in SCENES:
            raise UserError(f"{where}: unknown scene {scene!r}; one of {', '.join(SCENES)}")
    if recipe.conditioner is not None and not recipe.vae:
        raise UserError(f"{where}: the key 'vae' is missing: VAE and conditioner are made together")
    if recipe.vae and recipe.conditioner is None and not recipe.base:
        raise UserError(
            f"{where}: the key 'conditioner' is missing: VAE and conditioner are made together, or the "
            "'base' lends both"
        )
    if recipe.vae and recipe.vae[0].anchor and not recipe.base:
        raise UserError(f"{where}: vae[0].anchor: a VAE from nothing has no latents to be held to")
    if not recipe.steps:
        raise UserError(f"{where}: there is nothing to do: give it stages, or vae and conditioner")
    names = [one.name for one in recipe.stages]
    for name in (recipe.name, *names):
        if not NAME.fullmatch(name) or name == "random":
            raise UserError(
                f"{where}: {name!r} is no name: it must not be empty or random, begin with '.' or '-', or "
                "have slashes or control characters in it"
            )
    for name in names:
        if names.count(name) > 1 or name in (*BEFORE, *AFTER):
            raise UserError(f"{where}: two stages are named {name!r}; name them apart")
    if recipe.name in (*BEFORE, *AFTER, *names):
        raise UserError(
            f"{where}: the recipe is named {recipe.name!r}, and so is one of its stages; rename it"
        )
    if recipe.stages and not recipe.base and not recipe.vae:
        raise UserError(f"{where}: the key 'base' is missing: a model that lends its VAE and text encoder")
    if recipe.stages and not recipe.model and not recipe.base and not recipe.stages[0].start_from:
        raise UserError(f"{where}: the key 'model' is missing: the LinearDiT's configuration")
    if recipe.decoder is not None and (not recipe.stages or not learns_from_clips(recipe.stages[-1])):
        raise UserError(
            f"{where}: the decoder learns from what the last stage makes of its clips; that one must train "
            "a whole LinearDiT, by flow or distillation, in a bucket of more than 5 frames"
        )
    for number, one in enumerate(recipe.stages):
        check_stage(recipe, one, names[:number])
    return recipe
