"""`kairos certify`: one request on one rank and on several, and how far apart the videos are."""

import logging
import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from rich.table import Table

from kairos import presets
from kairos.cli.console import out, show_log, waiting
from kairos.cli.machine import import_libraries
from kairos.cli.options import option
from kairos.cli.run import RunOptions, check_model
from kairos.errors import MachineError, UserError
from kairos.request import Request

LIMIT = 1e-4
HEADS = 5
"""Heads of the random model: they divide by none of 2, 3 and 4."""


@dataclass(frozen=True)
class Finding:
    """The largest difference between a split video and one rank's, in latents and in frames in [0, 1]."""

    ranks: int
    split: str
    vae: bool
    latents: float = 0.0
    frames: float = 0.0
    refused: str = ""

    @property
    def largest(self) -> float:
        """Of the two; infinite where one is no number."""
        return max(math.inf if math.isnan(one) else one for one in (self.latents, self.frames))

    @property
    def passed(self) -> bool:
        return not self.refused and self.largest < LIMIT


def certify(
    ranks: Annotated[int, option("Try 1 to N ranks.", "N")] = 4,
    model: Annotated[
        str | None,
        option(
            f"The model. Default: {presets.DEFAULT} around a random LinearDiT of {HEADS} heads.", "NAME|PATH"
        ),
    ] = None,
    prompt: Annotated[str, option("What happens.", "TEXT")] = "a red ball rolls right",
    frames: Annotated[int, option("Frames, 4n + 1.", "N")] = 9,
    height: Annotated[int, option("Height.", "PIXELS")] = 64,
    width: Annotated[int, option("Width.", "PIXELS")] = 80,
    steps: Annotated[int, option("Denoising steps.", "N")] = 3,
    gpus: Annotated[bool, option("On GPUs by NCCL, not on CPUs by gloo.", None, "--gpus")] = False,
    verbose: Annotated[bool, option("Say what is going on.", None, "--verbose", "-v")] = False,
) -> None:
    """Show that a video split over several ranks is the video of one, in float32.

    Each rank is a process of this machine. Exit status 1 if a difference reaches 1e-4.
    """
    show_log(verbose)
    if not 1 <= ranks <= 64:
        raise UserError(f"--ranks must be from 1 to 64, got {ranks}")
    request = Request(
        prompt, height=height, width=width, num_frames=frames, num_inference_steps=steps, guidance_scale=3.0
    )
    check_model(RunOptions(model=model or presets.DEFAULT))
    from kairos.distributed.launch import launch
    from kairos.distributed.ranks import gpus_here

    if gpus and ranks > (there := gpus_here()):
        fix = f"take --ranks {there}" if there else "leave out --gpus"
        raise UserError(f"{ranks} ranks want a GPU each and this machine has {there or 'none'}; {fix}")
    with waiting(f"making the video on 1 to {ranks} ranks"):
        kind = "cuda" if gpus else "cpu"
        found = launch(compare_on_rank, (model, asdict(request), ranks, kind), size=ranks)
    findings = worst([[Finding(**one) for one in rank] for rank in found])
    table = Table(box=None, pad_edge=False)
    for title in ("ranks", "split", "VAE", "latents", "frames", ""):
        table.add_column(title, justify="right" if title in ("ranks", "latents", "frames") else "left")
    for one in findings:
        numbers = ("", "", one.refused) if one.refused else (f"{one.latents:.1e}", f"{one.frames:.1e}")
        verdict = () if one.refused else ("same" if one.passed else "DIFFERENT",)
        table.add_row(str(one.ranks), one.split, "strips" if one.vae else "whole", *numbers, *verdict)
    out.print(table)
    tried = [one for one in findings if not one.refused]
    largest = max(one.largest for one in tried)
    if bad := [one for one in tried if not one.passed]:
        raise MachineError(f"{len(bad)} of {len(tried)} splits differ by {LIMIT:g} or more")
    out.print(f"{len(tried)} splits, largest difference {largest:.1e}, below {LIMIT:g}")


def worst(found: list[list[Finding]]) -> list[Finding]:
    """Of each case the finding of the rank that is farthest off."""
    cases: dict[tuple, list[Finding]] = {}
    for one in (finding for rank in found for finding in rank):
        cases.setdefault((one.ranks, one.split, one.vae), []).append(one)
    return [max(cases[case], key=lambda one: one.largest) for case in sorted(cases)]


def compare_on_rank(model: str | None, request: dict[str, Any], most: int, kind: str) -> list[dict[str, Any]]:
    """Every split of 1 to `most` ranks against this rank alone."""
    import torch

    from kairos.distributed.parallel import parallelize
    from kairos.distributed.ranks import join, leave
    from kairos.pipeline import one_after_the_other

    logging.getLogger("kairos").setLevel(logging.ERROR)  # a small size is what was asked for
    torch.backends.cudnn.allow_tf32 = False  # by default a GPU's convolutions round to ten bits
    world = join(kind, {"model": model})
    import_libraries()
    pipeline = presets.load_pipeline(model or presets.DEFAULT, device=world.device, dtype=torch.float32)
    if model is None:
        pipeline.register_modules(transformer=random_transformer(pipeline.transformer).to(world.device))
    pipeline.set_progress_bar_config(disable=True)
    asked = Request(**request)

    def video() -> tuple[Any, Any]:
        made: Any = pipeline(
            asked.prompt,
            height=asked.height,
            width=asked.width,
            num_frames=asked.num_frames,
            num_inference_steps=asked.num_inference_steps,
            guidance_scale=asked.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(asked.seed),
            output_type="latent",
        )
        return made.frames, pipeline._decode(made.frames, "pt", False)

    alone = video()
    findings = []
    for ranks in range(1, most + 1):
        for split in ("context", "cfg") if ranks > 1 else ("context",):
            for strips in (False, True):
                case = {"ranks": ranks, "split": split, "vae": strips}
                try:
                    parallel = parallelize(
                        pipeline.transformer, pipeline.vae, split=split, strips=strips, ranks=range(ranks)
                    )
                except UserError:
                    heads = pipeline.transformer.config.num_attention_heads
                    findings.append(case | {"refused": f"more ranks than heads ({heads})"})
                    continue
                pipeline.branches = parallel.branches or one_after_the_other
                if world.rank < ranks:
                    latents, frames = (
                        (split - whole).abs().max().item()
                        for split, whole in zip(video(), alone, strict=True)
                    )
                    findings.append(case | {"latents": latents, "frames": frames})
                parallel.remove()
                pipeline.branches = one_after_the_other
    leave()
    return findings


def random_transformer(like: Any) -> Any:
    """A small random LinearDiT whose heads do not divide evenly, for the prompts of `like`."""
    import torch

    from kairos.models.transformer import KairosTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = KairosTransformer3DModel(
            hidden_size=HEADS * 12,
            num_attention_heads=HEADS,
            ffn_dim=120,
            num_layers=4,
            gated_delta_head_dim=16,
            text_dim=like.config.text_dim,
            freq_dim=32,
        ).eval()
        with torch.no_grad():  # a new model is silent: its last products are zero
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
