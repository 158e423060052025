"""Models by name: what is published, what it was made for, where its files are, how it becomes a pipeline.

    from kairos.presets import load_pipeline
    pipeline = load_pipeline("kairos-tiny", device="cpu", dtype=torch.float32)

Importing this module imports nothing heavy.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kairos import hub
from kairos.errors import UserError, one_line
from kairos.hub import Source
from kairos.sizes import RELEASED_DEFAULTS

if TYPE_CHECKING:
    import torch

    from kairos.pipeline import KairosPipeline

DEFAULT = "kairos-tiny"
ASSETS = Path(__file__).parent / "assets"
MARK = "kairos-model.json"
"""In a folder that a preset was downloaded to: which one it is."""

PARTS = ("transformer", "vae", "text_encoder")
WAN_VAE = Source("Wan-AI/Wan2.1-T2V-14B", ("Wan2.1_VAE.pth",))
QWEN_VL = Source("Qwen/Qwen2.5-VL-7B-Instruct", ("config.json", "merges.txt", "*.json", "*.safetensors"))
QWEN_IMAGE = Source("Qwen/Qwen-Image", ("text_encoder/*", "tokenizer/*"))


@dataclass(frozen=True)
class Preset:
    """A model by name.

    Attributes:
        transformer, vae, text_encoder: where the parts of a released model come from. A model without them
            ships with the package, in a folder that says the rest.
        template: one of `kairos.conditioning.TEMPLATES`.
        scheduler: "flow_match", or "few_step" for distilled models.
        defaults: what a call of the pipeline takes where it is not told: what the checkpoint was made for.
        transformer_config: what the shapes of a released file do not tell.
    """

    name: str
    description: str
    transformer: Source | None = None
    vae: Source | None = None
    text_encoder: Source | None = None
    template: str = ""
    scheduler: str = ""
    defaults: Mapping[str, float] = field(default_factory=dict)
    transformer_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """ "released", from original files at Hugging Face, or "embedded", shipped with the package."""
        return "released" if self.transformer is not None else "embedded"

    @property
    def sources(self) -> dict[str, Source]:
        """Part -> where it comes from; nothing for an embedded model."""
        return {part: getattr(self, part) for part in PARTS} if self.kind == "released" else {}


def released(
    name: str,
    description: str,
    repository: str,
    *,
    text_encoder: Source = QWEN_VL,
    template: str = "2026",
    scheduler: str = "flow_match",
    **defaults: float,
) -> Preset:
    """The preset of a released model, with what its `defaults` have of their own."""
    return Preset(
        name,
        description,
        Source(repository),
        WAN_VAE,
        text_encoder,
        template,
        scheduler,
        RELEASED_DEFAULTS | defaults,
        {"dilation": 4, "pad_dilated": True},
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "kairos-tiny",
            "The small model that ships with the package: small worlds as physics has them, on any CPU",
        ),
        Preset(
            "kairos-tiny-teacher",
            "What kairos-tiny learned from: the same in twenty steps, led by guidance to its first frame",
        ),
        released(
            "kairos-4b-480p",
            "Kairos 3.0, 4B, pretrained, 480p",
            "kairos-agi/kairos-sensenova-4B-480P-pretrained",
        ),
        released(
            "kairos-4b-common",
            "Kairos 3.0, 4B, the common model of the first release, with its image template",
            "kairos-agi/kairos-sensenova-common",
            text_encoder=QWEN_IMAGE,
            template="2025-12",
        ),
        released(
            "kairos-4b-720p",
            "Kairos 3.0, 4B, 720p",
            "kairos-agi/kairos-sensenova-4B-720P",
            height=720,
            width=1280,
        ),
        released(
            "kairos-robot-4b-480p",
            "Kairos 3.0, 4B, post-trained on robots, 480p",
            "kairos-agi/kairos-sensenova-robot-4B-480P",
        ),
        released(
            "kairos-robot-4b-480p-distilled",
            "Kairos 3.0, 4B, post-trained on robots, 480p, distilled to four steps",
            "kairos-agi/kairos-sensenova-robot-4B-480P-distilled",
            scheduler="few_step",
            num_inference_steps=4,
            guidance_scale=1.0,
        ),
    )
}


def get(name: str) -> Preset:
    """The preset of this name. Raises UserError with the nearest name."""
    from kairos.request import did_you_mean

    if name not in PRESETS:
        raise UserError(f"no model or folder {name!r}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]


def download(name: str, folder: str | os.PathLike[str] | None = None) -> dict[str, Path]:
    """Fetch a model's files; part -> where they lie. Nothing is fetched twice, and a broken download goes on.

    Args:
        folder: where to, instead of Hugging Face's cache; the folder can then be given in place of the name.

    Raises:
        UserError, MachineError: see `kairos.hub.fetch`.
    """
    preset = get(name)
    target = None if folder is None else Path(folder)
    if target is not None and preset.sources:
        from kairos.data.files import prepare_folder, write_atomically

        if (target / MARK).exists() and (there := locate(target).preset) != preset:
            held = there.name if there else "another model"
            raise UserError(f"{target} holds {held}; give another folder for {name}")
        prepare_folder(target)  # marked first: a download that breaks off can say what it is to be
        write_atomically(target / MARK, json.dumps({"preset": name}).encode())
    return {part: hub.fetch(source, target and target / part) for part, source in preset.sources.items()}


def local_files(preset: Preset, folder: Path | None = None, *, own_weights: bool = True) -> dict[str, Path]:
    """Part -> where its files lie, in the cache or in `folder`; no network is used.

    Without `own_weights` the LinearDiT is not asked for: another takes its place.

    Raises:
        UserError: naming the parts that are missing.
    """
    found = {
        part: hub.find(source, folder and folder / part)
        for part, source in preset.sources.items()
        if own_weights or part != "transformer"
    }
    if missing := [part for part, path in found.items() if path is None]:
        where = f" --dir {folder}" if folder else ""
        named = ", ".join(f"{part.replace('_', ' ')} ({preset.sources[part].repo})" for part in missing)
        raise UserError(
            f"{preset.name} is not downloaded, {named} missing; "
            f"run: kairos models download {preset.name}{where}"
        )
    return {part: path for part, path in found.items() if path is not None}


def load_pipeline(
    name_or_path: str | os.PathLike[str] = DEFAULT,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    weights: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
) -> KairosPipeline:
    """The model of this name, or in this folder, ready to be called.

    Args:
        name_or_path: a name of PRESETS, a folder that a pipeline was saved to, or one that `download` filled.
        device: where to.
        dtype: precision; None is float32 on a CPU, bfloat16 elsewhere. float16 leaves the VAE in float32.
        weights: another LinearDiT instead of the model's own: a released file, its shards or a folder, whose
            config.json counts before what the model says of its own.

    Raises:
        UserError: for a name that is not known, files that are not there, weights that do not fit, and a
            device that cannot be used.
    """
    import torch

    model = locate(name_or_path)
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError) as error:
        raise UserError(f'device {str(device)!r} cannot be used: {one_line(error)}; try "cpu"') from error
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"dtype must be a precision of torch's, such as torch.bfloat16, got {dtype!r}")
    pipeline = (_load_released if model.released else _load_saved)(model, dtype, weights)
    _check_parts(pipeline, name_or_path)
    return pipeline.to(device)


@dataclass(frozen=True)
class Model:
    """What a name or a folder means: a released model of `preset`, else a saved pipeline in `folder`."""

    preset: Preset | None
    folder: Path | None
    """None for the cache."""

    @property
    def released(self) -> Preset | None:
        return self.preset if self.preset is not None and self.preset.kind == "released" else None

    @property
    def saved(self) -> Path:
        """The folder of a pipeline that is not a released one's."""
        assert self.folder is not None
        return self.folder

    def part(self, name: str) -> Path:
        """Where one of PARTS lies. Raises UserError where a released one is not downloaded."""
        return local_files(self.released, self.folder)[name] if self.released else self.saved / name

    def index(self) -> dict[str, Any]:
        """The model_index.json of a saved pipeline."""
        return read_json(self.saved / "model_index.json")

    def config(self, part: str = "transformer") -> dict[str, Any]:
        """What a part's configuration says: of a released LinearDiT what its shapes do not tell."""
        if self.released:
            return dict(self.released.transformer_config) if part == "transformer" else {}
        file = self.saved / part / "config.json"
        said = read_json(file) if file.exists() else {}
        return {name: value for name, value in said.items() if not name.startswith("_")}


