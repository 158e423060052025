"""One video on several devices, or a list of videos on all: put on a model from outside.

`launch` starts ranks and ends them together, `parallelize` splits a model over them, `WorkQueue` hands out a
list.
"""

import os

from kairos.errors import UserError


def is_rank() -> bool:
    """Whether torchrun or `launch` started this process as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def check_alone(command: str) -> None:
    """Refuse several processes for a command whose files each of them would write."""
    if is_rank():
        raise UserError(f"kairos {command} is one process: start it without torchrun")
