"""Says once which route an operation takes."""

from __future__ import annotations

import logging

import torch

_SAID: set[str] = set()


def say_once(logger: logging.Logger, message: str) -> None:
    """Log `message` at INFO the first time it comes."""
    if not torch.compiler.is_compiling() and message not in _SAID:
        _SAID.add(message)
        logger.info(message)