def locate(name_or_path: str | os.PathLike[str]) -> Model:
    """What a name or a folder means.

    A known name is that model, unless there is a folder of this name with a model in it.

    Raises:
        UserError: for a name that is not known and a path that is no folder of a model.
    """
    folder = Path(name_or_path)
    if is_name(name_or_path):
        preset = PRESETS[str(name_or_path)]
        return Model(preset, ASSETS / preset.name if preset.kind == "embedded" else None)
    if folder.is_file():
        raise UserError(
            f"{folder} is a file; give a model's name or folder (weights alone: KairosPipeline.from_original)"
        )
    if not folder.is_dir():
        get(str(name_or_path))  # refuses it, with the nearest name
    if (folder / MARK).exists():
        return Model(get(str(read_json(folder / MARK).get("preset"))), folder)
    return Model(None, folder)


def is_name(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether it means a model by name, whatever else is called so here."""
    folder = Path(name_or_path)
    return str(name_or_path) in PRESETS and not any(
        (folder / file).exists() for file in (MARK, "model_index.json")
    )


def defaults_of(name_or_path: str | os.PathLike[str]) -> dict[str, float]:
    """What a call of the model takes where it is not told; nothing is loaded. UserError as `locate`."""
    model = locate(name_or_path)
    if model.released:
        return dict(model.released.defaults)
    return all_defaults(model.index().get("defaults") or {})


def is_downloaded(preset: Preset, folder: Path | None = None) -> bool:
    """Whether all its files are here, in the cache or in `folder`. No network is used."""
    try:
        local_files(preset, folder)
    except UserError:
        return False
    return preset.kind == "released" or (ASSETS / preset.name / "model_index.json").exists()


def _load_released(model: Model, dtype: torch.dtype, weights: Any) -> KairosPipeline:
    from kairos.pipeline import KairosPipeline

    preset = model.released
    assert preset is not None
    files = local_files(preset, model.folder, own_weights=weights is None)
    return KairosPipeline.from_original(
        dit=files["transformer"] if weights is None else weights,
        vae=_vae_path(files["vae"]),
        text_encoder=files["text_encoder"],
        few_step=preset.scheduler == "few_step",
        prompt_template=preset.template,
        dtype=dtype,
        defaults=dict(preset.defaults),
        otherwise=preset.transformer_config,
    )


def _load_saved(model: Model, dtype: torch.dtype, weights: Any) -> KairosPipeline:
    """A folder of `save_pretrained`, its weights loaded strictly (diffusers would fill gaps with noise)."""
    import torch

    from kairos.conditioning import load_text_encoder
    from kairos.pipeline import KairosPipeline
    from kairos.weights import load_transformer_file, load_vae_file

    folder = model.saved
    if model.index().get("text_encoder") == [None, None]:
        raise UserError(
            f"{folder} was saved without a text encoder; save the pipeline before that is freed, or load it "
            "with KairosPipeline.from_pretrained and give it prompt_embeds"
        )
    text_encoder, tokenizer, processor = load_text_encoder(folder, dtype=dtype)
    otherwise = {} if weights is None else model.config()
    transformer = folder / "transformer" if weights is None else weights
    parts = {
        "transformer": load_transformer_file(transformer, dtype=dtype, otherwise=otherwise),
        "vae": load_vae_file(folder / "vae", dtype=torch.float32 if dtype == torch.float16 else dtype),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "processor": processor,
    }
    try:
        return KairosPipeline.from_pretrained(folder, local_files_only=True, **parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot load the pipeline in {folder}: {one_line(error)}") from error


def _check_parts(pipeline: KairosPipeline, name: object) -> None:
    """The parts speak to each other: widths of embeddings, channels of latents."""
    config = pipeline.transformer.config
    assert pipeline.text_encoder is not None
    width = pipeline.text_encoder.config.get_text_config().hidden_size
    if width != config.text_dim:
        raise UserError(
            f"{name}: the text encoder gives {width} numbers a token, the LinearDiT takes {config.text_dim}"
        )
    channels = pipeline.vae.config.z_dim
    if channels != config.in_channels:
        raise UserError(
            f"{name}: the VAE's latents have {channels} channels, the LinearDiT's {config.in_channels}"
        )


def all_defaults(own: Any) -> dict[str, Any]:
    """A pipeline's own defaults, and the released model's for what they do not say.

    Raises:
        UserError: for a name that is nearly one of theirs, and a value that is no number.
    """
    if not isinstance(own, Mapping):
        raise UserError(f"the pipeline's defaults must be a dictionary, got {own!r}")
    known = [*RELEASED_DEFAULTS, "guide_continuation"]
    for name in own:
        if name not in known and (near := get_close_matches(str(name), known, 1)):
            raise UserError(f"the pipeline has no default {name!r}; did you mean {near[0]!r}?")
    defaults = RELEASED_DEFAULTS | dict(own)
    for name in RELEASED_DEFAULTS:
        if not isinstance(value := defaults[name], Real) or not math.isfinite(value):
            raise UserError(f"the pipeline's default {name} must be a number, got {value!r}")
        defaults[name] = int(value) if isinstance(value, Integral) else float(value)  # NumPy's too
    return defaults


def _vae_path(folder: Path) -> Path:
    return folder / WAN_VAE.patterns[0] if (folder / WAN_VAE.patterns[0]).exists() else folder


def read_json(file: Path) -> dict[str, Any]:
    """The dictionary in a file of JSON. Raises UserError where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no model in {file.parent}: {file.name} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"cannot read {file}: it is not a dictionary in JSON")
    return content
