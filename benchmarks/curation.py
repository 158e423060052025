"""Throughput of every stage of a curation, and its memory against the number of clips.

    python benchmarks/curation.py throughput VIDEO [VIDEO ...] --output results.json
    python benchmarks/curation.py memory --clips 10,1000

Throughput is hours of video per core-hour (processor time), all stages in one run with one worker, and the
share of each in the time. Memory is the peak of the process that runs the curation and of its largest worker,
each count of clips in a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from kairos.bench import processor

QUICK = {
    "shots": {"detectors": ["adaptive"]},
    "split": {"min_s": 2, "piece_s": 3, "max_s": 6, "frame_step": 8},
    "text": {"samples": 0},
}


def throughput(videos: list[Path], config: Path | None) -> dict[str, object]:
    """Curate copies of the videos, and read the ledger's times."""
    from kairos.curation import curate
    from kairos.curation.ledger import Ledger
    from kairos.curation.settings import read_settings

    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "in"), Path(folder, "out")
        source.mkdir()
        for number, video in enumerate(videos):
            shutil.copy(video, source / f"{number:04d}{video.suffix}")
        summary = curate(source, output, read_settings(config), workers=1)
        with Ledger(output / "work") as ledger:
            rows = [row for row in ledger.throughput() if row[1] > 0]
    total = sum(seconds for _, seconds, _ in rows)
    decoding = sum(seconds for stage, seconds, _ in rows if stage in ("decode", "source decode"))
    stages = {
        stage: {"hours_per_core_hour": round(video_s / seconds, 1), "share": round(seconds / total, 4)}
        for stage, seconds, video_s in rows
    }
    return {
        "stages": stages,
        "decoding_share": round(decoding / total, 4),
        "whole": round(summary.hours_in * 3600 / total, 2),
        "clips": summary.clips,
        "hours_in": round(summary.hours_in, 4),
    }


def memory(clips: int) -> dict[str, float]:
    """The peaks of a curation of so many clips, in MB."""
    from kairos.curation import Settings, curate
    from kairos.data.media import write_video

    shots_in_file, frames_in_shot = 10, 33
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "in"), Path(folder, "out")
        source.mkdir()
        rng = np.random.default_rng(0)
        for number in range(clips // shots_in_file):
            film = []
            for _ in range(shots_in_file):
                ground = np.repeat(np.repeat(rng.integers(0, 255, (8, 8, 3), np.uint8), 8, 0), 8, 1)
                for time in range(frames_in_shot):
                    picture = ground.copy()
                    picture[20:36, time : time + 16] = 255
                    film.append(picture)
            write_video(source / f"{number:04d}.mp4", np.stack(film), fps=16, scale=1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        summary = curate(source, output, Settings.from_dict(QUICK), workers=1)
    if summary.clips != clips:
        raise SystemExit(f"{summary.clips} clips came out, not {clips}")
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"before_mb": before / 1024, "runner_mb": own / 1024, "worker_mb": worker / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["throughput", "memory", "memory-of"])
    parser.add_argument("videos", nargs="*", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--clips", default="10,1000")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "memory-of":
        sys.stdout.write(json.dumps(memory(int(arguments.clips))))
        return
    result: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}",
        "load_at_start": os.getloadavg()[0],
    }
    if arguments.what == "throughput":
        result |= throughput(arguments.videos, arguments.config)
    else:
        for clips in arguments.clips.split(","):
            command = [sys.executable, __file__, "memory-of", "--clips", clips]
            result[clips] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    text = json.dumps(result, indent=1) + "\n"
    sys.stdout.write(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
