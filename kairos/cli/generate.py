"""`kairos generate`: a prompt, an image, the start of a video, or a file of requests, to mp4s."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kairos import presets
from kairos.cli.config import Config, read_config
from kairos.cli.console import show_log
from kairos.cli.jobs import Refused, file_jobs, prompt_job
from kairos.cli.options import (
    Compiled,
    Guidance,
    Height,
    Image,
    Memory,
    Negative,
    Scale,
    VaeDtype,
    Width,
    running,
    sampling,
    size,
    what,
)
from kairos.distributed import is_rank
from kairos.errors import UserError


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            show_default=False, help="What happens. Leave it out to let the image or video decide."
        ),
    ] = None,
    image: Image = None,
    video: Annotated[str | None, what("A video to continue from its start.", "FILE")] = None,
    video_frames: Annotated[
        int | None,
        what(
            "How many of the video's first frames to keep, 4n + 1. Default: all, up to half the result.", "N"
        ),
    ] = None,
    request: Annotated[
        Path | None,
        what(
            "A request, or a list of them, instead of a prompt. Options beside it win over it.", "FILE.json"
        ),
    ] = None,
    output: Annotated[
        str | None,
        what(
            "The mp4, or a folder. Default: named after the prompt; the folder output for --request.",
            "PATH",
            "--output",
            "-o",
        ),
    ] = None,
    negative: Negative = None,
    rewrite: Annotated[
        str | None,
        what(
            "Have a second model write the prompt out: its name or folder, or an OpenAI-compatible URL.",
            "MODEL|URL",
        ),
    ] = None,
    frames: Annotated[int | None, size("Frames, 4n + 1, given ones included.", "N")] = None,
    height: Height = None,
    width: Width = None,
    fps: Annotated[float | None, size("Frames a second.", "RATE")] = None,
    scale: Scale = None,
    seed: Annotated[int | None, sampling("One seed, one video. Default: 0.", "N")] = None,
    steps: Annotated[int | None, sampling("Denoising steps.", "N")] = None,
    guidance: Guidance = None,
    template: Annotated[str | None, sampling("A prompt template other than the model's.", "NAME")] = None,
    model: Annotated[
        str | None,
        running(
            f"A model by name (see kairos models list) or a folder. Default: {presets.DEFAULT}.", "NAME|PATH"
        ),
    ] = None,
    weights: Annotated[
        str | None,
        running("Another LinearDiT in place of the model's own: a released file or a folder.", "PATH"),
    ] = None,
    lora: Annotated[
        list[str] | None,
        running(
            "A LoRA to add to the LinearDiT, with its weight. May be given several times.", "FILE[:WEIGHT]"
        ),
    ] = None,
    config: Annotated[
        Path | None,
        running(
            "A configuration (see configs/) that names the model and fills in what nothing else says.",
            "FILE.py",
        ),
    ] = None,
    device: Annotated[str | None, running("auto, cpu, cuda, cuda:1, ... Default: auto.", "NAME")] = None,
    dtype: Annotated[
        str | None,
        running(
            "auto, float32, bfloat16 or float16. Default: auto, bfloat16 on a GPU, float32 on a CPU.", "NAME"
        ),
    ] = None,
    tiled: Annotated[
        bool, running("Encode and decode frames in tiles, to save memory.", None, "--tiled")
    ] = False,
    gpus: Annotated[
        str | None, running("Run on N GPUs of this machine; with --device cpu, in N processes.", "N|all")
    ] = None,
    split: Annotated[
        str | None,
        running(
            "What the GPUs share: context (a video's tokens), cfg (its two branches) or list (whole "
            "requests, a finished one is skipped). Default: what keeps most of them busy.",
            "NAME",
        ),
    ] = None,
    free_encoder: Annotated[
        bool, running("Drop the text encoder once the last prompt is encoded.", None, "--free-encoder")
    ] = False,
    compiled: Compiled = False,
    vae_dtype: VaeDtype = "auto",
    step_cache: Annotated[
        float | None,
        running(
            "Leave out most of a step that is like the one before; see kairos bench --step-cache.",
            "THRESHOLD",
        ),
    ] = None,
    memory: Memory = None,
    quantize: Annotated[
        str | None,
        running(
            "Weights in eight bits, int4: the encoder's in four; frames a little different.", "int8|fp8|int4"
        ),
    ] = None,
    verbose: Annotated[bool, running("Say where the time went.", None, "--verbose", "-v")] = False,
) -> None:
    """Make a video from a prompt, an image, both, or the start of a video.

    Which of them are given tells the mode: text to video, image to video, both, or continuation.
    """
    show_log(verbose)
    settings = read_config(config) if config else Config()
    said = {
        "prompt": prompt,
        "input_image": image,
        "input_video": video,
        "input_frames": video_frames,
        "negative_prompt": negative,
        "seed": seed,
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "fps": fps,
        "tiled": tiled or None,
        "template": template,
    }
    refused: list[Refused] = []
    if request is None:
        job_list = [prompt_job(said, settings.request, output)]
    else:
        if prompt is not None:
            raise UserError("give a prompt or --request, not both: the prompt stands in the request file")
        job_list, refused = file_jobs(request, said, settings.request, output)

    from kairos.cli.run import RunOptions, run

    options: dict[str, Any] = {"model": model, "weights": weights}
    options |= {"device": device, "dtype": dtype, "scale": scale}
    options = settings.options | {name: value for name, value in options.items() if value is not None}
    options |= {"loras": tuple(lora or ()), "rewrite": rewrite}
    options |= {"compiled": compiled, "step_cache": step_cache, "vae_dtype": vae_dtype}
    options |= {"memory": memory, "quantize": quantize}
    run_options = RunOptions(**options, free_encoder=free_encoder, verbose=verbose)
    if gpus is None and split is None and not is_rank():
        if refused:
            raise refused[0].error
        run(job_list, run_options)
    else:
        alone = {"compile": compiled, "step-cache": step_cache, "memory": memory, "quantize": quantize}
        if given := [f"--{name}" for name, value in alone.items() if value not in (None, False)]:
            raise UserError(f"{' and '.join(given)}: for one device; leave out --gpus, --split and torchrun")
        from kairos.cli.gpus import run_on_gpus

        report = None
        if request is not None and len(job_list) + len(refused) > 1:
            report = Path(output or "output") / f"{request.stem}.report.json"
        run_on_gpus(job_list, refused, run_options, gpus=gpus, split=split, report=report)
