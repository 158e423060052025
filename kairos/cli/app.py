"""The commands of `kairos`, one module each."""

from typing import Annotated

import typer

from kairos import __version__
from kairos.cli import (
    batch,
    bench,
    certify,
    curate,
    evaluate,
    generate,
    models,
    plan,
    rollout,
    show,
    train,
    worlds,
)
from kairos.cli.console import out
from kairos.cli.options import option

app = typer.Typer(
    help="An open video world model: a prompt, an image or the start of a video becomes its future.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"kairos {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def kairos(
    context: typer.Context,
    version: Annotated[
        bool, option("Print the version.", None, "--version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("generate")(generate.generate)
app.command("rollout", cls=rollout.SecondAndText)(rollout.rollout)
app.command("show")(show.show)
app.command("evaluate")(evaluate.evaluate)
app.command("plan")(plan.plan)
app.command("bench")(bench.bench)
app.command("batch")(batch.batch)
app.command("certify")(certify.certify)
app.add_typer(train.app, name="train")
app.add_typer(curate.app, name="curate")
app.add_typer(models.app, name="models")
app.add_typer(worlds.app, name="worlds")
