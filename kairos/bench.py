"""Times a model stage by stage, and its LinearDiT against others on the same clip and device.

Everything measured is a `Run`, and each has a process of its own: a process never forgets its peak memory.
Weights are random where a model is not here: that is enough to time, and is said. Protocol: two warm-ups,
then the median and the spread of several runs, device events waited for.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kairos.errors import MachineError, UserError
from kairos.process import keep_freed_memory, peak_gb
from kairos.request import did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TEXT_TOKENS = 512
WARM_UPS = 2

QWEN_7B: dict[str, Any] = {
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
    },
    "tie_word_embeddings": False,
}
"""Qwen2.5-VL-7B by its published configuration: it encodes the prompts of the released models."""

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
        text_tokens: random ones that one forward with random weights looks at; the released models' prompts
            have 512.
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
    text_tokens: int = TEXT_TOKENS


def measure(run: Run) -> dict[str, Any]:
    """The run in a process of its own: {"seconds", "spread_s", "peak_gb", ...}, or its "stages"."""
    command = [sys.executable, "-m", "kairos.bench", json.dumps(asdict(run))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        error = UserError if last.startswith("kairos.errors.UserError: ") else MachineError
        last = last.removeprefix(f"kairos.errors.{error.__name__}: ")
        raise error(f"{run.kind} at {run.latent_frames} latent frames failed: {last}")
    return asdict(run) | json.loads(done.stdout.splitlines()[-1])


def check_kind(kind: str) -> None:
    """Refuse what nothing is timed against, with the nearest that is."""
    known = ["full", *(f"diffusers:{name}" for name in DIFFUSERS)]
    if kind not in known:
        raise UserError(f"nothing is timed against {kind!r}{did_you_mean(kind, known)}")


def measure_here(run: Run) -> dict[str, Any]:
    """The run in this process."""
    import torch

    from kairos.cli.machine import device_and_dtype

    device_and_dtype(run.device, run.dtype)  # the GPU that is named is the current one from here on
    if run.threads:
        torch.set_num_threads(run.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        found = _stages(run) if run.kind == "stages" else _forward(run)
    return found | {"torch": torch.__version__}


def _forward(run: Run) -> dict[str, Any]:
    """One forward of a transformer with random weights."""
    import diffusers
    import torch

    from kairos.models.compiled import compile_blocks

    dtype = getattr(torch, run.dtype)
    foreign = DIFFUSERS.get(run.kind.removeprefix("diffusers:"), {})

    def make() -> nn.Module:
        if foreign:
            return getattr(diffusers, foreign["class"])(**foreign["config"])
        return random_transformer(run.model, full=run.kind == "full")

    model = built(make, run.device, dtype)
    if run.compiled and not foreign:
        compile_blocks(model)
    config, spatial = model.config, foreign.get("spatial", 8)
    size = (1, config.in_channels, run.latent_frames, run.height // spatial, run.width // spatial)
    width = config.caption_channels if "caption_channels" in config else config.text_dim
    inputs = {
        "hidden_states": torch.randn(size, device=run.device, dtype=dtype),
        "timestep": torch.tensor([500.0], device=run.device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, run.text_tokens, width, device=run.device, dtype=dtype),
        "return_dict": False,
    }
    seen = {"window_frames": run.latent_frames} if run.kind == "full" else {}
    flops = None if foreign else forward_flops(dict(config) | seen, run, run.text_tokens)
    parameters = sum(p.numel() for p in model.parameters())
    found = _measured(lambda: model(**inputs), run, dtype, flops)
    return found | {"parameters": parameters, "weights": "random"}


def built(make: Callable[[], nn.Module], device: str | torch.device, dtype: torch.dtype) -> Any:
    """A model with the weights it begins with, made on the device and in its dtype at once, never in float32
    before: memory's peak is measured. The gates of a LinearDiT are float32 all the same."""
    import torch

    from kairos.models.gated_delta_net import PRECISE, GatedDeltaNet

    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = make()
    finally:
        torch.set_default_dtype(usual)
    for layer in model.modules():
        if isinstance(layer, GatedDeltaNet):
            for name, parameter in layer.named_parameters():
                if name.split(".")[0] in PRECISE:
                    parameter.data = parameter.data.float()
    return model.to(dtype).eval()


