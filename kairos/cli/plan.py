"""`kairos plan`: what a video needs, where each part will lie, how long it should take. Nothing loads."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from kairos import presets
from kairos.cli.console import out
from kairos.errors import UserError
from kairos.request import Request


def plan(
    model: Annotated[
        str, typer.Option(metavar="NAME|PATH", help="A model by name or a folder.")
    ] = presets.DEFAULT,
    frames: Annotated[int | None, typer.Option(metavar="N", help="Frames. Default: the model's.")] = None,
    height: Annotated[int | None, typer.Option(metavar="PIXELS", help="Default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(metavar="PIXELS", help="Default: the model's.")] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Denoising steps. Default: the model's.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(metavar="SCALE", help="1 is off. Default: the model's.")
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GB", help="What the GPU has free.", show_default=False)
    ] = None,
    cpu_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GB", help="Instead: what the machine has free, without a GPU.", show_default=False
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.")] = "auto",
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="int8|fp8|int4",
            help="Weights in eight bits; int4: the encoder's in four.",
            show_default=False,
        ),
    ] = None,
    peak: Annotated[
        float | None,
        typer.Option(metavar="TFLOPS", help="The GPU's peak in bfloat16. Default: 989.4, an H100's."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a video takes before anything loads: the parts, where they lie, peak memory, computed time.

    It is what `kairos generate --memory GB` does. What cannot fit is refused, with what would.
    """
    from rich.table import Table

    from kairos import memory, sizes
    from kairos.cli.run import RunOptions
    from kairos.model_info import for_planning, info

    if (gpu_memory is None) is (cpu_memory is None):
        raise UserError("say how much memory there is: --gpu-memory GB, or --cpu-memory GB")
    if peak is not None and gpu_memory is None:
        raise UserError("--peak is the GPU's, and a plan for a CPU says no times; leave it out")
    device = "cuda" if cpu_memory is None else "cpu"
    budget = gpu_memory if cpu_memory is None else cpu_memory
    assert budget is not None
    # What no video can be is refused as `generate` refuses it.
    RunOptions(model=model, dtype=dtype, quantize=quantize)
    Request(
        "any",
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
    )
    about = info(model)
    clip = memory.clip_of(about.defaults, about.scheduler, height, width, frames, steps, guidance)
    made = memory.plan(
        for_planning(about, device, dtype),
        clip,
        budget,
        device=device,
        quantize=quantize,
        peak_tflops=sizes.PEAK_TFLOPS if peak is None else peak,
    )
    if as_json:
        said = {"model": about.name, "clip": asdict(clip), **asdict(made), "peak_gb": made.peak_gb}
        if device == "cpu":
            for stage in said["stages"]:
                del stage["seconds"]
        else:
            said["seconds"] = made.seconds
        typer.echo(json.dumps(said, indent=2))
        return
    guided = ", guided" if clip.guided else ""
    out.print(
        f"{about.name}: {clip.num_frames} frames of {clip.height} x {clip.width}, {clip.steps} steps{guided}"
        f", in {budget:g} GB of {'the GPU' if device == 'cuda' else 'the machine'}",
    )
    parts = Table("part", "parameters", "weights", "GB", "place")
    for part in made.parts:
        parts.add_row(
            part.name.replace("_", " "), f"{part.parameters:,}", part.dtype, f"{part.gb:.3g}", part.place
        )
    parts.add_row(
        "CUDA context" if device == "cuda" else "libraries", "", "", f"{made.context_gb:.3g}", "resident"
    )
    out.print(parts)
    stages = Table(
        "stage", "activations, GB", "peak, GB", *(["seconds, computed"] if device == "cuda" else [])
    )
    for stage in made.stages:
        cells = [stage.name, f"{stage.activations_gb:.3g}", f"{stage.peak_gb:.3g}"]
        stages.add_row(*cells, *([f"{stage.seconds:.3g}"] if device == "cuda" else []))
    out.print(stages)
    if made.tiled:
        out.print("the VAE works in tiles, with the pixels of the whole")
    if device == "cuda":
        tflops = sizes.PEAK_TFLOPS if peak is None else peak
        out.print(
            f"about {made.seconds:.3g} s in all, computed and not measured: {sizes.EFFICIENCY:.0%} of "
            f"{tflops:g} TFLOP/s, {memory.VAE_EFFICIENCY:.0%} in the VAE, copies at "
            f"{memory.HOST_GB_S:g} GB/s; activations are estimates",
        )
