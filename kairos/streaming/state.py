"""A world between two chunks: all that the next chunk needs and nothing else, as a value that can be kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kairos.data.files import write_atomically
from kairos.errors import UserError
from kairos.models.attention import AttentionState
from kairos.models.gated_delta_net import DeltaState
from kairos.models.transformer import TransformerState
from kairos.pipeline import whole
from kairos.streaming.decoder import Feature

FORMAT, VERSION = "kairos-world-state", "1"


@dataclass(frozen=True)
class RolloutSettings:
    """How chunks are made: latent frames in each, denoising steps, guidance (1 or less: none)."""

    chunk_frames: int
    num_inference_steps: int
    guidance_scale: float

    def __post_init__(self) -> None:
        for name in ("chunk_frames", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def branches(self) -> int:
        """With guidance the model runs for each video twice: led by the prompt, and by the negative one."""
        return 2 if self.guidance_scale > 1 else 1


@dataclass(frozen=True, eq=False)
class WorldState:
    """The world of a batch of B videos, mostly of one. Nothing changes it: a chunk makes a new one."""

    model: str
    """The fingerprint of the LinearDiT and the VAE that it belongs to."""
    settings: RolloutSettings
    latent_size: tuple[int, int]
    """Height and width of the latents."""
    prompt: tuple[Tensor, Tensor] = field(repr=False)
    """Embeddings (branches * B, T, C) and their mask (branches * B, T); negative ones behind the positive."""
    generators: Tensor = field(repr=False)
    """The state of each video's random generator, (B, bytes)."""
    given: Tensor | None = field(default=None, repr=False)
    """Before the first chunk, the latents of the given frames (B, 16, f, h, w): they come first."""
    transformer: TransformerState | None = field(default=None, repr=False)
    """What each layer keeps of the past, for branches * B; None before the first chunk."""
    decoder: tuple[Feature, ...] = field(default=(), repr=False)
    """What the VAE's decoder keeps of the past, for B."""
    model_name: str = ""
    """What the model was called by who loaded it, where that is known."""

    @property
    def batch(self) -> int:
        """How many videos."""
        return len(self.generators)

    @property
    def frames(self) -> int:
        """How many latent frames there were."""
        return self.transformer.frames if self.transformer else 0

    @property
    def nbytes(self) -> int:
        """The size of its tensors: constant once the widest window is full."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def fork(self, n: int) -> WorldState:
        """`n` futures of each video, side by side in one batch, equal as long as their generators are."""
        n = whole("the number of futures", n)

        def repeat(tensor: Tensor) -> Tensor:
            branches = len(tensor) // self.batch
            return tensor.unflatten(0, (branches, -1)).repeat_interleave(n, 1).flatten(0, 1)

        return self._map(repeat)

    def to(self, device: torch.device | str) -> WorldState:
        """The same on a device; the generators stay on the CPU."""
        return replace(self._map(lambda tensor: tensor.to(device)), generators=self.generators)

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file, which appears whole or not at all.

        Raises UserError where the folder cannot be written to, MachineError where the disk is full.
        """
        kinds = [feature if isinstance(feature, str) else feature is not None for feature in self.decoder]
        about = {
            "settings": asdict(self.settings),
            "latent_size": self.latent_size,
            "layers": len(self.transformer.layers) if self.transformer else 0,
            "decoder": kinds,
        }
        metadata = {"format": FORMAT, "version": VERSION, "model": self.model, "world": json.dumps(about)}
        metadata |= {"model_name": self.model_name} if self.model_name else {}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self._tensors().items()}
        write_atomically(path, save(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path) -> WorldState:
        """Read a file of `save`. Raises UserError for a file that is missing, torn or something else."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise UserError(f"{path} is not a world state; save one with a rollout's state.save()")
                if metadata["version"] != VERSION:
                    raise UserError(
                        f"{path} has version {metadata['version']} of the format, this Kairos reads {VERSION}"
                    )
                names = file.keys()
                # Cloned, since the file's own tensors begin anywhere in memory, and products of tensors that
                # are not aligned differ in their last bit.
                return cls._read(metadata, {name: file.get_tensor(name).clone() for name in names})
        except FileNotFoundError:
            raise UserError(f"no world state at {path}") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        except UserError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is not a whole world state: {reason}; save it again") from error

    @classmethod
    def _read(cls, metadata: dict[str, str], tensors: dict[str, Tensor]) -> WorldState:
        about = json.loads(metadata["world"])
        parts: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("transformer."):
                _, index, field = name.split(".")
                parts.setdefault(int(index), {})[field] = tensor
        layers = tuple(
            AttentionState(**parts[i]) if "keys" in parts[i] else DeltaState(**parts[i])
            for i in range(about["layers"])
        )
        features: list[Feature] = []
        for i, kind in enumerate(about["decoder"]):
            features.append(tensors[f"decoder.{i}"] if kind is True else kind or None)
        height, width = about["latent_size"]
        world = cls(
            model=metadata["model"],
            settings=RolloutSettings(**about["settings"]),
            latent_size=(height, width),
            prompt=(tensors["prompt.embeds"], tensors["prompt.mask"]),
            generators=tensors["generators"],
            given=tensors.get("given"),
            transformer=TransformerState(layers, int(tensors["frames"])) if layers else None,
            decoder=tuple(features),
            model_name=metadata.get("model_name", ""),
        )
        world._check()
        return world

    def _check(self) -> None:
        """Raise ValueError, TypeError or RuntimeError where the parts of a file are not of one world."""
        counts = (self.settings.chunk_frames, self.settings.num_inference_steps, *self.latent_size)
        if not all(isinstance(count, int) for count in counts):
            raise ValueError(
                f"chunk_frames, num_inference_steps and latent_size are no whole numbers: {counts}"
            )
        for generator in self.generators:
            torch.Generator().set_state(generator.clone())
        (embeds, mask), rows = self.prompt, self.settings.branches * self.batch
        if embeds.ndim != 3 or len(embeds) != rows or mask.shape != embeds.shape[:2]:
            shapes = f"{tuple(embeds.shape)} and {tuple(mask.shape)}"
            raise ValueError(f"the prompt has the shapes {shapes}, and must have {rows} rows")
        for past in (self.given, *self.decoder[:1]):
            if isinstance(past, Tensor) and (len(past), *past.shape[-2:]) != (self.batch, *self.latent_size):
                raise ValueError(f"the past has the shape {tuple(past.shape)}, not that of the latents")

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in the file."""
        tensors = {
            "frames": torch.tensor(self.frames),
            "generators": self.generators,
            "prompt.embeds": self.prompt[0],
            "prompt.mask": self.prompt[1],
        }
        if self.given is not None:
            tensors["given"] = self.given
        for i, layer in enumerate(self.transformer.layers if self.transformer else ()):
            tensors |= {f"transformer.{i}.{field}": tensor for field, tensor in vars(layer).items()}
        return tensors | {f"decoder.{i}": f for i, f in enumerate(self.decoder) if isinstance(f, Tensor)}

    def _map(self, change: Callable[[Tensor], Tensor]) -> WorldState:
        """The same with every tensor changed."""
        return replace(
            self,
            prompt=(change(self.prompt[0]), change(self.prompt[1])),
            generators=change(self.generators),
            given=None if self.given is None else change(self.given),
            transformer=self.transformer and self.transformer.map(change),
            decoder=tuple(change(f) if isinstance(f, Tensor) else f for f in self.decoder),
        )
