"""`kairos models`: the models that Kairos knows by name."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List, describe and download models.", no_args_is_help=False)


@app.command("list")
def list_models() -> None:
    """List the models that can be named."""


@app.command()
def info(name: Annotated[str, typer.Argument(show_default=False, help="A model's name.")]) -> None:
    """Say what a model is made for and what it needs."""


@app.command()
def download(
    name: Annotated[str, typer.Argument(show_default=False, help="A model's name.")],
    folder: Annotated[
        Path | None,
        typer.Option("--dir", metavar="FOLDER", help="Where to. Default: Hugging Face's cache."),
    ] = None,
) -> None:
    """Fetch a model's files from Hugging Face."""
