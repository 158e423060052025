"""Where the command line talks: results to `out`, everything else to `err`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.text import Text

# Nothing in a text is markup, also in a path, a prompt or a cell of a table: they are the user's.
out = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
err = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)


def say(kind: str, style: str, message: str) -> None:
    """One line on stderr: `kind: message`."""
    err.print(Text.assemble((f"{kind}:", style), " ", " ".join(message.split())))


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """A spinner beside `title`, where there is a terminal to see it."""
    with err.status(Text(title)) if err.is_terminal else nullcontext():
        yield


class LogLines(logging.Handler):
    """Kairos's log on stderr, a line for each remark."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            say("warning", "bold yellow", record.getMessage())
        else:
            say("note", "dim", record.getMessage())


TALKATIVE = ("bitsandbytes", "diffusers.quantizers.torchao", "torchao", "torch.utils._pytree")
"""Libraries that remark on other machines' kernels when diffusers imports them, where they are installed."""


def hush() -> None:
    """Errors alone of the talkative; to be called before diffusers is imported."""
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def show_log(verbose: bool) -> None:
    """Let Kairos's warnings through to stderr, and with `verbose` its remarks too."""
    hush()
    logger = logging.getLogger("kairos")
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    if not any(isinstance(handler, LogLines) for handler in logger.handlers):
        logger.addHandler(LogLines())
