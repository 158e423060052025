"""`kairos curate`: from folders of raw video to training shards."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kairos.cli.console import out, show_log
from kairos.cli.options import option
from kairos.distributed import check_alone

if TYPE_CHECKING:
    from kairos.curation import Settings, Summary

app = typer.Typer(help="From folders of raw video to training shards.", no_args_is_help=True)

Output = Annotated[Path, typer.Argument(metavar="OUTPUT", show_default=False, help="What `run` wrote.")]
Config = Annotated[
    Path | None,
    option(
        "Settings; see docs/curation.md. Default: OUTPUT/curation.yaml where it is, else built in.",
        "CONFIG.yaml",
    ),
]
Set = Annotated[
    list[str], option("Change a threshold; also max, rich_min, rich_max.", "SCORE.min=VALUE", "--set")
]


@app.command()
def run(
    input: Annotated[
        Path, option("Videos, or a list of them.", "DIR|MANIFEST", "--input", "-i", show_default=False)
    ],
    output: Annotated[Path, option("Everything goes here.", "DIR", "--output", "-o", show_default=False)],
    config: Config = None,
    ray: Annotated[str | None, option("Work on a Ray cluster; 'local' starts one here.", "ADDRESS")] = None,
    workers: Annotated[int | None, option("Processes that work. Default: one a core.", min=1)] = None,
) -> None:
    """Cut, score, choose and pack; a second run goes on where the first was stopped."""
    show_log(verbose=True)
    check_alone("curate")
    _need_extra()
    from kairos.curation import curate
    from kairos.curation.pipeline import saved_settings
    from kairos.curation.report import write_report
    from kairos.curation.settings import read_settings

    again = config is None and (output / "curation.yaml").is_file()
    settings = saved_settings(output) if again else read_settings(config)
    summary = curate(input, output, settings, ray=ray, workers=workers)
    write_report(output)
    _tell(summary, output)


@app.command()
def select(output: Output, config: Config = None, changes: Set = []) -> None:  # noqa: B006
    """Apply other thresholds, balance or shard sizes to what was scored; nothing is computed again."""
    show_log(verbose=True)
    check_alone("curate")
    _need_extra()
    from kairos.curation import select as choose
    from kairos.curation.pipeline import saved_settings
    from kairos.curation.report import write_report
    from kairos.curation.settings import read_settings

    settings = read_settings(config) if config else saved_settings(output)
    summary = choose(output, _changed(settings, changes))
    write_report(output)
    _tell(summary, output)


@app.command()
def why(
    output: Output,
    clip: Annotated[
        str,
        typer.Argument(
            metavar="CLIP|SOURCE",
            show_default=False,
            help="A clip_id, or how it begins; or the path of a source as it came in.",
        ),
    ],
) -> None:
    """Say what happened to a clip, with every score beside its threshold; or to a source and its clips."""
    _need_extra()
    from rich.table import Table

    from kairos.curation import why as explain
    from kairos.curation.pipeline import saved_settings, why_source
    from kairos.curation.selection import is_rich

    if (found := why_source(output, clip)) is not None:
        source, clips = found
        out.print(f"{source['path']}: {source['status']}{', ' * bool(source['reason'])}{source['reason']}")
        for row in clips:
            out.print(f"{row['clip_id']}, {row['start_s']:.2f} to {row['end_s']:.2f} s: {_fate(row)}")
        return
    row = explain(output, clip)
    settings = saved_settings(output)
    out.print(f"{row['clip_id']}: {_fate(row)}")
    where = f"{row['source']}, {row['start_s']:.2f} to {row['end_s']:.2f} s"
    out.print(f"{where}; {row['frames']} frames of {row['height']} x {row['width']}")
    table = Table()
    table.add_column("score")
    table.add_column("value", justify="right")
    table.add_column("stays from")
    table.add_column("to")
    rich = is_rich(row | {"events": [tag for tag in (row.get("events") or "").split(", ") if tag]}, settings)
    for name, value in row.items():
        if name in ("clip_id", "source", "kept", "reason", "start_s", "end_s") or value is None:
            continue
        threshold = settings.thresholds.get(name)
        low, high = threshold.bounds(rich) if threshold else (float("-inf"), float("inf"))
        shown = f"{value:.5g}" if isinstance(value, float) else str(value)
        table.add_row(name, shown, *("" if abs(b) == float("inf") else f"{b:g}" for b in (low, high)))
    out.print(table)


def _fate(row: dict[str, Any]) -> str:
    return "kept" if row["kept"] else f"dropped, {row['reason']}"


@app.command()
def report(output: Output) -> None:
    """Write report.html anew."""
    _need_extra()
    from kairos.curation.report import write_report

    out.print(str(write_report(output)))


def _changed(settings: Settings, changes: list[str]) -> Settings:
    """The settings with thresholds as `--set` gives them."""
    from kairos.curation.settings import Settings, Threshold
    from kairos.errors import UserError

    content: dict[str, Any] = settings.as_dict()
    for change in changes:
        name, _, value = change.partition("=")
        score, _, bound = name.partition(".")
        try:
            number = float(value)
        except ValueError:
            raise UserError(
                f"--set takes SCORE.min=VALUE, got {change!r}; for example sharpness.min=30"
            ) from None
        # One that was off comes back without its other bounds.
        before = content["thresholds"].get(score) or asdict(Threshold())
        content["thresholds"][score] = before | {bound: number}
    return Settings.from_dict(content, "--set") if changes else settings


def _need_extra() -> None:
    """Refuse in one line where the extra is not installed."""
    import importlib.util

    from kairos.errors import UserError

    names = ("cv2", "imagehash", "pyarrow", "rapidocr", "scenedetect", "scipy", "webdataset", "yaml")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'curation needs more packages ({", ".join(missing)}); pip install "kairos-world[curation]"'
        )


def _tell(summary: Summary, output: Path) -> None:
    statuses = ", ".join(f"{count} {status}" for status, count in sorted(summary.sources.items()))
    out.print(f"{sum(summary.sources.values())} files came in: {statuses}")
    lengths = f"{_length(summary.hours_kept)} of {_length(summary.hours_in)}"
    out.print(f"{summary.kept} of {summary.clips} clips kept, {lengths}: {output / 'report.html'}")


def _length(hours: float) -> str:
    """48 s, 12.5 min or 3.20 hours."""
    if hours < 1 / 30:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.1f} min" if hours < 2 else f"{hours:.2f} hours"
