"""VAE parallel: frames in horizontal strips, one for each rank, exact at their borders.

Before a convolution looks over its strip's edge, neighbours exchange the rows that it will see (a halo); the
attention in the middle sees the keys and values of all strips. Nothing is blended. Memory in time stays with
each strip, so frames can also be decoded as they come.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanCausalConv3d, WanResample
from torch import Tensor, nn

from kairos.distributed.exchange import Exchange, slices, spread
from kairos.models.vae import SPATIAL

ROWS = -2
"""The axis that is split."""


class StripParallel:
    """A VAE that encodes and decodes strips on several ranks, until `remove` is called.

    All ranks call it with the same input and get the whole result. Frames with fewer rows of latents than
    there are ranks are computed whole by every rank.
    """

    def __init__(self, vae: AutoencoderKLWan, group: dist.ProcessGroup) -> None:
        self.vae = vae
        cast(Any, vae).in_strips = True  # no tiles inside strips
        self.exchange = Exchange(group)
        self.rows: list[int] = []
        """Rows of latents of each rank; empty where every rank does all."""
        self._handles = [
            vae.encoder.register_forward_pre_hook(self._before_encoder),
            vae.quant_conv.register_forward_hook(self._after),
            vae.post_quant_conv.register_forward_pre_hook(self._before_decoder),
            vae.decoder.register_forward_hook(self._after),
        ]
        self._padded: list[tuple[Any, str, Any]] = []
        for module in vae.modules():
            if isinstance(module, WanCausalConv3d):
                left, right, top, bottom, past, future = module._padding
                self._take_rows(module, "_padding", (left, right, 0, 0, past, future), top, bottom)
            elif isinstance(module, WanResample) and isinstance(module.resample, nn.Sequential):
                first, conv = cast(Any, module.resample)
                if isinstance(first, nn.ZeroPad2d):  # downsampling: one row and one column more
                    left, right, top, bottom = first.padding
                    self._take_rows(first, "padding", (left, right, 0, 0), top, bottom)
                else:
                    rows, columns = conv.padding
                    self._take_rows(conv, "padding", (0, columns), rows, rows)
            elif type(module) is WanAttentionBlock:
                module.__class__ = SplitFrameAttention
                cast(Any, module).strips = self

    def remove(self) -> None:
        """Leave the VAE as it was."""
        del cast(Any, self.vae).in_strips
        for handle in self._handles:
            handle.remove()
        for module, name, value in self._padded:
            setattr(module, name, value)
        for module in self.vae.modules():
            if isinstance(module, SplitFrameAttention):
                module.__class__ = WanAttentionBlock
                del cast(Any, module).strips

    def _take_rows(self, module: nn.Module, name: str, padding: tuple, top: int, bottom: int) -> None:
        """Have `module` see rows of its neighbours where it padded with `top` and `bottom` rows of zeros."""
        if not top and not bottom:
            return
        self._padded.append((module, name, getattr(module, name)))
        setattr(module, name, padding)

        def before(module: nn.Module, args: tuple) -> tuple:
            x, *past = args
            if not past or past[0] is None:
                return (self._with_halo(x, top, bottom),)
            both = self._with_halo(torch.cat((past[0].to(x.device), x), dim=2), top, bottom)
            frames = past[0].shape[2]
            return both[:, :, frames:], both[:, :, :frames]

        self._handles.append(module.register_forward_pre_hook(before))

    def _with_halo(self, x: Tensor, top: int, bottom: int) -> Tensor:
        """x with `top` rows of the strip above and `bottom` of the one below; zeros at the frame's edges."""
        if not self.rows:
            return F.pad(x, (0, 0, top, bottom))
        above, below = self.exchange.neighbours(
            x[..., :bottom, :] if bottom else None, x[..., x.shape[ROWS] - top :, :] if top else None
        )
        return torch.cat(([above] if top else []) + [x] + ([below] if bottom else []), dim=ROWS)

    def _begin(self, x: Tensor, pixels: int) -> Tensor | None:
        rows = spread(x.shape[ROWS] // pixels, self.exchange.size)
        self.rows = rows if self.exchange.size > 1 and min(rows) > 0 else []
        if not self.rows:
            return None
        mine = slices([n * pixels for n in self.rows])[self.exchange.rank]
        return x[..., mine, :]

    def _before_encoder(self, module: nn.Module, args: tuple) -> tuple | None:
        strip = self._begin(args[0], SPATIAL)
        return None if strip is None else (strip, *args[1:])

    def _before_decoder(self, module: nn.Module, args: tuple) -> tuple | None:
        strip = self._begin(args[0], 1)
        return None if strip is None else (strip, *args[1:])

    def _after(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        """The whole of what the ranks made in strips."""
        if not self.rows:
            return None
        scale = out.shape[ROWS] // self.rows[self.exchange.rank]
        return self.exchange.gather(out, [n * scale for n in self.rows], dim=ROWS)


class SplitFrameAttention(WanAttentionBlock):
    """Attention over whole frames for the queries of a strip."""

    strips: StripParallel

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, F, rows, W) -> the same."""
        strips = self.strips
        if not strips.rows:
            return super().forward(x)
        batch, _, frames, rows, width = x.shape
        y = self.norm(x.transpose(1, 2).flatten(0, 1))
        qkv = self.to_qkv(y).flatten(2).mT[:, None]  # (B F, 1, rows W, 3 C)
        q, k, v = qkv.chunk(3, dim=-1)
        scale = rows // strips.rows[strips.exchange.rank]
        sizes = [n * scale * width for n in strips.rows]
        k, v = strips.exchange.gather(torch.cat((k, v), dim=-1), sizes, dim=2).chunk(2, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.proj(y[:, 0].mT.unflatten(-1, (rows, width)))
        return y.unflatten(0, (batch, frames)).transpose(1, 2) + x
