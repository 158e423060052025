"""Loading with transformers: quietly, and with what goes wrong in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging as transformers_logging

from kairos.errors import UserError, one_line


@contextmanager
def explained(what: str, folder: str | Path) -> Iterator[None]:
    """Whatever goes wrong in loading `what` becomes a UserError; progress bars are off meanwhile."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except (MemoryError, UserError):
        raise
    except Exception as error:  # transformers raises whatever its readers of JSON, pickles and tensors raise
        raise UserError(f"cannot load the {what} in {folder}: {one_line(error)}") from error
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
