"""Rollouts without end: a state of constant size goes from chunk to chunk, and can be saved and forked."""

from kairos.streaming.decoder import StreamingVAEDecoder
from kairos.streaming.drift import Drift, DriftLimits, DriftMeter
from kairos.streaming.overlap import OverlappingRollout
from kairos.streaming.rollout import Rollout, next_chunk, resume, stream
from kairos.streaming.state import RolloutSettings, WorldState

__all__ = [
    "Drift",
    "DriftLimits",
    "DriftMeter",
    "OverlappingRollout",
    "Rollout",
    "RolloutSettings",
    "StreamingVAEDecoder",
    "WorldState",
    "next_chunk",
    "resume",
    "stream",
]
