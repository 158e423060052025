"""Videos that are there: whether one is what a job asks for, by what it says of itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from kairos.cli.jobs import Job
from kairos.cli.run import Loaded, said_of
from kairos.errors import KairosError


def is_finished(job: Job, loaded: Loaded) -> bool:
    """Whether the job's file is there, and is what this job asks of this model with these options."""
    return is_as_asked(said_in(job.path), job, loaded)


def is_as_asked(metadata: dict[str, Any], job: Job, loaded: Loaded) -> bool:
    """`is_finished` for a file that says this."""
    said = said_of(loaded.options) | {"asked": with_remark(job).remarks["asked"]}
    said |= {name: loaded.about[name] for name in ("model", "dtype", "vae_dtype")}
    rewritten = metadata.get("rewritten") or {}
    return rewritten.get("by") == loaded.options.rewrite and all(
        metadata.get(name) == value for name, value in said.items()
    )


def with_remark(job: Job) -> Job:
    """The job whose video remembers what was asked for, before anything was rounded or rewritten."""
    asked = replace(job.request, output="").to_dict()
    return replace(job, remarks={"asked": asked} | job.remarks)


def rewritten_before(job: Job, rewriter: str) -> Job | None:
    """The job with the prompt that its file was made of, where this rewriter wrote it for the same job."""
    metadata = said_in(job.path)
    rewritten = metadata.get("rewritten") or {}
    if metadata.get("asked") != with_remark(job).remarks["asked"] or rewritten.get("by") != rewriter:
        return None
    request = replace(job.request, prompt=metadata["request"].get("prompt", ""))
    return replace(job, request=request, remarks=job.remarks | {"rewritten": rewritten})


def said_in(path: Path) -> dict[str, Any]:
    """The metadata of a video; nothing where there is none."""
    from kairos.data.media import read_metadata

    try:
        return read_metadata(path)
    except KairosError:
        return {}
