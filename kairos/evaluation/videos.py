"""Scores videos that are there already, of any model, by the states of the clips they are named after."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kairos.data.files import prepare_folder
from kairos.data.media import read_video
from kairos.errors import UserError
from kairos.evaluation import scores
from kairos.evaluation.reading import read, shrunk
from kairos.evaluation.suite import Case, Record, Settings, written
from kairos.evaluation.summary import summarise
from kairos.worlds.export import ClipName

logger = logging.getLogger(__name__)


def score_videos(
    folder: str | os.PathLike[str], settings: Settings, *, output: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Results, as of a model, of the mp4s in `folder` or in its `clips/`.

    They are named as `kairos.worlds.export` names them, scene-split-seed-index.mp4, are of one length, and
    begin with the given frames of that clip, a frame of video for 0.1 units of world time. With
    `settings.given` 0 they were made from the caption alone and are asked whether they show what it says. Of
    `settings`, the scenes and splits choose among the videos; `clips`, `num_frames` and the drift's are not
    used. Raises UserError where there is none to score, or two of one clip.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder of videos: {folder}")
    chosen = {
        name: path
        for name, path in (named(folder) or named(folder / "clips")).items()
        if name.scene in settings.scenes and name.split in settings.splits
    }
    if not chosen:
        raise UserError(
            f"no video in {folder} is named as a clip of the chosen scenes and splits, such as "
            f"{ClipName(settings.scenes[0], settings.splits[0], 0, 7)}.mp4"
        )
    output = None if output is None else Path(output)
    if output is not None:
        prepare_folder(output)
    found: dict[tuple[str, str], list[Record]] = {}
    lengths: dict[int, Path] = {}
    for name, path in chosen.items():
        frames, own = record(path, name, settings.given)
        lengths.setdefault(frames, path)
        if len(lengths) > 1:
            said = " and ".join(f"{path.name} {count}" for count, path in lengths.items())
            raise UserError(f"videos are compared at one length, in frames: {said}")
        found.setdefault((name.split, name.scene), []).append(own)
    result: dict[str, Any] = {split: {} for split in settings.splits if any(key[0] == split for key in found)}
    for split, measures in result.items():
        for scene in settings.scenes:
            if (split, scene) in found:
                measures[scene] = summarise(found[split, scene], settings.seed)
    about = {
        "model": str(folder),
        "videos": len(chosen),
        "seeds": sorted({name.seed for name in chosen}),
        "given_frames": settings.given,
        "num_frames": next(iter(lengths)),
    }
    records = {
        split: {scene: found[split, scene] for scene in measures} for split, measures in result.items()
    }
    return written(about, result, records, {}, output)


def named(folder: Path) -> dict[ClipName, Path]:
    """The mp4s right in a folder that are named as clips are. Raises UserError for two of one clip."""
    found: dict[ClipName, Path] = {}
    for path in sorted(folder.glob("*.mp4")):
        name = ClipName.of(path.stem)
        if name is None:
            logger.warning("%s is not named as a clip is, such as uniform-in-0-00007.mp4", path.name)
        elif name in found:
            raise UserError(
                f"{found[name].name} and {path.name} in {folder} are of one clip: keep one of them"
            )
        else:
            found[name] = path
    return found


def record(path: Path, name: ClipName, given: int) -> tuple[int, Record]:
    """How many frames a video has, and its scores beside those of the truth."""
    frames = read_video(path)
    height, width = frames.shape[1:3]
    if height != width:
        raise UserError(f"{path} must be square as the world is, got {width} x {height}")
    if len(frames) <= given + 1:
        raise UserError(f"{path} has {len(frames)} frames; more than the {given} given ones are needed")
    frames = shrunk(frames)
    case = Case.of(**asdict(name), num_frames=len(frames), size=frames.shape[1])
    said = case.clip.parameters["said"]
    truth = scores.score(case.truth, case.clip, given, case.truth)
    truth |= scores.agreement(case.truth, said, case.truth)
    reading = read(frames, case.scenery)
    if given:
        own = {"model": scores.score(reading, case.clip, given, case.truth)}
    else:
        own = {"text": scores.agreement(reading, said, case.truth)}
    return len(frames), {"clip": str(name), "caption": case.clip.caption, "scores": own | {"truth": truth}}
