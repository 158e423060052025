"""Options that `kairos generate` and `kairos rollout` share, and the panels of their help."""

from collections.abc import Callable
from typing import Annotated, Any

import typer


def panel(title: str | None) -> Callable[..., Any]:
    """Makes the options of one panel of a command's help."""

    def option(text: str, metavar: str | None = None, *flags: str, **more: Any) -> Any:
        return typer.Option(*flags, metavar=metavar, help=text, rich_help_panel=title, **more)

    return option


option = panel(None)
what, size, sampling = panel("What to make"), panel("Size"), panel("Sampling")
running = panel("How to run")

Image = Annotated[str | None, what("The first frame.", "FILE")]
Negative = Annotated[str | None, what("What guidance leads away from.", "TEXT")]
Height = Annotated[int | None, size("Height.", "PIXELS")]
Width = Annotated[int | None, size("Width.", "PIXELS")]
Scale = Annotated[
    int | None,
    size("Enlarge by a whole factor when writing. Default: to 256 pixels; 1 keeps it as made.", "N"),
]
Guidance = Annotated[float | None, sampling("How strongly to follow the prompt; 1 is off.", "SCALE")]
Compiled = Annotated[
    bool,
    running(
        "Compile the LinearDiT's blocks first: minutes once, then each step is quicker.", None, "--compile"
    ),
]
VaeDtype = Annotated[
    str,
    running("Precision of the VAE. auto: bfloat16 on a CPU with units for it (AMX), else its own.", "NAME"),
]
Memory = Annotated[
    str | None,
    running("Make do with this much of the device's memory, auto: what is free. See kairos plan.", "auto|GB"),
]
