"""Where the command line talks: results to `out`, everything else to `err`."""

import logging

from rich.console import Console

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


class LogLines(logging.Handler):
    """Kairos's log on stderr, a line for each remark."""

    def emit(self, record: logging.LogRecord) -> None:
        serious = record.levelno >= logging.WARNING
        err.print("[bold yellow]warning:[/]" if serious else "[dim]note:[/]", end=" ")
        err.print(" ".join(record.getMessage().split()), markup=False, highlight=False)


def show_log(verbose: bool) -> None:
    """Let Kairos's warnings through to stderr, and with `verbose` its remarks too."""
    logger = logging.getLogger("kairos")
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    if not any(isinstance(handler, LogLines) for handler in logger.handlers):
        logger.addHandler(LogLines())
