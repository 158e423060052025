"""How large a model is, from its configuration alone: parameters, memory, tokens, the state of a rollout.

Plain arithmetic, so that it can be said of models that are not downloaded, at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RELEASED_TRANSFORMER: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": (1, 2, 2),
    "hidden_size": 2560,
    "num_attention_heads": 20,
    "ffn_dim": 10240,
    "num_layers": 32,
    "layer_pattern": "SSDG",
    "window_frames": 3,
    "dilation": 4,
    "gated_delta_head_dim": 256,
    "gated_delta_expand_v": 2,
    "text_dim": 3584,
    "freq_dim": 256,
}
"""The released 4B model; the defaults of KairosTransformer3DModel."""

RELEASED_DEFAULTS: dict[str, float] = {
    "height": 480,
    "width": 640,
    "num_frames": 81,
    "fps": 16,
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
}
"""What a call takes where neither it nor the model says; the released 4B model's."""

RELEASED_VAE, RELEASED_TEXT_ENCODER = 126_892_531, 8_292_166_656
"""Parameters of the WAN2.1 VAE and of Qwen2.5-VL-7B."""

RELEASED_VAE_CONFIG = {"z_dim": 16, "base_dim": 96, "num_res_blocks": 2}
"""What the size of the WAN2.1 VAE's decoder follows from."""

PROCESS_GB = 0.6
"""What Python and the libraries hold in the machine's memory, whatever the model."""

PEAK_TFLOPS, EFFICIENCY = 989.4, 0.3
"""H100 and H200 SXM, dense bfloat16 (NVIDIA's data sheet), and the share of it that the LinearDiT reached on
an H200 (docs/performance.md)."""

LATENTS_TOGETHER = 256
"""AT_ONCE of kairos/models/vae.py, which needs torch."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CONV_SIZE = 4


@dataclass(frozen=True)
class Shape:
    """A clip as the LinearDiT sees it."""

    latent_frames: int
    tokens_per_frame: int

    @property
    def tokens(self) -> int:
        return self.latent_frames * self.tokens_per_frame


def clip_shape(config: Mapping[str, Any], height: int, width: int, num_frames: int) -> Shape:
    """The tokens of `num_frames` frames of height x width pixels (8 pixels a latent, 4 frames a latent)."""
    _, patch_y, patch_x = config["patch_size"]
    return Shape((num_frames - 1) // 4 + 1, (height // 8 // patch_y) * (width // 8 // patch_x))


def frames_together(latents: int) -> int:
    """Latent frames, each of so many latents, that go through the VAE together."""
    return max(1, LATENTS_TOGETHER // latents)


def transformer_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of a LinearDiT with this configuration."""
    dim, ffn, heads = config["hidden_size"], config["ffn_dim"], config["num_attention_heads"]
    patch = config["patch_size"][0] * config["patch_size"][1] * config["patch_size"][2]
    head_k = config["gated_delta_head_dim"]
    head_v = head_k * config["gated_delta_expand_v"]
    keys, values = heads * head_k, heads * head_v

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    attention = 4 * linear(dim, dim) + 2 * dim  # with the norms of queries and keys
    gated_delta = (
        dim * (2 * keys + 2 * values + 2 * heads)  # q, k; v, g; a, b
        + values * dim
        + CONV_SIZE * (2 * keys + values)
        + 2 * heads
        + head_v
    )
    block = (
        attention + linear(dim, ffn) + linear(ffn, dim) + 8 * dim
    )  # cross-attention, ffn, modulation, norm
    total = linear(config["in_channels"] * patch, dim)
    total += linear(config["text_dim"], dim) + linear(dim, dim)
    total += linear(config["freq_dim"], dim) + linear(dim, dim) + linear(dim, 6 * dim)
    total += linear(dim, config["out_channels"] * patch) + 2 * dim
    for kind in kinds(config):
        total += block + (gated_delta if kind == "G" else attention)
    return total


