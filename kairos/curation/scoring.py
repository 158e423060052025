"""From a clip to its scores: decoded once, for all stages that have not been run on it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kairos.curation.views import VIEWS, read_views


@dataclass(frozen=True)
class ScoreTask:
    """What a worker is asked for: the results of `stages` on one clip."""

    clip_id: str
    file: Path
    stages: tuple[Any, ...]
    labels: Mapping[str, Any]
    scores: Mapping[str, Any]
    """What the stages that need not run again gave."""


def score_clip(task: ScoreTask) -> dict[str, Any]:
    """{"results": {stage: its scores, seconds and video_s}}; a stage that failed has `failed` instead."""
    import av

    wanted = {name for stage in task.stages for name in stage.inputs if name in VIEWS}
    try:
        views, decode_s = read_views(task.file, wanted, task.labels)
    except MemoryError:
        raise
    except (av.error.FFmpegError, OSError) as error:
        return {"failed": f"corrupt: the clip {task.file.name} cannot be read: {error}"}
    views.scores.update(task.scores)
    video_s = views.frames / views.fps
    results: dict[str, Any] = {"decode": {"seconds": decode_s, "video_s": video_s}}
    for stage in task.stages:
        started = time.process_time()
        missing = [name for name in stage.inputs if name not in VIEWS and name not in views.scores]
        try:
            if missing:
                raise ValueError(f"it needs {', '.join(missing)}, which no earlier stage gave")
            scores = stage.measure(views)
        except MemoryError:
            raise
        except Exception as error:  # one stage's failure is this stage's: the others' scores stand
            said = " ".join(str(error).split())[:200]
            results[stage.name] = {"failed": f"error: {stage.name}: {type(error).__name__}: {said}"}
            continue
        views.scores.update(scores)
        results[stage.name] = {"scores": scores, "seconds": time.process_time() - started, "video_s": video_s}
    return {"results": results}
