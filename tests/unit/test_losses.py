"""How errors are weighed and averaged, against sums done by hand."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from dreambooth.base_model.process import DiscreteProcess
from dreambooth.loop.losses import dreambooth_losses, row_losses
from dreambooth.options.steps import LossOptions


def discrete(prediction_type: str = "epsilon", **options) -> DiscreteProcess:
    return DiscreteProcess(DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type, **options))


def losses(prediction, target, timesteps=None, loss_weights=None, process=None, **options):
    timesteps = torch.zeros(len(prediction), dtype=torch.int64) if timesteps is None else timesteps
    return row_losses(prediction, target, timesteps, loss_weights, process or discrete(), LossOptions(**options))


def test_a_row_s_loss_is_its_mean_squared_error_in_fp32():
    """Row i is off by i + 1 everywhere."""
    target = torch.randn(3, 4, 2, 2)
    rows = losses(target + torch.arange(1.0, 4)[:, None, None, None], target)
    torch.testing.assert_close(rows, torch.tensor([1.0, 4.0, 9.0]))
    large = torch.full((1, 4, 2, 2), 300.0, dtype=torch.float16)  # its square overflows fp16
    assert losses(large, torch.zeros_like(large)).item() == 90_000


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_follow_the_paper(prediction_type):
    process = discrete(prediction_type)
    timesteps = torch.tensor([0, 100, 300, 600, 999])
    snr = compute_snr(process.scheduler, timesteps)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    expected = torch.minimum(snr, torch.tensor(5.0)) / divisor
    torch.testing.assert_close(process.snr_weights(timesteps, 5.0), expected, rtol=1e-3, atol=1e-6)
    target = torch.zeros(5, 4, 2, 2)
    rows = losses(target + 1, target, timesteps, process=process, snr_gamma=5.0)
    torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-6)


def test_min_snr_weights_are_finite_at_zero_terminal_snr():
    for prediction_type, weight in (("epsilon", 1.0), ("v_prediction", 0.0)):
        process = discrete(prediction_type, rescale_betas_zero_snr=True)
        assert process.snr_weights(torch.tensor([999]), 5.0).item() == weight


def test_scheduled_huber_is_square_for_small_and_linear_for_large_errors():
    small, large = torch.full((1, 1, 1, 1), 1e-3), torch.full((1, 1, 1, 1), 1e3)
    zero = torch.zeros_like(small)
    for timestep, c in ((0, 1.0), (500, 0.1**0.5)):
        timesteps = torch.tensor([timestep])
        assert losses(small, zero, timesteps, loss_type="huber").item() == pytest.approx(1e-6, rel=0.05)
        assert losses(large, zero, timesteps, loss_type="huber").item() == pytest.approx(2 * c * 1e3, rel=0.01)


def test_a_mask_weighs_pixels_and_keeps_the_scale():
    """The left half is off by 1, the right by 3; masks are given per image pixel, eight to a latent."""
    target = torch.zeros(3, 4, 2, 2)
    prediction = target.clone()
    prediction[..., 0], prediction[..., 1] = 1, 3
    weights = torch.ones(3, 1, 16, 16)
    weights[0, ..., 8:] = 0
    weights[1, ..., 8:] = 0.5
    torch.testing.assert_close(losses(prediction, target, loss_weights=weights), torch.tensor([1, (1 + 4.5) / 1.5, 5]))
    assert losses(prediction[:1], target[:1], loss_weights=torch.zeros(1, 1, 16, 16)).item() == 0


@pytest.mark.parametrize("num_instances, rows", [(1, 2), (2, 4), (3, 6)])
def test_instance_rows_and_class_rows_are_averaged_apart(num_instances, rows):
    losses = torch.arange(1.0, rows + 1) ** 2
    instance_loss, prior_loss = dreambooth_losses(losses, num_instances)
    assert instance_loss.item() == pytest.approx(losses[:num_instances].mean().item())
    assert prior_loss.item() == pytest.approx(losses[num_instances:].mean().item())


def test_without_class_rows_the_prior_loss_is_zero():
    instance_loss, prior_loss = dreambooth_losses(torch.ones(2), 2)
    assert (instance_loss.item(), prior_loss.item()) == (1, 0)
