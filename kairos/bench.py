"""Times a model stage by stage, and its LinearDiT against others on the same clip and device.

Everything measured is a `Run`, and each has a process of its own: a process never forgets its peak memory.
Weights are random where a model is not here: that is enough to time, and is said. Protocol: two warm-ups,
then the median and the spread of several runs, device events waited for.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kairos.errors import UserError
from kairos.heap import keep_freed_memory
from kairos.request import did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TEXT_TOKENS = 512
WARM_UPS = 2

DIFFUSERS: dict[str, dict[str, Any]] = {
    "Wan2.1-1.3B": {
        "class": "WanTransformer3DModel",
        "config": {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
    },
    "Wan2.2-5B": {
        "class": "WanTransformer3DModel",
        "config": {
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "ffn_dim": 14336,
            "num_layers": 30,
            "in_channels": 48,
            "out_channels": 48,
        },
        "spatial": 16,
    },
    "SANA-Video": {"class": "SanaVideoTransformer3DModel", "config": {}},
}
"""Video transformers of diffusers by their published configurations; `spatial` is pixels a latent."""


@dataclass(frozen=True)
class Run:
    """One measurement.

    Attributes:
        kind: "stages" for the whole model, "hybrid" for its LinearDiT, "full" for the same with full
            attention in every block, or "diffusers:NAME".
        latent_frames: of the clip; height and width are in pixels.
        clock: "wall", or "cpu" for processor time, which other work on the machine does not touch.
        compiled: whether the LinearDiT's blocks are compiled first, which the warm-ups take.
    """

    kind: str
    model: str
    latent_frames: int
    height: int
    width: int
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    runs: int = 7
    clock: str = "wall"
    compiled: bool = False


def measure(run: Run) -> dict[str, Any]:
    """The run in a process of its own: {"seconds", "spread_s", "peak_gb", ...}, or its "stages"."""
    command = [sys.executable, "-m", "kairos.bench", json.dumps(asdict(run))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{run.kind} at {run.latent_frames} latent frames failed: {last}")
    return asdict(run) | json.loads(done.stdout.splitlines()[-1])


def check_kind(kind: str) -> None:
    """Refuse what nothing is timed against, with the nearest that is."""
    known = ["full", *(f"diffusers:{name}" for name in DIFFUSERS)]
    if kind not in known:
        raise UserError(f"--against takes {', '.join(known)}, got {kind!r}{did_you_mean(kind, known)}")


def measure_here(run: Run) -> dict[str, Any]:
    """The run in this process."""
    import torch

    if run.threads:
        torch.set_num_threads(run.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        found = _stages(run) if run.kind == "stages" else _forward(run)
    return found | {"peak_gb": _peak_gb(run.device), "torch": torch.__version__}


def _forward(run: Run) -> dict[str, Any]:
    """One forward of a transformer with random weights, its operations counted."""
    import diffusers
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    from kairos.models.compiled import compile_blocks

    dtype = getattr(torch, run.dtype)
    foreign = DIFFUSERS.get(run.kind.removeprefix("diffusers:"), {})
    with torch.device(run.device):
        if foreign:
            model = getattr(diffusers, foreign["class"])(**foreign["config"])
        else:
            model = random_transformer(run.model, full=run.kind == "full")
    model = model.to(dtype).eval()
    if run.compiled and not foreign:
        compile_blocks(model)
    config, spatial = model.config, foreign.get("spatial", 8)
    size = (1, config.in_channels, run.latent_frames, run.height // spatial, run.width // spatial)
    width = config.caption_channels if "caption_channels" in config else config.text_dim
    inputs = {
        "hidden_states": torch.randn(size, device=run.device, dtype=dtype),
        "timestep": torch.tensor([500.0], device=run.device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, width, device=run.device, dtype=dtype),
        "return_dict": False,
    }
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch counts only those of CUDA
    formulas = {attention: lambda q, k, v, *_, out_shape, **options: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(**inputs)
    found = _timed(lambda: model(**inputs), run)
    flops = counter.get_total_flops()
    peak = matmul_flops(run.device, dtype, clock=run.clock)
    return found | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tflop": flops / 1e12,
        "share_of_peak": flops / found["seconds"] / peak,
        "weights": "random",
    }


def _stages(run: Run) -> dict[str, Any]:
    """The parts of a video, apart: the prompt, the first frame, one step of each branch, the frames."""
    import torch

    from kairos.models import vae as video_vae
    from kairos.presets import load_pipeline

    dtype = getattr(torch, run.dtype)
    pipeline = load_pipeline(run.model, device=run.device, dtype=dtype)
    config = pipeline.transformer.config
    latents = torch.randn(
        1, config.in_channels, run.latent_frames, run.height // 8, run.width // 8, device=run.device
    ).to(dtype)
    frame = torch.rand(1, 3, 1, run.height, run.width, device=run.device).to(pipeline.vae.dtype) * 2 - 1
    embeds, mask = pipeline.encode_prompt(["a red ball rolls to the right"])
    count = iter(range(1 << 30))
    parts: dict[str, Callable[[], object]] = {
        "encode prompt": lambda: pipeline.encode_prompt([f"ball {next(count)}"]),  # not from the cache
        "encode a frame": lambda: video_vae.encode(pipeline.vae, frame),
        "one step, one branch": lambda: pipeline.transformer(
            latents,
            torch.tensor([500.0], device=run.device),
            embeds.to(run.device, dtype),
            encoder_attention_mask=mask.to(run.device),
        ),
        "decode frames": lambda: video_vae.decode(pipeline.vae, latents.to(pipeline.vae.dtype)),
    }
    return {"stages": {name: _timed(part, run) for name, part in parts.items()}, "weights": "the model's"}


PROMPTS = (
    "a red ball rolls to the right",
    "a blue ball falls and bounces",
    "a green ball and a yellow ball collide",
)


def calibrate_step_cache(
    model: str, thresholds: Sequence[float], *, device: str, dtype: str, clock: str = "wall", videos: int = 3
) -> list[dict[str, float]]:
    """What a step cache saves and costs at each threshold, against the same videos without it.

    Returns a row for each threshold: "threshold", "speed" (of the sampling, 1 without), and of the worst
    video "error" (of the latents, root mean square relative to theirs) and "psnr" (of the frames, dB).
    """
    import torch

    from kairos.presets import load_pipeline

    pipeline = load_pipeline(model, device=device, dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    nothing = pipeline.encode_prompt([""])
    encoded = [(pipeline.encode_prompt([prompt]), nothing) for prompt in PROMPTS[:videos]]
    now = clocks()[clock]
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def sample(number: int, threshold: float | None) -> tuple[Tensor, float]:
        positive, negative = encoded[number]
        wait()
        since = now()
        made: Any = pipeline(
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            generator=torch.Generator().manual_seed(number),
            step_cache=threshold,
            output_type="latent",
        )
        wait()
        return made.frames, now() - since

    @torch.no_grad()
    def frames_of(latents: Tensor) -> Tensor:
        return torch.as_tensor(pipeline._decode(latents, "np", False))

    sample(0, None)  # a warm-up
    plain = [sample(number, None) for number in range(len(encoded))]
    expected = [frames_of(latents) for latents, _ in plain]
    rows = []
    for threshold in thresholds:
        made = [sample(number, threshold) for number in range(len(encoded))]
        pairs = list(zip(made, plain, strict=True))
        errors = [((a - b).square().mean() / b.square().mean()).sqrt().item() for (a, _), (b, _) in pairs]
        squares = [
            (frames_of(latents) - frames).square().mean().item()
            for (latents, _), frames in zip(made, expected, strict=True)
        ]
        rows.append(
            {
                "threshold": threshold,
                "speed": sum(took for _, took in plain) / sum(took for _, took in made),
                "error": max(errors),
                "psnr": -10 * math.log10(max(max(squares), 1e-12)),
            }
        )
    return rows


def _timed(work: Callable[[], object], run: Run) -> dict[str, float]:
    """Median and spread in seconds, after the warm-ups."""
    import torch

    wait = torch.cuda.synchronize if run.device.startswith("cuda") else lambda: None
    now = clocks()[run.clock]
    times = []
    for _ in range(WARM_UPS + run.runs):
        wait()
        since = now()
        work()
        wait()
        times.append(now() - since)
    times = times[WARM_UPS:]
    return {"seconds": statistics.median(times), "spread_s": max(times) - min(times)}


def clocks() -> dict[str, Callable[[], float]]:
    """Clocks by name, in seconds."""
    return {"wall": time.perf_counter, "cpu": time.process_time}


def matmul_flops(device: str, dtype: torch.dtype, size: int = 2048, clock: str = "wall") -> float:
    """What the device reaches in large products of this precision, in FLOP/s: the best of ten."""
    import torch

    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = float("inf")
    now = clocks()[clock]
    for _ in range(10):
        since = now()
        product = a @ b
        if product.is_cuda:
            torch.cuda.synchronize()
        best = min(best, now() - since)
    return 2 * size**3 / best


def random_transformer(name: str, *, full: bool) -> nn.Module:
    """The LinearDiT of a model by name or folder with random weights; `full`: with full attention instead."""
    from kairos import sizes
    from kairos.models.transformer import KairosTransformer3DModel
    from kairos.presets import locate, read_json

    preset, folder = locate(name)
    config = sizes.RELEASED_TRANSFORMER | dict(preset.transformer_config if preset else {})
    if folder is not None and (folder / "transformer" / "config.json").exists():
        config |= read_json(folder / "transformer" / "config.json")
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    if not full:
        return KairosTransformer3DModel(**config)
    model = KairosTransformer3DModel(**config | {"layer_pattern": "S"})
    for block in model.blocks:
        attention: Any = block.self_attn
        attention.mix = _full_attention
    return model


def _full_attention(q: Tensor, k: Tensor, v: Tensor, *unused: Any) -> tuple[Tensor, None]:
    """In place of WindowedSelfAttention.mix: every token looks at every other, no mask."""
    from kairos.ops.attention import attend

    out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None)
    return out.transpose(1, 2), None


def _peak_gb(device: str) -> float:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


if __name__ == "__main__":
    keep_freed_memory()
    sys.stdout.write(json.dumps(measure_here(Run(**json.loads(sys.argv[1])))) + "\n")
