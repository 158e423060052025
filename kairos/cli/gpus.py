"""`kairos generate` on several GPUs: one video over all of them, or a list of videos shared out.

Every rank comes through `make_on_rank`, whether this command or torchrun started it.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kairos import presets
from kairos.cli import run as single
from kairos.cli.clock import Clock
from kairos.cli.console import err, out, say, show_log, waiting
from kairos.cli.generate import Job, Refused
from kairos.cli.run import RunOptions
from kairos.data.files import prepare_file, write_atomically
from kairos.distributed import is_rank
from kairos.errors import KairosError, MachineError, UserError, one_line
from kairos.request import did_you_mean

if TYPE_CHECKING:
    from kairos.distributed.ranks import World
    from kairos.pipeline import KairosPipeline

logger = logging.getLogger(__name__)

SPLITS = ("context", "cfg", "list")


@dataclass(frozen=True)
class Outcome:
    """What became of a request: "made", "skipped" (it was there) or "failed", by input or by machine."""

    request: int
    output: str
    status: str
    error: str = ""
    by_input: bool = True


def run_on_gpus(
    jobs: Sequence[Job],
    refused: Sequence[Refused],
    options: RunOptions,
    *,
    gpus: str | None,
    split: str | None,
    report: Path | None = None,
) -> None:
    """Make every job's video on `gpus` GPUs of this machine, or on the ranks that torchrun started.

    report: a file that says what became of each request.
    """
    if split is not None and split not in SPLITS:
        raise UserError(f"no split {split!r}{did_you_mean(split, SPLITS)}")
    kind = device_kind(options.device)
    jobs = [with_remark(job) for job in jobs]
    if is_rank():
        from kairos.distributed.ranks import join, one_voice

        if gpus is not None:
            raise UserError("torchrun has started the ranks: leave --gpus out")
        if options.rewrite is not None:
            raise UserError("--rewrite is for one machine: use --gpus N, not torchrun")
        world = join(kind, said_by(jobs, options, split))
        with one_voice(world.store):
            _make(world, jobs, refused, options, split, report)
        return
    if gpus is None:
        raise UserError(f"--split {split} says what several GPUs share; add --gpus N")
    size = count_gpus(gpus, kind)
    single.check_model(options)
    if not jobs:  # nothing to load a model for
        conclude(refusals(refused), report)
        return
    if not report:
        defaults = presets.defaults_of(options.model)
        for job in jobs:
            single.check_request(job.request, defaults, options.scale)
            single.prepare_output(job)
    if options.rewrite is not None:
        from kairos.conditioning.rewrite import Rewriter

        with waiting("rewriting prompts"), Rewriter(options.rewrite) as rewriter:
            jobs = [
                (rewritten_before(job, rewriter.source) if report else None)
                or single.rewritten(job, rewriter)
                for job in jobs
            ]
    from kairos.distributed.launch import launch

    launch(make_on_rank, (jobs, refused, options, kind, split, report), size=size)


def make_on_rank(
    jobs: Sequence[Job],
    refused: Sequence[Refused],
    options: RunOptions,
    kind: str,
    split: str | None,
    report: Path | None,
) -> None:
    """What each of the ranks that `launch` starts does."""
    from kairos.distributed.ranks import join

    show_log(options.verbose)
    _make(join(kind, said_by(jobs, options, split)), jobs, refused, options, split, report)


def device_kind(device: str) -> str:
    """ "auto", "cuda" or "cpu": a rank's number says which GPU is its own."""
    if device not in ("auto", "cuda", "cpu"):
        raise UserError(f"with several GPUs --device is auto, cuda or cpu, got {device!r}")
    return device


def count_gpus(gpus: str, kind: str) -> int:
    """How many ranks `--gpus` asks for."""
    from kairos.distributed.ranks import check_gpus, gpus_here

    if gpus == "all":
        if kind == "cpu":
            raise UserError("--gpus all counts GPUs; with --device cpu say how many processes: --gpus N")
        check_gpus(1)
        return gpus_here()
    if not gpus.isdecimal() or not 1 <= int(gpus) <= 1024:
        raise UserError(f"--gpus must be a whole number from 1 to 1024, or all, got {gpus!r}")
    if kind != "cpu":
        check_gpus(int(gpus))
    return int(gpus)


def said_by(jobs: Sequence[Job], options: RunOptions, split: str | None) -> dict[str, object]:
    """What all ranks must have been told alike."""
    requests = json.dumps([[job.request.to_dict(), str(job.path)] for job in jobs], sort_keys=True)
    digest = hashlib.sha256(requests.encode()).hexdigest()[:12]
    return {f"--{name}": value for name, value in asdict(options).items()} | {
        "--split": split,
        "requests": digest,
    }


