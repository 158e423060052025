"""`kairos train`: run a recipe; its cache and its plan alone; what becomes of weights afterwards."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kairos.cli.console import out, show_log
from kairos.cli.options import option


class RecipeFirst(TyperGroup):
    """`kairos train RECIPE` is `kairos train run RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {*self.commands, "--help"}
        if args and not any(argument in known for argument in args[:1]):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RecipeFirst,
    help="Train a model by a recipe: kairos train recipes/kairos-tiny.yaml",
    no_args_is_help=True,
)

RecipeFile = Annotated[
    Path,
    typer.Argument(metavar="RECIPE", show_default=False, help="A recipe, such as recipes/kairos-tiny.yaml."),
]


@app.command()
def run(
    recipe: RecipeFile,
    only: Annotated[str, option("Run these stages only, in the recipe's order.", "STAGE,STAGE")] = "",
) -> None:
    """Run a recipe, or go on where the last run stopped. `run` may be left out.

    Ctrl-C saves and stops. Under torchrun the LinearDiT is laid over all processes (FSDP2).
    """
    show_log(verbose=True)
    from kairos.cli.machine import explained_memory, import_libraries

    import_libraries()
    from kairos.training.recipe import read_recipe
    from kairos.training.steps import run_recipe

    with explained_memory("a smaller batch_size, a larger accumulate or checkpointing: true"):
        run_recipe(read_recipe(recipe), tuple(name.strip() for name in only.split(",")) if only else ())


@app.command()
def cache(recipe: RecipeFile) -> None:
    """Compute the latents and prompt embeddings of a recipe's clips that are not there yet."""
    show_log(verbose=True)
    from kairos.cli.machine import explained_memory, import_libraries

    import_libraries()
    from kairos.training.recipe import read_recipe
    from kairos.training.steps import run_recipe

    with explained_memory("smaller or shorter buckets"):
        run_recipe(read_recipe(recipe), ("cache",))


@app.command()
def plan(
    recipe: RecipeFile,
    processes: Annotated[int, option("For so many processes.", "N", min=1)] = 1,
    memory_gb: Annotated[
        float | None, option("Of the GPU of each process. Default: this machine's device.", "GB")
    ] = None,
) -> None:
    """Say what every stage needs: parameters, memory by part, time of a step. Refuse what cannot fit."""
    show_log(verbose=False)
    import torch

    from kairos.training.check import check_run
    from kairos.training.plan import (
        EFFICIENCY,
        available_gb,
        measured_speed,
        plan_stage,
        refuse_too_large,
    )
    from kairos.training.recipe import read_recipe

    content = read_recipe(recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speeds: dict[str, float] = {}
    available = available_gb(device) if memory_gb is None else memory_gb
    kind = device.type if memory_gb is None else "cuda"  # a machine that is told of is none like this
    check_run(content, content.stages, processes)
    plans = [(stage, plan_stage(content, stage, processes, kind)) for stage in content.stages]
    for stage, needed in plans:
        if stage.precision not in speeds:
            speeds[stage.precision] = measured_speed(device, stage.precision)
        step_s = needed.flops / (processes * EFFICIENCY * speeds[stage.precision])
        millions, trained = needed.parameters / 1e6, needed.trained / 1e6
        _say(f"{stage.name}: {millions:,.2f} M parameters, {trained:,.2f} M trained")
        parts = ", ".join(f"{part} {size:.3g}" for part, size in needed.memory_gb.items())
        _say(f"{'memory':>12}  {needed.total_gb:.3g} GB a process: {parts}")
        devices = f"{processes} x this device"
        _say(f"{'a step':>12}  up to {needed.tokens:,} tokens, about {step_s:.3g} s on {devices}")
        _say(f"{'in all':>12}  {stage.steps:,} steps, about {stage.steps * step_s / 3600:.3g} h")
    for _, needed in plans:
        refuse_too_large(needed, available)


@app.command()
def merge(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE[:WEIGHT]...", show_default=False, help="LinearDiTs: files or folders, with weights."
        ),
    ],
    output: Annotated[Path, option("The merged weights, in safetensors.", "FILE", "--output", "-o")],
    method: Annotated[str, option("average, ties or dare.", "NAME")] = "average",
    base: Annotated[
        str | None, option("What the models were trained from; ties and dare need it.", "FILE")
    ] = None,
    density: Annotated[float, option("Share of the differences that ties and dare keep.", "SHARE")] = 0.5,
    seed: Annotated[int, option("Of dare's choice.", "N")] = 0,
) -> None:
    """Merge checkpoints of one model, tensor by tensor: never two of them are in memory."""
    show_log(verbose=True)
    from kairos.weights.merge import merge_files, parse_model

    merge_files(
        [parse_model(m) for m in models], output, method=method, base=base, density=density, seed=seed
    )
    _say(f"{output}: {len(models)} models merged by {method}")


@app.command()
def export(
    weights: Annotated[
        Path, typer.Argument(metavar="WEIGHTS", show_default=False, help="A LinearDiT: a file or a folder.")
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT",
            show_default=False,
            help="NAME.safetensors for the released single file, or a folder for diffusers' layout.",
        ),
    ],
    dtype: Annotated[str, option("bfloat16 or float32.", "NAME")] = "bfloat16",
) -> None:
    """Write a trained LinearDiT under the released names or in diffusers' layout."""
    show_log(verbose=True)
    from kairos.errors import UserError

    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"dtype must be bfloat16 or float32, got {dtype!r}")
    import torch

    from kairos.data.files import prepare_file, prepare_folder
    from kairos.weights import load_transformer_file, save_original

    single = output.suffix == ".safetensors"
    prepare_file(output) if single else prepare_folder(output)
    model = load_transformer_file(weights, dtype=getattr(torch, dtype))
    if single:
        save_original(model, output)
    else:
        model.save_pretrained(output)
    _say(f"{output}: {sum(p.numel() for p in model.parameters()) / 1e6:,.2f} M parameters")


def _say(line: str) -> None:
    out.print(line)