def forward_flops(config: Mapping[str, Any], run: Run, text_tokens: int) -> float:
    """Operations of one forward of a LinearDiT, the text's keys and values with them, by its configuration.

    No counter looks into Triton's kernels, and torch's formula for FlashAttention knows of no windows.
    """
    from kairos import sizes

    shape = sizes.clip_shape(config, run.height, run.width, 4 * run.latent_frames - 3)
    dim, layers = config["hidden_size"], config["num_layers"]
    text = 2 * text_tokens * dim * (config["text_dim"] + dim + 2 * dim * layers)
    return text + sum(sizes.forward_flops(config, shape, text_tokens).values())


def counted_flops(work: Callable[[], object]) -> int:
    """Operations of a call, counted as it runs. Not of the first one, which may try several routes."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_flop_count

    aten = torch.ops.aten  # torch counts only what runs on CUDA
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape, **options: (
            sdpa_flop_count(q, k, v)
        ),
        aten.mkldnn_convolution: lambda x, weight, *_, out_shape, **options: conv_flop_count(
            x, weight, out_shape
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        work()
    return int(counter.get_total_flops())


def _measured(
    work: Callable[[], object], run: Run, dtype: torch.dtype, flops: float | None = None
) -> dict[str, float]:
    """Seconds, operations, their share of what the device reaches, and peak memory: on a GPU this work's own,
    its first call apart; on a CPU the process's until now. Operations that are not given are counted."""
    import torch

    on_gpu = run.device.startswith("cuda")
    if on_gpu:
        work()
        torch.cuda.reset_peak_memory_stats()
    found = _timed(work, run) | {"peak_gb": _peak_gb(run.device)}
    flops = counted_flops(work) if flops is None else flops
    peak = matmul_flops(run.device, dtype, size=8192 if on_gpu else 2048, clock=run.clock)
    return found | {"tflop": flops / 1e12, "share_of_peak": flops / found["seconds"] / peak}


