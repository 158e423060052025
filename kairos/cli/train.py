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
    peak: Annotated[
        float | None,
        option("Of such a GPU in bfloat16. Default: 989.4, an H100's.", "TFLOPS", show_default=False),
    ] = None,
) -> None:
    """Say what each stage of the LinearDiT needs: parameters, memory by part, time of a step. Refuse what
    cannot fit.

    The time is this machine's, measured at matrix products, or with --memory-gb computed from the GPU's peak.
    What else a recipe makes is named, and not planned.
    """
    show_log(verbose=False)
    from functools import cache

    import torch

    from kairos import sizes
    from kairos.errors import UserError
    from kairos.training.check import check_run
    from kairos.training.plan import (
        available_gb,
        computed_speed,
        measured_speed,
        plan_stage,
        refuse_too_large,
    )
    from kairos.training.progress import duration
    from kairos.training.recipe import read_recipe

    if peak is not None and memory_gb is None:
        raise UserError("--peak is of the GPU that --memory-gb tells of; give both, or leave it out")
    peak = sizes.PEAK_TFLOPS if peak is None else peak
    if not 0 < peak < float("inf"):
        raise UserError(f"the peak must be above 0 TFLOP/s, got {peak:g}")
    content = read_recipe(recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = "this device" if memory_gb is None else f"a GPU of {peak:g} TFLOP/s, computed"

    @cache
    def speed(precision: str) -> float:
        return measured_speed(device, precision) if memory_gb is None else computed_speed(peak, precision)

    available = available_gb(device) if memory_gb is None else memory_gb
    kind = device.type if memory_gb is None else "cuda"  # a machine that is told of is none like this
    check_run(content, content.stages, processes)
    plans = [(stage, plan_stage(content, stage, processes, kind)) for stage in content.stages]
    for stage, needed in plans:
        step_s = needed.flops / (processes * speed(stage.precision))
        millions, trained = needed.parameters / 1e6, needed.trained / 1e6
        _say(f"{stage.name}: {millions:,.2f} M parameters, {trained:,.2f} M trained")
        parts = ", ".join(f"{part} {size:.3g}" for part, size in needed.memory_gb.items())
        _say(f"{'memory':>12}  {needed.total_gb:.3g} GB a process: {parts}")
        tokens, took = f"up to {needed.tokens:,} tokens", duration(step_s)
        _say(f"{'a step':>12}  {tokens}, about {took} on {processes} x {machine}")
        _say(f"{'in all':>12}  {stage.steps:,} steps, about {duration(stage.steps * step_s)}")
    planned = {stage.name for stage in content.stages}
    _say(f"not planned: {', '.join(name for name in content.steps if name not in planned)}")
    for _, needed in plans:
        refuse_too_large(needed, available)


@app.command()
def merge(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL[:WEIGHT]...",
            show_default=False,
            help="LinearDiTs: models by name, files or folders, with weights.",
        ),
    ],
    output: Annotated[Path, option("The merged weights, in safetensors.", "FILE", "--output", "-o")],
    method: Annotated[str, option("average, ties or dare.", "NAME")] = "average",
    base: Annotated[
        str | None, option("What the models were trained from; ties and dare need it.", "MODEL")
    ] = None,
    density: Annotated[float, option("Share of the differences that ties and dare keep.", "SHARE")] = 0.5,
    seed: Annotated[int, option("Of dare's choice.", "N")] = 0,
) -> None:
    """Merge checkpoints of one model, tensor by tensor: never two of them are in memory."""
    show_log(verbose=True)
    from kairos.training.materials import weights_of
    from kairos.weights.lora import split_weight
    from kairos.weights.merge import merge_files

    weighted = [split_weight(model, "a model") for model in models]
    weighted = [(str(weights_of(model)), weight) for model, weight in weighted]
    start = None if base is None else str(weights_of(base))
    merge_files(weighted, output, method=method, base=start, density=density, seed=seed)
    _say(f"{output}: {len(models)} models merged by {method}")


@app.command()
def export(
    weights: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", show_default=False, help="A model by name or folder, or a LinearDiT's weights."
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT",
            show_default=False,
            help="NAME.safetensors for the released single file, or a folder for diffusers' layout: of a "
            "whole model a whole one.",
        ),
    ],
    dtype: Annotated[str, option("bfloat16 or float32.", "NAME")] = "bfloat16",
    lora: Annotated[
        list[str] | None,
        option("A LoRA to add to it, with its weight. May be given several times.", "FILE[:WEIGHT]"),
    ] = None,
) -> None:
    """Write a trained LinearDiT, with its LoRAs if it has any, under the released names or in diffusers'
    layout."""
    show_log(verbose=True)
    from kairos.errors import UserError

    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"dtype must be bfloat16 or float32, got {dtype!r}")
    from kairos.cli.machine import import_libraries

    import_libraries()
    import torch

    from kairos.data.files import prepare_file, prepare_folder
    from kairos.presets import load_pipeline
    from kairos.training.materials import is_whole, released_config, save_whole, weights_of
    from kairos.weights import load_transformer_file, save_folder, save_original
    from kairos.weights.lora import apply_loras, parse_lora
    from kairos.weights.transformer import DIFFUSERS_FILE

    loras, path = [parse_lora(one) for one in lora or ()], weights_of(weights)
    single, precision = output.suffix == ".safetensors", getattr(torch, dtype)
    prepare_file(output) if single else prepare_folder(output)
    if whole := not single and is_whole(weights):
        if (output / DIFFUSERS_FILE).exists():
            raise UserError(f"{output} holds a LinearDiT alone, and {weights} is a whole model; name another")
        pipeline = load_pipeline(weights, dtype=precision)
        model = pipeline.transformer
    else:
        model = load_transformer_file(path, dtype=precision, otherwise=released_config(weights))
    apply_loras(model, loras)
    if whole:
        save_whole(pipeline, output)
    else:
        (save_original if single else save_folder)(model, output)
    _say(f"{output}: {sum(p.numel() for p in model.parameters()) / 1e6:,.2f} M parameters")


def _say(line: str) -> None:
    out.print(line)
