"""Which clips stay: thresholds, near duplicates and balance, over scores that are already there.

All of it is a view: nothing here looks at a picture, and another choice costs seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kairos.curation.duplicates import Fingerprinted, find_duplicates
from kairos.curation.settings import Settings

logger = logging.getLogger(__name__)

Row = dict[str, Any]
"""One clip: where it is from, its size, and every score."""

VALUE = ("failure", "recovery", "contact", "collision")
"""Tags by what they teach, the most first (Kairos 3.0, section 4: near-boundary failure and recovery, then
near-boundary success, then rich contact, then ordinary success, then passive observation)."""


@dataclass(frozen=True)
class Light:
    """What the choice needs to know of one clip: memory for millions of them."""

    clip_id: str
    domain: str
    events: tuple[str, ...]
    value: tuple[float, ...]
    reason: str
    fingerprint: Fingerprinted


def choose(rows: Iterable[Row], settings: Settings) -> dict[str, tuple[str, str]]:
    """{clip_id: (reason, duplicate_of)}; a clip without a reason is kept."""
    lights = [_light(row, settings) for row in rows]
    stands_for = {}
    if settings.duplicates is not None:
        stands_for = find_duplicates([light.fingerprint for light in lights], settings.duplicates)
    reasons = {}
    for light in lights:
        reason = light.reason
        if not reason and light.clip_id in stands_for:
            reason = f"duplicate: looks like {stands_for[light.clip_id]}"
        reasons[light.clip_id] = reason
    kept = [light for light in lights if not reasons[light.clip_id]]
    reasons |= balance(kept, settings)
    return {light.clip_id: (reasons[light.clip_id], stands_for.get(light.clip_id, "")) for light in lights}


def is_rich(row: Row, settings: Settings) -> bool:
    """Whether a clip teaches so much physics that middling looks are forgiven."""
    rich = settings.rich
    tagged = not set(row.get("events") or ()).isdisjoint(rich.tags)
    return tagged or (row.get("events_per_s") or 0.0) >= rich.events_per_s


def verdict(row: Row, settings: Settings) -> str:
    """Why the thresholds drop a clip; empty where they let it pass."""
    if row.get("failed"):
        return str(row["failed"])
    rich = is_rich(row, settings)
    for score, threshold in settings.thresholds.items():
        value = row.get(score)
        if value is None:
            continue
        low, high = threshold.bounds(rich)
        if value < low:
            return f"{score}: {value:.4g} is below {low:.4g}"
        if value > high:
            return f"{score}: {value:.4g} is above {high:.4g}"
    return ""


def balance(kept: Sequence[Light], settings: Settings) -> dict[str, str]:
    """Reasons for those who go so that no tag has more than its share; the least valuable go first."""
    caps = [(kind, tag, share) for kind, shares in settings.balance.items() for tag, share in shares.items()]
    dropped: dict[str, str] = {}
    changed = True
    while changed:
        changed = False
        for kind, tag, share in caps:
            left = [light for light in kept if light.clip_id not in dropped]
            having = [light for light in left if _has(light, kind, tag)]
            others = len(left) - len(having)
            if share >= 1 or not having:
                continue
            if not others:
                logger.warning("balance: every clip has the %s %r; its share is left as it is", kind, tag)
                continue
            room = int(share * others / (1 - share) + 1e-9)
            having.sort(key=lambda light: light.value, reverse=True)
            for light in having[max(1, room) :]:
                dropped[light.clip_id] = f"balance: {kind} {tag!r} has more than its share of {share:g}"
                changed = True
    return dropped


def _has(light: Light, kind: str, tag: str) -> bool:
    if kind == "domain":
        return light.domain == tag
    return tag in light.events or (tag == "none" and not light.events)


def _light(row: Row, settings: Settings) -> Light:
    events = tuple(row.get("events") or ())
    reason = verdict(row, settings)
    score = float(row.get("physics_score") or 0.0)
    rank = next((len(VALUE) - place for place, tag in enumerate(VALUE) if tag in events), 0)
    area = int(row.get("source_height") or 0) * int(row.get("source_width") or 0)
    better = (not reason, area, row["frames"], float(row.get("sharpness") or 0.0), row["clip_id"])
    fingerprint = Fingerprinted(
        row["clip_id"],
        tuple(row.get("moments") or ()),
        tuple(row.get("changes") or ()),
        row.get("colors") or "000000" * 4,
        better,
        tuple(row.get("embedding") or ()),
    )
    value = (float(rank), score, float(row.get("sharpness") or 0.0))
    return Light(row["clip_id"], row.get("domain") or "", events, value, reason, fingerprint)
