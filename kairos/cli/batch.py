"""`kairos batch`: a list of requests on a Ray cluster, one model a GPU."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from kairos import presets
from kairos.cli.config import Config, read_config
from kairos.cli.console import out, show_log, waiting
from kairos.cli.jobs import Job, file_jobs, prepare_output
from kairos.cli.machine import device_and_dtype, dtype_named, import_libraries
from kairos.cli.made_before import is_as_asked, said_in, with_remark
from kairos.cli.options import option
from kairos.cli.outcomes import Outcome, attempt, conclude, failed, refusals, say_failure, skipped
from kairos.cli.run import RunOptions, check_model, load, planned
from kairos.data.files import write_atomically
from kairos.distributed import check_alone
from kairos.errors import KairosError, MachineError, UserError, one_line
from kairos.memory import Plan
from kairos.request import Request


def batch(
    request: Annotated[Path, typer.Argument(metavar="LIST.json", help="A list of requests.")],
    ray: Annotated[
        str, option("A Ray cluster, HOST:PORT or auto; local starts one.", "ADDRESS|local")
    ] = "local",
    output: Annotated[str, option("Where to.", "FOLDER", "--output", "-o")] = "output",
    gpus: Annotated[
        int | None, option("Workers, one a GPU. Default: all; with --device cpu, 1.", "N")
    ] = None,
    model: Annotated[str | None, option(f"The model. Default: {presets.DEFAULT}.", "NAME|PATH")] = None,
    weights: Annotated[str | None, option("Another LinearDiT in place of the model's own.", "PATH")] = None,
    config: Annotated[Path | None, option("A configuration.", "FILE.py")] = None,
    device: Annotated[str | None, option("cuda or cpu. Default: cuda.", "NAME")] = None,
    dtype: Annotated[str | None, option("As in generate.", "NAME")] = None,
    memory: Annotated[
        str | None, option("Make do with this much of a worker's memory. See kairos plan.", "GB")
    ] = None,
    quantize: Annotated[str | None, option("As in generate.", "int8|fp8|int4")] = None,
    retries: Annotated[int, option("How often a request is tried again whose machine failed.", "N")] = 2,
    verbose: Annotated[bool, option("Say what is going on.", None, "--verbose", "-v")] = False,
) -> None:
    """Make the videos of a list on a Ray cluster.

    Finished videos are skipped when the command runs again. The model and the images that requests name must
    be where the workers can read them; the videos come back here.
    """
    show_log(verbose)
    check_alone("batch")
    if output.lower().endswith(".mp4") and not Path(output).is_dir():
        raise UserError(f"--output is a folder here, for the videos and their report, got {output}")
    if retries < 0 or (gpus is not None and gpus < 1):
        wrong = ("--retries", 0, retries) if retries < 0 else ("--gpus", 1, gpus)
        raise UserError("{} must be at least {}, got {}".format(*wrong))
    if memory == "auto":
        raise UserError("workers may differ in what they have free; give --memory in GB")
    settings = read_config(config) if config else Config()
    given = {"model": model, "weights": weights, "dtype": dtype, "memory": memory, "quantize": quantize}
    said = {name: value for name, value in (given | {"device": device}).items() if value is not None}
    options = _at_home(RunOptions(**{"device": "cuda"} | settings.options | said))
    if options.device not in ("cuda", "cpu"):
        raise UserError(f"--device is cuda or cpu here, got {options.device!r}")
    jobs, refused = file_jobs(request, {}, settings.request, output)
    if ray != "local":
        from kairos.distributed.fleet import probe

        probe(ray)
    check_model(options)
    outcomes = refusals(refused)
    for job in jobs:
        prepare_output(job)
    if jobs:
        plan = _planned(jobs, options)
        workers = gpus or (None if options.device == "cuda" else 1)
        outcomes += on_ray(ray, jobs, options, plan, workers=workers, retries=retries)
    conclude(outcomes, Path(output) / f"{request.stem}.report.json")


def on_ray(
    address: str,
    jobs: Sequence[Job],
    options: RunOptions,
    plan: Plan | None,
    *,
    workers: int | None,
    retries: int,
) -> list[Outcome]:
    """What became of the jobs on the cluster; their videos are written as they come.

    A worker is told what the file of a job says, and skips what is made: it alone knows its model's weights.
    """
    from kairos.distributed.fleet import cluster, run_tasks

    on_gpus = options.device != "cpu"
    needs = {"num_gpus": 1} if on_gpus else {"num_cpus": 1}
    outcomes = []
    with cluster(address, workers=workers, on_gpus=on_gpus) as (ray, room):
        actor = ray.remote(**needs)(VideoWorker)
        # Absolute, as far as they are paths here: a worker has a working folder of its own.
        tasks = {
            job.number: asdict(replace(with_remark(job), request=_absolute(job)))
            | {"made_before": said_in(job.path)}
            for job in jobs
        }
        by_number = {job.number: job for job in jobs}
        with waiting(f"{len(jobs)} requests on {room} workers"):
            for number, answer in run_tasks(
                ray,
                lambda: actor.remote(asdict(options), plan),
                tasks,
                workers=room,
                retries=retries,
                again=lambda answer: "" if answer[0]["by_input"] else answer[0]["error"],
            ):
                outcomes.append(_received(by_number[number], answer))
    return outcomes


class VideoWorker:
    """An actor with a model; it makes a job into the bytes of an mp4."""

    def __init__(self, options: dict[str, Any], plan: Plan | None) -> None:
        import_libraries()
        run_options, self.tiled = RunOptions(**options), plan is not None and plan.tiled
        device, dtype = device_and_dtype(run_options.device, run_options.dtype)
        if plan is not None:
            dtype = dtype_named(plan.dtype)
        self.loaded = load(run_options, device, dtype, plan)

    def ready(self) -> bool:
        """Answers once the model is loaded."""
        return True

    def run(self, task: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """What became of the job, and its video."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video.mp4"
            request = Request(**task["request"])
            request = replace(request, tiled=request.tiled or self.tiled)
            job = Job(request, path, task["remarks"], task["number"])
            if is_as_asked(task["made_before"], job, self.loaded):
                return asdict(Outcome(job.number, "", "skipped")), b""
            outcome = attempt(job, self.loaded)
            return asdict(outcome), path.read_bytes() if outcome.status == "made" else b""


