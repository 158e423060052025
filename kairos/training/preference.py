"""Preference tuning: direct preference optimisation of a flow-matching model on pairs of clips.

A pair is two clips of one caption and one past, the first better than the second. With e the mean squared
error of the velocity and ref the model before tuning, the loss is
-log sigmoid(-beta / 2 ((e(better) - e_ref(better)) - (e(worse) - e_ref(worse)))), both with the same noise
(Diffusion-DPO, arXiv 2311.12908, equation 14, for velocities).

`rollout_pairs` makes pairs of a model's own clips: of two continuations of a simulated clip, the better is
the one whose velocities are nearer to the truth.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from kairos.data.config import check_keys
from kairos.data.files import write_atomically
from kairos.data.media import read_video
from kairos.errors import UserError
from kairos.evaluation.reading import read
from kairos.evaluation.scores import velocity_error
from kairos.models.vae import decode, encode
from kairos.schedulers import shift_for
from kairos.training.batches import Batch, ClipCut, draw_times, row_at, seed_of
from kairos.training.cache import (
    ClipSet,
    Encoders,
    ShardWriter,
    digest,
    embed_captions,
    prompt_name,
    stored_rows,
)
from kairos.training.clips import (
    Bucket,
    SimulatorSource,
    check_square,
    file_hash,
    fit,
    inside,
    read_lines,
)
from kairos.training.flow import latents_a_token, predict
from kairos.training.objective import Objective
from kairos.training.parallel import ALONE, Processes, shard
from kairos.training.stage import Preference, Stage
from kairos.weights.fingerprint import fingerprint
from kairos.worlds import simulate

logger = logging.getLogger(__name__)

LIST = "pairs.json"


@dataclass
class PairSet:
    """Pairs of clips of one shape. Row i of `better` and of `worse` have one caption and one past."""

    better: ClipSet
    worse: ClipSet
    past: list[int]
    """Latent frames that each pair begins with, clean."""

    def __len__(self) -> int:
        return len(self.past)


def rollout_pairs(
    folder: Path,
    pipeline: Any,
    encoders: Encoders,
    source: SimulatorSource,
    bucket: Bucket,
    options: Preference,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Make `options.pairs` pairs of the pipeline's own continuations and write them to `folder`, unless those
    of the same model, clips and options are there.

    A pair is left out where an error cannot be measured or they differ by less than the margin. Returns the
    mean errors of the better and the worse ones and how many pairs there are.
    """
    check_square(bucket)
    asked = asdict(replace(options, beta=1.0))  # which has no part in the making
    model = fingerprint({"model": pipeline.transformer})
    sampler = {name: value for name, value in pipeline.scheduler.config.items() if name[:1] != "_"}
    sampler |= pipeline.config.defaults
    of = digest([asked, asdict(source), bucket.name, seed, model, sampler, encoders.hashes()])
    if (kept := read_list(folder)).get("of") == of:
        return kept["said"]
    writer = PairWriter(folder, encoders, of, device)
    errors: list[tuple[float, float]] = []
    for index in range(options.pairs):
        scene = source.scenes[index % len(source.scenes)]
        clip = simulate(
            scene,
            split=source.split,
            seed=source.seed,
            index=index,
            num_frames=bucket.frames,
            size=bucket.height,
        )
        made = []
        for attempt in range(2):
            generator = torch.Generator().manual_seed(seed_of(seed, index, attempt))
            latents = pipeline(
                clip.caption,
                video=clip.frames[: options.given_frames],
                height=bucket.height,
                width=bucket.width,
                num_frames=bucket.frames,
                num_inference_steps=options.sampling_steps,
                guidance_scale=options.guidance_scale,
                generator=generator,
                output_type="latent",
            ).frames
            found = read(frames_of(encoders, latents), clip.scenery)
            error = velocity_error(found, clip, options.given_frames)
            made.append((error, latents))
        (best, better), (worst, worse) = sorted(made, key=lambda pair: pair[0])
        if not math.isfinite(worst - best) or worst - best <= options.margin:
            continue
        errors.append((best, worst))
        past = (options.given_frames - 1) // 4 + 1
        key = f"{scene}/{source.split}/{source.seed}/{index}"
        writer.add(key, clip.caption, past, better, worse, clip.frames[0])
    if not errors:
        raise UserError("no two rollouts differ by more than the margin; lower preference.margin")
    best, worst = np.mean(errors, axis=0)
    logger.info("%d pairs, mean velocity error %.4f and %.4f", len(errors), best, worst)
    said = {"pairs": len(errors), "better": float(best), "worse": float(worst)}
    writer.close(said)
    return said


