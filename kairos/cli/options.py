"""Options that `kairos generate` and `kairos rollout` share, and the panels of their help."""

from typing import Annotated

import typer

INPUT, SIZE, SAMPLING, RUN = "What to make", "Size", "Sampling", "How to run"

Image = Annotated[str | None, typer.Option(metavar="FILE", help="The first frame.", rich_help_panel=INPUT)]
Negative = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="What guidance leads away from.", rich_help_panel=INPUT),
]
Height = Annotated[int | None, typer.Option(metavar="PIXELS", help="Height.", rich_help_panel=SIZE)]
Width = Annotated[int | None, typer.Option(metavar="PIXELS", help="Width.", rich_help_panel=SIZE)]
Scale = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Enlarge by a whole factor when writing. Default: to 256 pixels; 1 keeps it as made.",
        rich_help_panel=SIZE,
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        metavar="SCALE", help="How strongly to follow the prompt; 1 is off.", rich_help_panel=SAMPLING
    ),
]
Compiled = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the LinearDiT's blocks first: minutes once, then each step is quicker.",
        rich_help_panel=RUN,
    ),
]
VaeDtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Precision of the VAE. auto: bfloat16 on a CPU with units for it (AMX), else its own.",
        rich_help_panel=RUN,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="auto|GB",
        help="Make do with this much of the device's memory, auto: what is free. See kairos plan.",
        rich_help_panel=RUN,
    ),
]
