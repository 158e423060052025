"""Words about a clip without a model: domain and events from what was measured and what its source said."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from kairos.curation.views import Stage, Views
from kairos.curation.vocabulary import DOMAINS, EVENTS

_DOMAIN_WORDS = {
    "robot": r"robots?|robotic|gripper|manipulator|end.effector|humanoid|quadruped",
    "human": r"person|people|man|men|woman|women|child|children|boy|girl|hands?|player|worker|dancer|crowd",
    "physics": r"simulat\w+|physics|balls?|pendulum|ramp|billiards?|dominoe?s?|marbles?|blocks?",
}
_FORMS = r"(?:s|es|[bdgmnpt]?(?:ed|ing))?"
"""What `~` stands for below: the endings of a verb, and no others, for a flower does not flow."""
_EVENT_WORDS = {
    "contact": r"touch~|contacts?|push~|grasp~|grip~|picks? up|holds?|press~",
    "collision": r"collide?~|collisions?|hits?|crash~|bump~|knock~|strikes?|bounce?~|meet",
    "sliding": r"slide?~|skid~|slip~",
    "rolling": r"roll~",
    "deformation": r"deform~|deformations?|bend~|squash~|squeeze?~|fold~|tear~|crumple?~|stretch~",
    "support": r"stack~|rests? on|leans?|balance?~|supports?|lies on",
    "fluid": r"pour~|water|liquid|fluid|splash~|spill~|drip~|flow~",
    "gravity": r"fall~|fallen|drop~|throw~|thrown|swing~|gravity|tumble?~|bounce?~",
    "tool use": r"tools?|hammer~|screw~|screwdrivers?|cut~|knife|saws|saw(?:ed|ing)|a saw|spoon|wrench",
    "occlusion": r"behind|hide?~|hidden|occlude?~|occlusions?|covers?|disappear~|vanish~",
    "failure": r"fail~|failures?|miss(?:es|ed)|drops? it|topples?|falls? over|breaks?|stumble?~",
    "recovery": r"recover~|recovery|retr(?:y|ies|ied|ying)|tr(?:y|ies|ied) again|catch~|regain~|corrects?",
}


@dataclass(frozen=True)
class Tags(Stage):
    """One domain and any events. What the manifest says goes before words, words before measurement."""

    name = "tags"
    version = 2
    inputs = (
        "labels",
        "jumps",
        "contacts",
        "occlusions",
        "reappearances",
        "falls",
    )
    outputs = ("domain", "events")
    measured: bool = True  # whether the physics scores give tags

    def measure(self, views: Views) -> dict[str, Any]:
        # File names are words too: robot_pours_water_03.mp4
        words = re.sub(
            r"[_\W\d]+", " ", f"{views.labels.get('caption', '')} {views.labels.get('source', '')}"
        ).lower()
        events = {str(tag).strip().lower() for tag in views.labels.get("events", ())}
        events |= {tag for tag, pattern in _EVENT_WORDS.items() if _holds(words, pattern)}
        if self.measured:
            events |= self._seen(views.scores)
        domain = str(views.labels.get("domain") or "").lower()
        if domain not in DOMAINS:
            domain = next(
                (name for name, pattern in _DOMAIN_WORDS.items() if _holds(words, pattern)), "general"
            )
        return {"domain": domain, "events": [tag for tag in EVENTS if tag in events]}

    @staticmethod
    def _seen(scores: dict[str, Any]) -> set[str]:
        counts = {
            name: scores.get(name) or 0
            for name in ("jumps", "contacts", "occlusions", "reappearances", "falls")
        }
        found = {
            "contact": counts["contacts"] > 0,
            "collision": counts["contacts"] > 0 and counts["jumps"] > 0,
            "occlusion": counts["occlusions"] > 0 and counts["reappearances"] > 0,
            "gravity": counts["falls"] > 0,
        }
        return {tag for tag, seen in found.items() if seen}


@dataclass(frozen=True)
class Caption(Stage):
    """The source's own caption; without one a plain sentence of the tags. A plug-in writes better ones."""

    name = "caption"
    inputs = ("labels", "domain", "events", "camera")
    outputs = ("caption",)
    camera_moves: float = 0.05  # picture widths a second
    may_be_0 = ("camera_moves",)

    def measure(self, views: Views) -> dict[str, Any]:
        if views.labels.get("caption"):
            return {"caption": str(views.labels["caption"])}
        scores = views.scores
        subject = {"human": "people", "robot": "a robot", "physics": "moving objects"}.get(
            scores["domain"], "a scene"
        )
        events = scores["events"]
        shown = f" with {_listed(events)}" if events else ""
        camera = "moving" if (scores.get("camera") or 0) > self.camera_moves else "still"
        return {"caption": f"A video of {subject}{shown}, seen by a {camera} camera."}


def _holds(words: str, pattern: str) -> bool:
    return re.search(rf"\b(?:{pattern.replace('~', _FORMS)})\b", words) is not None


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