def manifest_pairs(
    folder: Path,
    manifest: Path,
    bucket: Bucket,
    encoders: Encoders,
    fps: float,
    device: torch.device | str = "cpu",
) -> None:
    """Pairs from lines {"better": "a.mp4", "worse": "b.mp4", "caption": "...", "given_frames": 1}; those that
    are there already are not made again, nor are they lost where the manifest or its clips are gone."""
    kept = read_list(folder)
    try:
        listed = read_pairs(manifest, bucket)
    except UserError as error:
        if not kept or (manifest.is_file() and not isinstance(error, NoClip)):
            raise
        logger.warning("%s; the pairs in %s stay as they are", error, folder)
        return
    content = [[*map(file_hash, files), *said] for _, files, *said in listed]
    of = digest([content, bucket.name, fps, encoders.hashes()])
    if kept.get("of") == of:
        return
    writer, vae = PairWriter(folder, encoders, of, device), encoders.vae
    for line, files, caption, given in listed:
        try:
            both = [read_clip(file, bucket, fps) for file in files]
        except UserError as error:  # of what the file holds; one bad clip is no reason to lose the others
            logger.warning("%s, line %d: left out: %s", manifest, line, error)
            continue
        latents = []
        for frames in both:
            pixels = torch.from_numpy(frames.copy()).permute(3, 0, 1, 2)[None]
            with torch.no_grad():
                latents.append(encode(vae, pixels.to(vae.device, vae.dtype) / 127.5 - 1))
        past = (given - 1) // 4 + 1 if given else 0
        writer.add(f"{manifest.name}/{line}", caption, past, latents[0], latents[1], both[0][0])
    if not writer.pairs:
        raise UserError(f"{manifest}: none of its pairs can be used; the log says of each why")
    writer.close({})


def read_clip(file: Path, bucket: Bucket, fps: float) -> NDArray[np.uint8]:
    """The frames (F, H, W, 3) of a clip in its bucket. UserError where there are too few."""
    frames = read_video(file, fps=fps, max_frames=bucket.frames)
    if len(frames) < bucket.frames:
        raise UserError(f"{file} has {len(frames)} frames, {bucket.frames} are needed")
    return fit(frames, bucket)


class NoClip(UserError):
    """A line names a clip that is not there."""


def read_pairs(manifest: Path, bucket: Bucket) -> list[tuple[int, list[Path], str, int]]:
    """`read_pair` of every line. UserError for the first one that is no pair."""
    return [read_pair(manifest, bucket, *numbered) for numbered in read_lines(manifest)]


def read_pair(
    manifest: Path, bucket: Bucket, line: int, entry: dict[str, Any]
) -> tuple[int, list[Path], str, int]:
    """Number, the better and the worse clip, caption and given frames of a line."""
    where, root = f"{manifest}, line {line}", manifest.parent.resolve()
    check_keys(entry, ("better", "worse", "caption", "given_frames"), where)
    given, caption = entry.get("given_frames", 0), entry.get("caption", "")
    if not isinstance(given, int) or (given and given % 4 != 1) or not 0 <= given < bucket.frames:
        raise UserError(f"{where}: given_frames must be 0 or 4n + 1 below {bucket.frames}, got {given!r}")
    if not isinstance(caption, str):
        raise UserError(f'{where}: "caption" must be a text, got {caption!r}')
    files = []
    for side in ("better", "worse"):
        if not isinstance(entry.get(side), str):
            raise UserError(f'{where}: "{side}" must be the path of a clip, got {entry.get(side)!r}')
        files.append(inside(root, entry[side], where))
        if not files[-1].is_file():
            raise NoClip(f"{where}: no file {entry[side]!r} in {root}")
    return line, files, caption, given


class PairWriter:
    """Pairs into shards; the list is written last, so what was stopped is made again.

    `of`: what decides about the pairs, in short; where it changes they are made anew. `device`: where prompts
    are embedded.
    """

    def __init__(self, folder: Path, encoders: Encoders, of: str, device: torch.device | str = "cpu") -> None:
        self.folder, self.encoders, self.of, self.device = folder, encoders, of, device
        (folder / LIST).unlink(missing_ok=True)
        self.hashes = encoders.hashes()
        for file in (folder / "latents").glob("*.safetensors"):
            file.unlink()
        self.shards = ShardWriter(folder / "latents", "latents", {"vae": self.hashes[0]})
        self.prompts = ShardWriter(folder / "prompts", "embeds", {"text": self.hashes[1]})
        self.pairs: list[dict[str, Any]] = []

    def add(
        self, key: str, caption: str, past: int, better: Tensor, worse: Tensor, first: NDArray[np.uint8]
    ) -> None:
        """`first`: the frame (H, W, 3) that both begin with, where any is given."""
        self.pairs.append({"key": key, "caption": caption, "past": past})
        if self.encoders.pictured and past:
            (embedding,) = self.encoders.embed([caption], self.device, [Image.fromarray(first)])
            self.prompts.add(prompt_name(caption, f"{key}/better"), embedding)
        for side, latents in (("better", better), ("worse", worse)):
            self.shards.add(f"{key}/{side}", latents.to("cpu", torch.bfloat16))

    def close(self, said: dict[str, float]) -> None:
        """`said` is kept beside the pairs."""
        self.shards.close()
        self.prompts.close()
        captions = {"", *(pair["caption"] for pair in self.pairs)}
        embed_captions(self.folder / "prompts", captions, self.encoders, self.hashes[1], self.device)
        content = {"of": self.of, "said": said, "pairs": self.pairs}
        write_atomically(self.folder / LIST, json.dumps(content).encode())


