"""`kairos bench`: where the time of a video goes, and the LinearDiT against others as clips grow."""

import json
import sys
from collections.abc import Callable
from datetime import date
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from kairos.cli.console import err, out, say, show_log, waiting
from kairos.cli.options import option
from kairos.distributed import check_alone
from kairos.errors import MachineError, UserError
from kairos.request import did_you_mean


def bench(
    model: Annotated[str, option("A model's name or folder.", "NAME|PATH")] = "kairos-tiny",
    frames: Annotated[int | None, option("Frames, 4n + 1. Default: the model's.", "N")] = None,
    height: Annotated[int | None, option("Height. Default: the model's.", "PIXELS")] = None,
    width: Annotated[int | None, option("Width. Default: the model's.", "PIXELS")] = None,
    against: Annotated[
        list[str] | None,
        option(
            "Time this too: full (attention in every block), or diffusers:MODEL. May be repeated.", "NAME"
        ),
    ] = None,
    lengths: Annotated[
        str | None, option("Latent frames: one forward of the LinearDiT at each, and of the others.", "N,N")
    ] = None,
    text_tokens: Annotated[
        int | None,
        option("With --lengths or --against: tokens of text. Default: 512, as released.", "N", min=1),
    ] = None,
    device: Annotated[str, option("auto, cpu, cuda, ...", "NAME")] = "auto",
    dtype: Annotated[str, option("auto, float32, bfloat16 or float16.", "NAME")] = "auto",
    threads: Annotated[int | None, option("On a CPU. Default: torch's own.", min=1)] = None,
    runs: Annotated[int, option("Timed runs, after two warm-ups.", min=1)] = 7,
    clock: Annotated[
        str, option("wall, or cpu: processor time, for a machine that does other work too.", "NAME")
    ] = "wall",
    compiled: Annotated[bool, option("Compile the LinearDiT's blocks first.", None, "--compile")] = False,
    step_cache: Annotated[
        str | None,
        option(
            "Instead: what a step cache with each threshold saves, and its error, on whole videos.", "X,X"
        ),
    ] = None,
    output: Annotated[
        Path | None, option("Write the results; with --lengths, a plot too.", "FILE.json", "--output", "-o")
    ] = None,
) -> None:
    """Time a model's stages; with --lengths or --against, its LinearDiT alone, with random weights."""
    show_log(verbose=False)
    check_alone("bench")
    from kairos.bench import TEXT_TOKENS, Run, calibrate_step_cache, check_kind, clocks, measure
    from kairos.cli.machine import device_and_dtype, import_libraries
    from kairos.cli.run import RunOptions
    from kairos.data.files import prepare_file, write_atomically
    from kairos.model_info import info

    for kind in against or []:
        check_kind(kind)
    if clock not in clocks():
        raise UserError(f"--clock takes wall or cpu, got {clock!r}{did_you_mean(clock, clocks())}")
    thresholds = [] if step_cache is None else [threshold_of(text) for text in step_cache.split(",")]
    sizes = [] if lengths is None else [length_of(text) for text in lengths.split(",")]
    if output is not None:
        if output.suffix.lower() != ".json":
            raise UserError(f"--output must end in .json, got {output}")
        prepare_file(output)
    if thresholds:
        unused = {"--frames": frames, "--height": height, "--width": width, "--compile": compiled or None}
        unused["--text-tokens"] = text_tokens
        for option, value in (unused | {"--against": against, "--lengths": lengths}).items():
            if value is not None:
                raise UserError(f"--step-cache makes whole videos as the model does; leave out {option}")
    if sizes and frames is not None:
        raise UserError("--lengths says how long the clips are; leave out --frames")
    if text_tokens is not None and not sizes and not against:
        raise UserError("--text-tokens goes with --lengths or --against: stages are timed with a real prompt")
    made_for = info(model).defaults
    if frames is not None and (frames < 1 or frames % 4 != 1):
        raise UserError(f"frames must be 4n + 1, got {frames}")
    latent_frames = ((frames or int(made_for["num_frames"])) - 1) // 4 + 1
    options = RunOptions(model=model, device=device, dtype=dtype)
    chosen, precision = device_and_dtype(options.device, options.dtype)
    shape = {"height": height or int(made_for["height"]), "width": width or int(made_for["width"])}
    for name, side in shape.items():
        if side < 16 or side % 16:
            raise UserError(f"{name} must be a multiple of 16, got {side}")

    def run(kind: str, length: int) -> dict[str, Any]:
        with waiting(f"{kind}, {length} latent frames"):
            return measure(
                Run(
                    kind,
                    model,
                    length,
                    **shape,
                    device=str(chosen),
                    dtype=str(precision).removeprefix("torch."),
                    threads=threads,
                    runs=runs,
                    clock=clock,
                    compiled=compiled,
                    text_tokens=text_tokens or TEXT_TOKENS,
                )
            )

    missing = 0
    if thresholds:
        import_libraries()
        with waiting("making videos"):
            results = calibrate_step_cache(
                model,
                thresholds,
                device=str(chosen),
                dtype=str(precision).removeprefix("torch."),
                threads=threads,
                runs=runs,
                clock=clock,
            )
        print_step_cache(results, model)
    elif sizes or against:
        kinds = ["hybrid", *(against or [])]
        results = curve(run, kinds, sizes or [latent_frames])
        missing = len(kinds) * len(sizes or [latent_frames]) - len(results)
        if results:
            print_curve(results)
    else:
        results = [run("stages", latent_frames)]
        print_stages(results[0])
    if output is not None and results:
        said = {"date": date.today().isoformat(), "command": " ".join(["kairos", *sys.argv[1:]])}
        text = (
            json.dumps(said | {"hardware": hardware(str(chosen), threads), "runs": results}, indent=1) + "\n"
        )
        write_atomically(output, text.encode())
        if len(sizes) > 1:
            plot = output.with_suffix(".svg")
            write_atomically(plot, curve_svg(results).encode())
            err.print(f"{output} and {plot}")
    if missing:
        raise MachineError(f"{missing} of {missing + len(results)} runs failed or were left out")


