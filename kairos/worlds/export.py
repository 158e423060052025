"""Clips of the worlds as files: a data set to train any model on, and the tasks and truth to measure one by.

A folder holds `clips/<scene>-<split>-<seed>-<index>.mp4`, `manifest.jsonl` with a line {"video", "caption"}
a clip, and `states.jsonl` with where everything truly is in each frame.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kairos.data.files import prepare_folder, write_atomically
from kairos.data.media import write_video
from kairos.errors import UserError
from kairos.worlds.scenes import SCENES
from kairos.worlds.world import SPLITS, Clip, simulate

FPS = 16


@dataclass(frozen=True)
class ClipName:
    """Which clip a file is: its name without the folder is `str(name) + ".mp4"`."""

    scene: str
    split: str
    seed: int
    index: int

    def __str__(self) -> str:
        return f"{self.scene}-{self.split}-{self.seed}-{self.index:05d}"

    @classmethod
    def of(cls, stem: str) -> ClipName | None:
        """The clip that a name without its ending stands for; None where it is another kind of name."""
        pattern = rf"({'|'.join(SCENES)})-({'|'.join(SPLITS)})-(\d+)-(\d+)"
        found = re.fullmatch(pattern, stem)
        return cls(found[1], found[2], int(found[3]), int(found[4])) if found else None


def export(
    folder: str | os.PathLike[str],
    *,
    scenes: Sequence[str] = tuple(SCENES),
    splits: Sequence[str] = ("train",),
    clips: int = 16,
    seed: int = 0,
    num_frames: int = 33,
    size: int = 64,
    on_clip: Callable[[], None] = lambda: None,
) -> int:
    """Write a data set into `folder`; returns how many clips. The manifest comes last, when all is there.

    Raises UserError for what cannot be simulated or written, before the first clip.
    """
    if clips < 1:
        raise UserError(f"clips must be at least 1, got {clips}")
    names = [
        ClipName(scene, split, seed, index) for scene in scenes for split in splits for index in range(clips)
    ]
    for scene in scenes:
        for split in splits:
            simulate(scene, split=split, seed=seed, num_frames=min(num_frames, 1), size=size)
    folder = Path(folder)
    prepare_folder(folder)
    prepare_folder(folder / "clips")
    manifest, states = [], []
    for name in names:
        clip = simulate(**asdict(name), num_frames=num_frames, size=size)
        video = f"clips/{name}.mp4"
        write_video(folder / video, clip.frames, fps=FPS, metadata={"world": clip.parameters})
        manifest.append({"video": video, "caption": clip.caption})
        states.append({"video": video, **state(clip)})
        on_clip()
    for file, lines in (("states.jsonl", states), ("manifest.jsonl", manifest)):
        write_atomically(folder / file, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return len(names)


def state(clip: Clip) -> dict[str, Any]:
    """All that is true of a clip as JSON values: places and velocities (F, n, 2) in world units, y up."""
    return {
        "caption": clip.caption,
        "dt": clip.dt,
        "colors": list(clip.colors),
        "radii": clip.radii.tolist(),
        "positions": clip.positions.tolist(),
        "velocities": clip.velocities.tolist(),
        "parameters": clip.parameters,
    }
