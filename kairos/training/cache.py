"""Latents and prompt embeddings, computed once and kept in safetensors shards.

A clip's latents are known by its content and the VAE, a prompt's embedding by its words and the text encoder;
what another VAE or encoder made is made anew. Where the given image stands in the prompt, a clip's first
frame has embeddings of its own, with its caption and without words. Clips of one bucket lie in one folder.
Building can stop at any time and go on. `clips-*.json` lists what a data set has, so that training reads no
video.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kairos.conditioning import TEMPLATES, encode_prompts
from kairos.data.files import prepare_folder, write_atomically
from kairos.errors import KairosError, UserError
from kairos.models.vae import encode
from kairos.models.vae_layers import quicken
from kairos.training.ahead import Ahead, workers_for
from kairos.training.clips import Bucket, ClipReference, ClipSource, Skipped
from kairos.weights.fingerprint import fingerprint

if TYPE_CHECKING:
    from kairos.pipeline import KairosPipeline

logger = logging.getLogger(__name__)

SHARD_CLIPS = 240
SHARD_BYTES = 1 << 28
SPARE = 0.8
"""Share of the videos' length below which it is said how much of it is used."""
PROMPTS_AT_ONCE, PICTURES_AT_ONCE = 256, 8


@dataclass(frozen=True)
class Encoders:
    """What turns clips and captions into what the LinearDiT sees."""

    vae: AutoencoderKLWan
    text_encoder: Any
    tokenizer: Any
    template: str
    processor: Any = None

    @property
    def pictured(self) -> bool:
        """Whether the image that a video begins with stands in its prompt."""
        return TEMPLATES[self.template].image_in_prompt

    def hashes(self) -> tuple[str, str]:
        """Of the VAE, and of the text encoder with its template."""
        return fingerprint({"vae": self.vae}), f"{fingerprint({'text': self.text_encoder})}-{self.template}"

    def embed(
        self,
        captions: Sequence[str],
        device: torch.device | str = "cpu",
        images: Sequence[Image.Image] | None = None,
    ) -> list[Tensor]:
        """The embedding (T, C) of each caption, behind its image where there are any, bfloat16 on the CPU."""
        embeds, mask = encode_prompts(
            self.text_encoder,
            self.tokenizer,
            captions,
            template=TEMPLATES[self.template],
            processor=self.processor,
            images=images,
            device=device,
        )
        return [row[real].to("cpu", torch.bfloat16) for row, real in zip(embeds, mask, strict=True)]

    def pipeline(self, transformer: Any, scheduler: Any, defaults: dict[str, Any]) -> KairosPipeline:
        """What makes videos with a LinearDiT that has learned from these."""
        from kairos.pipeline import KairosPipeline

        return KairosPipeline(
            transformer=transformer,
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            processor=self.processor,
            scheduler=scheduler,
            prompt_template=self.template,
            defaults=defaults,
        )


@dataclass(frozen=True)
class CachedTensor:
    """Rows `first` to `last` of a tensor in a shard."""

    file: Path
    tensor: str
    first: int
    last: int

    def read(self) -> Tensor:
        return shard(self.file).get_slice(self.tensor)[self.first : self.last]


@dataclass
class ClipSet:
    """The clips of one bucket as training reads them. Row i has latents and a caption."""

    bucket: Bucket
    places: list[CachedTensor]
    captions: list[str]
    prompts: dict[str, CachedTensor]
    keys: list[str]
    pictured: bool = False
    """Whether prompts of clips that go on from their first frame hold it."""

    def __len__(self) -> int:
        return len(self.places)

    @property
    def latent_frames(self) -> int:
        return (self.bucket.frames - 1) // 4 + 1

    def latents(self, rows: Sequence[int]) -> Tensor:
        """(B, 16, F, h, w), float32."""
        return torch.cat([self.places[row].read() for row in rows]).float()

    def embeddings(self, captions: Sequence[str], keys: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """(B, T, C), float32, padded with zeros, and the mask (B, T). keys: of the clips whose first frame is
        given, None where nothing is."""
        names = captions
        if self.pictured and keys is not None:
            names = [prompt_name(caption, key) for caption, key in zip(captions, keys, strict=True)]
        parts = [self.prompts[name].read() for name in names]
        embeds = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).float()
        lengths = torch.tensor([len(part) for part in parts])
        return embeds, torch.arange(embeds.shape[1]) < lengths[:, None]


