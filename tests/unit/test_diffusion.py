"""What the UNet should predict and how errors are weighed, against diffusers' own schedulers and sums done by hand."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from dreambooth.base_model.process import build_noise_scheduler, build_sampler, diffuse, row_losses, snr_weights
from dreambooth.errors import UserError
from dreambooth.options.training import TrainingConfig


def config(**options) -> TrainingConfig:
    return TrainingConfig(
        pretrained_model_name_or_path="base", instance_data_dir="photos", instance_prompt="sks", **options
    )


def scheduler(prediction_type: str, **options) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type, clip_sample=False, **options)


@pytest.fixture
def latents_and_noise():
    torch.manual_seed(0)
    return torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_predicting_the_target_exactly_recovers_the_latents(prediction_type, zero_snr, latents_and_noise):
    """The scheduler's own step, an outsider, turns the right prediction back into the clean latents."""
    noise_scheduler = scheduler(prediction_type, rescale_betas_zero_snr=zero_snr)
    latents, noise = latents_and_noise
    for timestep in (1, 400, 900) + ((999,) if prediction_type == "v_prediction" else ()):
        noisy_latents, timesteps, target = diffuse(noise_scheduler, latents, noise, torch.full((3,), timestep))
        assert (timesteps == timestep).all()
        recovered = noise_scheduler.step(target, timestep, noisy_latents).pred_original_sample
        torch.testing.assert_close(recovered, latents, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edm_the_target_denoises_to_the_latents(prediction_type, latents_and_noise):
    """precondition_outputs, which the pipelines sample with, maps the network's target to the clean latents."""
    noise_scheduler = EDMEulerScheduler(prediction_type=prediction_type, sigma_data=0.5)
    latents, noise = latents_and_noise
    inputs, timesteps, target = diffuse(noise_scheduler, latents, noise, torch.tensor([0, 500, 999]))
    sigma = torch.exp(timesteps / 0.25)[:, None, None, None]
    noisy_latents = latents + sigma * noise
    torch.testing.assert_close(inputs, noisy_latents / (sigma**2 + 0.25).sqrt(), rtol=1e-4, atol=1e-5)
    denoised = noise_scheduler.precondition_outputs(noisy_latents, target, sigma)
    torch.testing.assert_close(denoised, latents, rtol=1e-3, atol=1e-3)
    assert sigma.flatten()[0] < sigma.flatten()[1] < sigma.flatten()[2], "timestep 0 is the cleanest"
    assert target.std(dim=(1, 2, 3)).max() < 4, "the network's own output is of the size of the data at every sigma"


@pytest.mark.parametrize(
    "base, kind, prediction_type",
    [
        (DDIMScheduler(beta_schedule="scaled_linear"), DDPMScheduler, "epsilon"),
        (EulerDiscreteScheduler(beta_schedule="scaled_linear"), DDPMScheduler, "epsilon"),
        (
            EulerDiscreteScheduler(
                beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True
            ),
            DDPMScheduler,
            "v_prediction",
        ),
        (EDMEulerScheduler(), EDMEulerScheduler, "epsilon"),
    ],
)
def test_the_training_scheduler_follows_the_base_model_s(base, kind, prediction_type):
    noise_scheduler = build_noise_scheduler(base, config())
    assert type(noise_scheduler) is kind
    assert noise_scheduler.config.prediction_type == prediction_type
    if base.config.get("rescale_betas_zero_snr"):
        assert noise_scheduler.alphas_cumprod[-1] == 0
        assert type(build_sampler(base)) is type(base)


@pytest.mark.parametrize(
    "base, options, words",
    [
        (DDIMScheduler(prediction_type="sample"), {}, "prediction_type 'sample'"),
        (EDMEulerScheduler(), {"snr_gamma": 5.0}, "--snr_gamma and --loss_type huber need .*EDM"),
        (EDMEulerScheduler(), {"loss_type": "huber"}, "--snr_gamma and --loss_type huber need .*EDM"),
        (DDIMScheduler(), {"max_timestep": 1000}, "--max_timestep 1000: the base model's timesteps go from 0 to 999"),
        (DDIMScheduler(), {"min_timestep": 500, "max_timestep": 400}, "--min_timestep 500 --max_timestep 400"),
        (DDIMScheduler(), {"min_timestep": 1000}, "--min_timestep 1000"),
    ],
)
def test_what_does_not_go_with_a_base_model_is_refused(base, options, words):
    with pytest.raises(UserError, match=words):
        build_noise_scheduler(base, config(**options))


# ---- losses ----


def losses(prediction, target, timesteps=None, loss_weights=None, noise_scheduler=None, **options):
    timesteps = torch.zeros(len(prediction), dtype=torch.int64) if timesteps is None else timesteps
    noise_scheduler = noise_scheduler or scheduler("epsilon")
    return row_losses(prediction, target, timesteps, loss_weights, noise_scheduler, config(**options))


def test_a_row_s_loss_is_its_mean_squared_error_in_fp32():
    """Row i is off by i + 1 everywhere."""
    target = torch.randn(3, 4, 2, 2)
    rows = losses(target + torch.arange(1.0, 4)[:, None, None, None], target)
    torch.testing.assert_close(rows, torch.tensor([1.0, 4.0, 9.0]))
    large = torch.full((1, 4, 2, 2), 300.0, dtype=torch.float16)  # its square overflows fp16
    assert losses(large, torch.zeros_like(large)).item() == 90_000


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_follow_the_paper(prediction_type):
    noise_scheduler = scheduler(prediction_type)
    timesteps = torch.tensor([0, 100, 300, 600, 999])
    snr = compute_snr(noise_scheduler, timesteps)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    expected = torch.minimum(snr, torch.tensor(5.0)) / divisor
    torch.testing.assert_close(snr_weights(noise_scheduler, timesteps, 5.0), expected, rtol=1e-3, atol=1e-6)
    target = torch.zeros(5, 4, 2, 2)
    rows = losses(target + 1, target, timesteps, noise_scheduler=noise_scheduler, snr_gamma=5.0)
    torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-6)


def test_min_snr_weights_are_finite_at_zero_terminal_snr():
    for prediction_type, weight in (("epsilon", 1.0), ("v_prediction", 0.0)):
        noise_scheduler = scheduler(prediction_type, rescale_betas_zero_snr=True)
        assert snr_weights(noise_scheduler, torch.tensor([999]), 5.0).item() == weight


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