def _make(
    world: "World",
    jobs: Sequence[Job],
    refused: Sequence[Refused],
    options: RunOptions,
    split: str | None,
    report: Path | None,
) -> None:
    """Load the model on this rank and make what is its part."""
    import torch

    from kairos.distributed.parallel import choose_split, parallelize
    from kairos.distributed.ranks import leave

    single.import_libraries()
    first = world.rank == 0
    clock = Clock()
    dtype = torch.float32 if world.device.type == "cpu" else torch.bfloat16
    if options.dtype != "auto":
        dtype = getattr(torch, options.dtype)
    with single.explained_memory(), clock.stage("load"):
        pipeline, about = single.load(options, world.device, dtype)
    world.agree({"weights": about["model"]["hash"]})
    guided = all(single.is_guided(job.request, pipeline) for job in jobs)
    heads = pipeline.transformer.config.num_attention_heads
    split = split or choose_split(len(jobs), world.size, guided, heads)
    if first:
        logger.info("%d ranks on %s share by %s", world.size, world.device.type, split)
    outcomes = refusals(refused) if first else []
    if split == "list":
        outcomes += _take_jobs(world, jobs, pipeline, about, options, clock)
    else:
        if not first:  # all would warn of the same
            logging.getLogger("kairos").setLevel(logging.ERROR)
        parallel = parallelize(pipeline.transformer, pipeline.vae, split=split)
        pipeline.branches = parallel.branches or pipeline.branches
        outcomes += _make_together(world, jobs, pipeline, about, options, clock, listed=report is not None)
        logger.info("rank %d sent %s bytes", world.rank, dict(parallel.sent))
    everyone = world.share("outcomes", [asdict(outcome) for outcome in outcomes])
    if first:
        if options.verbose:
            err.print(clock.table())
        conclude([Outcome(**one) for rank in everyone for one in rank], report)
    leave()


def _take_jobs(
    world: "World",
    jobs: Sequence[Job],
    pipeline: "KairosPipeline",
    about: dict[str, Any],
    options: RunOptions,
    clock: Clock,
) -> list[Outcome]:
    """Whole videos, from the queue, until it is empty."""
    from kairos.distributed.queue import WorkQueue

    return [
        attempt(jobs[number], pipeline, about, options, clock) for number in WorkQueue(world.store, len(jobs))
    ]


def attempt(
    job: Job, pipeline: "KairosPipeline", about: dict[str, Any], options: RunOptions, clock: Clock
) -> Outcome:
    """Make one job of a list, unless it is made; its failure is an outcome too."""
    if is_finished(job, options, about):
        return skipped(job)
    try:
        _check(job, pipeline, options)
        with single.explained_memory():
            single.make_job(job, pipeline, about, options, clock, "cpu" if options.free_encoder else "keep")
    except Exception as error:
        logger.debug("request %d failed", job.number, exc_info=True)
        return failed(job, error)
    return Outcome(job.number, str(job.path), "made")


def failed(job: Job, error: BaseException) -> Outcome:
    """The outcome of a job that raised `error`, said on stderr."""
    said = str(error) if isinstance(error, KairosError) else f"{type(error).__name__}: {one_line(error)}"
    outcome = Outcome(job.number, str(job.path), "failed", said, isinstance(error, UserError))
    say_failure(outcome)
    return outcome


def _make_together(
    world: "World",
    jobs: Sequence[Job],
    pipeline: "KairosPipeline",
    about: dict[str, Any],
    options: RunOptions,
    clock: Clock,
    *,
    listed: bool,
) -> list[Outcome]:
    """Each video on all ranks. What a rank finds wrong before it begins, all know before they begin.

    In a list what is there is left as it is, and what is wrong with one request is an outcome; a request by
    itself is made anew, and raises.
    """
    outcomes = []
    first = world.rank == 0
    for job in jobs:
        error: KairosError | None = None
        finished = is_finished(job, options, about)
        try:
            _check(job, pipeline, options)
        except KairosError as caught:
            error = caught
        said = [str(error) if error else "", isinstance(error, UserError), finished]
        told = world.share(f"request {job.number}", said)
        if listed and told[0][2]:
            outcomes.append(skipped(job) if first else None)
            continue
        if wrong := next((one for one in told if one[0]), None):
            problem = (UserError if wrong[1] else MachineError)(wrong[0])
            if not listed:
                raise problem
            outcomes.append(failed(job, problem) if first else None)
            continue
        after_encoding = ("free" if job is jobs[-1] else "cpu") if options.free_encoder else "keep"
        with single.explained_memory():
            single.make_job(job, pipeline, about, options, clock, after_encoding, write=first)
        outcomes.append(Outcome(job.number, str(job.path), "made") if first else None)
    return [outcome for outcome in outcomes if outcome is not None]


def _check(job: Job, pipeline: "KairosPipeline", options: RunOptions) -> None:
    single.check_request(job.request, pipeline.config.defaults, options.scale)
    single.check_template(job.request)
    single.prepare_output(job)


def with_remark(job: Job) -> Job:
    """The job whose video remembers what was asked for, before anything was rounded or rewritten."""
    asked = replace(job.request, output="").to_dict()
    return replace(job, remarks={"asked": asked} | job.remarks)


def is_finished(job: Job, options: RunOptions, about: dict[str, Any]) -> bool:
    """Whether the job's file is there, and is what this job asks of this model with these options.

    about: what the model's videos say of it, see `kairos.cli.run.load`.
    """
    return is_as_asked(said_in(job.path), job, options, about)


def is_as_asked(metadata: dict[str, Any], job: Job, options: RunOptions, about: dict[str, Any]) -> bool:
    """`is_finished` for a file that says this."""
    said = single.said_of(options) | {"asked": with_remark(job).remarks["asked"]}
    said |= {name: about[name] for name in ("model", "dtype", "vae_dtype")}
    rewritten = metadata.get("rewritten") or {}
    return rewritten.get("by") == options.rewrite and all(
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


def skipped(job: Job) -> Outcome:
    out.print(f"{job.path}: made before")
    return Outcome(job.number, str(job.path), "skipped")


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
