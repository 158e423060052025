"""The physics suite: measures a model on the worlds, clip by clip, and adds it all up.

Every number stands beside two floors: the same measure on the simulator's own frames, and on their
reconstruction by the model's VAE. A run is a function of (model, settings). Each clip's scores are a file in
the output folder, so a run that was stopped goes on, and one with more clips keeps what there is; but for a
model without an identity, which nothing tells from another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from kairos.data.files import prepare_folder, write_atomically
from kairos.data.media import Frames, write_video
from kairos.errors import UserError
from kairos.evaluation import scores
from kairos.evaluation.drift import drift_of, summarise_drift
from kairos.evaluation.models import KairosModel, VideoModel, generate
from kairos.evaluation.reading import SIZE, Reading, read
from kairos.evaluation.report import BESIDE, report
from kairos.evaluation.summary import summarise
from kairos.models.vae import TEMPORAL
from kairos.worlds import SCENES, SPLITS, VIOLATIONS, Clip, impossible_twin, simulate
from kairos.worlds.export import FPS, ClipName

logger = logging.getLogger(__name__)

Record = dict[str, Any]
VERSION = 3
"""Of the measures: records of another version are measured again."""
SHOWN = 4
"""Clips of each scene and split whose videos are kept."""


@dataclass(frozen=True)
class Settings:
    """What is measured. Raises UserError for what cannot be.

    `given` frames begin each video; 0 makes videos from captions alone. `batch`: clips made at once.
    `drift_seconds`: how long the rollouts of the first `drift_clips` clips are, at `FPS` frames a second; 0
    for none.
    """

    scenes: tuple[str, ...] = tuple(SCENES)
    splits: tuple[str, ...] = ("in", "interpolation", "out")
    clips: int = 16
    seed: int = 0
    num_frames: int = 33
    given: int = 5
    size: int = SIZE
    batch: int = 8
    drift_seconds: int = 4
    drift_clips: int = 4

    def __post_init__(self) -> None:
        for kind, chosen, known in (("scene", self.scenes, tuple(SCENES)), ("split", self.splits, SPLITS)):
            for name in chosen:
                if name not in known:
                    raise UserError(f"unknown {kind} {name!r}; one of {', '.join(known)}")
        least = {
            "clips": 1,
            "seed": 0,
            "batch": 1,
            "given": 0,
            "size": 16,
            "drift_seconds": 0,
            "drift_clips": 1,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UserError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        if self.num_frames <= self.given + 1:
            raise UserError(f"num_frames must be above given + 1 = {self.given + 1}, got {self.num_frames}")

    def check_latents(self) -> None:
        """Raises UserError where the frames are no whole latent ones, as a Kairos model's are."""
        for name in ("num_frames", "given"):
            value = getattr(self, name)
            if value and value % TEMPORAL != 1:
                near = value // TEMPORAL * TEMPORAL + 1
                raise UserError(f"{name} must be {TEMPORAL}n + 1, got {value}; try {near}")


@dataclass(frozen=True)
class Case:
    """One clip to measure by, with what is needed to read it."""

    clip: Clip
    scenery: Frames
    truth: Reading

    @classmethod
    def of(cls, scene: str, split: str, seed: int, index: int, num_frames: int, size: int) -> Case:
        clip = simulate(scene, split=split, seed=seed, index=index, num_frames=num_frames, size=size)
        empty = clip.scenery
        return cls(clip, empty, read(clip.frames, empty))

    def score(self, frames: Frames, given: int) -> scores.Scores:
        """The scores of a video that goes on from `given` frames."""
        return scores.score(read(frames, self.scenery), self.clip, given, self.truth)


