"""One page of HTML about a curation, whole in itself: hours, reasons, histograms, pictures, speed."""

from __future__ import annotations

import heapq
import html
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kairos.curation.ledger import Ledger
from kairos.curation.pipeline import clip_rows, saved_settings
from kairos.curation.settings import Settings, Threshold
from kairos.curation.stages import numbers_of, stages_of
from kairos.curation.tables import read_rows
from kairos.data.files import write_atomically

_SHOWN = 4  # clips at either end of a score, and of each reason
_BINS = 40

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}}
table{{border-collapse:collapse;margin:1em 0}} td,th{{padding:.2em .9em .2em 0;text-align:left}}
td.n,th.n{{text-align:right;font-variant-numeric:tabular-nums}} th{{border-bottom:1px solid #999}}
section{{border-top:1px solid #ddd;margin-top:2em}} figure{{margin:.5em 0}} img{{height:80px;max-width:100%}}
figcaption{{font-size:12px;color:#555}} .out{{color:#b00020}} svg text{{font-size:11px;fill:#555}}
details summary{{cursor:pointer;color:#555}}
</style><h1>{title}</h1>{body}</html>
"""


def write_report(output: str | os.PathLike[str]) -> Path:
    """Write OUTPUT/report.html of what was chosen last, and return its path. UserError without a run."""
    output = Path(output)
    settings = saved_settings(output)
    rows = list(_light(read_rows(output / "manifest.parquet"), settings))
    sources = list(read_rows(output / "sources.parquet"))
    names = [
        name for name in numbers_of(stages_of(settings)) if any(row.get(name) is not None for row in rows)
    ]
    wanted = {row["clip_id"] for name in names for row in [*_ends(rows, name)[0], *_ends(rows, name)[1]]}
    samples = _samples(rows)
    wanted |= {row["clip_id"] for group in samples.values() for row in group}
    with Ledger(output / "work") as ledger:
        strips = {
            row["clip_id"]: row.get("strip", "")
            for row in clip_rows(ledger, settings)
            if row["clip_id"] in wanted
        }
        speed = ledger.throughput()
    body = [_overview(rows, sources), _reasons(rows, sources), _dropped(samples, strips)]
    body += [_score(rows, name, settings.thresholds.get(name), strips) for name in names]
    body.append(_speed(speed))
    path = output / "report.html"
    write_atomically(path, _PAGE.format(title="Curation report", body="\n".join(body)).encode())
    return path


def _light(rows: Iterable[dict[str, Any]], settings: Settings) -> Iterable[dict[str, Any]]:
    """What the page needs of each clip."""
    names = (
        "clip_id",
        "source",
        "start_s",
        "end_s",
        "kept",
        "reason",
        "domain",
        "events",
        *numbers_of(stages_of(settings)),
    )
    for row in rows:
        yield {name: row.get(name) for name in names}


def _overview(rows: list[dict[str, Any]], sources: list[dict[str, Any]]) -> str:
    hours_in = sum(source["duration_s"] or 0 for source in sources) / 3600
    kept = [row for row in rows if row["kept"]]
    hours = [sum(row["end_s"] - row["start_s"] for row in some) / 3600 for some in (rows, kept)]
    table = [
        ("came in", len(sources), "files", hours_in),
        ("cut into", len(rows), "clips", hours[0]),
        ("kept", len(kept), "clips", hours[1]),
    ]
    lines = "".join(
        f"<tr><td>{what}<td class=n>{count:,}<td>{kind}<td class=n>{time:.3f}<td>hours"
        for what, count, kind, time in table
    )
    tags = Counter(tag for row in kept for tag in (row["events"] or "no event").split(", "))
    domains = Counter(row["domain"] or "none" for row in kept)
    return f"<table>{lines}</table>" + "".join(
        f"<p>Kept by {name}: "
        + (", ".join(f"{_text(tag)} {count}" for tag, count in found.most_common()) or "none")
        for name, found in (("domain", domains), ("event", tags))
    )


def _reasons(rows: list[dict[str, Any]], sources: list[dict[str, Any]]) -> str:
    hours: Counter[str] = Counter()
    for row in rows:
        hours[_kind(row)] += (row["end_s"] - row["start_s"]) / 3600
    clips = Counter(_kind(row) for row in rows)
    files = Counter(f"{source['status']}: {_head(source['reason'])}".rstrip(": ") for source in sources)
    first = "".join(
        f"<tr><td>{_text(kind)}<td class=n>{count}<td class=n>{hours[kind]:.3f}"
        for kind, count in clips.most_common()
    )
    second = "".join(f"<tr><td>{_text(kind)}<td class=n>{count}" for kind, count in files.most_common())
    listed = "".join(
        f"<tr><td>{_text(source['path'])}<td>{_text(source['reason'])}"
        for source in sources
        if source["status"] != "ok"
    )
    return (
        "<section><h2>What became of it</h2><table><tr><th>clips<th class=n>count<th class=n>hours"
        f"{first}</table><table><tr><th>files<th class=n>count{second}</table>"
        "<details><summary>Every file that gave no clip of its own</summary>"
        f"<table>{listed}</table></details></section>"
    )


def _samples(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """A few dropped clips for every reason."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if not row["kept"] and len(groups[_kind(row)]) < _SHOWN:
            groups[_kind(row)].append(row)
    return dict(sorted(groups.items()))


def _dropped(samples: dict[str, list[dict[str, Any]]], strips: dict[str, str]) -> str:
    parts = [
        f"<h3>{_text(kind)}</h3>" + "".join(_figure(row, row["reason"], strips) for row in group)
        for kind, group in samples.items()
    ]
    return f"<section><h2>Samples of what was dropped</h2>{''.join(parts) or 'Nothing was.'}</section>"


def _ends(rows: list[dict[str, Any]], name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The clips with the highest and with the lowest values."""
    known = [row for row in rows if row.get(name) is not None]
    return (
        heapq.nlargest(_SHOWN, known, key=lambda row: (row[name], row["clip_id"])),
        heapq.nsmallest(_SHOWN, known, key=lambda row: (row[name], row["clip_id"])),
    )


def _score(rows: list[dict[str, Any]], name: str, threshold: Threshold | None, strips: dict[str, str]) -> str:
    values = [row[name] for row in rows if row.get(name) is not None]
    highest, lowest = _ends(rows, name)
    sheets = "".join(
        f"<h4>{title}</h4>" + "".join(_figure(row, f"{name} {row[name]:.4g}", strips) for row in group)
        for title, group in (("highest", highest), ("lowest", lowest))
    )
    return (
        f"<section><h2>{_text(name)}</h2>{_histogram(values, threshold)}"
        f"<details><summary>Highest and lowest</summary>{sheets}</details></section>"
    )


def _histogram(values: list[float], threshold: Threshold | None) -> str:
    """Counts of the values, and the thresholds as lines: dashed for clips that are rich in events."""
    marks: list[tuple[float, bool]] = []
    if threshold is not None:
        bounds = (
            (threshold.min, False),
            (threshold.max, False),
            (threshold.rich_min, True),
            (threshold.rich_max, True),
        )
        marks = [(bound, rich) for bound, rich in bounds if bound is not None and math.isfinite(bound)]
    low, high = min([*values, *(m for m, _ in marks)]), max([*values, *(m for m, _ in marks)])
    span = (high - low) or 1.0
    counts = [0] * _BINS
    for value in values:
        counts[min(_BINS - 1, int((value - low) / span * _BINS))] += 1
    width, height = 640, 120
    bars = "".join(
        f'<rect x="{i * width / _BINS:.1f}" y="{height - height * c / max(counts):.1f}" '
        f'width="{width / _BINS - 1:.1f}" height="{height * c / max(counts):.1f}" fill="#4a7ebb"/>'
        for i, c in enumerate(counts)
    )
    lines = "".join(
        f'<line x1="{(m - low) / span * width:.1f}" x2="{(m - low) / span * width:.1f}" y1="0" y2="{height}" '
        f'stroke="#b00020" stroke-width="2" stroke-dasharray="{4 if rich else 0}"><title>{m:g}</title></line>'
        for m, rich in marks
    )
    labels = (
        f'<text x="0" y="{height + 14}">{low:.4g}</text>'
        f'<text x="{width}" y="{height + 14}" text-anchor="end">{high:.4g}</text>'
    )
    return f'<svg viewBox="0 0 {width} {height + 20}" width="{width}" role="img">{bars}{lines}{labels}</svg>'


def _figure(row: dict[str, Any], said: str, strips: dict[str, str]) -> str:
    strip = strips.get(row["clip_id"])
    picture = f'<img alt="" loading="lazy" src="data:image/jpeg;base64,{strip}"><br>' if strip else ""
    place = f"{row['source']}, {row['start_s']:.1f} to {row['end_s']:.1f} s"
    color = "" if row["kept"] else " class=out"
    fate = f"<code>{row['clip_id']}</code> {_text(place)}: <span{color}>{_text(said)}</span>"
    return f"<figure>{picture}<figcaption>{fate}</figcaption></figure>"


def _speed(speed: list[tuple[str, float, float]]) -> str:
    total = sum(seconds for _, seconds, _ in speed) or 1.0
    lines = "".join(
        f"<tr><td>{_text(stage)}<td class=n>{video_s / seconds:.1f}<td class=n>{seconds / total:.1%}"
        for stage, seconds, video_s in speed
        if seconds > 0
    )
    return (
        "<section><h2>Throughput</h2><table><tr><th>stage<th class=n>hours of video per core-hour"
        f"<th class=n>share of the time{lines}</table></section>"
    )


def _kind(row: dict[str, Any]) -> str:
    return "kept" if row["kept"] else _head(row["reason"])


def _head(reason: str | None) -> str:
    return (reason or "").split(":")[0]


def _text(value: object) -> str:
    return html.escape(str(value))
