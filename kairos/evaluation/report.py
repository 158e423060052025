"""The results as a page to look at: one HTML file with its plots and videos inside."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from kairos.evaluation.summary import MEASURES

VIDEOS = 2
"""Clips of each scene and split whose videos are in the report."""
COLORS = {"in": "#1f6feb", "interpolation": "#2da44e", "out": "#d1242f", "train": "#8250df"}
BESIDE = {"truth": "truth", "vae": "VAE", "model": "model"}
"""What stands side by side in a video, where there is such a thing, and what it is called."""
WIDTH, ROW, LABEL = 520, 22, 110

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; color: #1f2328 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: 2px 10px; text-align: right; border-bottom: 1px solid #d8dee4 }
th:first-child, td:first-child { text-align: left }
.plots { display: flex; flex-wrap: wrap; gap: 1rem 2rem } figure { margin: 0 }
figcaption { font-size: 13px } small, .quiet { color: #59636e }
svg text { font-size: 11px; fill: #1f2328 }
video { image-rendering: pixelated; height: 128px; display: block }
.videos { display: flex; flex-wrap: wrap; gap: 0.7rem } .videos figure { width: min-content }
"""


def report(
    results: Mapping[str, Any],
    videos: Path | None,
    records: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
) -> str:
    """The page of what `results.json` holds; `videos` is the folder of the side-by-side videos, if any, and
    `records`, {split: {scene: records}}, says what they show."""
    splits = {split: entry["scenes"] for split, entry in results["splits"].items()}
    title = escape(f"{results['model']}: the physics suite")
    about = ", ".join(
        f"{name.replace('_', ' ')} {escape(str(results[name]))}"
        for name in ("clips", "videos", "given_frames", "num_frames", "seed", "seeds")
        if name in results
    )
    key = " ".join(f'<b style="color:{COLORS[split]}">{split}</b>' for split in splits)
    entries = (entry for scenes in splits.values() for found in scenes.values() for entry in found.values())
    with_vae = any(entry["floor_vae"] is not None for entry in entries)
    reconstructed = ", ¦ on the VAE's reconstruction of them" if with_vae else ""
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>',
        f'<h1>{title}</h1><p class="quiet">{about}. Splits: {key}. Dots are means, bars 95 % intervals; ',
        f"| is the floor on the simulator's own frames{reconstructed}.</p>",
        f'<div class="plots">{"".join(plot(name, splits) for name in MEASURES)}</div>',
        *(
            drift_section(split, entry["drift"])
            for split, entry in results["splits"].items()
            if "drift" in entry
        ),
        *(
            f"<h2>{split}</h2>{table(scenes)}{shown(videos / split, records[split]) if videos else ''}"
            for split, scenes in splits.items()
        ),
        "</html>\n",
    ]
    return "\n".join(parts)


def plot(name: str, splits: Mapping[str, Mapping[str, Any]]) -> str:
    """A measure of every scene, a dot for each split; nothing where no scene has it."""
    found = [
        (scene, split, scenes[scene][name])
        for scene in dict.fromkeys(scene for scenes in splits.values() for scene in scenes)
        for split, scenes in splits.items()
        if name in scenes.get(scene, {})
    ]
    if not found:
        return ""
    rows = list(dict.fromkeys(scene for scene, _, _ in found))
    top = max(max(value for value in span(entry)) for _, _, entry in found) or 1.0
    if MEASURES[name].better == "high" and top <= 1:
        top = 1.0

    def x(value: float) -> float:
        return LABEL + (WIDTH - LABEL - 20) * min(value / top, 1.0)

    marks = []
    order = list(splits)
    for scene, split, entry in found:
        y = ROW * rows.index(scene) + ROW * (order.index(split) + 0.5) / len(order)
        low, high = entry["ci"]
        color = COLORS[split]
        if low is not None:
            marks.append(line(x(low), y, x(high), y, color, 2))
        marks.append(f'<circle cx="{x(entry["value"]):.1f}" cy="{y:.1f}" r="3.2" fill="{color}"/>')
        for floor, dashes in (("floor_truth", ""), ("floor_vae", "2 2")):
            if entry.get(floor) is not None:
                at = x(entry[floor])
                marks.append(line(at, y - 4, at, y + 4, color, 1.5, dashes))
    height = ROW * len(rows)
    labels = "".join(f'<text x="0" y="{ROW * i + 15}">{escape(row)}</text>' for i, row in enumerate(rows))
    axis = line(LABEL, height + 2, WIDTH - 20, height + 2, "#59636e", 1)
    ticks = "".join(
        f'<text x="{x(top * share):.1f}" y="{height + 15}" text-anchor="middle">{top * share:.3g}</text>'
        for share in (0, 0.5, 1)
    )
    measure = MEASURES[name]
    unit = f" <small>({escape(measure.unit)})</small>" if measure.unit else ""
    return (
        f"<figure><figcaption><b>{name}</b>: {escape(measure.about)}{unit}</figcaption>"
        f'<svg width="{WIDTH}" height="{height + 20}">{labels}{axis}{ticks}{"".join(marks)}</svg></figure>'
    )


