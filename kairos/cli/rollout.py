"""`kairos rollout`: a video without end, written as it is made."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from kairos import presets
from kairos.cli.console import show_log
from kairos.cli.jobs import prompt_job
from kairos.cli.options import (
    Compiled,
    Guidance,
    Height,
    Image,
    Memory,
    Negative,
    Scale,
    VaeDtype,
    Width,
    panel,
    running,
    sampling,
    what,
)
from kairos.distributed import check_alone
from kairos.errors import UserError
from kairos.request import check_text

length, world = panel("How long"), panel("The world")
SECOND = r"\s*(\d+(?:\.\d*)?|\.\d+)\s*s"
"""As --prompt-at says one: 12s."""


class SecondAndText(TyperCommand):
    """`--prompt-at 12s TEXT`, its value in two words, is `--prompt-at "12s TEXT"`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        args = list(args)
        for place, word in enumerate(args):
            second, *text = args[place + 1 : place + 3] or [""]
            if word == "--prompt-at" and re.fullmatch(SECOND, second) and text and text[0][:1] != "-":
                args[place + 1 : place + 3] = [f"{second} {text[0]}"]
        return super().parse_args(ctx, args)


def rollout(
    prompt: Annotated[
        str | None, typer.Argument(show_default=False, help="What happens. With --from-state: from now on.")
    ] = None,
    image: Image = None,
    video: Annotated[str | None, what("A video to go on from, taken in whole.", "FILE")] = None,
    prompt_at: Annotated[
        list[str] | None,
        what("From that second of this video on, something else happens. May be repeated.", '"12s TEXT"'),
    ] = None,
    output: Annotated[
        str | None,
        what(
            "The mp4, or a folder. It grows as it is made, and plays whenever it is cut off.",
            "PATH",
            "--output",
            "-o",
        ),
    ] = None,
    negative: Negative = None,
    seconds: Annotated[float | None, length("End with the chunk that reaches this length.", "N")] = None,
    forever: Annotated[bool, length("End at Ctrl-C.", None, "--forever")] = False,
    stop_on_drift: Annotated[
        bool,
        length(
            "End where a chunk is too far from the first one. All are measured, beside the video.",
            None,
            "--stop-on-drift",
        ),
    ] = False,
    save_state: Annotated[
        Path | None, world("Keep the world behind the last frame, to go on later.", "FILE")
    ] = None,
    from_state: Annotated[Path | None, world("Go on from a world that was kept.", "FILE")] = None,
    futures: Annotated[
        int | None, world("N futures of the world, or of the first chunk, side by side in a grid.", "N")
    ] = None,
    height: Height = None,
    width: Width = None,
    scale: Scale = None,
    chunk_frames: Annotated[
        int | None,
        sampling("Latent frames a chunk, four frames each. Default: 3; a clip's, if not chunk-causal.", "N"),
    ] = None,
    seed: Annotated[
        int | None,
        sampling(
            "One seed, one video; future k > 0 has seed N + k. Default: 0, or as the world goes on.", "N"
        ),
    ] = None,
    steps: Annotated[int | None, sampling("Denoising steps a chunk.", "N")] = None,
    guidance: Guidance = None,
    model: Annotated[str, running("A model by name or a folder.", "NAME|PATH")] = presets.DEFAULT,
    device: Annotated[str, running("auto, cpu, cuda, cuda:1, ...", "NAME")] = "auto",
    dtype: Annotated[
        str, running("auto, float32, bfloat16 or float16. auto: bfloat16 on a GPU, float32 on a CPU.", "NAME")
    ] = "auto",
    vae_dtype: VaeDtype = "auto",
    compiled: Compiled = False,
    memory: Memory = None,
    verbose: Annotated[bool, running("A line for each chunk.", None, "--verbose", "-v")] = False,
) -> None:
    """Make a video chunk after chunk, for as long as one likes, in the memory of one chunk.

    Every chunk is in the file as soon as it is made, so a video that is stopped or killed plays up to there.
    Ctrl-C ends it: the state is saved where that was asked for, and the exit status is 130.
    """
    show_log(verbose)
    check_alone("rollout")
    from kairos.cli.roll import RolloutJob, roll
    from kairos.cli.run import RunOptions

    if (seconds is None) is not forever:
        raise UserError("say how long the video is to be: --seconds N, or --forever")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise UserError(f"seconds must be above 0, got {seconds}")
    for name, count in (("futures", futures), ("chunk_frames", chunk_frames)):
        if count is not None and count < 1:
            raise UserError(f"{name} must be at least 1, got {count}")
    changes = sorted(map(prompt_change, prompt_at or []), key=lambda change: change[0])
    said = {
        "input_image": image,
        "input_video": video,
        "negative_prompt": negative,
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    if from_state is None:
        if changes and changes[0][0] == 0:
            raise UserError("--prompt-at 0s is before the first chunk; give the first prompt as PROMPT")
        first = prompt_job({"prompt": prompt, "seed": seed} | said, {}, output)
        request, path = first.request, first.path
    else:
        fixed = [*(name for name, value in said.items() if value is not None)]
        fixed += ["chunk_frames"] if chunk_frames is not None else []
        if fixed:
            raise UserError(f"--from-state goes on as the rollout was begun; leave out {', '.join(fixed)}")
        # Only its checks and its file name are wanted: the world knows the rest.
        first = prompt_job({"prompt": prompt or from_state.stem or "goes on", "seed": seed}, {}, output)
        request, path = None, first.path
        changes = [(0.0, prompt), *changes] if prompt else changes
    job = RolloutJob(
        output=path,
        request=request,
        changes=tuple(changes),
        seconds=seconds,
        chunk_frames=chunk_frames,
        seed=seed,
        futures=futures,
        save_state=save_state,
        from_state=from_state,
        stop_on_drift=stop_on_drift,
    )
    options: dict[str, Any] = {"device": device, "dtype": dtype, "scale": scale, "compiled": compiled}
    options |= {"memory": memory, "vae_dtype": vae_dtype}
    roll(job, RunOptions(model=model, **options, verbose=verbose))


def prompt_change(text: str) -> tuple[float, str]:
    """`12s a blue ball falls` -> (12.0, "a blue ball falls")."""
    found = re.fullmatch(SECOND + r"\s+(.*\S)\s*", text, re.DOTALL)
    if found is None:
        raise UserError(f'--prompt-at takes a second and a text, such as "12s a ball falls", got {text!r}')
    check_text("--prompt-at", found[2])
    return float(found[1]), found[2]
