"""`kairos generate` on several GPUs: one video over all of them, or a list of videos shared out.

Every rank comes through `make_on_rank`, whether this command or torchrun started it.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kairos import presets
from kairos.cli.clock import Clock
from kairos.cli.console import err, show_log, waiting
from kairos.cli.jobs import Job, Refused, prepare_output
from kairos.cli.machine import dtype_for, explained_memory, import_libraries
from kairos.cli.made_before import is_finished, rewritten_before, with_remark
from kairos.cli.outcomes import Outcome, attempt, check, conclude, failed, refusals, skipped
from kairos.cli.resolve import check_request, is_guided
from kairos.cli.run import Loaded, RunOptions, check_model, encoder_after, load, make_job, rewritten
from kairos.distributed import is_rank
from kairos.errors import KairosError, MachineError, UserError
from kairos.request import did_you_mean

if TYPE_CHECKING:
    from kairos.distributed.ranks import World

logger = logging.getLogger(__name__)

SPLITS = ("context", "cfg", "list")


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
    check_model(options)
    if not jobs:  # nothing to load a model for
        conclude(refusals(refused), report)
        return
    if not report:
        defaults = presets.defaults_of(options.model)
        for job in jobs:
            check_request(job.request, defaults, options.scale)
            prepare_output(job)
    if options.rewrite is not None:
        from kairos.conditioning.rewrite import Rewriter

        with waiting("rewriting prompts"), Rewriter(options.rewrite) as rewriter:
            jobs = [
                (rewritten_before(job, rewriter.source) if report else None) or rewritten(job, rewriter)
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
    from kairos.distributed.parallel import choose_split, parallelize
    from kairos.distributed.ranks import leave

    import_libraries()
    first = world.rank == 0
    clock = Clock()
    with explained_memory(), clock.stage("load"):
        loaded = load(options, world.device, dtype_for(world.device, options.dtype))
    loaded, pipeline = replace(loaded, clock=clock), loaded.pipeline
    world.agree({"weights": loaded.about["model"]["hash"]})
    guided = all(is_guided(job.request, pipeline) for job in jobs)
    heads = pipeline.transformer.config.num_attention_heads
    split = split or choose_split(len(jobs), world.size, guided, heads)
    if first:
        logger.info("%d ranks on %s share by %s", world.size, world.device.type, split)
    outcomes = refusals(refused) if first else []
    if split == "list":
        outcomes += _take_jobs(world, jobs, loaded)
    else:
        if not first:  # all would warn of the same
            logging.getLogger("kairos").setLevel(logging.ERROR)
        parallel = parallelize(pipeline.transformer, pipeline.vae, split=split)
        pipeline.branches = parallel.branches or pipeline.branches
        outcomes += _make_together(world, jobs, loaded, listed=report is not None)
        logger.info("rank %d sent %s bytes", world.rank, dict(parallel.sent))
    everyone = world.share("outcomes", [asdict(outcome) for outcome in outcomes])
    if first:
        if options.verbose:
            err.print(clock.table())
        conclude([Outcome(**one) for rank in everyone for one in rank], report)
    leave()


def _take_jobs(world: "World", jobs: Sequence[Job], loaded: Loaded) -> list[Outcome]:
    """Whole videos, from the queue, until it is empty."""
    from kairos.distributed.queue import WorkQueue

    return [attempt(jobs[number], loaded) for number in WorkQueue(world.store, len(jobs))]


def _make_together(world: "World", jobs: Sequence[Job], loaded: Loaded, *, listed: bool) -> list[Outcome]:
    """Each video on all ranks. What a rank finds wrong before it begins, all know before they begin.

    In a list what is there is left as it is, and what is wrong with one request is an outcome; a request by
    itself is made anew, and raises.
    """
    outcomes = []
    first = world.rank == 0
    for job in jobs:
        error: KairosError | None = None
        finished = is_finished(job, loaded)
        try:
            check(job, loaded)
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
        after_encoding = encoder_after(loaded.options, world.device, last=job is jobs[-1])
        with explained_memory():
            make_job(job, loaded, after_encoding, write=first)
        outcomes.append(Outcome(job.number, str(job.path), "made") if first else None)
    return [outcome for outcome in outcomes if outcome is not None]
