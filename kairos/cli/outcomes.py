"""What becomes of each request of a list: made, there already, or failed; and the report of them all."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kairos.cli.console import out, say
from kairos.cli.jobs import Job, Refused
from kairos.cli.run import Loaded, said_of
from kairos.data.files import prepare_file, write_atomically
from kairos.errors import KairosError, MachineError, UserError, one_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of a request: "made", "skipped" (it was there) or "failed", by input or by machine."""

    request: int
    output: str
    status: str
    error: str = ""
    by_input: bool = True


def skipped(job: Job) -> Outcome:
    out.print(f"{job.path}: made before")
    return Outcome(job.number, str(job.path), "skipped")


def failed(job: Job, error: BaseException) -> Outcome:
    """The outcome of a job that raised `error`, said on stderr."""
    said = str(error) if isinstance(error, KairosError) else f"{type(error).__name__}: {one_line(error)}"
    outcome = Outcome(job.number, str(job.path), "failed", said, isinstance(error, UserError))
    say_failure(outcome)
    return outcome


def refusals(refused: Sequence[Refused]) -> list[Outcome]:
    """The outcomes of what is no job, said on stderr."""
    outcomes = [Outcome(bad.number, "", "failed", one_line(bad.error)) for bad in refused]
    for outcome in outcomes:
        say_failure(outcome)
    return outcomes


def say_failure(outcome: Outcome) -> None:
    named = f"request {outcome.request}, {outcome.output}: " if outcome.output else ""
    say("error", "bold red", named + outcome.error)


def conclude(outcomes: Sequence[Outcome], report: Path | None) -> None:
    """Write the report; raise if a request failed."""
    outcomes = sorted(outcomes, key=lambda outcome: outcome.request)
    if report is not None:
        entries = [
            {name: value for name, value in asdict(outcome).items() if value != "" and name != "by_input"}
            for outcome in outcomes
        ]
        prepare_file(report)
        write_atomically(report, json.dumps(entries, indent=2, ensure_ascii=False).encode() + b"\n")
    bad = [outcome for outcome in outcomes if outcome.status == "failed"]
    if bad:
        numbers = ", ".join(str(outcome.request) for outcome in bad)
        message = f"{len(bad)} of {len(outcomes)} requests failed: {numbers}"
        message += f"; see {report}" if report else ""
        raise (UserError if all(outcome.by_input for outcome in bad) else MachineError)(message)


def with_remark(job: Job) -> Job:
    """The job whose video remembers what was asked for, before anything was rounded or rewritten."""
    asked = replace(job.request, output="").to_dict()
    return replace(job, remarks={"asked": asked} | job.remarks)


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
