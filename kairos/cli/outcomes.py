"""What becomes of each request of a list: made, there already, or failed; and the report of them all."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kairos.cli.console import out, say
from kairos.cli.jobs import Job, Refused, prepare_output
from kairos.cli.machine import explained_memory
from kairos.cli.made_before import is_finished
from kairos.cli.resolve import check_request, check_template
from kairos.cli.run import Loaded, encoder_after, make_job
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


def attempt(job: Job, loaded: Loaded) -> Outcome:
    """Make one job of a list, unless it is made; its failure is an outcome too."""
    if is_finished(job, loaded):
        return skipped(job)
    try:
        check(job, loaded)
        with explained_memory():
            make_job(job, loaded, encoder_after(loaded.options, loaded.pipeline.device, last=False))
    except Exception as error:
        logger.debug("request %d failed", job.number, exc_info=True)
        return failed(job, error)
    return Outcome(job.number, str(job.path), "made")


def check(job: Job, loaded: Loaded) -> None:
    """Refuse what the loaded model would not make."""
    check_request(job.request, loaded.pipeline.config.defaults, loaded.options.scale)
    check_template(job.request)
    prepare_output(job)


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
