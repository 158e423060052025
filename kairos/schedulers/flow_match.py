"""The shifted flow-matching schedule of the released models, with Euler steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from kairos.errors import UserError
from kairos.schedulers.noise import Generators


@dataclass
class SchedulerOutput(BaseOutput):
    """`prev_sample`: the latents after the step."""

    prev_sample: Tensor


def shift_for(latent_frames: int, tokens_per_frame: int) -> float:
    """How much noise a clip needs: exp(mu) sqrt(latent_frames), mu linear in the tokens a frame."""
    mu = 0.5 + (tokens_per_frame - 256) * 0.4 / 7936
    return math.exp(mu) * math.sqrt(latent_frames)


def shifted(sigmas: Tensor, shift: float) -> Tensor:
    """shift sigma / (1 + (shift - 1) sigma): SD3's shift (arXiv 2403.03206, equation 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


class FlowMatchScheduler(SchedulerMixin, ConfigMixin):
    """Sigmas from 1 down to 0, spaced evenly and then shifted; x += v (sigma_next - sigma)."""

    order = 1

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.sigmas = torch.tensor([1.0, 0.0])
        self.timesteps = num_train_timesteps * self.sigmas[:-1]

    def set_timesteps(
        self,
        num_inference_steps: int,
        *,
        latent_frames: int,
        tokens_per_frame: int,
        device: torch.device | str | None = None,
    ) -> None:
        """Set `.sigmas` (steps + 1, the last 0) and `.timesteps` (steps, 1000 sigma) for this clip."""
        if num_inference_steps < 1:
            raise UserError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        even = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64, device="cpu")
        self._set(shifted(even, shift_for(latent_frames, tokens_per_frame)), device)

    def step(
        self,
        velocity: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Go from `timestep` (one of `.timesteps`) to the next; nothing random, `generator` is not used."""
        sigma, following = self._sigmas_at(timestep)
        sample = sample + velocity * (following - sigma)
        return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)

    def _set(self, sigmas: Tensor, device: torch.device | str | None) -> None:
        self.sigmas = sigmas.float()
        self.timesteps = (self.config.num_train_timesteps * sigmas[:-1]).to(device, torch.float32)

    def _sigmas_at(self, timestep: float | Tensor) -> tuple[float, float]:
        """The sigma of a timestep, and the one after it."""
        index = int((self.timesteps - timestep).abs().argmin())
        return float(self.sigmas[index]), float(self.sigmas[index + 1])
