"""Where a model's parts lie while a video is made, how much memory that takes, and how long it should take.

One function, `plan`, decides; `kairos plan` prints what it says and `--memory` carries it out. All of it is
computed from configurations: no weights are read. Bytes of weights are exact, activations are estimates, and
seconds are what the work would take at an assumed share of a stated peak; nothing here is measured.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kairos import sizes
from kairos.errors import UserError
from kairos.request import Request
from kairos.sizes import EFFICIENCY, PEAK_TFLOPS

QUANTIZED = {
    "int8": {"transformer": "int8", "text_encoder": "int8"},
    "fp8": {"transformer": "fp8", "text_encoder": "fp8"},
    "int4": {"transformer": "int8", "text_encoder": "int4"},
}
"""What `--quantize` may be, and what the weights of each part's large products become."""
QUANTIZED_BYTES = {"int8": 1.0, "fp8": 1.0, "int4": 0.5 + 0.127 / 8}
"""Of a weight; four bits have a scale for 64 weights, itself in eight bits (QLoRA, arXiv 2305.14314)."""
ENCODER_SHARE = 0.93
"""Of the encoder's parameters that are in its large products; the rest is its table of words."""
CUDA_CONTEXT_GB = 0.6
"""What CUDA, its libraries and the allocator's gaps take beside tensors; an estimate."""
VAE_EFFICIENCY = 0.18
"""Share of the peak that the VAE's decoder reached on an H200 (docs/performance.md)."""
FLOAT32_SHARE = 0.5
"""Of that peak in float32 products, which CUDA's convolutions make in TF32; assumed."""
FLA_CHUNK = 64
"""Tokens for each of which flash-linear-attention keeps a state of the gated delta rule."""
HOST_GB_S = 20.0
"""What is assumed to travel a second from the machine's memory to the GPU."""
TEXT_TOKENS, FEW_STEPS = 512, 4
VAE_FLOP = {"encode": 6.6e6, "decode": 8.5e6}
"""A pixel of a frame, with the released VAE: 2 TFLOP for one of 480p, 212 for 81."""
TILE_PIXELS = 256
HALO_PIXELS = 48
"""Of kairos.models.vae_tiles, to each side of a tile when decoding."""

RESIDENT, WHOLE, STREAMED, FREED = "resident", "offloaded whole", "streamed block by block", "freed after use"


@dataclass(frozen=True)
class Part:
    """One of the model's parts: `gb` of weights in `dtype`, and where they lie."""

    name: str
    parameters: int
    dtype: str
    gb: float
    place: str


