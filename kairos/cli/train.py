"""`kairos train`: run a recipe."""

from pathlib import Path
from typing import Annotated

import typer

from kairos.cli.console import show_log


def train(
    recipe: Annotated[
        Path, typer.Argument(show_default=False, help="A recipe, such as recipes/kairos-tiny.yaml.")
    ],
    only: Annotated[
        str, typer.Option(metavar="STAGE,STAGE", help="Run these stages only, in the recipe's order.")
    ] = "",
) -> None:
    """Train a model from nothing, or go on where the last run stopped."""
    show_log(verbose=True)
    from kairos.training.recipe import STAGES, read_recipe, run_recipe

    run_recipe(read_recipe(recipe), tuple(only.split(",")) if only else STAGES)
