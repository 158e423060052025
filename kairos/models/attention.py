"""The attention layers of the LinearDiT: windowed over the video's tokens, full over the prompt's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kairos.models.norm import RMSNorm
from kairos.models.tiles import Tiles
from kairos.ops.attention import attend
from kairos.ops.rotary import apply_rotary
from kairos.ops.windowed_attention import windowed_attention

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AttentionState:
    """What a windowed layer keeps of the past: rotated keys and values (B, tokens, H, head_dim)."""

    keys: Tensor
    values: Tensor


class WindowedSelfAttention(nn.Module):
    """SWA, or DSWA where `dilation` is more than 1.

    With `follow_length` a clip shorter than two dilations gets plain windows, as the released models do; a
    chunk-causal model must not, since the past would depend on how much future there is.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window_frames: int,
        dilation: int = 1,
        pad_dilated: bool = False,
        follow_length: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.window_frames = window_frames
        self.dilation = dilation
        self.pad_dilated = pad_dilated
        self.follow_length = follow_length
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(
        self,
        tiles: Tiles,
        rotary: tuple[Tensor, Tensor],
        tokens_per_frame: int,
        chunk_frames: Sequence[int] | None = None,
        past: AttentionState | None = None,
    ) -> tuple[Tensor, AttentionState]:
        """Mix the tokens inside the window; also returns what the frames that follow need."""
        heads = (self.heads, -1)
        cos, sin = rotary

        def project(tokens: slice, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            part, table = tiles.read(tokens, rows), (cos[tokens], sin[tokens])
            v = self.v(part).unflatten(-1, heads)
            q = apply_rotary(self.norm_q(self.q(part)).unflatten(-1, heads), table)
            k = apply_rotary(self.norm_k(self.k(part)).unflatten(-1, heads), table)
            return q.to(v.dtype), k.to(v.dtype), v

        def finish(tokens: slice, rows: slice) -> tuple[Tensor]:
            return (tiles.finish(tokens, rows, self.o(mixed[:, tokens].flatten(2))),)

        q, k, v = tiles.map(project)
        mixed, kept = self.mix(q, k, v, tokens_per_frame, chunk_frames, past)
        (out,) = tiles.map(finish)
        return out, kept

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tokens_per_frame: int,
        chunk_frames: Sequence[int] | None,
        past: AttentionState | None,
    ) -> tuple[Tensor, AttentionState]:
        """Attention of q, k, v (B, N, H, head_dim): the part that needs whole sequences, head by head."""
        if past is not None:
            k = torch.cat((past.keys.to(k.dtype), k), dim=1)
            v = torch.cat((past.values.to(v.dtype), v), dim=1)
        dilated = not self.follow_length or q.shape[1] // tokens_per_frame >= 2 * self.dilation
        out = windowed_attention(
            q,
            k,
            v,
            tokens_per_frame=tokens_per_frame,
            window_frames=self.window_frames,
            dilation=self.dilation if dilated else 1,
            pad_dilated=self.pad_dilated,
            chunk_frames=chunk_frames,
        )
        kept = self.window_frames * self.dilation * tokens_per_frame
        return out, AttentionState(k[:, -kept:], v[:, -kept:])


class CrossAttention(nn.Module):
    """Every video token looks at every prompt token that the mask leaves."""

    def __init__(self, dim: int, heads: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def keys_values(self, text: Tensor | KeysValues) -> KeysValues:
        """The prompt's keys and values (B, T, H, head_dim), of the prompt (B, T, dim); or they themselves."""
        if not isinstance(text, Tensor):
            return text
        v = self.v(text).unflatten(-1, (self.heads, -1))
        return self.norm_k(self.k(text), v.dtype).unflatten(-1, (self.heads, -1)), v

    def forward(self, x: Tensor, prompt: KeysValues, mask: Tensor | None = None) -> Tensor:
        """Look x (B, N, dim) up in a prompt's keys and values; mask (B, 1, 1, T): true where one is real."""
        k, v = prompt
        q = self.norm_q(self.q(x), v.dtype).unflatten(-1, (self.heads, -1))
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.o(out.transpose(1, 2).flatten(2))
