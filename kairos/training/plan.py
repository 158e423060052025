"""What a stage needs, before anything is started: parameters, memory by part, the time of a step.

Estimates. Weights, gradients and what the optimizer keeps are exact; activations come from what one block
keeps for its way back (in the VAE's decoder 80 + 52 bytes a residual block, of each pixel and channel of
`base_dim`: counted with hooks), and the time from the machine's speed at matrix products.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kairos import presets, sizes
from kairos.errors import MachineError
from kairos.memory import VAE_FLOP
from kairos.training.batches import LONGEST_CHUNK
from kairos.training.loop import build_optimizer
from kairos.training.materials import UNSHAPED, base_config, is_weights, weights_at
from kairos.training.parallel import Processes
from kairos.training.precision import has_bfloat16
from kairos.training.stage import Distillation, Stage
from kairos.weights import infer_transformer_config, open_weights
from kairos.weights.files import written_config
from kairos.weights.transformer import empty_transformer, transformer_config

if TYPE_CHECKING:
    from kairos.training.recipe import Recipe

EFFICIENCY = 0.4
"""Share of a machine's speed at large matrix products that training reaches."""
FLOAT32 = 1 / 15
"""Of a GPU's peak in bfloat16, that in float32 (H100: 67 of 989.4 TFLOP/s, NVIDIA's data sheet)."""
ROOM = 0.95
"""Share of the memory that a plan may fill."""


@dataclass(frozen=True)
class StagePlan:
    """Of one process; memory in GB."""

    stage: Stage
    parameters: int
    trained: int
    memory_gb: dict[str, float]
    tokens: int
    """Of the largest batch, over all processes."""
    clips: float
    """Of the bucket with the most activations, that a process has at once: one cannot be cut."""
    flops: float
    """Of one step with that batch, over all processes."""

    @property
    def total_gb(self) -> float:
        return sum(self.memory_gb.values())


def plan_stage(recipe: Recipe, stage: Stage, world: int = 1, device: str = "") -> StagePlan:
    """Count what the stage needs on each of `world` processes; their device is a "cuda" or a "cpu", this
    machine's where it is not said."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = stage_config(recipe, stage)
    parameters = sizes.transformer_parameters(config)
    trained, by_muon = trained_parameters(config, stage, parameters)
    gb = 1e9 * world
    memory = {
        "weights": 4 * parameters / gb,
        "gradients": 4 * trained / gb,
        "optimizer": (8 * trained - 4 * by_muon) / gb,
        "moving average": 4 * trained / gb,
    }
    teacher = stage.distillation.teacher if stage.distillation is not None else ""
    taught_by = config_at(recipe, teacher, teaches=True) if teacher else config
    if stage.objective == "distillation":
        taught = sizes.transformer_parameters(taught_by)
        memory["teacher"] = 4 * taught / gb
        memory["fake score"] = 16 * taught / gb
    if stage.objective == "preference":
        memory["reference"] = 4 * parameters / gb
    options = stage.distillation or Distillation()
    tokens, activations, clips = 0, 0.0, 1.0
    for bucket in stage.buckets:
        shape = sizes.clip_shape(config, bucket.height, bucket.width, bucket.frames)
        together = 2 if stage.objective == "preference" else 1  # of a pair one clip is not computed alone
        batch = stage.batch_of(bucket) * together
        learned = shape.tokens
        if stage.only_unrolls(bucket):  # what is behind the past, which is read without a gradient
            latents = (bucket.frames - 1) // 4 + 1
            learned = learned * min(options.unrolled * LONGEST_CHUNK, latents) // latents
        part = max(batch / (stage.accumulate * world), together) * learned
        tokens = max(tokens, batch * shape.tokens)
        kept = activation_bytes(config, part, stage, device)
        learns = stage.objective == "distillation" and (options.matching or options.adversarial)
        if learns and not stage.only_unrolls(bucket):
            kept = max(kept, fake_score_bytes(taught_by, part, stage, device))
        if kept > activations:
            activations, clips = kept, batch / (together * stage.accumulate * world)
    memory["activations"] = activations / 1e9
    updates, critic = options.fake_score_updates, 1 if options.adversarial else 0
    distilling = 14.5 + 5.5 * updates + critic * (3 + 9 * updates)
    passes = {"flow": 3.0, "preference": 4.0, "distillation": distilling}
    flops = 2 * parameters * tokens * (passes[stage.objective] + stage.checkpointing)
    if options.frames:
        base, blocks = decoder_size(recipe)
        parts = world * stage.accumulate
        pixels = max(
            min(options.frame_clips, max(stage.batch_of(bucket) // parts, 1))
            * (bucket.frames * bucket.height * bucket.width)
            for bucket in stage.buckets
            if bucket.frames > 5 and not stage.only_unrolls(bucket)
        )
        memory["decoder"] = pixels * base * (80 + 52 * blocks) / 1e9
        flops += 2 * parts * pixels * VAE_FLOP["decode"] * (base / 96) ** 2 * (1 + blocks) / 3
    return StagePlan(stage, parameters, trained, memory, tokens, clips, flops)


def model_config(recipe: Recipe) -> dict[str, Any]:
    """The configuration of a LinearDiT that begins with random weights."""
    return sizes.RELEASED_TRANSFORMER | base_config(recipe) | recipe.model


def stage_config(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """The configuration of the LinearDiT that a stage trains; of weights no more than headers are read."""
    return config_at(recipe, stage.name)


def config_at(recipe: Recipe, source: str, *, teaches: bool = False) -> dict[str, Any]:
    """The configuration of what `load_start` would load."""
    named = {one.name: one for one in recipe.stages}
    own = {} if teaches else recipe.model
    if source in named:  # what it started from may be gone by now
        file = weights_at(recipe, source) / "config.json"
        if file.exists():
            return written_config(file)[1] | own
        return config_at(recipe, recipe.start_of(named[source]))
    if source in ("", "random"):
        return model_config(recipe)
    if not is_weights(source):
        return sizes.RELEASED_TRANSFORMER | presets.locate(source).config() | own
    path = weights_at(recipe, source)
    stored, otherwise = open_weights(path), base_config(recipe) | recipe.model
    unshaped = {key: otherwise[key] for key in UNSHAPED if key in otherwise}
    known = unshaped | transformer_config(path, stored) | own
    return infer_transformer_config(stored, source=source, **known) | known


def decoder_size(recipe: Recipe) -> tuple[int, int]:
    """`base_dim` and `num_res_blocks` of the VAE whose decoder shows a student its frames."""
    if recipe.vae and not recipe.base:
        return 16, 1
    config = presets.locate(recipe.base).config("vae") if recipe.base else {}
    return int(config.get("base_dim", 96)), int(config.get("num_res_blocks", 2))


def trained_parameters(config: Mapping[str, Any], stage: Stage, parameters: int) -> tuple[int, int]:
    """How many numbers change: all, those of LoRA, or those of the named parts; and how many of them Muon
    changes, which keeps one number of each where AdamW keeps two."""
    if stage.lora is None and not stage.train and stage.muon_lr is None:
        return parameters, 0
    model = empty_transformer(config, f"stage {stage.name}")
    if stage.lora is None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not stage.train or any(part in name for part in stage.train))
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        groups = build_optimizer(model, stage).param_groups if stage.muon_lr is not None else []
        return count, sum(p.numel() for group in groups if group["muon"] for p in group["params"])
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(tuple(f".{t}" for t in stage.lora.targets)):
            count += stage.lora.rank * (module.in_features + module.out_features)
    return count, count if stage.muon_lr is not None else 0


def activation_bytes(config: Mapping[str, Any], tokens: float, stage: Stage, device: str = "cpu") -> float:
    """What is kept for the way back: of every block, or with checkpointing its input and one block's all."""
    dim, ffn = config["hidden_size"], config["ffn_dim"]
    number = 2 if stage.precision == "bfloat16" and has_bfloat16(device) else 4
    block = tokens * number * (26 * dim + 3 * ffn)
    if stage.checkpointing:
        return config["num_layers"] * tokens * 4 * dim + block
    return config["num_layers"] * block


