"""The released model's parts and others' LinearDiTs on one GPU, in one process, in bfloat16, random weights.

    python benchmarks/gpu.py --output benchmarks/results/gpu-h200.json [--sizes 480p,720p] [--runs 3]
                             [--limit-s 100] [--only TEXT]... [--fla-configs 3]
    python benchmarks/gpu.py --device cpu --tiny --output tiny.json     (tries the script)

First the ceilings (the largest product, a copy), then what is worth most first: a forward of the LinearDiT,
the decoder, the other models at the same clip. The first call of each, which compiles and measures routes, is
timed apart; then one warm-up and the median of `--runs`, by device events. Results are written after each
item, errors with them and their traces in a .log beside; what no longer begins within `--limit-s` is said.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kairos import sizes
from kairos.bench import DIFFUSERS, QWEN_7B, TEXT_TOKENS, built, matmul_flops, processor, random_transformer

Item = tuple[str, Callable[[], dict[str, Any]]]
BEGAN = time.perf_counter()
ITEM_S = 6.0
"""Runs of an item end once they took so long; one there is always."""
CHUNK = 3
"""Latent frames of a chunk in a rollout, four frames of video each."""


@dataclass(frozen=True)
class Clip:
    """81 frames of height x width pixels, and the operations of its parts (performance.md's table)."""

    height: int
    width: int
    latent_frames: int = 21
    tflop: dict[str, float] = field(default_factory=dict)

    def latents(self, channels: int = 16, spatial: int = 8) -> tuple[int, ...]:
        return (1, channels, self.latent_frames, self.height // spatial, self.width // spatial)


CLIPS = {
    "480p": Clip(480, 640, tflop={"step": 226.8, "decode": 212, "encode": 2}),
    "720p": Clip(704, 1280, tflop={"step": 881.1, "decode": 625, "encode": 6}),
}
TINY = {"480p": Clip(32, 32, 3), "720p": Clip(32, 64, 3)}


class Messages(logging.Handler):
    """Keeps what the package says of its routes."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def routes(self) -> list[dict[str, Any]]:
        """What was measured against what: {"operation", "taken", "ms": {route: ms}}."""
        found = []
        for line in self.lines:
            if match := re.fullmatch(r"(.*) on \w+: (\w+) \((.*)\)", line):
                times = (part.removesuffix(" ms").rsplit(" ", 1) for part in match[3].split(", "))
                ms = {route: float(value) for route, value in times}
                found.append({"operation": match[1], "taken": match[2], "ms": ms})
        return found


class Bench:
    """Items one after the other, one model in memory at a time."""

    def __init__(self, options: argparse.Namespace) -> None:
        import kairos.models.transformer  # noqa: F401, the longest of the imports, counted here

        self.options = options
        self.device, self.tiny = options.device, options.tiny
        self.cuda = options.device.startswith("cuda")
        self.dtype = torch.bfloat16
        self.clips = TINY if options.tiny else CLIPS
        self.model_name = "kairos-tiny" if options.tiny else "kairos-4b-480p"
        self.peak_flops: float | None = None
        self.held: tuple[str, Any] = ("", None)
        self.results: dict[str, Any] = {
            "date": date.today().isoformat(),
            "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
            "device": torch.cuda.get_device_name() if self.cuda else processor(),
            "torch": torch.__version__,
            "dtype": "bfloat16",
            "weights": "random",
            "text_tokens": TEXT_TOKENS,
            "imports_s": round(time.perf_counter() - BEGAN, 1),
            "items": {},
            "skipped": [],
        }
        self.messages = Messages()
        logger = logging.getLogger("kairos")
        logger.addHandler(self.messages)
        logger.setLevel(logging.INFO)

    # What an item needs.

    def take(self, name: str, build: Callable[[], Any]) -> Any:
        """The model of this name; any other is freed before it is built."""
        if self.held[0] != name:
            self.free()
            self.held = (name, build())
        return self.held[1]

    def free(self) -> None:
        self.held = ("", None)
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def built(self, make: Callable[[], nn.Module]) -> Any:
        return built(make, self.options.device, self.dtype)

    def kairos(self, **changes: Any) -> Any:
        return self.take(" ".join(["kairos", *changes]), lambda: self._kairos(**changes))

    def _kairos(self, **changes: Any) -> nn.Module:
        model = self.built(lambda: random_transformer(self.model_name, full=False, **changes))
        for parameter in model.parameters():
            if parameter.ndim > 1:  # norms, biases and gates are as they begin
                parameter.normal_(0, 0.02)
        return model

    def vae(self, kind: str = "bfloat16") -> Any:
        return self.take(f"vae {kind}", lambda: self._vae(kind))

    def _vae(self, kind: str) -> nn.Module:
        from diffusers import AutoencoderKLWan

        from kairos.models.vae_layers import channels_last, quicken

        config: dict[str, Any] = {"base_dim": 8, "num_res_blocks": 1} if self.tiny else {}
        vae: Any = quicken(self.built(lambda: AutoencoderKLWan(**config)))
        if kind == "float32":
            vae = vae.float()
        return channels_last(vae) if kind == "channels last" else vae

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype)

    def timed(self, work: Callable[[], object], tflop: float | None = None) -> dict[str, Any]:
        """The first call, a warm-up, then the median of the runs; peak memory of the first and the rest."""
        first = self._once(work)
        peak_first = self._peak()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        warm = self._once(work)
        times = [warm] if warm > ITEM_S else []
        while not times or (len(times) < self.options.runs and sum(times) < ITEM_S):
            times.append(self._once(work))
        seconds = statistics.median(times)
        found = {
            "seconds": seconds,
            "spread_s": max(times) - min(times),
            "runs": len(times),
            "first_call_s": first,
            "first_call_peak_gb": peak_first,
            "peak_gb": self._peak(),
        }
        if tflop:
            found |= {"tflop": tflop, "tflop_per_s": tflop / seconds}
            if self.peak_flops:
                floor = tflop * 1e12 / self.peak_flops
                found |= {"floor_s": floor, "share_of_matmul_peak": floor / seconds}
        return found

    def _once(self, work: Callable[[], object]) -> float:
        if not self.cuda:
            since = time.perf_counter()
            work()
            return time.perf_counter() - since
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    def _peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0

    # The order of things.

    def run(self, items: list[Item]) -> None:
        names = [name for name, _ in items]
        chosen = {"ceilings", *(names if not self.options.only else ())}
        for text in self.options.only:
            chosen |= (found := {text} if text in names else {name for name in names if text in name})
            if not found:
                sys.exit(f"no item has {text!r} in its name; there are: {'; '.join(names)}")
        for name, work in items:
            if name not in chosen:
                continue
            if time.perf_counter() - BEGAN > self.options.limit_s:
                self.results["skipped"].append(name)
                self.save()
                continue
            self.messages.lines.clear()
            if self.cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            since = time.perf_counter()
            try:
                found = work()
            except Exception as error:
                lines = (str(error).splitlines() or [""])[0]
                found = {"error": f"{type(error).__name__}: {lines}"}
                self.log(f"{name}\n{traceback.format_exc()}")
                del error
                self.free()
            found |= {"item_s": time.perf_counter() - since}
            if routes := self.messages.routes():
                found["routes"] = routes
            if self.messages.lines:
                found["log"] = list(self.messages.lines)
            self.results["items"][name] = found
            self.save()
            said = found.get("error") or {
                key: found[key] for key in ("seconds", "first_call_s") if key in found
            }
            sys.stderr.write(f"{time.perf_counter() - BEGAN:6.1f} s  {name}: {said}\n")
            sys.stderr.flush()

    def save(self) -> None:
        self.results["total_s"] = round(time.perf_counter() - BEGAN, 1)
        target = Path(self.options.output)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(rounded(self.results), indent=1) + "\n", encoding="utf-8")

    def log(self, text: str) -> None:
        with Path(self.options.output).with_suffix(".log").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    # The items.

    def ceilings(self) -> dict[str, Any]:
        size = 256 if self.tiny else 8192
        self.peak_flops = matmul_flops(self.device, self.dtype, size=size)
        source = torch.empty(1 << 20 if self.tiny else 1 << 32, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        seconds = min(self._once(lambda: target.copy_(source)) for _ in range(5))
        return {
            "matmul": f"{size}^3",
            "matmul_tflop_per_s": self.peak_flops / 1e12,
            "copy_gb_per_s": 2 * source.numel() / seconds / 1e9,
        }

    def step_inputs(self, clip: Clip) -> tuple[Tensor, Tensor, Tensor]:
        config = self.kairos().config
        return (
            self.randn(*clip.latents(config.in_channels)),
            torch.tensor([500.0], device=self.device),
            self.randn(1, TEXT_TOKENS, config.text_dim),
        )

    def velocity(self, clip: Clip) -> Callable[[], Tensor]:
        """A step's one forward."""
        model, inputs = self.kairos(), self.step_inputs(clip)
        mask = torch.ones(1, TEXT_TOKENS, dtype=torch.bool, device=self.device)  # as the pipeline gives it
        return lambda: model(*inputs, encoder_attention_mask=mask).sample

    def step(self, clip: Clip) -> dict[str, Any]:
        model, velocity = self.kairos(), self.velocity(clip)
        tokens = sizes.clip_shape(model.config, clip.height, clip.width, 4 * clip.latent_frames - 3).tokens
        about = {
            "tokens": tokens,
            "parameters": sum(p.numel() for p in model.parameters()),
            "weights_gb": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9,
        }
        made: dict[str, Tensor] = {}
        found = self.timed(lambda: made.update(velocity=velocity()), clip.tflop.get("step"))
        return about | found | {"finite": bool(torch.isfinite(made["velocity"]).all())}

    def four_steps(self, clip: Clip) -> dict[str, Any]:
        """As a distilled model samples: four steps, the prompt's keys and values computed at the first."""
        from kairos.models.transformer import PromptMemory
        from kairos.schedulers.few_step import FewStepScheduler

        model, (latents, _, prompt) = self.kairos(), self.step_inputs(clip)
        mask = torch.ones(1, TEXT_TOKENS, dtype=torch.bool, device=self.device)
        scheduler = FewStepScheduler()

        def sample() -> Tensor:
            x, memory = latents, PromptMemory()
            scheduler.set_timesteps(device=self.device)
            for now in scheduler.timesteps:
                velocity = model(
                    x, now.reshape(1), prompt, encoder_attention_mask=mask, prompt_memory=memory
                ).sample
                x = scheduler.step(velocity, now, x, generator=torch.Generator().manual_seed(0)).prev_sample
                x = x.to(latents.dtype)
            return x

        tflop = clip.tflop.get("step")
        return self.timed(sample, tflop and 4 * tflop)

    def compiled(self, clip: Clip) -> dict[str, Any]:
        """A step as `--compile` makes it. Routes and fla's kernels are measured before, by a plain step, so
        that the first call is the compiler's; its velocity is compared with the plain one's."""
        from kairos.models.compiled import compile_blocks

        model, velocity = self.kairos(), self.velocity(clip)
        self.held = ("kairos compiled", model)  # no plain one for later items
        plain = velocity().float()
        compile_blocks(model)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        found = self.timed(velocity, clip.tflop.get("step"))
        difference = (velocity().float() - plain).norm() / plain.norm()
        return found | {
            "relative_difference": difference.item(),
            "kernels_ms": self._kernels_ms(velocity),
        }

    def streaming(self, clip: Clip) -> dict[str, Any]:
        """A chunk of a rollout whose windows are full: four steps, then once clean to keep what it leaves.

        The released models look into the future and cannot do this; it is one of their shape made causal.
        """
        from kairos.schedulers.few_step import FewStepScheduler
        from kairos.streaming.rollout import denoise_chunk, run
        from kairos.streaming.state import RolloutSettings, WorldState

        model = self.kairos(causal="chunk", pad_dilated=False)
        latents, _, embeds = self.step_inputs(clip)
        size = (int(latents.shape[3]), int(latents.shape[4]))
        generator = torch.Generator().manual_seed(0)
        defaults = SimpleNamespace(defaults={"num_frames": 4 * clip.latent_frames - 3})
        pipeline: Any = SimpleNamespace(transformer=model, scheduler=FewStepScheduler(), config=defaults)
        world = WorldState(
            model="",
            settings=RolloutSettings(CHUNK, 4, 1.0),
            latent_size=size,
            prompt=(embeds, torch.ones(1, TEXT_TOKENS, dtype=torch.bool, device=self.device)),
            generators=generator.get_state()[None],
        )

        def keep(latents: Tensor) -> None:
            nonlocal world
            _, after = run(pipeline, world, latents, torch.zeros(()))
            world = replace(world, transformer=after.map(Tensor.clone))

        past = model.config.window_frames * model.config.dilation
        keep(self.randn(1, model.config.in_channels, past, *size))
        found = self.timed(lambda: keep(denoise_chunk(pipeline, world, [generator])))
        return found | {
            "model": f"{self.model_name}'s shape, chunk-causal",
            "frames": 4 * CHUNK,
            "frames_per_second": 4 * CHUNK / found["seconds"],
            "passes": 5,
            "past_latent_frames": past,
            "state_gb": world.nbytes / 1e9,
        }

    def streaming_decode(self, clip: Clip) -> dict[str, Any]:
        """The frames of a chunk, from what the decoder kept of those before."""
        from kairos.streaming.decoder import StreamingVAEDecoder

        decoder = StreamingVAEDecoder(self.vae("channels last"))
        shape = list(clip.latents())
        shape[2] = CHUNK
        latents = self.randn(*shape)
        decoder.decode(latents)
        found = self.timed(lambda: decoder.decode(latents))
        return found | {"frames": 4 * CHUNK, "frames_per_second": 4 * CHUNK / found["seconds"]}

    def _kernels_ms(self, work: Callable[[], object]) -> list[list[Any]]:
        """The 25 kernels that take longest: name, calls, milliseconds of all of them."""
        from torch.profiler import ProfilerActivity, profile

        activity = ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU
        with profile(activities=[activity]) as profiler:
            work()
            if self.cuda:
                torch.cuda.synchronize()
        which = "self_device_time_total" if self.cuda else "self_cpu_time_total"
        rows = sorted(profiler.key_averages(), key=lambda row: -getattr(row, which))[:25]
        return [[row.key[:120], row.count, getattr(row, which) / 1e3] for row in rows]

    def kernels(self, clip: Clip) -> dict[str, Any]:
        """Where a step's time goes, kernel by kernel; the mixing of each kind of block beside it."""
        model, velocity = self.kairos(), self.velocity(clip)
        velocity()
        kernels_ms = self._kernels_ms(velocity)
        by_kind: dict[str, float] = {}
        hooks = []
        events: list[tuple[str, list[Any]]] = []

        def before(module: Any, *_: Any) -> None:
            events.append((module.kind, [torch.cuda.Event(enable_timing=True) for _ in range(2)]))
            events[-1][1][0].record()

        def after(*_: Any) -> None:
            events[-1][1][1].record()

        if self.cuda:
            for block in model.blocks:
                hooks += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
            velocity()
            torch.cuda.synchronize()
            for hook in hooks:
                hook.remove()
            for kind, (begin, end) in events:
                by_kind[kind] = by_kind.get(kind, 0) + begin.elapsed_time(end)
        return {"blocks_ms": by_kind, "kernels_ms": kernels_ms}

    def decode(self, clip: Clip, kind: str = "bfloat16") -> dict[str, Any]:
        """All frames. In float32 its convolutions are made in TF32, as torch's default is."""
        from kairos.models import vae as video_vae

        vae = self.vae(kind)
        latents = self.randn(*clip.latents(), dtype=vae.dtype)
        return self.timed(lambda: video_vae.decode(vae, latents), clip.tflop.get("decode"))

    def encode(self, clip: Clip) -> dict[str, Any]:
        from kairos.models import vae as video_vae

        vae = self.vae()
        frame = self.randn(1, 3, 1, clip.height, clip.width).clamp(-1, 1)
        return self.timed(lambda: video_vae.encode(vae, frame), clip.tflop.get("encode"))

    def prompt(self) -> dict[str, Any]:
        """512 tokens through Qwen2.5-VL-7B, as kairos.conditioning.encoder asks for them."""
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        config = Qwen2_5_VLConfig(**QWEN_7B)
        encoder = self.take("encoder", lambda: self.built(lambda: Qwen2_5_VLForConditionalGeneration(config)))
        ids = torch.randint(1000, 100_000, (1, TEXT_TOKENS), device=self.device)
        return self.timed(
            lambda: encoder(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                output_hidden_states=True,
                logits_to_keep=1,
                use_cache=False,
            ),
            2 * TEXT_TOKENS * 6.53e9 / 1e12,  # the blocks' weights, not the words'
        )

    def other(self, name: str, clip: Clip) -> dict[str, Any]:
        """One forward of a video transformer of diffusers, as published."""
        import diffusers

        entry = DIFFUSERS[name]
        config = dict(entry["config"])
        if self.tiny:
            config |= {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 2}
        make = getattr(diffusers, entry["class"])
        model = self.take(name, lambda: self.built(lambda: make(**config)))
        shape = clip.latents(model.config.in_channels, entry.get("spatial", 8))
        inputs = {
            "hidden_states": self.randn(*shape),
            "timestep": torch.tensor([500.0], device=self.device),
            "encoder_hidden_states": self.randn(1, TEXT_TOKENS, model.config.text_dim),
            "return_dict": False,
        }
        tokens = shape[2] * (shape[3] // 2) * (shape[4] // 2)
        found = self.timed(lambda: model(**inputs), wan_tflop(model.config, tokens))
        return {"tokens": tokens, "parameters": sum(p.numel() for p in model.parameters())} | found


def wan_tflop(config: Any, tokens: int) -> float:
    """Of one forward of a Wan transformer: projections, attention to all tokens and to the prompt, ffn."""
    dim = config.num_attention_heads * config.attention_head_dim
    products = tokens * (6 * dim * dim + 2 * dim * config.ffn_dim) + 2 * TEXT_TOKENS * dim * dim
    attention = 2 * tokens * (tokens + TEXT_TOKENS) * dim
    return 2 * config.num_layers * (products + attention) / 1e12


def rounded(value: Any) -> Any:
    """Numbers with four digits that count."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def items_of(bench: Bench, names: list[str]) -> list[Item]:
    """What is done, the most valuable first."""
    early: list[Item] = [("ceilings", bench.ceilings)]
    late: list[Item] = []
    for name in names:
        clip = bench.clips[name]
        others: list[Item] = [
            (f"{name}, {other}", partial(bench.other, other, clip)) for other in ("Wan2.1-1.3B", "Wan2.2-5B")
        ]
        early.append((f"{name}, one step", partial(bench.step, clip)))
        four: Item = (f"{name}, four steps", partial(bench.four_steps, clip))
        kernels: Item = (f"{name}, kernels of a step", partial(bench.kernels, clip))
        decode: Item = (f"{name}, decode", partial(bench.decode, clip))
        last: Item = (f"{name}, decode, channels last", partial(bench.decode, clip, "channels last"))
        if name == names[0]:  # beside what needs the same model, so that nothing is built twice
            early += [four, kernels, decode, last, *others]
            late += [
                (f"{name}, streaming", partial(bench.streaming, clip)),
                (f"{name}, streaming, decode", partial(bench.streaming_decode, clip)),
                (f"{name}, one step, compiled", partial(bench.compiled, clip)),
            ]
        else:
            early.append(decode)
            late += [last, four, kernels, *others]
        late.insert(0, (f"{name}, encode a frame", partial(bench.encode, clip)))
    first = bench.clips[names[0]]
    middle: list[Item] = [(f"{names[0]}, decode, float32", partial(bench.decode, first, "float32"))]
    if not bench.tiny:  # there is no small one of the encoder
        middle.insert(0, ("encode a prompt", bench.prompt))
    return [*early, *middle, *late]


def table(results: dict[str, Any]) -> str:
    """A line for each item."""
    lines = [f"{'':38} {'seconds':>9} {'first':>8} {'peak GB':>8} {'of matmul':>9}"]
    for name, item in results["items"].items():
        if "error" in item:
            lines.append(f"{name:38} {item['error'][:100]}")
        elif "seconds" in item:
            share = item.get("share_of_matmul_peak")
            lines.append(
                f"{name:38} {item['seconds']:9.4g} {item['first_call_s']:8.3g} {item['peak_gb']:8.3g} "
                f"{'' if share is None else format(share, '9.0%')}"
            )
        elif name == "ceilings":
            lines.append(
                f"{name:38} {item['matmul_tflop_per_s']:.4g} TFLOP/s, {item['copy_gb_per_s']:.4g} GB/s"
            )
        for route in item.get("routes", []):
            lines.append(f"    {route['operation'][:60]}: {route['taken']} of {route['ms']} ms")
    if results["skipped"]:
        lines.append(f"skipped for want of time: {'; '.join(results['skipped'])}")
    return "\n".join(lines) + "\n"


def limit_tuning(most: int) -> None:
    """Let Triton try so many configurations of each kernel; compiling all of fla's takes minutes."""
    from triton.runtime.autotuner import Autotuner

    begin = Autotuner.__init__

    def __init__(self: Any, fn: Any, arg_names: Any, configs: list[Any], *args: Any, **options: Any) -> None:
        step = max(1, (len(configs) - 1) // max(most - 1, 1))
        begin(self, fn, arg_names, configs[::step][:most], *args, **options)

    Autotuner.__init__ = __init__  # fla has a tuner of its own, made of this one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON of the results; a .log of errors beside it")
    parser.add_argument("--sizes", default="480p,720p", help=f"of {', '.join(CLIPS)}, the first in full")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=100.0, help="no item begins later; from the start")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="the item of this name, or those with this in it, and the ceilings; may be repeated",
    )
    parser.add_argument("--fla-configs", type=int, help="configurations tried of each of fla's kernels")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and clips, to try the script")
    options = parser.parse_args()
    names = options.sizes.split(",")
    if unknown := set(names) - set(CLIPS):
        parser.error(f"unknown size {', '.join(sorted(unknown))}; choose from {', '.join(CLIPS)}")
    os.environ.setdefault("FLA_CACHE_RESULTS", "0")  # kernels tuned for these sizes, not for the tests'
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.fla_configs:
        limit_tuning(options.fla_configs)
    torch.manual_seed(0)
    bench = Bench(options)
    with torch.no_grad():
        bench.run(items_of(bench, names))
    bench.save()
    sys.stdout.write(table(rounded(bench.results)))


if __name__ == "__main__":
    main()
