"""Kairos: an open video world model. A prompt, an image or the start of a video in; its future out.

Names are imported when first used, so `import kairos` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kairos.errors import KairosError as KairosError
    from kairos.errors import MachineError as MachineError
    from kairos.errors import UserError as UserError
    from kairos.models.transformer import KairosTransformer3DModel as KairosTransformer3DModel
    from kairos.pipeline import KairosPipeline as KairosPipeline
    from kairos.pipeline import KairosPipelineOutput as KairosPipelineOutput
    from kairos.schedulers import FewStepScheduler as FewStepScheduler
    from kairos.schedulers import FlowMatchScheduler as FlowMatchScheduler
    from kairos.streaming import StreamingVAEDecoder as StreamingVAEDecoder
    from kairos.streaming import WorldState as WorldState

_HOME = {
    "FewStepScheduler": "kairos.schedulers",
    "FlowMatchScheduler": "kairos.schedulers",
    "KairosError": "kairos.errors",
    "KairosPipeline": "kairos.pipeline",
    "KairosPipelineOutput": "kairos.pipeline",
    "KairosTransformer3DModel": "kairos.models.transformer",
    "MachineError": "kairos.errors",
    "StreamingVAEDecoder": "kairos.streaming",
    "UserError": "kairos.errors",
    "WorldState": "kairos.streaming",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'kairos' has no attribute {name!r}")
