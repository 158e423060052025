"""The LinearDiT: a diffusion transformer over video latents whose cost grows with the length, not its square.

Blocks of sliding-window attention (S), dilated sliding-window attention (D) and gated linear attention (G),
tiled by `layer_pattern`. Parameter names and arithmetic are those of the released Kairos 3.0 checkpoints.

The chunk-causal variant (`causal="chunk"`) sees no later chunk, so a rollout carries a `TransformerState` of
constant size from chunk to chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from kairos.errors import UserError, listed
from kairos.models.attention import AttentionState, CrossAttention, KeysValues, WindowedSelfAttention
from kairos.models.gated_delta_net import PRECISE, DeltaState, GatedDeltaNet
from kairos.models.step_cache import StepCache
from kairos.models.tiles import Tiles
from kairos.ops.rotary import rotary_table


@dataclass(frozen=True, eq=False)
class TransformerState:
    """What a chunk-causal model keeps of the past: a state for each block, and how many frames it saw."""

    layers: tuple[AttentionState | DeltaState, ...] = field(repr=False)
    frames: int

    def map(self, change: Callable[[Tensor], Tensor]) -> TransformerState:
        """The same with every tensor changed."""
        return TransformerState(tuple(changed(layer, change) for layer in self.layers), self.frames)


def changed(layer: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A layer's state with every tensor changed."""
    return type(layer)(*(change(tensor) for tensor in vars(layer).values()))


@dataclass
class PromptMemory:
    """The prompt's keys and values in every block: filled by the first call that it is given to, used by the
    later ones."""

    layers: list[KeysValues] = field(default_factory=list)


@dataclass
class KairosTransformerOutput(Transformer2DModelOutput):
    """`sample`: the velocity; `state`: that after this call's frames, where it was asked for."""

    state: TransformerState | None = None


class KairosTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Latents, a time and a prompt in; the velocity (noise - sample) out. The defaults are the released 4B.

    Args:
        in_channels, out_channels: of the latents.
        patch_size: latents to a token along (frames, height, width); one frame at a time.
        hidden_size: width of the blocks.
        num_attention_heads: of attention and of the gated delta layers; heads are hidden_size / heads wide.
        ffn_dim: width inside the feed-forward.
        num_layers: blocks.
        layer_pattern: kinds of blocks, tiled over the depth: S sliding, D dilated sliding, G gated delta.
        window_frames: latent frames that attention sees on each side.
        dilation: of the D blocks, in latent frames.
        pad_dilated: the zero frames that the released models' dilated blocks see at the end of a clip.
        gated_delta_head_dim: channels of keys in a gated delta head; values have `gated_delta_expand_v` times
            as many.
        text_dim: width of the prompt embeddings.
        freq_dim: sines and cosines of the time.
        eps: of every norm.
        causal: "none", or "chunk": no token sees a later chunk.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["KairosBlock"]
    _repeated_blocks = ["KairosBlock"]
    _keep_in_fp32_modules = list(PRECISE)
    _skip_layerwise_casting_patterns = ["patch_embedding", "time_embedding", "norm", "modulation"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int = 16,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 2560,
        num_attention_heads: int = 20,
        ffn_dim: int = 10240,
        num_layers: int = 32,
        layer_pattern: str = "SSDG",
        window_frames: int = 3,
        dilation: int = 4,
        pad_dilated: bool = True,
        gated_delta_head_dim: int = 256,
        gated_delta_expand_v: int = 2,
        text_dim: int = 3584,
        freq_dim: int = 256,
        eps: float = 1e-6,
        causal: str = "none",
    ) -> None:
        super().__init__()
        check_config(self.config)
        patch = (1, patch_size[1], patch_size[2])
        self.patch_embedding = nn.Conv3d(in_channels, hidden_size, kernel_size=patch, stride=patch)
        self.text_embedding = mlp(text_dim, hidden_size, hidden_size)
        self.time_embedding = mlp(freq_dim, hidden_size, hidden_size)
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.blocks = nn.ModuleList(
            KairosBlock(self.config, layer_pattern[index % len(layer_pattern)]) for index in range(num_layers)
        )
        self.head = Head(hidden_size, out_channels * patch[1] * patch[2], eps)
        self.gradient_checkpointing = False
        self.init_weights()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        chunk_frames: Sequence[int] | None = None,
        state: TransformerState | None = None,
        return_state: bool = False,
        prompt_memory: PromptMemory | None = None,
        step_cache: StepCache | None = None,
        return_dict: bool = True,
    ) -> KairosTransformerOutput | tuple:
        """Predict the velocity.

        Args:
            hidden_states: latents (B, in_channels, F, H, W).
            timestep: 0 to 1000, (B,) for the clip, (B, F) for each latent frame, or (B, N) for each token.
                A model in bfloat16 rounds it to bfloat16, as the released pipeline and its training do.
            encoder_hidden_states: prompt embeddings (B, T, text_dim).
            encoder_attention_mask: (B, T), true where a prompt token is real.
            chunk_frames: sizes of consecutive chunks of the F frames, for a chunk-causal model. None is one
                chunk.
            state: the past of a chunk-causal model, from an earlier call with `return_state`.
            return_state: also return the state after these frames.
            prompt_memory: one for each prompt and video; what a prompt is to the blocks does not change from
                step to step, so it is computed at the first.
            step_cache: one for each prompt and video, to leave out all blocks but the first at steps that
                are like the one before. Not with `return_state`: there would be none.

        Returns:
            The velocity (B, out_channels, F, H, W) as `.sample` (and `.state`), or as a tuple.

        Raises:
            UserError: for shapes and chunks that do not fit.
        """
        self._check_input(
            hidden_states,
            timestep,
            encoder_hidden_states,
            encoder_attention_mask,
            chunk_frames,
            state,
            return_state,
        )
        _, patch_y, patch_x = self.config.patch_size
        frames, height, width = hidden_states.shape[2:]
        height, width = height // patch_y, width // patch_x
        tokens_per_frame = height * width
        rotary = rotary_table(
            frames,
            height,
            width,
            self.config.hidden_size // self.config.num_attention_heads,
            first_frame=state.frames if state else 0,
            device=hidden_states.device,
        )
        time, modulation = self._embed_time(timestep, hidden_states.shape[0], frames, tokens_per_frame)
        prompts: Sequence[Tensor | KeysValues]
        if prompt_memory is not None and prompt_memory.layers:
            prompts = prompt_memory.layers
        else:
            prompts = [self.text_embedding(encoder_hidden_states)] * len(self.blocks)
        mask = encoder_attention_mask
        if mask is not None:
            # On a GPU the question would wait for all that it has to do, and compilers cannot answer it.
            asked = mask.device.type == "cpu" and not torch.compiler.is_compiling()
            mask = None if asked and mask.all() else mask.bool()[:, None, None, :]
        # In line, or every sum to come keeps a token's channels apart, and every norm puts them together.
        x = rearrange(self.patch_embedding(hidden_states), "b d f h w -> b (f h w) d").contiguous()

        assert step_cache is None or not return_state
        layers, remembered = [], list[KeysValues]()
        before = after_first = x
        skips = False
        for index, (block, text) in enumerate(zip(self.blocks, prompts, strict=True)):
            if index == 1 and step_cache is not None:
                after_first, skips = x, step_cache.skips(x - before)
                if skips:
                    assert step_cache.later is not None
                    x = x + step_cache.later
                    break
            past = state.layers[index] if state else None
            arguments = (x, modulation, text, mask, rotary, tokens_per_frame, chunk_frames, past)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x, kept, prompt = self._gradient_checkpointing_func(block, *arguments)
            else:
                x, kept, prompt = block(*arguments)
            if return_state:  # cloned, since what a layer keeps is a view of all that it saw
                layers.append(changed(kept, Tensor.clone))
            if prompt_memory is not None:
                remembered.append(prompt)
        if prompt_memory is not None and not skips:
            prompt_memory.layers = remembered
        if step_cache is not None and not skips:
            step_cache.later = x - after_first

        x = self.head(x, time)
        unpatchify = "b (f h w) (p q c) -> b c f (h p) (w q)"
        sample = rearrange(x, unpatchify, f=frames, h=height, p=patch_y, q=patch_x)
        after = None
        if return_state:
            after = TransformerState(cast(Any, tuple(layers)), frames + (state.frames if state else 0))
        if return_dict:
            return KairosTransformerOutput(sample=sample, state=after)
        return (sample, after) if return_state else (sample,)

    def _embed_time(
        self, timestep: Tensor, batch: int, frames: int, tokens_per_frame: int
    ) -> tuple[Tensor, Tensor]:
        """The time's embedding (B, T, dim) and its six vectors (B, T, 6, dim); T is 1, frames or tokens."""
        if timestep.ndim < 2:
            timestep = timestep.reshape(-1, 1)
        timestep = timestep.expand(batch, -1)
        if timestep.shape[1] not in (1, frames):  # for each token; mostly alike in a frame
            by_frame = timestep.unflatten(1, (frames, tokens_per_frame))
            if (by_frame == by_frame[..., :1]).all():
                timestep = by_frame[..., 0]
        dtype = self.patch_embedding.weight.dtype  # self.dtype asks every parameter, which takes 2 ms
        if dtype == torch.bfloat16:
            timestep = timestep.to(torch.bfloat16)
        time = self.time_embedding(sinusoidal(timestep, self.config.freq_dim).to(dtype))
        return time, self.time_projection(time).unflatten(-1, (6, -1))

    def _check_input(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        mask: Tensor | None,
        chunk_frames: Sequence[int] | None,
        state: TransformerState | None,
        return_state: bool,
    ) -> None:
        config = self.config
        if hidden_states.ndim != 5 or hidden_states.shape[1] != config.in_channels:
            raise UserError(
                f"latents must be (B, {config.in_channels}, F, H, W), got {tuple(hidden_states.shape)}"
            )
        batch, _, frames, height, width = hidden_states.shape
        _, patch_y, patch_x = config.patch_size
        if height % patch_y or width % patch_x:
            raise UserError(
                f"latents must be multiples of the patch {patch_y} x {patch_x}, got {height} x {width}"
            )
        tokens_per_frame = (height // patch_y) * (width // patch_x)
        tokens = frames * tokens_per_frame
        expected = (batch, 1), (batch, frames), (batch, tokens)
        if timestep.ndim > 2 or (timestep.ndim == 2 and tuple(timestep.shape) not in expected):
            raise UserError(
                f"timestep must be ({batch},), ({batch}, {frames}) or ({batch}, {tokens}), "
                f"got {tuple(timestep.shape)}"
            )
        if timestep.ndim == 1 and len(timestep) not in (1, batch):
            raise UserError(
                f"timestep must hold one value for each of the {batch} clips, got {len(timestep)}"
            )
        text = tuple(encoder_hidden_states.shape)
        if len(text) != 3 or text[0] != batch or text[2] != config.text_dim:
            raise UserError(f"prompt embeddings must be ({batch}, T, {config.text_dim}), got {text}")
        if mask is not None and tuple(mask.shape) != text[:2]:
            raise UserError(f"the prompt's mask must be {text[:2]}, got {tuple(mask.shape)}")
        if config.causal != "chunk" and (chunk_frames is not None or state is not None or return_state):
            raise UserError(
                'chunk_frames and state are for models made with causal="chunk", this one has causal="none"'
            )
        if chunk_frames is not None and (sum(chunk_frames) != frames or min(chunk_frames) < 1):
            raise UserError(
                f"chunk_frames must be positive and sum to {frames} latent frames, got {list(chunk_frames)}"
            )
        if state is not None and not self._continues(state, batch, tokens_per_frame):
            raise UserError(
                f"the state is of other videos or of another model: it must come from this one, with a batch "
                f"of {batch} and {tokens_per_frame} tokens a frame"
            )

    def _continues(self, state: TransformerState, batch: int, tokens_per_frame: int) -> bool:
        """Whether these layers could have left the state, after such frames."""

        def fits(block: Any, past: Any) -> bool:
            if block.kind == "G":
                return isinstance(past, DeltaState) and len(past.recurrent_state) == batch
            reach = self.config.window_frames * (self.config.dilation if block.kind == "D" else 1)
            expected = (batch, min(state.frames, reach) * tokens_per_frame)
            return isinstance(past, AttentionState) and past.keys.shape[:2] == expected

        return len(state.layers) == len(self.blocks) and all(map(fits, self.blocks, state.layers))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """As diffusers' own, but strict: that leaves parameters without values where the file lacks them.

        Raises:
            UserError: naming the tensors that are missing or left over.
        """
        info_wanted = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **options
        )
        for kind, verb in (("missing_keys", "lacks"), ("unexpected_keys", "has no place for")):
            if names := sorted(info.get(kind, ())):
                raise UserError(f"the LinearDiT in {pretrained_model_name_or_path} {verb} {listed(names)}")
        return (model, info) if info_wanted else model

    @torch.no_grad()
    def init_weights(self) -> None:
        """Weights to train from: every block begins as the identity and the velocity as 0.

        The last product of each branch is zero and its gate one, so gradients reach the branch at full size
        from the first step (with gates of zero, as in adaLN-zero, they would not). Other matrices keep the
        scale of their input.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
                if module.bias is not None:
                    module.bias.zero_()
        self.patch_embedding.weight.normal_(std=self.patch_embedding.weight[0].numel() ** -0.5)
        nn.init.zeros_(cast(Tensor, self.patch_embedding.bias))
        nn.init.zeros_(cast(nn.Linear, self.time_projection[1]).weight)
        self.head.modulation.zero_()
        self.head.head.weight.zero_()
        for block in self.blocks:
            cast(KairosBlock, block).init_branches()


class KairosBlock(nn.Module):
    """Mix over the video's tokens, attend to the prompt, feed forward; the time scales, shifts and gates."""

    def __init__(self, config: Any, kind: str) -> None:
        super().__init__()
        dim, heads, self.eps = config.hidden_size, config.num_attention_heads, config.eps
        self.kind = kind
        if kind == "G":
            self.gated_delta = GatedDeltaNet(
                dim, heads, config.gated_delta_head_dim, config.gated_delta_expand_v, eps=self.eps
            )
        else:
            self.self_attn = WindowedSelfAttention(
                dim,
                heads,
                window_frames=config.window_frames,
                dilation=config.dilation if kind == "D" else 1,
                pad_dilated=config.pad_dilated,
                follow_length=config.causal == "none",
                eps=self.eps,
            )
        self.cross_attn_norm = nn.LayerNorm(dim, self.eps)
        self.cross_attn = CrossAttention(dim, heads, self.eps)
        self.ffn = mlp(dim, config.ffn_dim, dim)
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor | KeysValues,
        mask: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        tokens_per_frame: int,
        chunk_frames: Sequence[int] | None,
        past: Any,
    ) -> tuple[Tensor, AttentionState | DeltaState, KeysValues]:
        """x (B, N, dim), modulation (B, T, 6, dim), text (B, tokens, dim) or its keys and values -> x, what
        later frames need, the prompt's keys and values."""
        # Scale before shift, here; the head has them the other way round. So are the released weights.
        scale_mix, shift_mix, gate_mix, scale_ffn, shift_ffn, gate_ffn = (
            self.modulation + modulation
        ).unbind(2)
        prompt = self.cross_attn.keys_values(text)

        def normed(tokens: slice, rows: slice) -> Tensor:
            y = modulate(x[:, tokens], scale_mix[:, rows], shift_mix[:, rows], self.eps)
            if torch.is_autocast_enabled(y.device.type):  # once here, not once for each product
                y = y.to(torch.get_autocast_dtype(y.device.type))
            return y

        def after_mixing(tokens: slice, rows: slice, y: Tensor) -> Tensor:
            part = add_gated(x[:, tokens], gate_mix[:, rows], y)
            part = part + self.cross_attn(self.cross_attn_norm(part), prompt, mask)
            fed = self.ffn(modulate(part, scale_ffn[:, rows], shift_ffn[:, rows], self.eps))
            return add_gated(part, gate_ffn[:, rows], fed)

        tiles = Tiles(x, gate_mix.shape[1], normed, after_mixing)
        kept: AttentionState | DeltaState
        if self.kind == "G":
            out, kept = self.gated_delta(tiles, past)
        else:
            out, kept = self.self_attn(tiles, rotary, tokens_per_frame, chunk_frames, past)
        return out, kept, prompt

    def init_branches(self) -> None:
        """Gates of one over last products of zero."""
        self.modulation.zero_()
        self.modulation[:, (2, 5)] = 1
        mix = self.gated_delta.o_proj if self.kind == "G" else self.self_attn.o
        for last in (mix, self.cross_attn.o, self.ffn[2]):
            nn.init.zeros_(cast(nn.Linear, last).weight)


