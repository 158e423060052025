"""Models that must be fetched or paid for. A plug-in is off unless the settings name it under `plugins`.

Those with `scores_clips` are stages as all others; the rest ask about clips that the thresholds let pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kairos.curation.plugins.captions import Captions
from kairos.curation.plugins.models import Aesthetics, Embedding, Nsfw

PLUGINS: Mapping[str, Any] = {plugin.name: plugin for plugin in (Aesthetics, Nsfw, Embedding, Captions)}

__all__ = ["PLUGINS"]