def prompt_name(caption: str, key: str = "") -> str:
    """What the embedding of a caption is called, with the first frame of the clip `key` before it."""
    return f"{caption}\0{key}" if key else caption


@lru_cache(maxsize=512)
def shard(file: Path) -> Any:
    """The open shard; it is mapped, not read."""
    return safe_open(file, framework="pt")


def build_cache(
    folder: Path,
    source: ClipSource,
    buckets: Sequence[Bucket],
    encoders: Encoders,
    *,
    described: Any,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Compute what `folder` lacks of the source's clips, list them, and report.

    Args:
        described: what names the data set: the same value finds it again in `load_clips`.
        batch_size: clips encoded at once, where their bucket is small.

    Returns:
        The report, also written to report-*.json: how many clips were made, kept and skipped, and which.
    """
    prepare_folder(folder)
    shard.cache_clear()
    vae_hash, text_hash = encoders.hashes()
    vae = encoders.vae.to(device).eval()
    quicken(vae)
    skipped = Skipped()
    buckets = list({bucket.name: bucket for bucket in buckets}.values())  # some differ in their tasks alone
    known: dict[str, dict[str, CachedTensor]] = {
        b.name: stored_rows(folder / b.name, "vae", vae_hash, remove=True) for b in buckets
    }
    listed: list[dict[str, str]] = []
    references: list[ClipReference] = []
    moving: list[ClipReference] = []
    ahead: Ahead[int, Any] = Ahead(lambda number: _read(references[number]), workers_for(device))
    writers = {
        bucket.name: ShardWriter(folder / bucket.name, "latents", {"vae": vae_hash}) for bucket in buckets
    }
    begun: set[tuple[str, str]] = set()
    for reference in source.references(buckets, skipped):
        name = reference.bucket.name
        if encoders.pictured and reference.bucket.frames > 1:
            moving.append(reference)
        if reference.key in known[name] or (name, reference.key) in begun:
            listed.append(entry_of(reference))
        else:
            begun.add((name, reference.key))
            references.append(reference)
    with ahead:
        for bucket in buckets:
            mine = [i for i, reference in enumerate(references) if reference.bucket.name == bucket.name]
            pixels = bucket.frames * bucket.height * bucket.width
            size = max(1, -(-min(batch_size * 33 * 64 * 64, 1 << 24) // pixels))
            for first in range(0, len(mine), size):
                ahead.begin(mine[first : first + max(2 * size, ahead.workers)])
                group = []
                for number in mine[first : first + size]:
                    frames = ahead.get(number)
                    if isinstance(frames, Tensor):
                        group.append((references[number], frames))
                    else:
                        skipped.add(references[number].name, frames)
                if not group:
                    continue
                video = torch.stack([frames for _, frames in group]).to(device).permute(0, 4, 1, 2, 3)
                with torch.no_grad():
                    latents = encode(vae, video.to(vae.dtype) / 127.5 - 1).to("cpu", torch.bfloat16)
                for (reference, _), row in zip(group, latents, strict=True):
                    writers[bucket.name].add(reference.key, row[None])
                    listed.append(entry_of(reference))
            writers[bucket.name].close()
    listed = [
        entry
        for entry in listed
        if entry["key"] in known[entry["bucket"]] or entry["key"] in writers[entry["bucket"]].written
    ]
    captions = {"", *(entry["caption"] for entry in listed)}
    embed_captions(folder / "prompts", captions, encoders, text_hash, device)
    there = {(entry["bucket"], entry["key"]) for entry in listed}
    moving = [one for one in moving if (one.bucket.name, one.key) in there]
    unread = embed_pictures(folder / "prompts", moving, encoders, text_hash, device)
    for one in moving:
        if one.key in unread:
            skipped.add(one.name, unread[one.key])
    listed = [entry for entry in listed if entry["key"] not in unread]
    listed.sort(key=lambda entry: (entry["bucket"], entry["key"], entry["caption"]))
    made = sum(len(writer.written) for writer in writers.values())
    report = {"made": made, "kept": max(len(listed) - made, 0), "skipped": skipped.clips}
    used_s, there_s = skipped.used_s, sum(skipped.seconds.values())
    if there_s:
        report |= {"used_s": round(used_s, 1), "of_s": round(there_s, 1)}
    content = {"vae": vae_hash, "text": text_hash, "clips": listed}
    write_atomically(folder / f"clips-{digest(described)}.json", json.dumps(content).encode())
    write_atomically(folder / f"report-{digest(described)}.json", json.dumps(report, indent=1).encode())
    logger.info(
        "%s: %d clips computed, %d there already, %d skipped",
        folder,
        report["made"],
        report["kept"],
        len(skipped.clips),
    )
    if used_s < SPARE * there_s:
        logger.info("used %d s of %d s of video; cut with kairos curate or start_s", used_s, there_s)
    return report


def _read(reference: ClipReference) -> Tensor | KairosError | MemoryError:
    """The clip's frames, bytes, or why there are none."""
    try:
        return torch.from_numpy(reference.read().copy())
    except (KairosError, MemoryError) as error:
        return error


def entry_of(reference: ClipReference) -> dict[str, str]:
    return {"bucket": reference.bucket.name, "key": reference.key, "caption": reference.caption}


def embed_captions(
    folder: Path,
    captions: Iterable[str],
    encoders: Encoders,
    text_hash: str,
    device: torch.device | str = "cpu",
) -> None:
    """Embed the captions that `folder` lacks."""
    encoders.text_encoder.to(device)
    known = stored_rows(folder, "text", text_hash, remove=True)
    # Longest last: batches of equal length waste no padding.
    missing = sorted(set(captions) - set(known), key=lambda caption: (len(caption), caption))
    writer = ShardWriter(folder, "embeds", {"text": text_hash})
    for first in range(0, len(missing), PROMPTS_AT_ONCE):
        group = missing[first : first + PROMPTS_AT_ONCE]
        for caption, embedding in zip(group, encoders.embed(group, device), strict=True):
            writer.add(caption, embedding)
    writer.close()


def embed_pictures(
    folder: Path,
    clips: Sequence[ClipReference],
    encoders: Encoders,
    text_hash: str,
    device: torch.device | str = "cpu",
) -> dict[str, KairosError | MemoryError]:
    """Embed the clips' first frames that `folder` lacks, each with its caption and without words.

    Returns why a clip could not be read, by its key.
    """
    known = set(stored_rows(folder, "text", text_hash))
    wanted: dict[str, dict[str, None]] = {}
    for clip in clips:
        for caption in ("", clip.caption):
            if prompt_name(caption, clip.key) not in known:
                wanted.setdefault(clip.key, {})[caption] = None
    first_of = {clip.key: clip for clip in clips}
    missing = [first_of[key] for key in wanted]
    unread: dict[str, KairosError | MemoryError] = {}
    writer = ShardWriter(folder, "embeds", {"text": text_hash})
    ahead: Ahead[int, Any] = Ahead(lambda number: _first_frame(missing[number]), workers_for(device))
    with ahead:
        for first in range(0, len(missing), PICTURES_AT_ONCE):
            group = range(first, min(first + PICTURES_AT_ONCE, len(missing)))
            ahead.begin(range(first, min(first + max(2 * PICTURES_AT_ONCE, ahead.workers), len(missing))))
            names, captions, images = [], [], []
            for number in group:
                key, frame = missing[number].key, ahead.get(number)
                if not isinstance(frame, Tensor):
                    unread[key] = frame
                    continue
                for caption in wanted[key]:
                    names.append(prompt_name(caption, key))
                    captions.append(caption)
                    images.append(Image.fromarray(frame.numpy()))
            if names:
                for name, embedding in zip(names, encoders.embed(captions, device, images), strict=True):
                    writer.add(name, embedding)
    writer.close()
    return unread


def _first_frame(clip: ClipReference) -> Tensor | KairosError | MemoryError:
    frames = _read(clip)
    return frames[0].clone() if isinstance(frames, Tensor) else frames


def load_clips(
    folder: Path, buckets: Sequence[Bucket], encoders: Encoders, *, described: Any
) -> list[ClipSet]:
    """The clips of the data set that `described` names, a set for each bucket that has any.

    Raises:
        UserError: where the cache was not built, or by other encoders.
    """
    content = listed(folder, described)
    if not content:
        raise UserError(f"{folder} has no latents of this data set; run: kairos train cache RECIPE")
    vae_hash, text_hash = encoders.hashes()
    for part, (found, now) in {
        "VAE": (content["vae"], vae_hash),
        "text encoder": (content["text"], text_hash),
    }.items():
        if found != now:
            raise UserError(
                f"the latents in {folder} were made with another {part}; run: kairos train cache RECIPE"
            )
    prompts = stored_rows(folder / "prompts", "text", text_hash)
    sets = []
    for bucket in buckets:
        entries = [entry for entry in content["clips"] if entry["bucket"] == bucket.name]
        if not entries:
            logger.warning("no clips for the bucket %s", bucket.name)
            continue
        places = stored_rows(folder / bucket.name, "vae", vae_hash)
        wanted = {entry["caption"] for entry in entries}
        if encoders.pictured and bucket.frames > 1:
            pictured = [(entry["caption"], entry["key"]) for entry in entries]
            wanted |= {prompt_name(words, key) for caption, key in pictured for words in ("", caption)}
        if any(entry["key"] not in places for entry in entries) or wanted - prompts.keys():
            raise UserError(f"shards are missing in {folder}; run: kairos train cache RECIPE")
        sets.append(
            ClipSet(
                bucket,
                [places[entry["key"]] for entry in entries],
                [entry["caption"] for entry in entries],
                prompts,
                [entry["key"] for entry in entries],
                encoders.pictured,
            )
        )
    if not sets:
        raise UserError(f"{folder} has no clip for {', '.join(bucket.name for bucket in buckets)}")
    return sets


def listed(folder: Path, described: Any) -> dict[str, Any]:
    """What `build_cache` has written down of a data set: hashes of "vae" and "text", and "clips"; empty where
    it has not been there."""
    file = folder / f"clips-{digest(described)}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


class ShardWriter:
    """Collects tensors under keys and writes them, many to a file, rows one after the other."""

    def __init__(self, folder: Path, tensor: str, metadata: dict[str, str]) -> None:
        self.folder, self.tensor, self.metadata = folder, tensor, metadata
        self.written: set[str] = set()
        self._keys: list[str] = []
        self._parts: list[Tensor] = []
        self._bytes = 0

    def add(self, key: str, rows: Tensor) -> None:
        self._keys.append(key)
        self._parts.append(rows)
        self._bytes += rows.nbytes
        if self._bytes >= SHARD_BYTES or (self.tensor == "latents" and len(self._keys) >= SHARD_CLIPS):
            self.close()

    def close(self) -> None:
        """Write what has been collected, whole or not at all."""
        if not self._keys:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = [int(file.stem) for file in self.folder.glob("*.safetensors") if file.stem.isdigit()]
        file = self.folder / f"{max(numbers, default=-1) + 1:05d}.safetensors"
        keys = {"keys": json.dumps(self._keys), "rows": json.dumps([len(part) for part in self._parts])}
        write_atomically(file, save({self.tensor: torch.cat(self._parts)}, metadata=self.metadata | keys))
        logger.info("wrote %s", file)
        self.written |= set(self._keys)
        self._keys, self._parts, self._bytes = [], [], 0


def stored_rows(folder: Path, kind: str, wanted: str, *, remove: bool = False) -> dict[str, CachedTensor]:
    """Key -> where it lies, over the shards of `folder` whose encoder is `wanted`.

    Shards of another encoder, and torn ones, are left out, and deleted with `remove`.
    """
    found: dict[str, CachedTensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as handle:
                metadata = handle.metadata() or {}
                (tensor,) = handle.keys()
        except (SafetensorError, OSError, ValueError):
            metadata, tensor = {}, ""
        if metadata.get(kind) != wanted or "keys" not in metadata:
            if remove:
                logger.warning("%s is torn or another encoder's: made anew", file)
                file.unlink()
            continue
        first = 0
        for key, rows in zip(json.loads(metadata["keys"]), json.loads(metadata["rows"]), strict=True):
            found[key] = CachedTensor(file, tensor, first, first + rows)
            first += rows
    return found


def digest(described: Any) -> str:
    """A short name for a value that JSON can hold."""
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:12]


def description(source: ClipSource, buckets: Sequence[Bucket]) -> dict[str, Any]:
    """What `described` is for a source and the shapes that are made of it."""
    shapes = sorted(bucket.name for bucket in buckets)
    return {"source": type(source).__name__, **asdict(source), "buckets": shapes}  # type: ignore[call-overload]
