"""The arithmetic of a step, against diffusers' schedulers and sums done by hand."""

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler

from dreambooth.config import TrainingConfig, UserError
from dreambooth.data import Batch
from dreambooth.training import (
    build_lr_scheduler,
    build_optimizer,
    count_steps,
    draw_latents,
    dreambooth_losses,
    training_target,
)


def config(**options) -> TrainingConfig:
    return TrainingConfig(
        pretrained_model_name_or_path="base", instance_data_dir="photos", instance_prompt="sks", **options
    )


def scheduler(prediction_type: str) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type, clip_sample=False)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_predicting_the_target_exactly_recovers_the_latents(prediction_type):
    """The scheduler's own step, an outsider, turns the right prediction back into the clean latents."""
    noise_scheduler = scheduler(prediction_type)
    latents, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for timestep in (1, 400, 900):
        timesteps = torch.tensor([timestep])
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        target = training_target(noise_scheduler, latents, noise, timesteps)
        recovered = noise_scheduler.step(target, timestep, noisy_latents).pred_original_sample
        torch.testing.assert_close(recovered, latents, rtol=1e-2, atol=1e-2)


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(UserError, match="'sample'"):
        training_target(scheduler("sample"), *torch.zeros(2, 1, 4, 8, 8), torch.tensor([1]))


@pytest.mark.parametrize("num_instances, rows", [(1, 2), (2, 4), (3, 6)])
def test_instance_rows_and_class_rows_are_averaged_apart(num_instances, rows):
    """Row i is off by i + 1 everywhere: its mean squared error is (i + 1)²."""
    target = torch.randn(rows, 4, 2, 2)
    prediction = target + torch.arange(1.0, rows + 1)[:, None, None, None]
    instance_loss, prior_loss = dreambooth_losses(prediction, target, num_instances)
    squares = [(i + 1) ** 2 for i in range(rows)]
    assert instance_loss.item() == pytest.approx(sum(squares[:num_instances]) / num_instances)
    assert prior_loss.item() == pytest.approx(sum(squares[num_instances:]) / (rows - num_instances))


def test_without_class_rows_the_prior_loss_is_zero():
    instance_loss, prior_loss = dreambooth_losses(torch.ones(2, 4, 2, 2), torch.zeros(2, 4, 2, 2), 2)
    assert (instance_loss.item(), prior_loss.item()) == (1, 0)


def test_losses_of_half_precision_predictions_are_computed_in_fp32():
    prediction = torch.full((1, 4, 2, 2), 300.0, dtype=torch.float16)  # its square overflows fp16
    assert dreambooth_losses(prediction, torch.zeros_like(prediction), 1)[0].item() == 90_000


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def batch(seeds, pixel_values=None) -> Batch:
    rows = len(seeds)
    pixel_values = torch.zeros(rows, 3, 16, 16) if pixel_values is None else pixel_values
    return Batch(pixel_values, torch.zeros(rows, dtype=torch.int64), torch.tensor(seeds), num_instances=rows)


def test_noise_timesteps_and_latents_of_a_row_depend_on_its_seed_alone(vae):
    noise, timesteps, latents = draw_latents(vae, batch([5, 6, 7]), 1000)
    alone = draw_latents(vae, batch([6]), 1000)
    for together, single in zip((noise, timesteps, latents), alone):
        torch.testing.assert_close(together[1:2], single)
    assert noise.shape == latents.shape == (3, 4, 8, 8)
    assert not torch.allclose(noise[0], noise[1]) and not torch.allclose(latents[0], latents[1])
    assert not torch.allclose(noise, latents)


def test_latents_are_scaled_samples_of_the_vae_s_posterior(vae):
    pixels = torch.rand(1, 3, 16, 16).expand(400, -1, -1, -1) * 2 - 1
    _, _, latents = draw_latents(vae, batch(list(range(400)), pixels), 1000)
    posterior = vae.encode(pixels[:1]).latent_dist
    torch.testing.assert_close(latents.mean(0), 0.5 * posterior.mean[0], atol=0.15, rtol=0)
    torch.testing.assert_close(latents.std(0), 0.5 * posterior.std[0], rtol=0.2, atol=0)


def test_noise_is_normal_and_timesteps_are_uniform(vae):
    noise, timesteps, _ = draw_latents(vae, batch(list(range(2000))), 1000)
    assert noise.mean().abs() < 0.01 and noise.std().item() == pytest.approx(1, abs=0.01)
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    counts = torch.histc(timesteps.float(), bins=10, min=0, max=1000)
    assert counts.min() > 150 and counts.max() < 250


@pytest.mark.parametrize(
    "options, ranks, steps",
    [
        ({}, 1, 500),
        ({"max_train_steps": 7}, 1, 7),
        ({"num_train_epochs": 3}, 1, 15),
        ({"num_train_epochs": 3, "train_batch_size": 2, "gradient_accumulation_steps": 2}, 1, 6),
        ({"num_train_epochs": 3}, 2, 9),
        ({"num_train_epochs": 3, "max_train_steps": 7}, 1, 7),
    ],
)
def test_steps_to_train_on_five_photos(options, ranks, steps):
    assert count_steps(5, config(**options), ranks) == steps


def test_learning_rate_is_scaled_by_samples_per_step_only_if_asked():
    factor = [torch.nn.Parameter(torch.zeros(2))]
    options = {"learning_rate": 1e-3, "train_batch_size": 2, "gradient_accumulation_steps": 3}
    assert build_optimizer(factor, config(**options), 4).param_groups[0]["lr"] == 1e-3
    assert build_optimizer(factor, config(**options, scale_lr=True), 4).param_groups[0]["lr"] == pytest.approx(24e-3)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("constant", [1, 1, 1, 1]),
        ("constant_with_warmup", [0, 0.5, 1, 1]),
        ("linear", [0, 0.5, 1, 0.5]),
        ("cosine", [0, 0.5, 1, 0.5]),
    ],
)
def test_learning_rate_schedule_in_optimizer_steps(name, expected):
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(2))], config(learning_rate=1.0), 1)
    lr_scheduler = build_lr_scheduler(optimizer, config(lr_scheduler=name, lr_warmup_steps=2), total_steps=4)
    rates = []
    for _ in expected:
        rates.append(lr_scheduler.get_last_lr()[0])
        optimizer.step()
        lr_scheduler.step()
    assert rates == pytest.approx(expected)