def fake_score_bytes(config: Mapping[str, Any], tokens: float, stage: Stage, device: str) -> float:
    """`activation_bytes` of the fake score. Of the critic's three verdicts, which it goes back through at
    once, two hold the blocks up to the middle alone."""
    kept = activation_bytes(config, tokens, stage, device)
    if stage.distillation is None or not stage.distillation.adversarial:
        return kept
    layers = config["num_layers"]
    return kept * (1 + 2 * (layers // 2 + 1) / layers)


def check_memory(recipe: Recipe, stage: Stage, here: Processes) -> None:
    """Raise MachineError where the stage cannot fit."""
    plan = plan_stage(recipe, stage, here.world, here.device.type)
    refuse_too_large(plan, available_gb(here.device))


def refuse_too_large(plan: StagePlan, memory_gb: float) -> None:
    """Raise MachineError where the stage needs more; it says what would make it less."""
    if plan.total_gb <= ROOM * memory_gb:
        return
    largest = max(plan.memory_gb, key=lambda part: plan.memory_gb[part])
    fixes = []
    if largest == "activations":
        fixes += [] if plan.stage.checkpointing else ["checkpointing: true"]
        fixes += ["a larger accumulate or more processes"] if plan.clips > 1 else []
        fixes += ["shorter or smaller clips"]
    elif largest == "decoder":
        fixes += ["fewer frame_clips", "shorter clips"]
    else:
        fixes += ["more processes", *([] if plan.stage.lora else ["lora"])]
    raise MachineError(
        f"stage {plan.stage.name} needs about {plan.total_gb:.1f} GB a process ({largest} "
        f"{plan.memory_gb[largest]:.1f}), there are {memory_gb:.1f}; try {' or '.join(fixes)}"
    )


def available_gb(device: torch.device) -> float:
    """Memory of the device: all of a GPU's, or what the machine has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError, AttributeError):  # Windows
        return float("inf")


def measured_speed(device: torch.device, precision: str = "bfloat16", size: int = 1024) -> float:
    """Operations a second of training in a precision on this machine, from its speed at matrix products."""
    dtype = torch.bfloat16 if precision == "bfloat16" and has_bfloat16(device.type) else torch.float32
    size = 4 * size if device.type == "cuda" else size
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        for _ in range(3):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - began) / 3)
    return EFFICIENCY * 2 * size**3 / best


def computed_speed(peak_tflops: float, precision: str) -> float:
    """Operations a second of training in a precision on a GPU of this peak in bfloat16."""
    return sizes.EFFICIENCY * 1e12 * peak_tflops * (1 if precision == "bfloat16" else FLOAT32)
