"""Jobs: requests and the files that they become."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kairos.data.files import prepare_file
from kairos.errors import UserError
from kairos.request import Request, read_requests


@dataclass(frozen=True)
class Job:
    """A request and the file that it becomes."""

    request: Request
    path: Path
    remarks: dict[str, Any] = field(default_factory=dict)
    """What the video's metadata says besides."""
    number: int = 1
    """Its place in the request file."""


@dataclass(frozen=True)
class Refused:
    """A request that cannot be a job, and why."""

    number: int
    error: UserError


def prompt_job(said: dict[str, Any], defaults: dict[str, Any], output: str | None) -> Job:
    """The one job of a command without a request file."""
    request = Request.from_dict(said, defaults)
    words = request.prompt or Path(request.input_image or request.input_video).stem
    name = request.output or f"{_slug(words)}-{request.seed}.mp4"
    if output is None:
        return Job(request, Path(name))
    if output.endswith("/") or Path(output).is_dir():
        return Job(request, Path(output) / name)
    if Path(output).suffix.lower() != ".mp4":
        raise UserError(f"--output must end in .mp4, as out.mp4 does, or in / for a folder, got {output}")
    return Job(request, Path(output))


def file_jobs(
    path: Path, said: dict[str, Any], defaults: dict[str, Any], output: str | None
) -> tuple[list[Job], list[Refused]]:
    """The jobs of a request file, and what is no job: the command wins over the file, the file over the
    configuration."""
    requests = read_requests(path, defaults, said)
    jobs, refused = [], []
    for number, request in enumerate(requests, start=1):
        if isinstance(request, UserError):
            refused.append(Refused(number, request))
            continue
        name = path.stem if len(requests) == 1 else f"{path.stem}-{number:0{len(str(len(requests)))}}"
        target = Path(output or "output") / (request.output or f"{name}.mp4")
        jobs.append(Job(request, target, number=number))
    if output is not None and output.lower().endswith(".mp4") and not Path(output).is_dir():
        if len(requests) > 1:
            raise UserError(f"--output must be a folder for {len(requests)} requests, got {output}")
        return [replace(job, path=Path(output)) for job in jobs], refused
    taken: dict[Path, int] = {}
    for job in jobs:
        if job.path in taken:
            raise UserError(
                f"{path}: requests {taken[job.path]} and {job.number} both write {job.path}; name them apart"
            )
        taken[job.path] = job.number
    return jobs, refused


def prepare_output(job: Job) -> None:
    """Try that the job's file can be written, and refuse one that the job is made from."""
    prepare_file(job.path)
    keep_inputs(job.path, job.request.input_image, job.request.input_video)


def keep_inputs(output: Path, *inputs: str) -> None:
    """Refuse to write over what is read."""
    for name in inputs:
        if name and output.exists() and Path(name).exists() and output.samefile(name):
            raise UserError(f"{output} would be written over what it is made from; choose another name")


def _slug(text: str) -> str:
    """A file name from a prompt: its first words, in characters and of a length that every system takes."""
    words = re.sub(r"[^\w]+", "-", text.lower()).strip("-_")
    return words.encode()[:100].decode(errors="ignore").rstrip("-_") or "video"
