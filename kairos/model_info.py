"""What there is to say of a model without loading it: what it was made for, how large it is, its needs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from kairos import memory, sizes
from kairos.errors import UserError
from kairos.presets import PARTS, defaults_of, is_downloaded, local_files, locate, read_json

PLENTY_GB = 1e6
"""More than any model takes."""


@dataclass(frozen=True)
class ModelInfo:
    """A model in numbers.

    Attributes:
        path: where its LinearDiT lies, or None where the model is not downloaded, or not all of it.
        repositories: part -> where it is downloaded from.
        config, vae_config: of the LinearDiT, and of the VAE what its size follows from.
        defaults: height, width, num_frames, fps, num_inference_steps and guidance_scale that it was made for.
        parameters: part -> how many.
        tokens: of a clip of the defaults' size.
    """

    name: str
    description: str
    path: Path | None
    repositories: dict[str, str]
    template: str
    scheduler: str
    causal: str
    config: dict[str, Any]
    vae_config: dict[str, Any]
    defaults: dict[str, float]
    parameters: dict[str, int]
    tokens: int

    def vae_dtype(self, dtype: str) -> str:
        """The VAE's precision beside a LinearDiT in `dtype`: the released VAE stays in its own, and float16
        holds none."""
        return "float32" if self.repositories or dtype == "float16" else dtype

    def state_mb(self, dtype: str) -> tuple[float, float]:
        """What a rollout of the defaults' size carries from chunk to chunk, if the model is chunk-causal: the
        layers' part in `dtype`, and that of the VAE's decoder in the VAE's precision."""
        height, width = int(self.defaults["height"]), int(self.defaults["width"])
        shape = sizes.clip_shape(self.config, height, width, 1)
        layers = sizes.state_bytes(self.config, shape.tokens_per_frame, dtype)
        latents = (height // 8) * (width // 8)
        decoder = sizes.decoder_state_bytes(self.vae_config, latents, self.vae_dtype(dtype))
        return layers / 1e6, decoder / 1e6


def info(name_or_path: str | os.PathLike[str]) -> ModelInfo:
    """Describe a model by name or folder. Raises UserError as `kairos.presets.load_pipeline` does."""
    model = locate(name_or_path)
    preset, folder = model.preset, model.folder
    config, vae_config = dict(sizes.RELEASED_TRANSFORMER), dict(sizes.RELEASED_VAE_CONFIG)
    if preset is not None and model.released:
        path = local_files(preset, folder)["transformer"] if is_downloaded(preset, folder) else None
        template, scheduler = preset.template, preset.scheduler
        parameters = {
            "transformer": sizes.transformer_parameters(config),
            "vae": sizes.RELEASED_VAE,
            "text_encoder": sizes.RELEASED_TEXT_ENCODER,
        }
    else:
        path = folder = model.saved
        index = model.index()
        config |= read_json(folder / "transformer" / "config.json")
        _check(config, sizes.RELEASED_TRANSFORMER, folder / "transformer")
        vae_config |= read_json(folder / "vae" / "config.json")
        _check(vae_config, sizes.RELEASED_VAE_CONFIG, folder / "vae")
        template = index.get("prompt_template", "2025-12")
        scheduler = "few_step" if "FewStep" in str(index.get("scheduler")) else "flow_match"
        parameters = {part: stored_parameters(folder / part) for part in PARTS}
    defaults = defaults_of(name_or_path)
    shape = sizes.clip_shape(config, *(int(defaults[name]) for name in ("height", "width", "num_frames")))
    return ModelInfo(
        name=preset.name if preset else str(name_or_path),
        description=preset.description if preset else "a saved pipeline",
        path=path,
        repositories={part: source.repo for part, source in preset.sources.items()} if preset else {},
        template=template,
        scheduler=scheduler,
        causal=config.get("causal", "none"),
        config=config,
        vae_config=vae_config,
        defaults=defaults,
        parameters=parameters,
        tokens=shape.tokens,
    )


def gpu_memory_gb(about: ModelInfo, dtype: str) -> tuple[float, float]:
    """The peak of a clip of the defaults' size on a GPU that holds all, as `kairos plan` has it; and where
    the text encoder is freed after encoding."""
    clip = memory.clip_of(about.defaults, about.scheduler)
    plan = memory.plan(for_planning(about, "cuda", dtype), clip, PLENTY_GB)
    encode, *later = plan.stages
    return plan.peak_gb, max(encode.peak_gb, *(stage.peak_gb - plan.parts[0].gb for stage in later))


def for_planning(about: ModelInfo, device: str, dtype: str = "auto") -> memory.Model:
    """What `kairos.memory.plan` takes of a model. On a CPU "auto" is bfloat16 where float32 is too much."""
    automatic = ("float32", "bfloat16") if device == "cpu" else ("bfloat16",)
    own = about.vae_dtype(dtype)
    return memory.Model(
        about.config,
        about.parameters,
        automatic if dtype == "auto" else (dtype,),
        vae_dtype=None if own == dtype else own,
    )


def _check(config: Mapping[str, Any], released: Mapping[str, Any], folder: Path) -> None:
    """Refuse sizes that are none; the model's own class knows the rest."""

    def positive(value: Any) -> bool:
        return isinstance(value, int) and value > 0

    for name, usual in released.items():
        value, wanted = config[name], "a positive whole number"
        fits = positive(value)
        if isinstance(usual, tuple):
            wanted = f"{len(usual)} positive whole numbers"
            fits = isinstance(value, list | tuple) and len(value) == len(usual) and all(map(positive, value))
        elif isinstance(usual, str):
            wanted = "S, D and G, one for each block of a group"
            fits = isinstance(value, str) and bool(value) and set(value) <= set("SDG")
        if not fits:
            raise UserError(f"{folder}: the configuration's {name} must be {wanted}, got {value!r}")


def stored_parameters(folder: Path) -> int:
    """Numbers in the safetensors files of a folder, by their headers. Raises UserError for torn files."""
    total = 0
    for file in folder.glob("*.safetensors"):
        try:
            with file.open("rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                header = json.loads(handle.read(min(length, 1 << 27)))
            total += sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is not weights, or only a part of them") from error
    return total
