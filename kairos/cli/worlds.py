"""`kairos worlds`: look at the simulated scenes, and write clips of them as a data set."""

from pathlib import Path
from typing import Annotated

import typer

from kairos.cli.console import err, out, show_log
from kairos.cli.options import option
from kairos.distributed import check_alone

app = typer.Typer(help="Look at the simulated worlds, and export them as a data set.", no_args_is_help=True)

Split = Annotated[str, option("train, in, interpolation or out.", "SPLIT")]
Seed = Annotated[int, option("Of the clips.")]
Frames = Annotated[int, option("Frames of a clip.", "FRAMES")]
Size = Annotated[int, option("Side of the picture.", "PIXELS")]


@app.command()
def preview(
    scene: Annotated[str, typer.Argument(metavar="SCENE", show_default=False, help="Which world.")],
    split: Split = "in",
    seed: Seed = 0,
    clips: Annotated[int, option("Clips, one after the other in the mp4.", min=1)] = 6,
    frames: Frames = 33,
    size: Size = 64,
    output: Annotated[
        Path | None, option("The mp4. Default: SCENE.mp4; the PNG is beside it.", "FILE", "--output", "-o")
    ] = None,
) -> None:
    """Write clips of a scene: an mp4, and a contact sheet with their captions."""
    show_log(verbose=False)
    check_alone("worlds")
    import numpy as np

    from kairos.data.files import prepare_file
    from kairos.data.media import write_contact_sheet, write_video
    from kairos.errors import UserError
    from kairos.worlds import simulate
    from kairos.worlds.export import FPS

    made = [
        simulate(scene, split=split, seed=seed, index=index, num_frames=frames, size=size)
        for index in range(clips)
    ]
    path = output or Path(f"{scene}.mp4")
    if path.suffix != ".mp4":
        raise UserError(f"--output must end in .mp4, as {scene}.mp4 does, got {path}")
    sheet = path.with_suffix(".png")
    prepare_file(path)
    prepare_file(sheet)
    write_video(path, np.concatenate([clip.frames for clip in made]), fps=FPS)
    captions = [clip.caption for clip in made]
    write_contact_sheet(sheet, [clip.frames for clip in made], captions=captions, scale=max(1, 128 // size))
    out.print(f"{path}, {sheet}")


@app.command()
def export(
    output: Annotated[Path, option("The folder of the data set.", "DIR", "--output", "-o")] = Path("worlds"),
    scenes: Annotated[str | None, option("Which worlds. Default: all eight.", "SCENE,SCENE")] = None,
    splits: Annotated[
        str, option("train, in, interpolation, out.", "SPLIT,SPLIT", "--splits", "--split")
    ] = "train",
    clips: Annotated[int, option("Clips of each scene and split.")] = 16,
    seed: Seed = 0,
    frames: Frames = 33,
    size: Size = 64,
) -> None:
    """Write clips as mp4s with a manifest of captions, and a file of their states."""
    show_log(verbose=False)
    check_alone("worlds")
    from rich.progress import Progress

    from kairos.cli.evaluate import names
    from kairos.worlds import SCENES
    from kairos.worlds.export import export as write

    chosen = names(scenes, "scene") if scenes is not None else list(SCENES)
    wanted = names(splits, "split")
    with Progress(console=err, disable=not err.is_terminal) as progress:
        task = progress.add_task("clips", total=clips * len(chosen) * len(wanted))
        count = write(
            output,
            scenes=chosen,
            splits=wanted,
            clips=clips,
            seed=seed,
            num_frames=frames,
            size=size,
            on_clip=lambda: progress.advance(task),
        )
    out.print(f"{count} clips in {output / 'manifest.jsonl'}")