@dataclass(frozen=True)
class Stage:
    """One stage of making a video: its peak on the device, activations included, and its computed time."""

    name: str
    activations_gb: float
    peak_gb: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What `--memory` does. `tiled`: the VAE works in tiles, with the same result."""

    device: str
    budget_gb: float
    dtype: str
    quantize: str | None
    context_gb: float
    parts: tuple[Part, ...]
    stages: tuple[Stage, ...]
    tiled: bool

    @property
    def peak_gb(self) -> float:
        return max(stage.peak_gb for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def line(self) -> str:
        """The plan in one line."""
        said = "; ".join(f"{part.name.replace('_', ' ')} {part.dtype}, {part.place}" for part in self.parts)
        tiles = "; VAE in tiles" if self.tiled else ""
        return f"{said}{tiles}; about {self.peak_gb:.3g} of {self.budget_gb:.3g} GB at the peak"


@dataclass(frozen=True)
class Clip:
    """A video to be made: pixels, frames, and how it is sampled.

    `rolling`: it is rolled out chunk by chunk, or others follow and nothing can be offloaded: every part is
    needed again and again. `tileable`: the VAE can work in tiles; what decodes chunk by chunk cannot.
    `videos`: so many are made at once.
    """

    height: int
    width: int
    num_frames: int
    steps: int
    guided: bool
    rolling: bool = False
    tileable: bool = True
    videos: int = 1

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_frames", "steps", "videos"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


def clip_of(defaults: Mapping[str, Any], scheduler: str, request: Request | None = None) -> Clip:
    """What is asked for, the model's defaults for what is not, rounded up as the pipeline does."""
    asked = (request or Request("any")).completed(defaults)
    assert asked.height and asked.width and asked.num_frames
    assert asked.num_inference_steps and asked.guidance_scale is not None
    few = scheduler == "few_step"
    return Clip(
        height=-(-asked.height // 16) * 16,
        width=-(-asked.width // 16) * 16,
        num_frames=asked.num_frames,
        steps=FEW_STEPS if few else asked.num_inference_steps,
        guided=not few and asked.guidance_scale > 1,
    )


@dataclass(frozen=True)
class Model:
    """A model in what a plan needs: the LinearDiT's configuration and the parameters by part.

    dtypes: that the weights may have, the best first; vae_dtype: the VAE's, None for that of the others.
    """

    config: Mapping[str, Any]
    parameters: Mapping[str, int]
    dtypes: tuple[str, ...] = ("bfloat16",)
    vae_dtype: str | None = "float32"

    def __post_init__(self) -> None:
        for dtype in (*self.dtypes, self.vae_dtype):
            if dtype is not None and dtype not in sizes.BYTES:
                raise UserError(f"dtype must be one of {', '.join(sizes.BYTES)}, got {dtype!r}")


@dataclass(frozen=True)
class Terms:
    """What a plan has to keep to; see `plan`."""

    budget_gb: float
    device: str
    quantize: str | None
    tiled: bool
    peak_tflops: float

    def __post_init__(self) -> None:
        if not 0 < self.budget_gb < float("inf"):
            raise UserError(f"memory must be above 0 GB, got {self.budget_gb:g}")
        if not 0 < self.peak_tflops < float("inf"):
            raise UserError(f"the peak must be above 0 TFLOP/s, got {self.peak_tflops:g}")
        if self.device not in ("cuda", "cpu"):
            raise UserError(f'device must be "cuda" or "cpu", got {self.device!r}')
        if self.quantize is not None and self.quantize not in QUANTIZED:
            raise UserError(f"quantize must be one of {', '.join(QUANTIZED)}, got {self.quantize!r}")


def plan(
    model: Model,
    clips: Clip | Sequence[Clip],
    budget_gb: float,
    *,
    device: str = "cuda",
    quantize: str | None = None,
    tiled: bool = False,
    peak_tflops: float = PEAK_TFLOPS,
) -> Plan:
    """The quickest way to make all of `clips`, one after the other, in `budget_gb` of the device's memory.

    Args:
        clips: one or several; the plan's stages are those of the clip that takes the most.
        device: "cuda", or "cpu", where there is nowhere to offload to: the encoder is freed after use, unless
            the clips are `rolling`.
        quantize: one of `QUANTIZED`: fewer bits for the weights of the LinearDiT's blocks and the encoder.
        tiled: the VAE is to work in tiles, whether it has to or not.

    Raises:
        UserError: where nothing fits, with what would.
    """
    terms = Terms(budget_gb, device, quantize, tiled, peak_tflops)
    clips = [clips] if isinstance(clips, Clip) else clips
    if not clips:
        raise UserError("there is nothing to plan for: give one clip or several")
    by_clip = [_ways(model, clip, terms) for clip in clips]
    fitting = [way for way in zip(*by_clip, strict=True) if all(one.peak_gb <= budget_gb for one in way)]
    if fitting:
        quickest = min(
            fitting, key=lambda way: (model.dtypes.index(way[0].dtype), sum(one.seconds for one in way))
        )
        return max(quickest, key=lambda one: one.peak_gb)
    for clip, ways in zip(clips, by_clip, strict=True):
        least = min(ways, key=lambda way: way.peak_gb)
        if least.peak_gb > budget_gb:
            raise UserError(
                f"{clip.num_frames} frames of {clip.height} x {clip.width} do not fit in {budget_gb:g} GB: "
                f"the least is {least.peak_gb:.3g} GB ({least.stages[_worst(least)].name}); "
                f"{_what_would_fit(model, clip, terms, least)}"
            )
    raise UserError(
        f"each of the {len(clips)} videos fits in {budget_gb:g} GB, but in no one way for all; "
        "make them with one command each"
    )


def _ways(model: Model, clip: Clip, terms: Terms) -> list[Plan]:
    """Every way in which the parts can lie, whether it fits or not."""
    # encoder, LinearDiT, VAE
    places = [(RESIDENT if clip.rolling else FREED, RESIDENT, RESIDENT)]
    if terms.device == "cuda":
        places = [
            (RESIDENT, RESIDENT, RESIDENT),
            (WHOLE, WHOLE, WHOLE),
            (STREAMED, RESIDENT, RESIDENT),
            (STREAMED, STREAMED, RESIDENT),
        ]
        if terms.quantize == "int4":  # its scales lie beside the weights, where streaming does not find them
            places = [place for place in places if place[0] != STREAMED]
        if clip.rolling:
            places = [place for place in places if WHOLE not in place]
    tilings = [False] if not clip.tileable else [True] if terms.tiled else [False, True]
    return [
        _way(replace(model, dtypes=(dtype,)), clip, replace(terms, tiled=tiled), place)
        for dtype in model.dtypes
        for place in places
        for tiled in tilings
    ]


def _way(model: Model, clip: Clip, terms: Terms, places: tuple[str, ...]) -> Plan:
    """The plan with encoder, LinearDiT and VAE in these places, in tiles if `terms` say so."""
    (dtype,) = model.dtypes
    parts = _parts(model, terms.quantize, places)
    context = CUDA_CONTEXT_GB if terms.device == "cuda" else sizes.PROCESS_GB
    stages = []
    for name, own, activations, seconds in _work(model, clip, terms, parts):
        held, took = 0.0, seconds
        for part in parts:
            if part.place == RESIDENT or part is own:
                held += _streamed_gb(model, part) if part.place == STREAMED else part.gb
        if own.place == WHOLE:
            took += own.gb / HOST_GB_S
        elif own.place == STREAMED:
            branches = 1 + clip.guided
            loads = clip.steps * branches if own.name == "transformer" else branches
            took = max(took, loads * own.gb / HOST_GB_S)  # copied while the block before works
        stages.append(Stage(name, activations, context + held + activations, took))
    return Plan(
        terms.device, terms.budget_gb, dtype, terms.quantize, context, parts, tuple(stages), terms.tiled
    )


def _parts(model: Model, quantize: str | None, places: tuple[str, ...]) -> tuple[Part, ...]:
    (own_dtype,) = model.dtypes
    parts = []
    for name, place in zip(("text_encoder", "transformer", "vae"), places, strict=True):
        dtype = (model.vae_dtype or own_dtype) if name == "vae" else own_dtype
        gb = model.parameters[name] * sizes.BYTES[dtype] / 1e9
        if quantize is not None and name != "vae":
            bits = QUANTIZED[quantize][name]
            share = quantizable_share(model.config) if name == "transformer" else ENCODER_SHARE
            gb *= 1 - share * (1 - QUANTIZED_BYTES[bits] / sizes.BYTES[dtype])
            dtype = f"{bits} and {dtype}"
        parts.append(Part(name, model.parameters[name], dtype, gb, place))
    return tuple(parts)


def _work(
    model: Model, clip: Clip, terms: Terms, parts: tuple[Part, ...]
) -> list[tuple[str, Part, float, float]]:
    """Of each stage its name, the part that works, the GB of its activations, and its computed seconds."""
    encoder, transformer, vae = parts
    (dtype,) = model.dtypes
    vae_dtype = model.vae_dtype or dtype
    shape = sizes.clip_shape(model.config, clip.height, clip.width, clip.num_frames)
    flops = terms.peak_tflops * 1e12 * EFFICIENCY
    vae_flops = terms.peak_tflops * 1e12 * VAE_EFFICIENCY * (FLOAT32_SHARE if vae_dtype == "float32" else 1)
    branches = 1 + clip.guided
    forward = sum(sizes.forward_flops(model.config, shape, TEXT_TOKENS).values())
    pixel = (
        VAE_FLOP["decode"] * vae.parameters / sizes.RELEASED_VAE * (_tile_work(clip) if terms.tiled else 1)
    )
    prompt_s = 2 * encoder.parameters * TEXT_TOKENS * branches / flops
    denoise_s = clip.videos * clip.steps * branches * forward / flops
    decode_s = clip.videos * pixel * clip.height * clip.width * clip.num_frames / vae_flops
    denoising_gb = clip.videos * _denoising_gb(model, dtype, shape, clip.guided, terms.device)
    decoding_gb = clip.videos * _decoding_gb(model, vae_dtype, clip, terms.tiled)
    return [
        ("encode prompt", encoder, 0.05 * encoder.gb, prompt_s),
        ("denoise", transformer, denoising_gb, denoise_s),
        ("decode frames", vae, decoding_gb, decode_s),
    ]


def quantizable_share(config: Mapping[str, Any]) -> float:
    """The share of the LinearDiT's parameters that quantisation takes: the blocks' large products."""
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    keys = heads * config["gated_delta_head_dim"]
    values = keys * config["gated_delta_expand_v"]
    total = 0
    for kind in sizes.kinds(config):
        total += 4 * dim * dim + 2 * dim * config["ffn_dim"]
        total += dim * (2 * keys + 3 * values) if kind == "G" else 4 * dim * dim
    return total / sizes.transformer_parameters(config)


def _streamed_gb(model: Model, part: Part) -> float:
    """What a streamed part keeps on the device: two of its blocks, and what is in none."""
    if part.name == "transformer":
        inside = quantizable_share(model.config)
        return part.gb * (1 - inside) + 2 * part.gb * inside / model.config["num_layers"]
    return (
        part.gb * 0.15
    )  # layer by layer; the largest is the table of words, 7 %, and the next comes already


def _denoising_gb(model: Model, dtype: str, shape: sizes.Shape, guided: bool, device: str) -> float:
    """What a block holds while it works, and the prompt's keys and values in every block.

    On a GPU a gated delta block works on all tokens at once and holds the most: queries, keys and values
    seven times over on their way, and a state for each of fla's chunks. By that the 4B model takes 9.3 GB at
    25,200 tokens and 27.2 at 73,920; measured on an H200 were 9.2 and 26.7.
    """
    width, config = sizes.BYTES[dtype], model.config
    dim = config["hidden_size"]
    held = 2 * config["ffn_dim"] + 10 * dim
    if device == "cuda" and "G" in sizes.kinds(config):
        keys = config["num_attention_heads"] * config["gated_delta_head_dim"]
        values = keys * config["gated_delta_expand_v"]
        held = max(
            held, 7 * (2 * keys + values) + keys * values // config["num_attention_heads"] // FLA_CHUNK
        )
    block = shape.tokens * held * width
    prompts = (1 + guided) * model.config["num_layers"] * TEXT_TOKENS * 2 * dim * width
    return (block + prompts) / 1e9


def _decoding_gb(model: Model, dtype: str, clip: Clip, tiled: bool) -> float:
    """The decoder's last levels for the frames that go together, its memory of earlier ones, and the video
    itself, twice."""
    width, pixels = sizes.BYTES[dtype], clip.height * clip.width
    frames = min(4 * sizes.frames_together(pixels // 64), clip.num_frames)
    at_once = min(pixels, _tile_side(clip.height) * _tile_side(clip.width)) if tiled else pixels
    channels = 96 * (model.parameters["vae"] / sizes.RELEASED_VAE) ** 0.5
    working = at_once * channels * (frames * 8 + 20) * width
    video = 2 * 3 * clip.num_frames * pixels * width
    maps = clip.num_frames * pixels * channels / 16 * width if tiled else 0  # kept at a quarter of the size
    return (working + video + maps) / 1e9


def _tile_side(side: int) -> int:
    return min(side, TILE_PIXELS + 2 * HALO_PIXELS)


def _tile_work(clip: Clip) -> float:
    """How much more there is to compute in tiles, halos included."""
    more = 1.0
    for side in (clip.height, clip.width):
        tiles = -(-side // TILE_PIXELS)
        more *= (side + 2 * HALO_PIXELS * (tiles - 1)) / side
    return more


def _worst(plan: Plan) -> int:
    return max(range(len(plan.stages)), key=lambda index: plan.stages[index].peak_gb)


def _what_would_fit(model: Model, clip: Clip, terms: Terms, least: Plan) -> str:
    """The changes that would make it fit, each by itself."""
    quantize = terms.quantize

    def fits(quantize: str | None = quantize, **changed: Any) -> bool:
        ways = _ways(model, replace(clip, **changed), replace(terms, quantize=quantize))
        return any(way.peak_gb <= terms.budget_gb for way in ways)

    def smaller(quantize: str | None) -> str | None:
        for tenths in range(9, 1, -1):
            height, width = (max(side * tenths // 160, 1) * 16 for side in (clip.height, clip.width))
            if (height, width) != (clip.height, clip.width) and fits(quantize, height=height, width=width):
                return f"{height} x {width}"
        return None

    found = []
    if quantize is None:
        less = next((kind for kind in ("int8", "int4") if fits(quantize=kind)), None)
        if less is not None:
            found.append(f"{less} (--quantize {less})")
    counts, lengths = range(1, clip.videos), range(1, clip.num_frames, 4)
    # More or longer videos never take less, and there may be thousands of lengths.
    if fitting := bisect_left(counts, True, key=lambda count: not fits(videos=count)):
        found.append(f"{counts[fitting - 1]} at once")
    if fitting := bisect_left(lengths, True, key=lambda length: not fits(num_frames=length)):
        found.append(f"{lengths[fitting - 1]} frames")
    if size := smaller(quantize):
        found.append(size)
    if not found and quantize is None and (size := smaller("int8")):
        found.append(f"{size} with --quantize int8")
    if found:
        return f"what would fit: {' or '.join(found)} or {least.peak_gb * 1.02:.3g} GB"
    return f"it takes a device with more memory (about {least.peak_gb * 1.02:.3g} GB) or a smaller model"
