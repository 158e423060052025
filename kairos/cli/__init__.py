"""The `kairos` command: where it starts, and what becomes of its errors.

Each command is a module here; heavy imports wait inside its body, so that `kairos --help` is quick.
"""

import errno
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import NoReturn

from kairos.errors import KairosError, MachineError
from kairos.process import keep_freed_memory

REFUSED = {
    errno.ENAMETOOLONG: "the file name is too long",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}
"""What the system says of a path that somebody gave."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""What it says of a disk that is full or fails, of standard output too, where there is no file to name."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and leave with its exit status.

    0 done, 1 the machine failed, 2 the input cannot be used, 130 interrupted. Bad input and a failing machine
    get one line on stderr; anything else is a bug of ours and shows its traceback.
    """
    keep_freed_memory()
    if isinstance(sys.stdout, TextIOWrapper):  # escape what the terminal's encoding has not, as stderr does
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        import typer

        from kairos.cli.console import say
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        from kairos.cli.app import app

        status = app(args=arguments, prog_name="kairos", standalone_mode=False)
    except typer.TyperException as error:  # a wrong option or argument
        message, status = error.format_message(), error.exit_code
    except KairosError as error:
        message, status = str(error), 1 if isinstance(error, MachineError) else 2
    except MemoryError:
        message, status = "not enough memory; try a smaller size, fewer frames or --tiled", 1
    except OSError as error:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        where = f": {name}" if name else ""
        if where and error.errno in REFUSED:
            message, status = REFUSED[error.errno] + where, 2
        elif error.errno in FULL:
            message, status = (error.strerror or str(error)).lower() + where, 1
        else:
            raise
    except (KeyboardInterrupt, typer.Abort):
        message, status = "", 130
    else:
        message = ""
    if status == 130:
        message = "interrupted"
    if message:
        say("error", "bold red", message)
    sys.exit(status if isinstance(status, int) else 0)
