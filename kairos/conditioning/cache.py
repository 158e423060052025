"""Embeddings of the prompts encoded last: the encoder is larger than the LinearDiT, and prompts repeat."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

CAPACITY = 32
"""Embeddings that are kept of each encoder."""
DEVICES = ("cpu", "cuda")
"""Kinds of devices whose autocast an embedding is made under."""


class EmbeddingCache:
    """The last embeddings of each encoder, on the CPU. They go with their encoder.

    An encoder whose weights were written to or replaced, or whose adapters were switched, counts as another
    one. `parameter.data = ...` is not seen: so are weights moved to a device and back, and their embeddings
    stay what they were.
    """

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[nn.Module, OrderedDict[Hashable, Tensor]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def get(self, encoder: nn.Module, key: Hashable) -> Tensor | None:
        with self._lock:
            entries = self._entries.get(encoder, OrderedDict())
            key = (_version(encoder), key)
            if key not in entries:
                return None
            entries.move_to_end(key)
            return entries[key]

    def put(self, encoder: nn.Module, key: Hashable, embedding: Tensor) -> None:
        with self._lock:
            entries = self._entries.setdefault(encoder, OrderedDict())
            entries[(_version(encoder), key)] = embedding.to("cpu", copy=True)  # not a view of its batch
            while len(entries) > CAPACITY:
                entries.popitem(last=False)


def _version(encoder: nn.Module) -> Hashable:
    """Changes when a weight is written to or replaced, adapters are switched, or the precision is another."""
    parameters = list(encoder.parameters())
    writes = sum(parameter._version for parameter in parameters if not parameter.is_inference())
    layers: list[Any] = [layer for layer in encoder.modules() if hasattr(layer, "merged_adapters")]  # PEFT's
    adapters = tuple(
        (layer.disable_adapters, *layer.active_adapters, str(getattr(layer, "scaling", "")))
        for layer in layers
    )
    cast = [torch.get_autocast_dtype(kind) for kind in DEVICES if torch.is_autocast_enabled(kind)]
    precision = parameters[0].dtype if parameters else None, *cast
    return writes, tuple(map(id, parameters)), adapters, precision
