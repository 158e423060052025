"""Quicker layers for the WAN2.1 VAE of diffusers: the same weights, names and arithmetic.

At batch 1 torch takes its slow 3D convolution on a CPU, which first copies every window of its input out;
oneDNN's reads them where they are. The norm needs one pass over its channels, not four. And a CPU need not
compute anew what doubled pixels have in common, nor channels that are there only to fill a register.
"""

from __future__ import annotations

from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanResample,
    WanRMS_norm,
    WanUpsample,
)
from torch import Tensor, nn


@cache
def computed_in(dtype: torch.dtype) -> torch.dtype | None:
    """In what this machine's oneDNN convolves or multiplies x of a dtype: float32, where it knows no half
    precision (that takes AVX-512 or newer; torch's own is tens of times slower). None: not at all."""
    if not torch.backends.mkldnn.is_available() or dtype == torch.float64:
        return None
    half = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if dtype in half and half[dtype]() else torch.float32


class OneDNNCausalConv3d(WanCausalConv3d):
    """The causal convolution by oneDNN where it runs: on a CPU, in inference."""

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """x (B, C, F, H, W); `cache_x` holds the frames before it. Returns (B, C', F', H', W')."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or (inside := computed_in(x.dtype)) is None:
            return super().forward(x, cache_x)
        side, _, top, _, past, _ = self._padding
        if cache_x is not None and past:
            x = torch.cat((cache_x.to(x.device), x), dim=2)
            past -= cache_x.shape[2]
        if past:
            x = F.pad(x, (0, 0, 0, 0, past, 0))
        if inside == torch.bfloat16:  # units for matrix products want the channels of a pixel side by side
            x = x.contiguous(memory_format=torch.channels_last_3d)
        weight, bias = self.weight.to(inside), None if self.bias is None else self.bias.to(inside)
        few = self.out_channels < 8 and self.kernel_size[0] == 3 and self.stride[0] == 1
        taps = few and inside == torch.float32
        if taps:  # a register would be mostly empty: each tap in time gives channels of its own
            weight, bias = weight.transpose(0, 2).transpose(1, 2).flatten(0, 1)[:, :, None], None
        out = torch.ops.aten.mkldnn_convolution(
            x.to(inside), weight, bias, (0, top, side), self.stride, self.dilation, self.groups
        )
        if taps:
            first, second, third = out.unflatten(1, (3, -1)).unbind(1)
            out = first[:, :, :-2] + second[:, :, 1:-1]
            out = out.add_(third[:, :, 2:]).add_(cast(Tensor, self.bias)[:, None, None, None])
        return out.to(x.dtype)


_AXIS = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float32, device="cpu")
SUMMED = torch.kron(_AXIS, _AXIS)
"""Which of a convolution's 3 x 3 taps make each of the 4 x 4; and which of three make each of four."""


class UpsamplingConv2d(nn.Sequential):
    """A picture's pixels doubled, then a convolution of 3 x 3: the two layers inside, as one where a CPU runs
    them.

    The convolution sees each pixel four times over. Its taps summed where they fall on the same one are a
    transposed convolution of the small picture, of 4 of the 9 products for each new pixel.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C', 2 H, 2 W)."""
        conv = cast(nn.Conv2d, self[1])
        alone = conv.padding == (1, 1)  # where frames are split into strips, neighbours pad it
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not alone:
            return super().forward(x)
        if computed_in(x.dtype) != torch.float32:
            return super().forward(x)
        taps = (conv.weight.float().flatten(2) @ SUMMED.T).unflatten(2, (4, 4)).transpose(0, 1)
        bias = cast(Tensor, conv.bias).float()
        return F.conv_transpose2d(x.float(), taps, bias, stride=2, padding=1).to(x.dtype)


class OnePassRMSNorm(WanRMS_norm):
    """The same normalisation in one pass over the channels."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, ...) over its channels."""
        inverse = torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-12).to(x.dtype)
        return (x * inverse).mul_(self.gamma.to(x.dtype))


def quicken(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Give the VAE its quicker layers, in place; weights and their names stay as they are."""
    for module in vae.modules():
        if type(module) is WanRMS_norm:
            module.__class__ = OnePassRMSNorm
        elif type(module) is WanCausalConv3d:
            module.__class__ = OneDNNCausalConv3d
        elif type(module) is WanResample and isinstance(next(module.resample.children(), None), WanUpsample):
            module.resample.__class__ = UpsamplingConv2d
        elif isinstance(module, nn.SiLU):  # behind a norm, whose output nobody else has
            module.inplace = True
    return vae


def channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Lay the convolutions' weights out with channels last, in place."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in vae.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])
    return vae
