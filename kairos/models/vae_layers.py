"""Quicker layers for the WAN2.1 VAE of diffusers: the same weights, names and arithmetic.

At batch 1 torch takes its slow 3D convolution on a CPU, which first copies every window of its input out;
oneDNN's reads them where they are. And the norm needs one pass over its channels, not four.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from torch import Tensor


class OneDNNCausalConv3d(WanCausalConv3d):
    """The causal convolution by oneDNN where it runs: on a CPU, in inference."""

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """x (B, C, F, H, W); `cache_x` holds the frames before it. Returns (B, C', F', H', W')."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or not torch.backends.mkldnn.is_available():
            return super().forward(x, cache_x)
        side, _, top, _, past, _ = self._padding
        if cache_x is not None and past:
            x = torch.cat((cache_x.to(x.device), x), dim=2)
            past -= cache_x.shape[2]
        if past:
            x = F.pad(x, (0, 0, 0, 0, past, 0))
        if x.dtype == torch.bfloat16:  # units for matrix products want the channels of a pixel side by side
            x = x.contiguous(memory_format=torch.channels_last_3d)
        return torch.ops.aten.mkldnn_convolution(
            x, self.weight, self.bias, (0, top, side), self.stride, self.dilation, self.groups
        )


class OnePassRMSNorm(WanRMS_norm):
    """The same normalisation in one pass over the channels."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, ...) over its channels."""
        inverse = torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-12).to(x.dtype)
        return x * inverse * self.gamma.to(x.dtype)


def quicken(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Give the VAE its quicker layers, in place; weights and their names stay as they are."""
    for module in vae.modules():
        if type(module) is WanRMS_norm:
            module.__class__ = OnePassRMSNorm
        elif type(module) is WanCausalConv3d:
            module.__class__ = OneDNNCausalConv3d
    return vae


def channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Lay the convolutions' weights out with channels last, in place."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in vae.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])
    return vae
