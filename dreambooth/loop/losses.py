"""The loss of each row of a batch, and DreamBooth's two means: over instance rows and over class rows."""

import torch
from torch import Tensor

from dreambooth.base_model.process import NoiseProcess
from dreambooth.options.steps import LossOptions


def row_losses(
    prediction: Tensor,
    target: Tensor,
    timesteps: Tensor,
    loss_weights: Tensor | None,
    process: NoiseProcess,
    config: LossOptions,
) -> Tensor:
    """Return the loss of each row (rows,), fp32: its mean error over latent pixels, weighted for its own noise level.

    prediction, target: (rows, channels, H / 8, W / 8)    timesteps: (rows,)
    loss_weights: (rows, 1, H, W), one per image pixel, or None for equal weights
    """
    errors = _errors(prediction.float(), target.float(), timesteps / process.num_timesteps, config)
    if loss_weights is None:
        losses = errors.mean((1, 2, 3))
    else:
        weights = torch.nn.functional.interpolate(loss_weights, size=errors.shape[-2:], mode="area").expand_as(errors)
        losses = (errors * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3)).clamp(min=1e-6)
    return losses if config.snr_gamma is None else losses * process.snr_weights(timesteps, config.snr_gamma)


def _errors(prediction: Tensor, target: Tensor, noise_share: Tensor, config: LossOptions) -> Tensor:
    """Return the elementwise error. noise_share (rows,): 0 without noise, 1 at the highest noise level."""
    squares = (prediction - target).square()
    if config.loss_type == "mse":
        return squares
    # Scheduled pseudo-Huber (arXiv 2403.16728): quadratic at low noise, nearly linear at high noise
    c = (config.huber_c**noise_share)[:, None, None, None]
    return 2 * c * ((squares + c**2).sqrt() - c)


def dreambooth_losses(rows: Tensor, num_instances: int) -> tuple[Tensor, Tensor]:
    """Return the mean loss of the instance rows and of the class rows (0 if there are none)."""
    instance_rows, class_rows = rows[:num_instances], rows[num_instances:]
    return instance_rows.mean(), class_rows.mean() if len(class_rows) else rows.new_zeros(())