class Head(nn.Module):
    """The last norm, modulated by the time's embedding, and the product that makes patches of it."""

    def __init__(self, dim: int, out_features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))
        self.head = nn.Linear(dim, out_features)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, N, dim), time (B, T, dim) -> (B, N, out_features)."""
        shift, scale = (self.modulation + time[:, :, None]).unbind(2)
        return self.head(modulate(x, scale, shift, self.eps))


def mlp(dim_in: int, dim_hidden: int, dim_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim_in, dim_hidden), nn.SiLU(inplace=True), nn.Linear(dim_hidden, dim_out))


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift; x (B, N, dim), scale and shift (B, T, dim), T dividing N."""
    if scale.shape[:2] == (1, 1):  # one time for all there is: the norm's own weights, in one pass
        return F.layer_norm(x, x.shape[-1:], 1 + scale[0, 0], shift[0, 0], eps)
    x = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (scale.shape[1], -1))
    return torch.addcmul(shift[:, :, None], x, 1 + scale[:, :, None]).flatten(1, 2)


def add_gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate * y; x and y (B, N, dim), gate (B, T, dim), T dividing N."""
    by_time = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, by_time), gate[:, :, None], y.unflatten(1, by_time)).flatten(1, 2)


def sinusoidal(timestep: Tensor, dim: int) -> Tensor:
    """[cos | sin] of t * 10000^(-i / (dim / 2)), (..., dim), in float64."""
    half = dim // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angles = timestep.double()[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def check_config(config: Any) -> None:
    """Refuse sizes that cannot work together."""
    positive = (
        "in_channels",
        "out_channels",
        "hidden_size",
        "num_attention_heads",
        "ffn_dim",
        "num_layers",
        "window_frames",
        "dilation",
        "gated_delta_head_dim",
        "gated_delta_expand_v",
        "text_dim",
        "freq_dim",
    )
    for name in positive:
        if config[name] < 1:
            raise UserError(f"{name} must be at least 1, got {config[name]}")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"hidden_size must be a multiple of num_attention_heads, got {config.hidden_size} and "
            f"{config.num_attention_heads}"
        )
    head_dim = config.hidden_size // config.num_attention_heads
    if head_dim % 2:
        raise UserError(
            f"hidden_size / num_attention_heads must be even for rotary positions, got {head_dim}"
        )
    if config.freq_dim % 2:
        raise UserError(f"freq_dim must be even, got {config.freq_dim}")
    if not config.layer_pattern or set(config.layer_pattern) - set("SDG"):
        raise UserError(
            "layer_pattern must be made of S (sliding), D (dilated) and G (gated delta), "
            f"got {config.layer_pattern!r}"
        )
    if len(config.patch_size) != 3 or config.patch_size[0] != 1 or min(config.patch_size) < 1:
        raise UserError(f"patch_size must be (1, height, width), got {tuple(config.patch_size)}")
    if config.causal not in ("none", "chunk"):
        raise UserError(f'causal must be "none" or "chunk", got {config.causal!r}')
    if config.causal == "chunk" and config.pad_dilated:
        raise UserError(
            'causal="chunk" needs pad_dilated=False: zeros after the end would be seen from the past'
        )
