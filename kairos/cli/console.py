"""Where the command line talks: results to `out`, everything else to `err`."""

import logging

from rich.console import Console
from rich.logging import RichHandler

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


def show_log(verbose: bool) -> None:
    """Let Kairos's warnings through to stderr, and with `verbose` its remarks too."""
    logger = logging.getLogger("kairos")
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    if not any(isinstance(handler, RichHandler) for handler in logger.handlers):
        logger.addHandler(RichHandler(console=err, show_time=False, show_path=False, markup=False))
