"""Rollouts without end: a state of constant size goes from chunk to chunk, and can be saved and forked."""

from kairos.streaming.decoder import StreamingVAEDecoder
from kairos.streaming.rollout import Rollout, next_chunk, resume, stream
from kairos.streaming.state import RolloutSettings, WorldState

__all__ = [
    "Rollout",
    "RolloutSettings",
    "StreamingVAEDecoder",
    "WorldState",
    "next_chunk",
    "resume",
    "stream",
]
