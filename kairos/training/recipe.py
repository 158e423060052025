"""A recipe: one YAML file that names every stage of a model's making, and the command that runs them in
order.

A stage that has finished is not run again; one that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kairos.errors import UserError
from kairos.training.config import arguments, at_least, build, check_keys
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

DEFAULTS = (
    "height",
    "width",
    "num_frames",
    "fps",
    "num_inference_steps",
    "guidance_scale",
    "guide_continuation",
)


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
        defaults: of the finished pipeline, see DEFAULTS.
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
    defaults: dict[str, float | bool] = field(default_factory=dict)
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


def read_recipe(path: Path) -> Recipe:
    """The recipe of a YAML file. Raises UserError, in one line, for what cannot be used."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise UserError('training needs more packages; pip install "kairos-world[train]"') from None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no recipe at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of keys to values")
    return build_recipe(content, path.name)


def build_recipe(content: dict[str, Any], where: str) -> Recipe:
    """The recipe of a mapping, checked as far as it can be without data."""
    from kairos.models.transformer import KairosTransformer3DModel

    recipe = build(Recipe, content, where)
    check_keys(recipe.defaults, DEFAULTS, f"{where}.defaults")
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
    names = [one.name for one in recipe.stages]
    for name in names:
        if names.count(name) > 1 or name in (*BEFORE, *AFTER):
            raise UserError(f"{where}: two stages are named {name!r}; name them apart")
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
        if one.objective != "preference" or one.preference is None or one.preference.manifest is None:
            recipe.source(one)
    return recipe


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
    named = {one.name: one for one in recipe.stages}
    teacher = stage.distillation.teacher if stage.distillation is not None else ""
    for key, source in (("start_from", stage.start_from), ("distillation.teacher", teacher)):
        if source in named and source not in before:
            refuse(f"{key} must name an earlier stage, got {source!r}")
    for name in (recipe.start_of(stage), teacher):
        if name in named and named[name].lora is not None:
            refuse(f"{name} makes a LoRA, no weights to start from; let start_from name a whole model")


def learns_from_clips(stage: Stage) -> bool:
    """Whether a stage trains a whole LinearDiT on cached clips that are longer than the start of a sample."""
    long = any(bucket.frames > 5 for bucket in stage.buckets)
    return stage.objective != "preference" and stage.lora is None and long


def run_recipe(recipe: Recipe, only: tuple[str, ...] = ()) -> None:
    """Run the stages of `recipe`, or those named in `only`, in order."""
    import torch

    from kairos.training.parallel import processes
    from kairos.training.plan import check_memory

    for name in only:
        if name not in recipe.steps:
            raise UserError(f"unknown stage {name!r}; stages are {', '.join(recipe.steps)}")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with processes() as here:
        for stage in recipe.stages:
            if not only or stage.name in only:
                check_memory(recipe, stage, here)
        for name in recipe.steps:
            if only and name not in only:
                continue
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
    if source in [stage.name for stage in recipe.stages]:
        folder = recipe.output / source / "ema"
        if not (folder / "config.json").exists():
            raise UserError(f"stage {source} has no weights in {folder}; run it first")
        return load_transformer_file(folder, **options)
    path = Path(source)
    if path.exists() and not (path / presets.MARK).exists():
        otherwise = base_config(recipe) | recipe.model
        return load_transformer_file(
            path, otherwise={key: otherwise[key] for key in UNSHAPED if key in otherwise}, **options
        )
    preset, base = presets.locate(source)
    if preset is not None and preset.kind == "released":
        files = presets.local_files(preset, base)["transformer"]
        return load_transformer_file(files, otherwise=preset.transformer_config, **options)
    assert base is not None
    return load_transformer_file(base / "transformer", **options)


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

    assert recipe.decoder is not None
    output, stage = recipe.output / "decoder", recipe.stages[-1]
    if (output / "finished").exists():
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
        seed=recipe.seed,
        device=here.device,
    )
    (output / "finished").touch()


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
    named = {one.name: one for one in recipe.stages}
    while stage.objective == "preference" and recipe.start_of(stage) in named:
        stage = named[recipe.start_of(stage)]
    if stage.objective == "preference":
        for source in (recipe.start_of(stage), recipe.base):
            if (own := own_sampler(source)) is not None:
                return own, {**presets.defaults_of(source), **recipe.defaults}
        return FlowMatchScheduler(), base | recipe.defaults
    if stage.objective == "distillation":
        options = stage.distillation or Distillation()
        few = {"num_inference_steps": len(options.sampling_times), "guidance_scale": 1.0}
        scheduler = FewStepScheduler(sampling_times=options.sampling_times, shift=options.shift)
        return scheduler, base | recipe.defaults | few
    if isinstance(own_sampler(recipe.base), FewStepScheduler):
        base |= {name: sizes.RELEASED_DEFAULTS[name] for name in ("num_inference_steps", "guidance_scale")}
    return FlowMatchScheduler(), base | recipe.defaults


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