def _stages(run: Run) -> dict[str, Any]:
    """The parts of a video, apart: the prompt, the first frame, one step of each branch, the frames."""
    import torch

    from kairos.models import vae as video_vae
    from kairos.models.compiled import compile_blocks

    dtype = getattr(torch, run.dtype)
    parts, weights = _parts(run, dtype)
    transformer, vae = parts["transformer"], parts["vae"]
    if run.compiled:
        compile_blocks(transformer)
    size = (1, transformer.config.in_channels, run.latent_frames, run.height // 8, run.width // 8)
    latents = torch.randn(size, device=run.device).to(dtype)
    frame = torch.rand(1, 3, 1, run.height, run.width, device=run.device).to(vae.dtype) * 2 - 1
    embeds, mask = (part.to(run.device) for part in parts["prompt"])
    stages: dict[str, tuple[torch.dtype, Callable[[], object], float | None]] = {
        "encode prompt": (dtype, parts["encode"], None),
        "encode a frame": (vae.dtype, lambda: video_vae.encode(vae, frame), None),
        "one step, one branch": (
            dtype,
            lambda: transformer(
                latents,
                torch.tensor([500.0], device=run.device),
                embeds.to(dtype),
                encoder_attention_mask=mask,
            ),
            forward_flops(transformer.config, run, embeds.shape[1]),
        ),
        "decode frames": (vae.dtype, lambda: video_vae.decode(vae, latents.to(vae.dtype)), None),
    }
    found = {name: _measured(work, run, kind, flops) for name, (kind, work, flops) in stages.items()}
    most = max(stage["peak_gb"] for stage in found.values())
    return {"stages": found, "weights": weights, "peak_gb": most}


def _parts(run: Run, dtype: torch.dtype) -> tuple[dict[str, Any], str]:
    """LinearDiT, VAE, a call that encodes a prompt, and a prompt encoded; and whose weights they have.

    A released model that is not downloaded has random ones, and prompts are random tokens.
    """
    import torch

    from kairos.models.vae_layers import quicken
    from kairos.presets import is_downloaded, load_pipeline, locate

    model = locate(run.model)
    if not model.released or model.folder is not None or is_downloaded(model.released):
        pipeline = load_pipeline(run.model, device=run.device, dtype=dtype)
        count = iter(range(1 << 30))
        parts = {
            "transformer": pipeline.transformer,
            "vae": pipeline.vae,
            "encode": lambda: pipeline.encode_prompt([f"ball {next(count)}"]),  # not from the cache
            "prompt": pipeline.encode_prompt(["a red ball rolls to the right"]),
        }
        return parts, "the model's"
    from diffusers import AutoencoderKLWan
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    transformer = built(lambda: random_transformer(run.model, full=False), run.device, dtype)
    vae = quicken(built(AutoencoderKLWan, run.device, dtype))
    config = Qwen2_5_VLConfig(**QWEN_7B)
    encoder = built(lambda: Qwen2_5_VLForConditionalGeneration(config), run.device, dtype)
    tokens = torch.randint(QWEN_7B["text_config"]["vocab_size"], (1, TEXT_TOKENS), device=run.device)
    parts = {
        "transformer": transformer,
        "vae": vae,
        "encode": lambda: encoder(
            input_ids=tokens, output_hidden_states=True, logits_to_keep=1, use_cache=False
        ),
        "prompt": (torch.randn(1, TEXT_TOKENS, transformer.config.text_dim), torch.ones(1, TEXT_TOKENS)),
    }
    return parts, "random"


PROMPTS = (
    "a red ball rolls to the right",
    "a blue ball falls and bounces",
    "a green ball and a yellow ball collide",
)


def calibrate_step_cache(
    model: str,
    thresholds: Sequence[float],
    *,
    device: str,
    dtype: str,
    threads: int | None = None,
    runs: int = 3,
    clock: str = "wall",
    videos: int = 3,
) -> list[dict[str, Any]]:
    """What a step cache saves and costs at each threshold, against the same videos without it.

    Each video is made with and without it in turn, `runs` times. Returns a row for each threshold:
    "threshold", "speed" (of the sampling: of the medians, 1 without), and of the worst video "error" (of the
    latents, root mean square relative to theirs) and "psnr" (of the frames, dB).
    """
    import torch

    from kairos.cli.machine import device_and_dtype
    from kairos.presets import load_pipeline

    where, kind = device_and_dtype(device, dtype)
    if threads:
        torch.set_num_threads(threads)
    pipeline = load_pipeline(model, device=where, dtype=kind)
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

    for _ in range(WARM_UPS):
        sample(0, None)
    rows = []
    for threshold in thresholds:
        plain_s = cached_s = worst = largest = 0.0
        for number in range(len(encoded)):
            turns = [(sample(number, None), sample(number, threshold)) for _ in range(runs)]
            (latents, _), (cached, _) = turns[0]
            plain_s += statistics.median(took for (_, took), _ in turns)
            cached_s += statistics.median(took for _, (_, took) in turns)
            error = (cached - latents).square().mean() / latents.square().mean()
            worst = max(worst, error.sqrt().item())
            difference = frames_of(cached) - frames_of(latents)
            largest = max(largest, difference.square().mean().item())
        rows.append(
            {
                "model": model,
                "device": device,
                "dtype": dtype,
                "threads": torch.get_num_threads(),
                "steps": int(pipeline.config.defaults["num_inference_steps"]),
                "runs": runs,
                "clock": clock,
                "threshold": threshold,
                "speed": plain_s / cached_s,
                "error": worst,
                "psnr": -10 * math.log10(max(largest, 1e-12)),
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


@cache
def matmul_flops(device: str, dtype: torch.dtype, size: int, clock: str = "wall") -> float:
    """What the device reaches in products of this size and precision, FLOP/s: best of ten, once a process.

    On a GPU those of float32 are in TF32 here, as its convolutions are: nothing is faster than this.
    """
    import torch

    products = torch.backends.cuda.matmul
    own, products.allow_tf32 = products.allow_tf32, True
    best, now = float("inf"), clocks()[clock]
    try:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        for _ in range(10):
            since = now()
            product = a @ b
            if product.is_cuda:
                torch.cuda.synchronize()
            best = min(best, now() - since)
    finally:
        products.allow_tf32 = own
    return 2 * size**3 / best


def processor() -> str:
    """What the system calls this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    said = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(said, "") or platform.processor() or platform.machine()


def random_transformer(name: str, *, full: bool, **changes: Any) -> nn.Module:
    """The LinearDiT of a model by name or folder with random weights, its configuration changed so; `full`:
    with full attention instead."""
    from kairos import sizes
    from kairos.models.transformer import KairosTransformer3DModel
    from kairos.presets import locate

    config = sizes.RELEASED_TRANSFORMER | locate(name).config() | changes
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
    return peak_gb() or math.nan


if __name__ == "__main__":
    keep_freed_memory()
    sys.stdout.write(json.dumps(measure_here(Run(**json.loads(sys.argv[1])))) + "\n")