def read_list(folder: Path) -> dict[str, Any]:
    """The list of the pairs in `folder`; empty where they are not all there."""
    if not (folder / LIST).exists():
        return {}
    content = json.loads((folder / LIST).read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def load_pairs(folder: Path, bucket: Bucket, encoders: Encoders) -> PairSet:
    """The pairs that were written to `folder`. Raises UserError where there are none for these encoders."""
    pairs = read_list(folder).get("pairs")
    vae_hash, text_hash = encoders.hashes()
    places = stored_rows(folder / "latents", "vae", vae_hash)
    prompts = stored_rows(folder / "prompts", "text", text_hash)
    names = [
        prompt_name(pair["caption"], f"{pair['key']}/better" if encoders.pictured and pair["past"] else "")
        for pair in pairs or ()
    ]
    latents = {f"{pair['key']}/worse" for pair in pairs or ()}
    if not pairs or set(names) - prompts.keys() or latents - places.keys():
        raise UserError(f"there are no pairs in {folder}, or shards are missing; delete it to make them anew")
    captions = [pair["caption"] for pair in pairs]
    keys = {side: [f"{pair['key']}/{side}" for pair in pairs] for side in ("better", "worse")}
    sides = [
        ClipSet(bucket, [places[key] for key in named], captions, prompts, named, encoders.pictured)
        for named in keys.values()
    ]
    return PairSet(sides[0], sides[1], [pair["past"] for pair in pairs])


class PreferenceObjective(Objective):
    """Pairs of a step have one length of past; the reference is the model that the stage began with."""

    def __init__(
        self, model: nn.Module, pairs: PairSet, stage: Stage, options: Preference, here: Processes = ALONE
    ) -> None:
        self.pairs, self.stage, self.options, self.processes = pairs, stage, options, here
        self.reference = copy.deepcopy(model).requires_grad_(False).eval()
        shard(self.reference, here)
        self._right: list[Tensor] = []

    def loss(self, model: nn.Module, step: int, part: int) -> tuple[Tensor, int]:
        size = self.stage.batch_of(self.pairs.better.bucket)
        world = self.processes.world
        parts = self.stage.accumulate * world
        if size % parts:
            raise UserError(f"batches of {size} pairs cannot be cut in {parts} equal parts")
        first = row_at(self.stage.seed, self.pairs.better, step * size)
        past = self.pairs.past[first]
        alike = [row for row in range(len(self.pairs)) if self.pairs.past[row] == past]
        rng = np.random.default_rng((self.stage.seed, step))
        order = rng.choice(alike, size=size, replace=len(alike) < size)
        own = slice(part * world + self.processes.rank, None, parts)
        seeds = [seed_of(self.stage.seed, step, number) for number in range(size)]
        differences = self.differences(model, order[own].tolist(), past, seeds[own])
        self._right.append((differences < 0).float().mean())  # read after the step, which would wait for it
        return -F.logsigmoid(-self.options.beta / 2 * differences).mean(), len(differences)

    def differences(self, model: nn.Module, rows: Sequence[int], past: int, seeds: Sequence[int]) -> Tensor:
        """(B,): how much more the model errs than the reference on the better clip, less the other; the
        seeds are of each pair's time and noise."""
        begun = self.pairs.better
        better, worse = begun.latents(rows), self.pairs.worse.latents(rows)
        worse[:, :, :past] = better[:, :, :past]
        frames = better.shape[2]
        shift = shift_for(frames, better.shape[3] * better.shape[4] // latents_a_token(model))
        sigma, noise, _ = draw_times(self.stage, seeds, better, past, shift)
        keys = [begun.keys[row] for row in rows]
        embeds, mask = begun.embeddings([begun.captions[row] for row in rows], keys if past else None)
        noise, sigma, embeds, mask = (torch.cat([each, each]) for each in (noise, sigma, embeds, mask))
        cut = ClipCut("rollout", past, frames - past)
        batch = Batch(torch.cat([better, worse]), noise, sigma, embeds, mask, cut, keys)
        batch = batch.to(self.processes.device)

        def errors(network: Any) -> Tensor:
            with self.processes.autocast(self.stage.precision):
                velocity = predict(
                    network, batch, batch.noisy, batch.timestep, (batch.prompt_embeds, batch.prompt_mask)
                )
            return (velocity - batch.target)[:, :, past:].square().mean((1, 2, 3, 4))

        with torch.no_grad():
            reference = errors(self.reference)
        gain = errors(model) - reference
        return gain[: len(rows)] - gain[len(rows) :]

    def report(self, model: nn.Module, step: int) -> dict[str, float]:
        """The share of this step's pairs on which the model favours the better clip, more than before."""
        right, self._right = float(np.mean([float(part) for part in self._right])), []
        return {"preferred": right}


@torch.no_grad()
def frames_of(encoders: Encoders, latents: Tensor) -> np.ndarray:
    """(F, H, W, 3) uint8 of latents (1, 16, f, h, w)."""
    vae = encoders.vae
    pixels = decode(vae, latents.to(vae.device, vae.dtype))[0].float().permute(1, 2, 3, 0)
    return ((pixels / 2 + 0.5) * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