def state_bytes(config: Mapping[str, Any], tokens_per_frame: int, dtype: str = "bfloat16") -> int:
    """Bytes that the layers of a chunk-causal model carry from chunk to chunk.

    Keys and values of the last 3 latent frames in each S block and of 3 x dilation in each D block; in each G
    block the recurrent state, in float32, and the last inputs of the convolutions.
    """
    heads, head_k = config["num_attention_heads"], config["gated_delta_head_dim"]
    head_v = head_k * config["gated_delta_expand_v"]
    frame = 2 * tokens_per_frame * config["hidden_size"] * BYTES[dtype]
    sizes = {
        "S": config["window_frames"] * frame,
        "D": config["window_frames"] * config["dilation"] * frame,
        "G": heads * (head_k * head_v * 4 + (CONV_SIZE - 1) * (2 * head_k + head_v) * BYTES[dtype]),
    }
    return sum(sizes[kind] for kind in kinds(config))


def decoder_state_bytes(vae: Mapping[str, Any], latents: int, dtype: str) -> int:
    """Bytes that the VAE's decoder carries from chunk to chunk, of frames of so many latents.

    The last two inputs of each causal convolution: two in each residual block, of which a level has one more
    than the encoder's. Each level has twice the height and width of the one before.
    """
    base, convolutions = vae["base_dim"], 2 * (vae["num_res_blocks"] + 1)
    levels = (
        vae["z_dim"] + (4 + convolutions + 1) * 4 * base,  # the first, the middle's, and the step in time
        2 * base + convolutions * 4 * base,  # the first of them sees half of the channels; a step in time too
        convolutions * 2 * base,
        (convolutions + 1) * base,  # and the last
    )
    return 2 * latents * sum(4**level * channels for level, channels in enumerate(levels)) * BYTES[dtype]


def forward_flops(config: Mapping[str, Any], shape: Shape, text_tokens: int = 512) -> dict[str, float]:
    """Floating point operations of one forward by part, a multiply-add being two.

    "shared" is what any split over tokens divides evenly, "heads" what is divided by whole heads, and "delta"
    the gated delta rule, which a split over tokens widens by dim_k columns. The prompt's own keys and values
    are left out: they are computed once a video.
    """
    n, dim, heads = shape.tokens, config["hidden_size"], config["num_attention_heads"]
    dim_k = heads * config["gated_delta_head_dim"]
    dim_v = dim_k * config["gated_delta_expand_v"]
    head_k, head_v, chunk = dim_k // heads, dim_v // heads, 64
    flops = {"shared": 0.0, "heads": 0.0, "delta": 0.0}
    for kind in kinds(config):
        flops["shared"] += 2 * n * 2 * dim * config["ffn_dim"]
        flops["shared"] += 2 * n * 2 * dim * dim + 2 * n * 2 * text_tokens * dim  # cross-attention
        if kind == "G":
            flops["shared"] += 2 * n * dim * (2 * dim_k + 3 * dim_v)
            inside = chunk * (2 * head_k + head_k + 2 * head_v) + 3 * head_k * head_v
            flops["delta"] += 2 * n * heads * inside
        else:
            step = config["dilation"] if kind == "D" else 1
            seen = mean_seen_frames(shape.latent_frames, config["window_frames"], step)
            flops["shared"] += 2 * n * 4 * dim * dim
            flops["heads"] += 2 * n * 2 * seen * shape.tokens_per_frame * dim
    return flops


def mean_seen_frames(frames: int, window: int, dilation: int) -> float:
    """Frames that a query's window holds on average; at the clip's ends there are fewer."""
    total = 0.0
    for step in range(-window, window + 1):
        inside = max(0, frames - abs(step) * dilation)  # of all frames, those that have one `step` away
        total += inside * (0.5 if abs(step) == window else 1.0)
    return total / frames


def kinds(config: Mapping[str, Any]) -> str:
    """The kind of every block: S, D or G."""
    pattern = config["layer_pattern"]
    return (pattern * config["num_layers"])[: config["num_layers"]]
