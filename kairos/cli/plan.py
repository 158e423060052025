"""`kairos plan`: what a video needs, where each part will lie, how long it should take. Nothing loads."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from kairos import presets
from kairos.cli.console import out
from kairos.cli.options import option
from kairos.errors import UserError
from kairos.request import Request


def plan(
    model: Annotated[str, option("A model by name or a folder.", "NAME|PATH")] = presets.DEFAULT,
    frames: Annotated[int | None, option("Frames. Default: the model's.", "N")] = None,
    height: Annotated[int | None, option("Default: the model's.", "PIXELS")] = None,
    width: Annotated[int | None, option("Default: the model's.", "PIXELS")] = None,
    steps: Annotated[int | None, option("Denoising steps. Default: the model's.", "N")] = None,
    guidance: Annotated[float | None, option("1 is off. Default: the model's.", "SCALE")] = None,
    gpu_memory: Annotated[float | None, option("What the GPU has free.", "GB", show_default=False)] = None,
    cpu_memory: Annotated[
        float | None, option("Instead: what the machine has free, without a GPU.", "GB", show_default=False)
    ] = None,
    dtype: Annotated[str, option("auto, float32, bfloat16 or float16.", "NAME")] = "auto",
    quantize: Annotated[
        str | None,
        option("Weights in eight bits; int4: the encoder's in four.", "int8|fp8|int4", show_default=False),
    ] = None,
    peak: Annotated[
        float | None, option("The GPU's peak in bfloat16. Default: 989.4, an H100's.", "TFLOPS")
    ] = None,
    as_json: Annotated[bool, option("Print JSON.", None, "--json")] = False,
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
    request = Request(
        "any",
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
    )
    about = info(model)
    clip = memory.clip_of(about.defaults, about.scheduler, request)
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
