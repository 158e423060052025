"""Decodes latents as they come, in the memory of one latent frame or a few small ones, to the
frames of decoding them at once.

The WAN2.1 VAE is causal in time: each of its convolutions needs its own last two inputs and nothing else of
the past. diffusers' decoder takes them as a list and replaces them; here the list outlives the call.
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from kairos.models.vae import decode_next, normalisation

Feature = Tensor | Literal["Rep"] | None
"""A convolution's last inputs; "Rep" where an upsampling saw one latent frame; None where nothing is kept."""


class StreamingVAEDecoder:
    """Latents in, frames out, with what the VAE remembers of the past in between.

    `features` is that memory: empty before the first latents, and of one size from the third latent frame on.
    It is a value, replaced at each call and never changed, so two decoders can go on from one.
    """

    def __init__(self, vae: AutoencoderKLWan, features: tuple[Feature, ...] = ()) -> None:
        self.vae = vae
        self.features = features

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The frames of the normalised latents (B, 16, f, h, w) that come next.

        Returns (B, 3, F, 8 h, 8 w) in [-1, 1] in the VAE's dtype, four frames a latent one; the first latent
        frame of all gives one.
        """
        mean, std = normalisation(self.vae, latents)
        scaled = self.vae.post_quant_conv((latents.float() * std + mean).to(self.vae.dtype))
        kept = [f.to(scaled.dtype) if isinstance(f, Tensor) else f for f in self.features]
        video, after = decode_next(self.vae, scaled, kept or None)
        self.features = tuple(f.contiguous() if isinstance(f, Tensor) else f for f in after)
        return video.clamp(-1, 1)
