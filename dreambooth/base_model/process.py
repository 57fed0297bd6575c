"""What noise is: how a family of schedulers hides latents, what the denoiser then gets, and what it should predict."""

from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler, SchedulerMixin
from torch import Tensor

from dreambooth.errors import UserError
from dreambooth.options.steps import LossOptions

EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")


@dataclass(frozen=True)
class Noised:
    """A training example of the denoiser. All but `timesteps` are (rows, channels, height, width)."""

    latents: Tensor  # its input
    timesteps: Tensor  # (rows,), as it knows them
    target: Tensor  # its output


class NoiseProcess(Protocol):
    """Timesteps are numbered 0, 1, ... num_timesteps - 1; 0 is the cleanest."""

    @property
    def num_timesteps(self) -> int: ...

    def noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        """Return the example made of latents and noise (rows, channels, height, width) at timesteps (rows,)."""
        ...

    def snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return the min-SNR weights (rows,) of losses at timesteps (rows,) (arXiv 2303.09556)."""
        ...


@dataclass(frozen=True)
class DiscreteProcess:
    """A fixed list of noise levels: DDPM's betas. The denoiser predicts the noise (epsilon) or the velocity (v)."""

    scheduler: DDPMScheduler

    @property
    def num_timesteps(self) -> int:
        return self.scheduler.config.num_train_timesteps

    @property
    def predicts_velocity(self) -> bool:
        return self.scheduler.config.prediction_type == "v_prediction"

    def noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        noisy_latents = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps) if self.predicts_velocity else noise
        return Noised(noisy_latents, timesteps, target)

    def snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """min(SNR, γ) / SNR for epsilon, min(SNR, γ) / (SNR + 1) for v."""
        alphas_cumprod = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alphas_cumprod / (1 - alphas_cumprod)
        if self.predicts_velocity:
            return snr.clamp(max=gamma) / (snr + 1)
        return gamma / snr.clamp(min=gamma)  # the same as min(SNR, γ) / SNR, but 1 and not 0/0 if SNR is 0


@dataclass(frozen=True)
class EdmProcess:
    """Karras et al. (arXiv 2206.00364), eq. 7 and 8:  D = c_skip x + c_out F.

    F is the network's own output; regressing it on (latents - c_skip x) / c_out with equal weights is their loss.
    """

    scheduler: EDMEulerScheduler

    @property
    def num_timesteps(self) -> int:
        return self.scheduler.config.num_train_timesteps

    def noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        scheduler = self.scheduler
        scheduler.sigmas = scheduler.sigmas.to(timesteps.device)  # it keeps them on the CPU otherwise
        index = self.num_timesteps - 1 - timesteps  # sigmas are stored from high to low
        sigma = scheduler.sigmas[index].to(latents)[:, None, None, None]
        noisy_latents = latents + sigma * noise
        skipped = scheduler.precondition_outputs(noisy_latents, torch.zeros_like(noise), sigma)
        c_out = scheduler.precondition_outputs(torch.zeros_like(noise), torch.ones_like(noise), sigma)
        inputs = scheduler.precondition_inputs(noisy_latents, sigma)
        return Noised(inputs, scheduler.precondition_noise(sigma.flatten()), (latents - skipped) / c_out)

    def snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        raise NotImplementedError("min-SNR weights are defined over discrete timesteps")


def noise_process(scheduler: SchedulerMixin, config: LossOptions) -> NoiseProcess:
    """Return the training side of a base model's scheduler, whatever solver it ships with.

    Raises UserError if its kind of noise or its prediction type cannot be trained, or options do not go with it.
    """
    process = _discrete_or_edm(scheduler)
    kind, last = scheduler.config.get("prediction_type", "epsilon"), process.num_timesteps - 1
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"the base model's scheduler has prediction_type {kind!r}; epsilon and v_prediction train")
    if _is_edm(scheduler) and (config.snr_gamma is not None or config.loss_type == "huber"):
        raise UserError("--snr_gamma and --loss_type huber need a base model with discrete timesteps; this one is EDM")
    if not config.min_timestep <= (last if config.max_timestep is None else config.max_timestep) <= last:
        raise UserError(
            f"--min_timestep {config.min_timestep} --max_timestep {config.max_timestep}: the base model's timesteps go "
            f"from 0 to {last}"
        )
    return process


def build_sampler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Return a fast solver for drawing; the base model's own scheduler if the fast one would not do it justice."""
    special = _is_edm(scheduler) or scheduler.config.get("rescale_betas_zero_snr")
    return scheduler if special else DPMSolverMultistepScheduler.from_config(scheduler.config)


def _discrete_or_edm(scheduler: SchedulerMixin) -> DiscreteProcess | EdmProcess:
    if _is_edm(scheduler):
        return EdmProcess(EDMEulerScheduler.from_config(scheduler.config))
    if "beta_schedule" in scheduler.config:
        return DiscreteProcess(DDPMScheduler.from_config(scheduler.config))
    raise UserError(
        f"the base model's scheduler is a {type(scheduler).__name__}; models whose noise is a list of betas, or EDM's, "
        "can be trained"
    )


def _is_edm(scheduler: SchedulerMixin) -> bool:
    return type(scheduler).__name__ in EDM