def evaluate(
    model: VideoModel,
    settings: Settings,
    *,
    output: str | os.PathLike[str] | None = None,
    name: str = "",
    teacher: str | os.PathLike[str] | None = None,
    on_clips: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Measure a model. Returns what `results.json` holds (see docs/evaluation.md), and writes it to `output`.

    name: of the model, as results show it. teacher: the output folder of another model, measured on the same
    clips, whose motion this one's is compared with. `on_clips` is told how many clips are done, now and then.
    """
    if isinstance(model, KairosModel):
        settings.check_latents()
    folder = None if output is None else Path(output)
    if folder is not None:
        prepare_folder(folder)
    if not settings.given and not getattr(model, "from_text", False):
        raise UserError("without given frames only a model with from_text can be measured")
    records = Records(folder, record_key(model, settings, name))
    if not hasattr(model, "identity"):
        records.forget()
    videos = None if folder is None else folder / "videos" / records.key
    taught = None if teacher is None else Records.of_results(Path(teacher), settings)
    every = range(settings.clips)
    result: dict[str, Any] = {}
    known: dict[str, Any] = {}
    drift: dict[str, Any] = {}
    for split in settings.splits:
        result[split], known[split] = {}, {}
        for scene in settings.scenes:
            missing = [index for index in every if records.get(split, scene, index) is None]
            on_clips(settings.clips - len(missing))
            for start in range(0, len(missing), settings.batch):
                part = missing[start : start + settings.batch]
                for index, record in measure(model, settings, scene, split, part, videos):
                    records.put(split, scene, index, record)
                on_clips(len(part))
            rows = list(filter(None, (records.get(split, scene, index) for index in every)))
            beside = [taught.get(split, scene, index) for index in every] if taught else None
            known[split][scene] = rows
            result[split][scene] = summarise(rows, settings.seed, beside)
            if rolled := rollouts(model, settings, scene, split, records):
                drift.setdefault(split, {})[scene] = summarise_drift(rolled, settings.seed)
            logger.info("%s, %s: %s", scene, split, short(result[split][scene]))
    about = {
        "model": name,
        "identity": identity(model, name),
        "key": records.key,
        "seed": settings.seed,
        "clips": settings.clips,
        "given_frames": settings.given,
        "num_frames": settings.num_frames,
    }
    return written(about, result, known, drift, folder, videos)


def written(
    about: Record,
    result: dict[str, Any],
    records: dict[str, dict[str, list[Record]]],
    drift: dict[str, Any],
    output: Path | None,
    videos: Path | None = None,
) -> dict[str, Any]:
    """The results of all splits, {split: {scene: measures}}, as `results.json` has them, and the files.

    records: those behind them, {split: {scene: records}}. videos: the folder of those that the report shows.
    """
    every = [row for scenes in records.values() for rows in scenes.values() for row in rows]
    warn_of_beginnings(every, about["given_frames"])
    first = next(iter(result))
    splits: dict[str, Any] = {split: {"scenes": scenes} for split, scenes in result.items()}
    for split, scenes in drift.items():
        splits[split]["drift"] = scenes
    results = about | {"split": first, "scenes": result[first], "splits": splits}
    if output is not None:
        write_atomically(output / "results.json", dump(results))
        write_atomically(output / "report.html", report(results, videos, records).encode())
    return results


def warn_of_beginnings(records: Sequence[Record], given: int) -> None:
    """Say how many videos do not begin with the given frames: one of only what was made is ahead of its clip
    throughout."""
    begin = [(row["clip"], row["scores"].get("model", {}).get("begins")) for row in records]
    if wrong := [clip for clip, right in begin if right == 0]:
        logger.warning(
            "%d of %d videos do not begin with the %d given frames, such as %s; where they hold only what "
            "comes after those, put the given frames before it",
            len(wrong),
            len(begin),
            given,
            wrong[0],
        )


def measure(
    model: VideoModel,
    settings: Settings,
    scene: str,
    split: str,
    indices: Sequence[int],
    shown: Path | None,
) -> Iterator[tuple[int, Record]]:
    """The records of some clips of one scene and split, made at once. shown: where the first videos go."""
    place = (scene, split, settings.seed)
    cases = [Case.of(*place, index, settings.num_frames, settings.size) for index in indices]
    captions = [case.clip.caption for case in cases]
    truth = np.stack([case.clip.frames for case in cases])

    def seeds(purpose: str) -> list[int]:
        return [seed_of(*place, index, purpose) for index in indices]

    videos: dict[str, Frames] = {"truth": truth}
    if hasattr(model, "reconstruct"):
        videos["vae"] = model.reconstruct(truth)
    if settings.given:
        first = truth[:, : settings.given]
        videos["model"] = generate(model, captions, first, settings.num_frames, seeds("continuation"))
    if getattr(model, "from_text", False):
        videos["text"] = generate(model, captions, truth[:, :0], settings.num_frames, seeds("text"))
    preferred = expectation(model, settings, scene, split, indices, captions, seeds("surprise"))
    for number, (index, case) in enumerate(zip(indices, cases, strict=True)):
        said = case.clip.parameters["said"]
        of_kind: dict[str, scores.Scores] = {}
        for kind, batch in videos.items():
            frames = batch[number]
            reading = case.truth if kind == "truth" else read(frames, case.scenery)
            of_kind[kind] = {}
            if kind != "text":
                of_kind[kind] |= scores.score(reading, case.clip, settings.given, case.truth)
            if kind != "model":
                of_kind[kind] |= scores.agreement(reading, said, case.truth)
            if kind == "vae":
                of_kind[kind]["psnr"] = psnr(frames, case.clip.frames)
        if shown is not None and index < SHOWN:
            keep(shown / split, scene, index, {kind: batch[number] for kind, batch in videos.items()})
        name = str(ClipName(scene, split, settings.seed, index))
        about = {"clip": name, "caption": case.clip.caption}
        yield index, about | {"scores": of_kind, "expectation": preferred[number]}


def rollouts(model: VideoModel, settings: Settings, scene: str, split: str, records: Records) -> list[Record]:
    """The drift of the first clips of a scene and split; none for a model that cannot be rolled out."""
    seconds, given = settings.drift_seconds, settings.given
    if not (seconds and given and getattr(model, "rolls", False)):
        return []
    wanted = range(min(settings.clips, settings.drift_clips))
    part = f"{split}-{seconds}s"
    missing = [index for index in wanted if records.get(part, scene, index) is None]
    place, frames = (scene, split, settings.seed), max(seconds * FPS, given + 3) // 4 * 4 + 1
    for start in range(0, len(missing), settings.batch):
        some = missing[start : start + settings.batch]
        cases = [Case.of(*place, index, frames, settings.size) for index in some]
        truth = np.stack([case.clip.frames for case in cases])
        captions = [case.clip.caption for case in cases]
        seeds = [seed_of(*place, index, "rollout") for index in some]
        videos = {"truth": truth, "model": model.rollout(captions, truth[:, :given], frames, seeds)}  # type: ignore[attr-defined]
        if hasattr(model, "reconstruct"):
            videos["vae"] = model.reconstruct(truth)
        rows = drift_of(videos, [case.clip for case in cases], [case.scenery for case in cases], given)
        for index, row in zip(some, rows, strict=True):
            records.put(part, scene, index, row)
    return list(filter(None, (records.get(part, scene, index) for index in wanted)))


def expectation(
    model: VideoModel,
    settings: Settings,
    scene: str,
    split: str,
    indices: Sequence[int],
    captions: Sequence[str],
    seeds: Sequence[int],
) -> list[Record | None]:
    """For each clip its violation and the model's surprise at the possible and the impossible video."""
    given, frames = settings.given, settings.num_frames
    if not (hasattr(model, "surprise") and given and frames >= given + 8 and scene in VIOLATIONS):
        return [None] * len(indices)
    pairs = [
        impossible_twin(
            scene,
            split=split,
            seed=settings.seed,
            index=index,
            num_frames=frames,
            size=settings.size,
            given=given,
        )
        for index in indices
    ]
    possible, impossible = (
        model.surprise(captions, np.stack([getattr(pair, kind) for pair in pairs]), given, seeds).tolist()
        for kind in ("possible", "impossible")
    )
    return [
        {"violation": pair.violation, "possible": good, "impossible": bad, "begins": pair.begins}
        if pair.begins < frames
        else None
        for pair, good, bad in zip(pairs, possible, impossible, strict=True)
    ]


class Records:
    """What is known of clips, under a key: in memory, and as files where there is a folder."""

    def __init__(self, folder: Path | None, key: str) -> None:
        self.folder, self.key = folder, key
        self.known: dict[tuple[str, str, int], Record] = {}

    @classmethod
    def of_results(cls, folder: Path, settings: Settings) -> Records:
        """Those behind a results.json. Raises UserError where there is none, or of other clips."""
        try:
            results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            key, said = (
                str(results["key"]),
                [results[name] for name in ("seed", "given_frames", "num_frames")],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"no results of a model's evaluation in {folder}: give its --output folder"
            ) from error
        if said != (own := [settings.seed, settings.given, settings.num_frames]):
            raise UserError(
                f"the results in {folder} are of other clips: their seed, given frames and frames are "
                f"{said[0]}, {said[1]} and {said[2]}, here {own[0]}, {own[1]} and {own[2]}"
            )
        records = cls(folder, key)
        asked = list(product(settings.splits, settings.scenes, range(settings.clips)))
        if not (known := sum(records.get(*place) is not None for place in asked)):
            raise UserError(
                f"the results in {folder} have none of these clips: measure both models on the same scenes "
                "and splits"
            )
        if known < len(asked):
            logger.warning(
                "%s has %d of the %d clips; motion is compared on those", folder, known, len(asked)
            )
        return records

    def get(self, split: str, scene: str, index: int) -> Record | None:
        place = (split, scene, index)
        if place not in self.known and self.folder is not None and (path := self.path(*place)).exists():
            self.known[place] = json.loads(path.read_text(encoding="utf-8"))
        return self.known.get(place)

    def forget(self) -> None:
        """Remove those of earlier runs, and their videos: nothing tells whether they are this model's."""
        if self.folder is not None and (self.folder / "clips" / self.key).exists():
            logger.warning(
                "a model without an identity is measured anew; give it one, which changes with its weights"
            )
            for part in ("clips", "videos"):
                shutil.rmtree(self.folder / part / self.key, ignore_errors=True)

    def put(self, split: str, scene: str, index: int, record: Record) -> None:
        self.known[split, scene, index] = record
        if self.folder is not None:
            path = self.path(split, scene, index)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, dump(record))

    def path(self, split: str, scene: str, index: int) -> Path:
        assert self.folder is not None
        return self.folder / "clips" / self.key / split / f"{scene}-{index:05d}.json"


