"""A recipe: one YAML file that names every stage of a model's making, and the command that runs them in
order.

A stage that has finished is not run again; one that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kairos.data.files import locked, prepare_folder
from kairos.errors import UserError
from kairos.training.config import above_0, arguments, at_least, build
from kairos.training.decoder import DecoderStage
from kairos.training.stage import Distillation, Stage
from kairos.training.vae import VAEStage
from kairos.worlds import SCENES

if TYPE_CHECKING:
    from kairos.schedulers import FewStepScheduler, FlowMatchScheduler
    from kairos.training.cache import ClipSet, Encoders
    from kairos.training.clips import ClipReference, ClipSource
    from kairos.training.parallel import Processes

logger = logging.getLogger(__name__)

BEFORE, AFTER = ("vae", "conditioner", "cache"), ("decoder", "assemble")
UNSHAPED = ("layer_pattern", "window_frames", "dilation", "pad_dilated", "eps", "causal")
"""What the shapes of a LinearDiT's weights do not tell."""

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
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
    def fps(self) -> float:
        """Of the finished pipeline: what is said, else that of the last clips, else the base's."""
        from kairos import presets, sizes

        base = presets.defaults_of(self.base) if self.base else sizes.RELEASED_DEFAULTS
        learned = self.data_fps(self.stages[-1]) if self.stages else None
        return self.defaults.fps or learned or base["fps"]


def read_recipe(path: Path) -> Recipe:
    """The recipe of a YAML file. Raises UserError, in one line, for what cannot be used."""
    try:
        import yaml

        from kairos.data.yaml_text import load_yaml
    except ModuleNotFoundError:
        raise UserError('training needs more packages; pip install "kairos-world[train]"') from None
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no recipe at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
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
                f"{where}: {name!r} is no name: it must be of letters, digits, '_', '.' and '-', begin with "
                "a letter or a digit, and not be random"
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


def run_recipe(recipe: Recipe, only: tuple[str, ...] = ()) -> None:
    """Run the stages of `recipe`, or those named in `only`, in order."""
    import torch

    from kairos.training.check import check_run, check_there
    from kairos.training.parallel import processes
    from kairos.training.plan import check_memory

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
            check_memory(recipe, stage, here)
        if here.first:
            check_there(recipe, steps)
            warn_of_rates(recipe, stages)
            prepare_folder(recipe.output)
            busy = f"another kairos train works in {recipe.output}; wait for it, or name another output"
            held.enter_context(locked(recipe.output, busy))
        for name in steps:
            if here.first:
                logger.info("stage %s", name)
            run_step(recipe, name, here)
            here.wait()