def _planned(jobs: Sequence[Job], options: RunOptions) -> Plan | None:
    """What every worker does to make do with `options.memory`. Raises UserError for what cannot fit."""
    if options.memory is None:
        return None
    import torch

    # One with more given frames than it makes is for its worker to refuse, by itself.
    requests = [replace(job.request, input_frames=None) for job in jobs]
    device = torch.device(options.device)
    # With nowhere to offload to, a worker keeps its encoder: it never knows which prompt is its last.
    return planned(requests, options, device, rolling=device.type == "cpu")


def _received(job: Job, answer: Any) -> Outcome:
    """Write the video that came, or say what went wrong."""
    if isinstance(answer, KairosError):
        return failed(job, answer)
    if isinstance(answer, BaseException):
        return failed(job, MachineError(f"its worker died: {one_line(answer)}"))
    outcome = replace(Outcome(**answer[0]), output=str(job.path))
    if outcome.status == "skipped":
        return skipped(job)
    if outcome.status == "made":
        try:
            write_atomically(job.path, answer[1])
        except KairosError as error:
            return failed(job, error)
    if outcome.status == "failed":
        say_failure(outcome)
    else:
        out.print(f"{job.path}: made")
    return outcome


def _absolute(job: Job) -> Request:
    """The request with the files that it names in full."""
    paths = (job.request.input_image, job.request.input_video)
    image, video = (str(Path(path).resolve()) if path else "" for path in paths)
    return replace(job.request, input_image=image, input_video=video)


def _at_home(options: RunOptions) -> RunOptions:
    """The options with the folders that they name in full; a model's name is not a folder."""
    model, weights = options.model, options.weights
    if not presets.is_name(model) and Path(model).exists():
        model = str(Path(model).resolve())
    if weights and Path(weights).exists():
        weights = str(Path(weights).resolve())
    return replace(options, model=model, weights=weights)
