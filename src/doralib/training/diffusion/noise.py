"""Noise on latents, what is to be learned of it, and how much each time step weighs."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from torch import Tensor

from ...errors import UsageError

_LOGIT_MEAN, _LOGIT_STD, _MODE_SCALE = 0.0, 1.0, 1.29


@dataclass(frozen=True)
class Noised:
    """Noisy latents (B, C, h, w), and what the network is to say of them."""

    noisy_BCHW: Tensor
    time_B: Tensor
    target_BCHW: Tensor
    weight_B: Tensor


class Diffusion:
    """Noise that the network is to tell, by the scheduler's prediction_type: epsilon, v_prediction or sample.

    Args:
        scheduler: The pipeline's.
        snr_gamma: min(SNR, gamma) weighs the error of the picture; None: all steps of the target weigh 1.
    """

    def __init__(self, scheduler: Any, snr_gamma: float | None) -> None:
        self.scheduler, self.snr_gamma = DDPMScheduler.from_config(scheduler.config), snr_gamma
        self.kind = str(self.scheduler.config.prediction_type)
        if self.kind not in ("epsilon", "v_prediction", "sample"):
            raise UsageError(f"model: the scheduler's prediction_type is {self.kind}, which cannot be trained")

    def draw_time(self, generator: torch.Generator) -> Tensor:
        """A time step for one picture, (1,)."""
        return torch.randint(self.scheduler.config.num_train_timesteps, (1,), generator=generator)

    def add(self, latents_BCHW: Tensor, noise_BCHW: Tensor, time_B: Tensor) -> Noised:
        """Add the noise of these steps."""
        noisy = self.scheduler.add_noise(latents_BCHW, noise_BCHW, time_B)
        if self.kind == "epsilon":
            target = noise_BCHW
        elif self.kind == "sample":
            target = latents_BCHW
        else:
            target = self.scheduler.get_velocity(latents_BCHW, noise_BCHW, time_B)
        return Noised(noisy, time_B, target, self._weigh(time_B))

    def _weigh(self, time_B: Tensor) -> Tensor:
        if self.snr_gamma is None:
            return torch.ones(len(time_B), device=time_B.device)
        snr = compute_snr(self.scheduler, time_B)
        weight = snr.clamp(max=self.snr_gamma)
        if self.kind == "sample":
            return weight
        # an error of epsilon is one of the picture times SNR, of v times SNR + 1; at SNR 0 the ratio is 1
        return torch.where(snr == 0, 1.0, weight / snr) if self.kind == "epsilon" else weight / (snr + 1)


class Flow:
    """Straight lines from a picture to noise; the network is to tell their direction.

    Args:
        scheduler: The pipeline's.
        weighting: Which time steps are drawn, or weighed, more: as diffusers names it.
    """

    def __init__(self, scheduler: Any, weighting: str) -> None:
        made = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self.sigmas, self.times, self.weighting = made.sigmas[: len(made.timesteps)], made.timesteps, weighting

    def draw_time(self, generator: torch.Generator) -> Tensor:
        """The place of a time step among the scheduler's, for one picture, (1,)."""
        u = compute_density_for_timestep_sampling(
            self.weighting, 1, _LOGIT_MEAN, _LOGIT_STD, _MODE_SCALE, generator=generator
        )
        return (u * len(self.times)).long().clamp(max=len(self.times) - 1)

    def add(self, latents_BCHW: Tensor, noise_BCHW: Tensor, time_B: Tensor) -> Noised:
        """Add the noise of the steps at these places."""
        sigma = self.sigmas.to(latents_BCHW)[time_B]
        sigma_B111 = sigma.view(-1, 1, 1, 1)
        noisy = (1 - sigma_B111) * latents_BCHW + sigma_B111 * noise_BCHW
        weight = compute_loss_weighting_for_sd3(self.weighting, sigma)
        return Noised(noisy, self.times.to(latents_BCHW)[time_B], noise_BCHW - latents_BCHW, weight)
