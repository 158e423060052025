"""`kairos evaluate`: measure a model, or a folder of videos, on the worlds."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kairos import presets
from kairos.cli.console import out, show_log
from kairos.cli.options import panel
from kairos.distributed import check_alone
from kairos.errors import UserError
from kairos.request import Request

if TYPE_CHECKING:
    from rich.table import Table

what, how = panel("What is measured"), panel("How")
OF_MODELS = (
    *("model", "teacher", "steps", "guidance", "clips", "frames", "seed", "batch"),
    *("drift_seconds", "drift_clips", "device", "dtype"),
)
"""Options that say nothing of videos which are there already."""


def evaluate(
    context: typer.Context,
    model: Annotated[
        str | None, what(f"A model's name or folder. Default: {presets.DEFAULT}.", "NAME|PATH")
    ] = None,
    videos: Annotated[
        Path | None,
        what(
            "Score the mp4s of this folder, named as `kairos worlds export` names them, and no model.", "DIR"
        ),
    ] = None,
    suite: Annotated[str, what("physics is the only one.", "SUITE")] = "physics",
    scenes: Annotated[str | None, what("Which worlds. Default: all eight.", "SCENE,SCENE")] = None,
    splits: Annotated[
        str, what("in (distribution), interpolation, out.", "SPLIT,SPLIT", "--splits", "--split")
    ] = "in,interpolation,out",
    clips: Annotated[int, what("Clips of each scene and split.")] = 16,
    given: Annotated[int, what("Frames given; to a model 4n + 1.", "FRAMES")] = 5,
    frames: Annotated[int | None, what("Frames in all, 4n + 1. Default: the model's.", "FRAMES")] = None,
    drift_seconds: Annotated[
        int, what("Length of the rollouts that drift is measured on; 0: none.", "N")
    ] = 4,
    drift_clips: Annotated[int, what("Rollouts of each scene and split.", "N")] = 4,
    seed: Annotated[int, how("One seed, one result.")] = 0,
    steps: Annotated[int | None, how("Sampling steps. Default: the model's.")] = None,
    guidance: Annotated[float | None, how("Guidance. Default: the model's.")] = None,
    batch: Annotated[int, how("Clips made at once.")] = 8,
    teacher: Annotated[
        Path | None,
        how("The --output of another model on the same clips: compare the motion with its.", "DIR"),
    ] = None,
    device: Annotated[str, how("auto, cpu, cuda, cuda:1, ...", "NAME")] = "auto",
    dtype: Annotated[str, how("auto, float32, bfloat16 or float16.", "NAME")] = "float32",
    output: Annotated[
        Path | None,
        how(
            "Write results.json, report.html and videos here; a run that stopped goes on.",
            "DIR",
            "--output",
            "-o",
        ),
    ] = None,
) -> None:
    """Measure a model against the simulator, with no learned judge: motion, contact, permanence, text."""
    show_log(verbose=True)
    check_alone("evaluate")
    from kairos.data.files import prepare_folder
    from kairos.evaluation.suite import Settings
    from kairos.worlds import SCENES

    # What no video can be is refused as `generate` refuses it.
    Request("any", num_inference_steps=steps, guidance_scale=guidance)
    if suite != "physics":
        raise UserError(f"unknown suite {suite!r}; physics is the only one")
    model = model or presets.DEFAULT
    defaults = presets.defaults_of(model)
    if videos is not None:
        frames = given + 2  # theirs are as long as they are; this is only what Settings asks for at least
    settings = Settings(
        scenes=tuple(SCENES if scenes is None else names(scenes, "scene")),
        splits=tuple(names(splits, "split")),
        clips=clips,
        given=given,
        num_frames=int(defaults["num_frames"]) if frames is None else frames,
        size=int(defaults["height"]),
        seed=seed,
        batch=batch,
        drift_seconds=drift_seconds,
        drift_clips=drift_clips,
    )
    if output is not None:
        prepare_folder(output)
    if videos is not None:
        from kairos.evaluation.videos import score_videos

        for option in OF_MODELS:
            source = context.get_parameter_source(option)
            if source is not None and source.name == "COMMANDLINE":
                said = option.replace("_", "-")
                raise UserError(f"--{said} goes with a model; --videos scores what is there already")
        results = score_videos(videos, settings, output=output)
    else:
        settings.check_latents()
        results = measured(model, settings, steps, guidance, device, dtype, teacher, output)
    out.print(table(results))
    out.print(LEGEND, style="dim")
    if output is not None:
        out.print(f"{output / 'results.json'}")


def measured(
    model: str,
    settings: Any,
    steps: int | None,
    guidance: float | None,
    device: str,
    dtype: str,
    teacher: Path | None,
    output: Path | None,
) -> dict[str, Any]:
    """Load the model and measure it, with a bar where there is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from kairos.cli.console import err
    from kairos.cli.machine import device_and_dtype, explained_memory, import_libraries
    from kairos.cli.run import RunOptions, check_model

    options = RunOptions(model=model, device=device, dtype=dtype)
    check_model(options)
    import_libraries()
    from kairos.evaluation.models import KairosModel
    from kairos.evaluation.suite import evaluate as run_suite

    where, kind = device_and_dtype(options.device, options.dtype)
    with explained_memory("a smaller --batch or fewer --frames"):
        pipeline = presets.load_pipeline(model, device=where, dtype=kind)
        total = settings.clips * len(settings.scenes) * len(settings.splits)
        columns = (TextColumn("clips"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
            task = progress.add_task("clips", total=total)
            return run_suite(
                KairosModel(pipeline, steps=steps, guidance=guidance),
                settings,
                output=output,
                name=model,
                teacher=teacher,
                on_clips=lambda count: progress.advance(task, count),
            )


def names(text: str, kind: str) -> list[str]:
    """`a, b` -> ["a", "b"]. Raises UserError where there is none, or one twice."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise UserError(f"name at least one {kind}, got {text!r}")
    if len(set(found)) < len(found):
        raise UserError(f"a {kind} is named twice: {text}")
    return found


COLUMNS = {
    "velocity": ("velocity_error", "value"),
    "truth": ("velocity_error", "floor_truth"),
    "VAE": ("velocity_error", "floor_vae"),
    "motion": ("motion_ratio", "value"),
    "teacher": ("motion_to_teacher", "value"),
    "kept": ("conserved", "value"),
    "law": ("expectation", "value"),
    "text": ("all", "value"),
    "dB": ("psnr", "value"),
}
"""What the table shows, where there is such a thing: heading -> measure and which of its numbers."""
OWN = ("permanence", "contact")
LEGEND = """velocity: its error beside its floors (truth, VAE); motion: to the truth's; teacher: to its;
kept: count, colours; law: possible preferred to impossible; text: all as captioned; dB: the VAE's PSNR;
own: the ball comes out again (occlusion), the balls meet and part (collision)"""


def table(results: dict[str, Any]) -> "Table":
    """A line for each scene of each split: what matters most of what results.json holds."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    every = [measures for found in results["splits"].values() for measures in found["scenes"].values()]
    columns = {
        heading: (name, which)
        for heading, (name, which) in COLUMNS.items()
        if any(measures.get(name, {}).get(which) is not None for measures in every)
    }
    view = Table(title=results["model"], box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for heading in ("scene", *columns, "own"):
        view.add_column(heading, justify="left" if heading == "scene" else "right", no_wrap=True)
    for split, found in results["splits"].items():
        view.add_section()
        view.add_row(split, style="bold")
        for scene, measures in found["scenes"].items():
            cells = [number(measures.get(name, {}).get(which)) for name, which in columns.values()]
            own = [number(measures[name]["value"]) for name in OWN if name in measures]
            view.add_row(scene, *cells, *(own or [""]))
    return view


def number(value: float | None) -> str:
    """A value for the table; nothing where it was not measured."""
    if value is None:
        return ""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.3f}"
