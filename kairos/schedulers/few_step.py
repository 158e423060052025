"""The schedule of distilled models: a few fixed times, each step a whole prediction that is noised again."""

from __future__ import annotations

from itertools import pairwise

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401, diffusers looks for it here
from torch import Tensor

from kairos.errors import UserError
from kairos.schedulers.flow_match import FlowMatchScheduler, SchedulerOutput, shifted
from kairos.schedulers.noise import Generators, draw_noise


class FewStepScheduler(FlowMatchScheduler):
    """A step predicts x0 = x - sigma v, then x = (1 - sigma_next) x0 + sigma_next noise; the last returns x0.

    The sampler of consistency models (arXiv 2303.01469, algorithm 1) on the flow-matching path.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        sampling_times: tuple[float, ...] = (1000, 800, 500, 100),
        shift: float = 5.0,
    ) -> None:
        falling = all(now > later for now, later in pairwise([*sampling_times, 0]))
        if not sampling_times or not falling or sampling_times[0] > num_train_timesteps:
            raise UserError(
                f"sampling_times must fall from at most {num_train_timesteps} to above 0, got "
                f"{list(sampling_times)}"
            )
        self._set_fixed(None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        *,
        latent_frames: int | None = None,
        tokens_per_frame: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Set `.sigmas` and `.timesteps`. They are fixed by the distillation: steps and clip are not used."""
        self._set_fixed(device)

    def step(
        self,
        velocity: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Predict the end of the path and noise it again up to the next time."""
        sigma, following = self._sigmas_at(timestep)
        sample = sample - velocity * sigma
        if following > 0:
            sample = (1 - following) * sample + following * draw_noise(sample.shape, generator).to(sample)
        return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)

    def _set_fixed(self, device: torch.device | str | None) -> None:
        times = torch.tensor([*self.config.sampling_times, 0.0], dtype=torch.float64, device="cpu")
        self._set(shifted(times / self.config.num_train_timesteps, self.config.shift), device)