def identity(model: VideoModel, name: str = "") -> str:
    """What tells a model's records from another's: its own word for that, or its names here and in Python."""
    known = getattr(model, "__qualname__", type(model).__qualname__)
    return str(getattr(model, "identity", f"{known}-{name}" if name else known))


def record_key(model: VideoModel, settings: Settings, name: str = "") -> str:
    """The name of the folder of records: what they depend on, but for scene, split and index."""
    from_text = bool(getattr(model, "from_text", False))
    clips = [settings.seed, settings.num_frames, settings.given, settings.size]
    said = [VERSION, identity(model, name), from_text, *clips]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]


def seed_of(scene: str, split: str, seed: int, index: int, purpose: str) -> int:
    """The seed of one video: that of nothing else in the suite, and the same in every run."""
    return zlib.crc32(f"{scene}/{split}/{seed}/{index}/{purpose}".encode())


def keep(folder: Path, scene: str, index: int, videos: dict[str, Frames]) -> None:
    """Write truth, reconstruction and model side by side, and what was made from the caption alone."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = [videos[kind] for kind in BESIDE if kind in videos]
    gap = np.full((*beside[0].shape[:2], 2, 3), 255, np.uint8)
    row = [part for video in beside for part in (video, gap)][:-1]
    write_video(folder / f"{scene}-{index:03d}.mp4", np.concatenate(row, 2), fps=FPS)
    if "text" in videos:
        write_video(folder / f"{scene}-{index:03d}-text.mp4", videos["text"], fps=FPS)


def dump(value: Any) -> bytes:
    """JSON in which what could not be measured is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return (json.dumps(plain(value), indent=1, allow_nan=False) + "\n").encode()


def psnr(frames: Frames, truth: Frames) -> float:
    """Peak signal to noise ratio in dB."""
    error = float(np.mean((frames.astype(np.float64) - truth) ** 2))
    return 10 * math.log10(255**2 / max(error, 1e-9))


def short(measures: dict[str, Any]) -> str:
    """The first measures of a scene in a line of the log."""
    shown = [f"{name} {entry['value']:.3f}" for name, entry in measures.items() if entry["value"] is not None]
    return ", ".join(shown[:6])
