"""The stages that score a clip. A stage is a frozen dataclass of its settings with

    name            what the ledger and the configuration call it
    version         raised when its mathematics changes: what was computed before is computed again
    inputs          views of the clip ("grey", "vectors", "samples", "labels") or scores of earlier stages
    outputs         the scores that it gives
    measure(views)  -> those scores, JSON values

A clip is decoded once, for the views that the stages still to be run ask for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kairos.curation.plugins import PLUGINS
from kairos.curation.settings import Settings, hash_of
from kairos.curation.stages.fingerprint import Fingerprint
from kairos.curation.stages.looks import Bars, Exposure, Sharpness, Strip
from kairos.curation.stages.motion import Flow, Motion, Richness
from kairos.curation.stages.physics import Physics
from kairos.curation.stages.tags import Caption, Tags
from kairos.curation.stages.text import Text
from kairos.curation.tables import HIDDEN, TEXTS
from kairos.curation.views import Stage, Views

STAGES: Mapping[str, type] = {
    stage.name: stage
    for stage in (
        Motion,
        Flow,
        Sharpness,
        Exposure,
        Bars,
        Text,
        Fingerprint,
        Richness,
        Physics,
        Tags,
        Caption,
        Strip,
    )
}
"""What runs by default, in this order; none needs a download."""

__all__ = ["PLUGINS", "STAGES", "Stage", "Views", "hashes_of", "numbers_of", "stages_of"]


def stages_of(settings: Settings) -> list[Stage]:
    """The stages of a curation that score clips, made with its settings."""
    return [
        *(stage(**settings.stages.get(name, {})) for name, stage in STAGES.items()),
        *(
            PLUGINS[name](**options)
            for name, options in settings.plugins.items()
            if PLUGINS[name].scores_clips
        ),
    ]


def numbers_of(stages: Iterable[Any]) -> list[str]:
    """The scores of stages, or of their classes, that are numbers: a threshold can bound them."""
    return [name for stage in stages for name in stage.outputs if name not in (*HIDDEN, *TEXTS)]


def hashes_of(stages: Sequence[Stage]) -> dict[str, str]:
    """The configuration hash of each stage: its settings, its version, and those of what it reads."""
    hashes: dict[str, str] = {}
    givers: dict[str, str] = {}
    for stage in stages:
        upstream = sorted({hashes[givers[name]] for name in stage.inputs if name in givers})
        hashes[stage.name] = hash_of(stage.name, stage.version, stage, upstream)
        givers |= dict.fromkeys(stage.outputs, stage.name)
    return hashes