def warn_of_rates(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Say where the finished model would play its videos faster or slower than it has seen them."""
    for stage in stages:
        fps = recipe.data_fps(stage)
        if fps is not None and fps != recipe.fps:
            logger.warning(
                "stage %s learns from clips at %g fps, and the finished model says %g; give data.fps and "
                "defaults.fps one value",
                stage.name,
                fps,
                recipe.fps,
            )


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
        from kairos.training.run import run_stage

        numbers = [stage.name for stage in recipe.stages]
        run_stage(recipe, numbers.index(name), here)


def make_vae(recipe: Recipe, here: Processes) -> None:
    import torch

    from kairos.training.vae import train_vae
    from kairos.weights import load_vae_file

    output = recipe.output / "vae"
    if (output / "finished").exists():
        logger.info("%s is finished", output)
        return
    start = None
    if recipe.base:
        start = load_vae_file(encoders_of_base(recipe.base)[0], dtype=torch.float32)
    train_vae(
        output, stages=recipe.vae, scenes=recipe.scenes, seed=recipe.seed, start=start, device=here.device
    )
    (output / "finished").touch()


def make_conditioner(recipe: Recipe, here: Processes) -> None:
    from kairos.training.conditioner import train_conditioner

    output = recipe.output / "conditioner"
    if (output / "finished").exists():
        logger.info("%s is finished", output)
        return
    options = recipe.conditioner or {}
    measured = train_conditioner(output, scenes=recipe.scenes, seed=recipe.seed, **options)
    (output / "finished").touch()
    logger.info("prompt encoder: %s", measured)


def make_cache(recipe: Recipe, here: Processes) -> None:
    """Latents and embeddings of every stage's clips."""
    from kairos.training.cache import build_cache, description

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


def clip_sets(recipe: Recipe, stage: Stage, encoders: Encoders) -> list[ClipSet]:
    """The cached clips of a stage."""
    from kairos.training.cache import description, load_clips

    source = recipe.source(stage)
    what = description(source, stage.buckets)
    return load_clips(recipe.output / "cache", stage.buckets, encoders, described=what)


def load_encoders(recipe: Recipe) -> Encoders:
    """VAE and text encoder: the recipe's own, or those of its base."""
    from kairos.conditioning import TEMPLATES, load_text_encoder
    from kairos.training.cache import Encoders
    from kairos.weights import load_vae_file

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
    from kairos import presets

    preset, folder = presets.locate(base)
    if preset is not None and preset.kind == "released":
        files = presets.local_files(preset, folder)
        return files["vae"], files["text_encoder"], preset.template
    assert folder is not None
    return folder, folder, str(presets.read_json(folder / "model_index.json").get("prompt_template"))


def vae_dtype() -> Any:
    """bfloat16 where it is the quicker one; else float32, which is more exact as well."""
    import torch

    from kairos.models.vae import quickest_dtype

    return torch.bfloat16 if torch.cuda.is_available() else quickest_dtype("cpu") or torch.float32


def encoder_dtype(folder: Path) -> Any:
    """bfloat16 for a large encoder beside a GPU, whose memory is for training; else float32, which is more
    exact and on a CPU quicker. `folder` is the encoder's, or a whole model's."""
    import torch

    own = folder / "text_encoder"
    size = sum(file.stat().st_size for file in (own if own.is_dir() else folder).rglob("*.safetensors"))
    return torch.bfloat16 if torch.cuda.is_available() and size > 1e9 else torch.float32


def load_start(recipe: Recipe, source: str, dtype: str = "float32", *, teaches: bool = False) -> Any:
    """The LinearDiT that `source` names: a stage of the recipe, a model, a file or a folder.

    The recipe's `model` overrides what it says of itself, unless it `teaches`: a teacher may be larger than
    what learns from it, and see whole clips where that sees chunks.
    """
    import torch

    from kairos import presets
    from kairos.weights import load_transformer_file

    options: dict[str, Any] = {"dtype": getattr(torch, dtype), **({} if teaches else recipe.model)}
    path = weights_at(recipe, source)
    if source in [stage.name for stage in recipe.stages]:
        if not (path / "config.json").exists():
            raise UserError(f"stage {source} has no weights in {path}; run it first")
        return load_transformer_file(path, **options)
    if path == Path(source):
        otherwise = base_config(recipe) | recipe.model
        otherwise = {key: otherwise[key] for key in UNSHAPED if key in otherwise}
    else:
        preset, _ = presets.locate(source)
        otherwise = dict(preset.transformer_config) if preset is not None else {}
    return load_transformer_file(path, otherwise=otherwise, **options)


def weights_at(recipe: Recipe, source: str) -> Path:
    """The file or folder of the LinearDiT that `source` names. UserError for a model that is not here."""
    from kairos import presets

    if source in [stage.name for stage in recipe.stages]:
        return recipe.output / source / "ema"
    path = Path(source)
    if path.exists() and not (path / presets.MARK).exists():
        return path
    preset, folder = presets.locate(source)
    if preset is not None and preset.kind == "released":
        return presets.local_files(preset, folder)["transformer"]
    assert folder is not None
    return folder / "transformer"


def base_config(recipe: Recipe) -> dict[str, Any]:
    """What the configuration of the base's LinearDiT says; nothing without a base."""
    return config_of(recipe.base) if recipe.base else {}


def config_of(model: str) -> dict[str, Any]:
    """What the configuration of a LinearDiT says, of a model by name or folder; nothing is loaded."""
    from kairos import presets

    preset, folder = presets.locate(model)
    if preset is not None and preset.kind == "released":
        return dict(preset.transformer_config)
    file = folder / "transformer" / "config.json" if folder is not None else None
    config = presets.read_json(file) if file is not None and file.exists() else {}
    return {name: value for name, value in config.items() if not name.startswith("_")}


def make_decoder(recipe: Recipe, here: Processes) -> None:
    """The VAE whose decoder has seen what the last stage makes of its own clips."""
    from kairos.training.decoder import GIVEN, train_decoder
    from kairos.training.origins import hash_of, is_finished, made_of

    assert recipe.decoder is not None
    output, stage = recipe.output / "decoder", recipe.stages[-1]
    origins = made_of(recipe, stage) | {"weights": hash_of(recipe, stage.name)}
    if is_finished("decoder", output, origins):
        logger.info("%s is finished", output)
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
        here=here,
    )
    (output / "finished").write_text(json.dumps(origins))