def curve(
    run: Callable[[str, int], dict[str, Any]], kinds: list[str], lengths: list[int]
) -> list[dict[str, Any]]:
    """A row of each kind at each length. Where the machine fails, that is told and the row left out, as are
    others of its kind that are no shorter."""
    rows = []
    failed: dict[str, int] = {}
    for length, kind in product(lengths, kinds):
        if length >= failed.get(kind, length + 1):
            continue
        try:
            rows.append(run(kind, length))
        except MachineError as error:
            failed[kind] = length
            say("warning", "bold yellow", str(error))
    return rows


def length_of(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise UserError(f"--lengths takes latent frames such as 21,41,81, got {text!r}")
    return int(text)


def threshold_of(text: str) -> float:
    try:
        threshold = float(text)
    except ValueError:
        threshold = 0.0
    if not 0 < threshold < float("inf"):
        raise UserError(f"--step-cache takes thresholds above 0 such as 0.05,0.1, got {text!r}")
    return threshold


def print_step_cache(rows: list[dict[str, Any]], model: str) -> None:
    from rich.table import Table

    table = Table("threshold", "speed", "error", "PSNR, dB", title=f"{model}, against no step cache")
    for row in rows:
        table.add_row(
            f"{row['threshold']:g}", f"{row['speed']:.2f}", f"{row['error']:.2%}", f"{row['psnr']:.1f}"
        )
    out.print(table)
    out.print("speed: of the sampling; error: of the latents, of the worst video; PSNR: of its frames")


def print_stages(result: dict[str, Any]) -> None:
    from rich.table import Table

    title = f"{result['model']}, {clip_of(result)}, weights: {result['weights']}"
    table = Table("stage", "seconds", "spread", "TFLOP", "of peak", title=title)
    for stage, found in result["stages"].items():
        table.add_row(
            stage,
            f"{found['seconds']:.4f}",
            f"{found['spread_s']:.4f}",
            f"{found['tflop']:.3g}",
            f"{found['share_of_peak']:.0%}",
        )
    out.print(table)
    out.print(f"peak memory {result['peak_gb']:.2f} GB; two warm-ups, the median of {result['runs']}")
    out.print(OF_PEAK)


def print_curve(results: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    first = {row["kind"]: row for row in reversed(results)}
    hybrid = {row["latent_frames"]: row["seconds"] for row in results if row["kind"] == "hybrid"}
    text = f"{results[0]['text_tokens']} tokens of text"
    title = f"one forward, {clip_of(results[0], length=False)}, {text}, random weights"
    columns = ("frames", "model", "weights", "s", "to ours", "growth", "TFLOP", "of peak", "GB")
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=True, justify="left" if name == "model" else "right")
    for row in results:
        table.add_row(
            str(row["latent_frames"]),
            row["kind"].removeprefix("diffusers:"),
            f"{row['parameters'] / 1e6:,.0f} M",
            f"{row['seconds']:.3g}",
            f"{row['seconds'] / ours:.2f}" if (ours := hybrid.get(row["latent_frames"])) else "",
            f"{row['seconds'] / first[row['kind']]['seconds']:.2f}",
            f"{row['tflop']:.2g}",
            f"{row['share_of_peak']:.0%}",
            f"{row['peak_gb']:.2f}",
        )
    out.print(table)
    out.print(f"frames: latent ones; {OF_PEAK}")


OF_PEAK = "of peak: of what this device reaches in large products of this precision"


def clip_of(row: dict[str, Any], length: bool = True) -> str:
    frames = f"{row['latent_frames']} latent frames of " if length else ""
    return f"{frames}{row['height']} x {row['width']}, {row['dtype']} on {row['device']}"


def hardware(device: str, threads: int | None) -> str:
    import torch

    from kairos.bench import processor

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {threads or torch.get_num_threads()} threads"


def curve_svg(results: list[dict[str, Any]]) -> str:
    """Seconds over latent frames, both on linear axes: a line of a linear model is straight."""
    colors = ("#0b6e4f", "#c1121f", "#3a86ff", "#8338ec", "#fb8500")
    kinds = list(dict.fromkeys(row["kind"] for row in results))
    most_x = max(row["latent_frames"] for row in results)
    most_y = max(row["seconds"] for row in results)
    left, top, width, height = 60, 20, 520, 300
    parts = [f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>']
    for share in (0.5, 1.0):
        y, x = top + height * (1 - share), left + width * share
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{most_y * share:.3g} s</text>')
        parts.append(
            f'<text x="{x}" y="{top + height + 18}" text-anchor="middle">{most_x * share:.0f}</text>'
        )
    for number, kind in enumerate(kinds):
        rows = [row for row in results if row["kind"] == kind]
        points = " ".join(
            f"{left + width * row['latent_frames'] / most_x:.1f},"
            f"{top + height * (1 - row['seconds'] / most_y):.1f}"
            for row in rows
        )
        color = colors[number % len(colors)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{left + 12}" y="{top + 22 + 18 * number}" fill="{color}">{kind}</text>')
    parts.append(
        f'<text x="{left + width / 2}" y="{top + height + 36}" text-anchor="middle">latent frames</text>'
    )
    style = 'font-family="sans-serif" font-size="13"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 370" {style}>{"".join(parts)}</svg>\n'
