"""`kairos models`: the models that Kairos knows by name."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kairos.cli.console import out, show_log
from kairos.cli.options import option

app = typer.Typer(help="List, describe and download models.", no_args_is_help=True)


@app.command("list")
def list_models() -> None:
    """List the models that can be named, and which of them are here."""
    from kairos import presets

    for preset in presets.PRESETS.values():
        here = "downloaded" if presets.is_downloaded(preset) else "not downloaded"
        if preset.kind == "embedded":
            here = "ships with Kairos" if presets.is_downloaded(preset) else "missing"
        out.print(f"{preset.name:<32}{here:<20}{preset.description}")


@app.command()
def info(
    name: Annotated[
        str, typer.Argument(metavar="NAME|PATH", show_default=False, help="A model's name or folder.")
    ],
) -> None:
    """Say what a model was made for and what it needs. Nothing is loaded."""
    from kairos import presets
    from kairos.model_info import gpu_memory_gb
    from kairos.model_info import info as describe
    from kairos.sizes import PROCESS_GB

    about = describe(name)
    where = "" if presets.is_name(name) else f" --dir {name}"
    made_for = about.defaults
    guided = "" if made_for.get("guide_continuation", True) else ", of the first frame alone"
    rows: list[tuple[str, Any]] = [
        ("model", f"{about.name}: {about.description}"),
        ("where", about.path or f"not downloaded; run: kairos models download {about.name}{where}"),
        *((f"{part} from", repository) for part, repository in about.repositories.items()),
        ("made for", "{num_frames} frames of {height} x {width}, at {fps} fps".format(**made_for)),
        ("sampling", f"{about.scheduler}, {made_for['num_inference_steps']} steps"),
        ("guidance", f"{made_for['guidance_scale']:g}{guided}"),
        ("prompt template", about.template),
        ("causal", about.causal),
        ("tokens a clip", f"{about.tokens:,}"),
        *((f"{part} parameters", f"{count:,}") for part, count in about.parameters.items()),
    ]
    for dtype in ("bfloat16", "float32"):
        whole_gb, freed_gb = gpu_memory_gb(about, dtype)
        rows.append((f"GPU, in {dtype}", f"about {whole_gb:.3g} GB; {freed_gb:.3g} GB with --free-encoder"))
    rows.append(("beside that", f"about {PROCESS_GB} GB of the machine's memory for the libraries"))
    carried = "state of a rollout" if about.causal == "chunk" else "state, if chunk-causal"
    for dtype in ("bfloat16", "float32"):
        layers, decoder = about.state_mb(dtype)
        vae = f"{decoder:,.1f} MB of the VAE's decoder in {about.vae_dtype(dtype)}"
        rows.append((carried, f"{layers:,.1f} MB of the layers in {dtype}, {vae}"))
    for title, value in rows:
        out.print(f"{title.replace('_', ' '):>24}  {value}")


@app.command()
def download(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="A model's name.")],
    folder: Annotated[
        Path | None, option("Where to. Default: Hugging Face's cache.", "FOLDER", "--dir")
    ] = None,
) -> None:
    """Fetch a model's files from Hugging Face. What is here already is not fetched again."""
    show_log(verbose=False)
    from kairos import presets

    preset = presets.get(name)
    if not preset.sources:
        out.print(f"{name} ships with Kairos; there is nothing to download")
        return
    for part, path in presets.download(name, folder).items():
        out.print(f"{part.replace('_', ' ')}: {path}")