def read_again(recipe: Recipe, stage: Stage, sets: Sequence[ClipSet]) -> dict[str, ClipReference]:
    """Where the frames of a stage's cached clips are read, by their keys."""
    from kairos.training.clips import Skipped

    found = recipe.source(stage).references([clips.bucket for clips in sets], Skipped())
    references = {reference.key: reference for reference in found}
    gone = sum(key not in references for clips in sets for key in clips.keys)
    if gone:
        raise UserError(
            f"stage {stage.name}: {gone} cached clips are not in the data any more; run the stage cache"
        )
    return references


def sampler_of(recipe: Recipe, stage: Stage) -> tuple[Any, dict[str, float | bool]]:
    """The sampler of what a stage has trained, and the defaults of its pipeline.

    Preferences leave a model the sampler that it had. Flow matching makes one of many steps of any.
    """
    from kairos import presets, sizes
    from kairos.schedulers import FewStepScheduler, FlowMatchScheduler

    base = dict(presets.defaults_of(recipe.base)) if recipe.base else {}
    said = {**recipe.defaults.said(), "fps": recipe.fps}
    named = {one.name: one for one in recipe.stages}
    while stage.objective == "preference" and recipe.start_of(stage) in named:
        stage = named[recipe.start_of(stage)]
    if stage.objective == "preference":
        for source in (recipe.start_of(stage), recipe.base):
            if (own := own_sampler(source)) is not None:
                return own, {**presets.defaults_of(source), **said}
        return FlowMatchScheduler(), base | said
    if stage.objective == "distillation":
        options = stage.distillation or Distillation()
        few = {"num_inference_steps": len(options.sampling_times), "guidance_scale": 1.0}
        scheduler = FewStepScheduler(sampling_times=options.sampling_times, shift=options.shift)
        return scheduler, base | said | few
    if isinstance(own_sampler(recipe.base), FewStepScheduler):
        base |= {name: sizes.RELEASED_DEFAULTS[name] for name in ("num_inference_steps", "guidance_scale")}
    return FlowMatchScheduler(), base | said


def own_sampler(source: str) -> FewStepScheduler | FlowMatchScheduler | None:
    """The sampler of a model by name or folder; None for weights alone, which say nothing of it."""
    from kairos import presets
    from kairos.schedulers import FewStepScheduler, FlowMatchScheduler

    marks = (presets.MARK, "model_index.json")
    if not source or not (presets.is_name(source) or any((Path(source) / mark).exists() for mark in marks)):
        return None
    preset, folder = presets.locate(source)
    if preset is not None and preset.kind == "released":
        return FewStepScheduler() if preset.scheduler == "few_step" else FlowMatchScheduler()
    assert folder is not None
    config = presets.read_json(folder / "scheduler" / "scheduler_config.json")
    kind = FewStepScheduler if config.get("_class_name") == FewStepScheduler.__name__ else FlowMatchScheduler
    return kind.from_config(config)


def assemble(recipe: Recipe, here: Processes) -> None:
    """One folder in diffusers' layout, of the last stage that trained a whole LinearDiT."""
    import torch

    from kairos.pipeline import KairosPipeline
    from kairos.weights import load_vae_file

    whole = [stage for stage in recipe.stages if stage.lora is None]
    if not whole:
        logger.info("LoRA alone: use %s", recipe.output / recipe.stages[-1].name / "ema" / "lora.safetensors")
        return
    stage = whole[-1]
    decoder = made_before(recipe, "decoder") if recipe.decoder is not None else None
    transformer = load_start(recipe, stage.name, "bfloat16")
    encoders = load_encoders(recipe)
    vae = encoders.vae if decoder is None else load_vae_file(decoder)
    scheduler, defaults = sampler_of(recipe, stage)
    pipeline = KairosPipeline(
        transformer=transformer,
        vae=vae.to(torch.bfloat16),
        text_encoder=encoders.text_encoder.to(torch.bfloat16),
        tokenizer=encoders.tokenizer,
        processor=encoders.processor,
        scheduler=scheduler,
        prompt_template=encoders.template,
        defaults=defaults,
    )
    folder = recipe.output / recipe.name
    pipeline.save_pretrained(folder)
    for file in folder.glob("*/config.json"):  # where a part came from is nobody's business
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n")
    logger.info("%s is ready: kairos generate --model %s ...", folder, folder)
