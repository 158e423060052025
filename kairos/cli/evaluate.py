"""`kairos evaluate`: measure a model on the worlds."""

import json
from pathlib import Path
from typing import Annotated

import typer

from kairos.cli.console import out, show_log


def evaluate(
    model: Annotated[
        str, typer.Option(metavar="NAME|PATH", help="A model's name or folder.")
    ] = "kairos-tiny",
    scenes: Annotated[
        str, typer.Option(metavar="SCENE,SCENE", help="Which worlds.")
    ] = "uniform,collision,parabola",
    clips: Annotated[int, typer.Option(min=1, help="Clips of each scene.")] = 16,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="in, interpolation or out.")] = "in",
    seed: Annotated[int, typer.Option(min=0, help="One seed, one result.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps. Default: the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance. Default: the model's.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Write results.json and the videos here."),
    ] = None,
) -> None:
    """Measure a model against the simulator: velocity, and colours, count and direction as captioned."""
    show_log(verbose=True)
    import torch
    from rich.table import Table

    from kairos.cli.run import quiet_libraries
    from kairos.data.files import prepare_folder
    from kairos.data.media import write_video
    from kairos.evaluation import physics
    from kairos.presets import load_pipeline
    from kairos.worlds import simulate

    for scene in scenes.split(","):  # a name that is not known is told before the model is loaded
        simulate(scene, split=split, num_frames=1, size=16)
    quiet_libraries()
    if output is not None:
        prepare_folder(output)
    pipeline = load_pipeline(
        model, device="cuda" if torch.cuda.is_available() else "cpu", dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)

    def keep(kind: str, scene: str, index: int, frames: physics.Frames) -> None:
        if output is not None:
            write_video(
                output / f"{scene}-{index:03d}-{kind}.mp4", frames, fps=pipeline.config.defaults["fps"]
            )

    result = physics.evaluate(
        pipeline,
        scenes=scenes.split(","),
        clips=clips,
        split=split,
        seed=seed,
        steps=steps,
        guidance=guidance,
        keep=keep,
    )
    table = Table(title=f"{model}, {clips} clips a scene, split {split!r}")
    for column in ("scene", "measure", "value", "95 % interval", "truth", "VAE"):
        table.add_column(column, justify="left" if column in ("scene", "measure") else "right")
    for scene, measures in result["scenes"].items():
        for name, entry in measures.items():
            floors = [f"{entry[key]:.3f}" if key in entry else "" for key in ("floor_truth", "floor_vae")]
            low, high = entry["ci"]
            table.add_row(scene, name, f"{entry['value']:.3f}", f"{low:.3f} to {high:.3f}", *floors)
    out.print(table)
    if output is not None:
        (output / "results.json").write_text(json.dumps({"model": model} | result, indent=1) + "\n")
