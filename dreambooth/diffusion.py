"""What the UNet is shown and what it should say: noise, targets and losses, for every kind of base model."""

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler, SchedulerMixin
from torch import Tensor

from dreambooth.config import TrainingConfig, UserError

NoiseScheduler = DDPMScheduler | EDMEulerScheduler


def build_noise_scheduler(scheduler: SchedulerMixin, config: TrainingConfig) -> NoiseScheduler:
    """Return the training side of a base model's scheduler, whatever solver it ships with.

    Raises UserError where its prediction type cannot be trained, or options do not go with it.
    """
    is_edm = type(scheduler).__name__.startswith("EDM")
    noise_scheduler = (EDMEulerScheduler if is_edm else DDPMScheduler).from_config(scheduler.config)
    kind, last = noise_scheduler.config.prediction_type, noise_scheduler.config.num_train_timesteps - 1
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"the base model's scheduler has prediction_type {kind!r}; epsilon and v_prediction train")
    if is_edm and (config.snr_gamma is not None or config.loss_type == "huber"):
        raise UserError("--snr_gamma and --loss_type huber need a base model with discrete timesteps; this one is EDM")
    if not config.min_timestep <= (last if config.max_timestep is None else config.max_timestep) <= last:
        raise UserError(
            f"--min_timestep {config.min_timestep} --max_timestep {config.max_timestep}: the base model's timesteps go "
            f"from 0 to {last}"
        )
    return noise_scheduler


def build_sampler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Return a fast solver for drawing samples; the base model's own where the fast one would not do it justice."""
    special = type(scheduler).__name__.startswith("EDM") or scheduler.config.get("rescale_betas_zero_snr")
    return scheduler if special else DPMSolverMultistepScheduler.from_config(scheduler.config)


def diffuse(
    noise_scheduler: NoiseScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the UNet gets (noisy latents and timesteps, as it knows them) and what it should predict.

    latents, noise, noisy latents, target: (rows, channels, height, width)    timesteps: (rows,), 0 is the cleanest
    """
    if isinstance(noise_scheduler, EDMEulerScheduler):
        return _diffuse_edm(noise_scheduler, latents, noise, timesteps)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    if noise_scheduler.config.prediction_type == "v_prediction":
        return noisy_latents, timesteps, noise_scheduler.get_velocity(latents, noise, timesteps)
    return noisy_latents, timesteps, noise


def _diffuse_edm(
    noise_scheduler: EDMEulerScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Karras et al. (arXiv 2206.00364), eq. 7 and 8:  D = c_skip x + c_out F.

    F is the network's own output; regressing it on (latents - c_skip x) / c_out with equal weights is their loss.
    """
    noise_scheduler.sigmas = noise_scheduler.sigmas.to(timesteps.device)  # it keeps them on the CPU otherwise
    index = noise_scheduler.config.num_train_timesteps - 1 - timesteps  # sigmas are stored from high to low
    sigma = noise_scheduler.sigmas[index].to(latents)[:, None, None, None]
    noisy_latents = latents + sigma * noise
    skipped = noise_scheduler.precondition_outputs(noisy_latents, torch.zeros_like(noise), sigma)
    c_out = noise_scheduler.precondition_outputs(torch.zeros_like(noise), torch.ones_like(noise), sigma)
    inputs = noise_scheduler.precondition_inputs(noisy_latents, sigma)
    return inputs, noise_scheduler.precondition_noise(sigma.flatten()), (latents - skipped) / c_out


def row_losses(
    prediction: Tensor,
    target: Tensor,
    timesteps: Tensor,
    loss_weights: Tensor | None,
    noise_scheduler: NoiseScheduler,
    config: TrainingConfig,
) -> Tensor:
    """Return the loss of every row (rows,), fp32: the mean error over its pixels, weighted for its own noise level.

    loss_weights: (rows, 1, H, W) per image pixel, or None
    """
    errors = _errors(prediction.float(), target.float(), timesteps, noise_scheduler, config)
    if loss_weights is None:
        losses = errors.mean((1, 2, 3))
    else:
        weights = torch.nn.functional.interpolate(loss_weights, size=errors.shape[-2:], mode="area").expand_as(errors)
        losses = (errors * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3)).clamp(min=1e-6)
    return losses if config.snr_gamma is None else losses * snr_weights(noise_scheduler, timesteps, config.snr_gamma)


def _errors(
    prediction: Tensor, target: Tensor, timesteps: Tensor, noise_scheduler: NoiseScheduler, config: TrainingConfig
) -> Tensor:
    squares = (prediction - target).square()
    if config.loss_type == "mse":
        return squares
    # Scheduled pseudo-Huber (arXiv 2403.16728): square where there is little noise, towards linear where there is much
    share = timesteps / noise_scheduler.config.num_train_timesteps
    c = (config.huber_c**share)[:, None, None, None]
    return 2 * c * ((squares + c**2).sqrt() - c)


def snr_weights(noise_scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Return min-SNR weights (rows,) (arXiv 2303.09556):  min(SNR, γ) / SNR for epsilon, / (SNR + 1) for v."""
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if noise_scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return gamma / snr.clamp(min=gamma)  # the same as min(SNR, γ) / SNR, but 1 and not 0/0 where SNR is 0