def span(entry: Mapping[str, Any]) -> list[float]:
    """All numbers of a measure that its plot must hold."""
    values = [entry["value"], *entry["ci"], entry.get("floor_truth"), entry.get("floor_vae")]
    return [value for value in values if value is not None]


def drift_section(split: str, scenes: Mapping[str, Any]) -> str:
    """Lines of the measures of a rollout over its seconds, a small plot for each scene."""
    parts = [f"<h2>Drift, {split}</h2><p class='quiet'>By the second of a rollout; dashed: the truth.</p>"]
    for name in dict.fromkeys(name for measures in scenes.values() for name in measures):
        plots = [drift_plot(scene, measures[name]) for scene, measures in scenes.items() if name in measures]
        parts.append(f'<h3>{name}</h3><div class="plots">{"".join(plots)}</div>')
    return "".join(parts)


def drift_plot(scene: str, rows: list[Mapping[str, Any]]) -> str:
    """One measure of one scene, second by second."""
    width, height = 240, 90
    last = max(rows[-1]["second"], 2)
    top = max(max(span(row)) for row in rows) or 1.0

    def x(second: float) -> float:
        return 4 + (width - 8) * (second - 1) / (last - 1)

    def path(value: Callable[[Mapping[str, Any]], float | None]) -> str:
        pairs = [(x(row["second"]), value(row)) for row in rows]
        return " ".join(
            f"{at:.1f},{height - 14 - (height - 20) * y / top:.1f}" for at, y in pairs if y is not None
        )

    model, truth = path(lambda row: row["value"]), path(lambda row: row["floor_truth"])
    return (
        f"<figure><figcaption>{escape(scene)} <small>0 to {top:.3g}, {last} s</small></figcaption>"
        f'<svg width="{width}" height="{height}"><polyline points="{truth}" fill="none" stroke="#59636e" '
        f'stroke-dasharray="3 3"/><polyline points="{model}" fill="none" stroke="#1f6feb" stroke-width="2"/>'
        f"{line(4, height - 14, width - 4, height - 14, '#59636e', 1)}</svg></figure>"
    )


def line(x1: float, y1: float, x2: float, y2: float, color: str, width: float, dashes: str = "") -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" '
        f'stroke-width="{width}" stroke-dasharray="{dashes}"/>'
    )


def table(scenes: Mapping[str, Any]) -> str:
    """Every number of one split."""
    rows = []
    for scene, measures in scenes.items():
        for name, entry in measures.items():
            digits = MEASURES[name].decimals
            low, high = entry["ci"]
            between = "" if low is None else f"{low:.{digits}f} to {high:.{digits}f}"
            floors = "".join(
                f"<td>{'' if entry[key] is None else f'{entry[key]:.{digits}f}'}</td>"
                for key in ("floor_truth", "floor_vae")
            )
            rows.append(
                f"<tr><td>{escape(scene)}</td><td>{name}</td><td>{entry['value']:.{digits}f}</td>"
                f"<td>{between}</td>{floors}<td>{entry['clips']}</td></tr>"
            )
    heads = ("scene", "measure", "value", "95 % interval", "truth", "VAE", "clips")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<details><summary>All numbers</summary><table><tr>{head}</tr>{''.join(rows)}</table></details>"


def shown(folder: Path, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The first videos of each scene: truth, reconstruction, model in a row; and from the caption alone."""
    parts = []
    for scene, rows in records.items():
        videos = []
        for index, row in enumerate(rows[:VIDEOS]):
            beside = " | ".join(name for kind, name in BESIDE.items() if kind in row["scores"])
            for kind, what in (("", beside), ("-text", "from these words alone")):
                file = folder / f"{scene}-{index:03d}{kind}.mp4"
                if file.exists():
                    videos.append(embedded(file, f'"{row["caption"]}": {what}'))
        if videos:
            parts.append(f'<h3>{escape(scene)}</h3><div class="videos">{"".join(videos)}</div>')
    return "".join(parts)


def embedded(file: Path, caption: str) -> str:
    """A video inside the page, with what it shows."""
    data = base64.b64encode(file.read_bytes()).decode()
    return (
        f'<figure><video src="data:video/mp4;base64,{data}" autoplay loop muted playsinline></video>'
        f'<figcaption class="quiet">{escape(caption)}</figcaption></figure>'
    )
