"""What noise is: what the denoiser should predict, against diffusers' own schedulers."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from dreambooth.base_model.process import DiscreteProcess, EdmProcess, build_sampler, noise_process
from dreambooth.errors import UserError
from dreambooth.options.steps import LossOptions


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
    process = noise_process(noise_scheduler, LossOptions())
    latents, noise = latents_and_noise
    for timestep in (1, 400, 900) + ((999,) if prediction_type == "v_prediction" else ()):
        noised = process.noise(latents, noise, torch.full((3,), timestep))
        assert (noised.timesteps == timestep).all()
        recovered = noise_scheduler.step(noised.target, timestep, noised.latents).pred_original_sample
        torch.testing.assert_close(recovered, latents, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edm_the_target_denoises_to_the_latents(prediction_type, latents_and_noise):
    """precondition_outputs, which the pipelines sample with, maps the network's target to the clean latents."""
    noise_scheduler = EDMEulerScheduler(prediction_type=prediction_type, sigma_data=0.5)
    process = noise_process(noise_scheduler, LossOptions())
    latents, noise = latents_and_noise
    noised = process.noise(latents, noise, torch.tensor([0, 500, 999]))
    sigma = torch.exp(noised.timesteps / 0.25)[:, None, None, None]
    noisy_latents = latents + sigma * noise
    torch.testing.assert_close(noised.latents, noisy_latents / (sigma**2 + 0.25).sqrt(), rtol=1e-4, atol=1e-5)
    denoised = noise_scheduler.precondition_outputs(noisy_latents, noised.target, sigma)
    torch.testing.assert_close(denoised, latents, rtol=1e-3, atol=1e-3)
    assert sigma.flatten()[0] < sigma.flatten()[1] < sigma.flatten()[2], "timestep 0 is the cleanest"
    assert noised.target.std(dim=(1, 2, 3)).max() < 4, (
        "the network's own output is of the size of the data at every sigma"
    )


@pytest.mark.parametrize(
    "base, process_kind, kind, prediction_type",
    [
        (DDIMScheduler(beta_schedule="scaled_linear"), DiscreteProcess, DDPMScheduler, "epsilon"),
        (EulerDiscreteScheduler(beta_schedule="scaled_linear"), DiscreteProcess, DDPMScheduler, "epsilon"),
        (
            EulerDiscreteScheduler(
                beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True
            ),
            DiscreteProcess,
            DDPMScheduler,
            "v_prediction",
        ),
        (EDMEulerScheduler(), EdmProcess, EDMEulerScheduler, "epsilon"),
        (EDMDPMSolverMultistepScheduler(), EdmProcess, EDMEulerScheduler, "epsilon"),
    ],
)
def test_the_noise_process_follows_the_base_model_s_scheduler(base, process_kind, kind, prediction_type):
    process = noise_process(base, LossOptions())
    assert type(process) is process_kind and type(process.scheduler) is kind
    assert process.num_timesteps == base.config.num_train_timesteps == 1000
    assert process.scheduler.config.prediction_type == prediction_type
    if base.config.get("rescale_betas_zero_snr"):
        assert process.scheduler.alphas_cumprod[-1] == 0
        assert type(build_sampler(base)) is type(base)


@pytest.mark.parametrize(
    "base, options, words",
    [
        (DDIMScheduler(prediction_type="sample"), {}, "prediction_type 'sample'"),
        (EDMEulerScheduler(prediction_type="sample"), {}, "prediction_type 'sample'"),
        (FlowMatchEulerDiscreteScheduler(), {}, "FlowMatchEulerDiscreteScheduler"),
        (EDMEulerScheduler(), {"snr_gamma": 5.0}, "--snr_gamma and --loss_type huber need .*EDM"),
        (EDMEulerScheduler(), {"loss_type": "huber"}, "--snr_gamma and --loss_type huber need .*EDM"),
        (DDIMScheduler(), {"max_timestep": 1000}, "--max_timestep 1000: the base model's timesteps go from 0 to 999"),
        (DDIMScheduler(), {"min_timestep": 500, "max_timestep": 400}, "--min_timestep 500 --max_timestep 400"),
        (DDIMScheduler(), {"min_timestep": 1000}, "--min_timestep 1000"),
    ],
)
def test_what_does_not_go_with_a_base_model_is_refused(base, options, words):
    with pytest.raises(UserError, match=words):
        noise_process(base, LossOptions(**options))
