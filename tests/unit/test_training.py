"""The pieces of a step: noise by row, losses by kind of row, how many steps there are."""

import pytest
import torch

from dreambooth.config import TrainingConfig
from dreambooth.training import count_steps, draw_noise, dreambooth_losses


def config(**options) -> TrainingConfig:
    return TrainingConfig(
        pretrained_model_name_or_path="base", instance_data_dir="photos", instance_prompt="sks", **options
    )


def draw(seeds, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return draw_noise(generators, torch.zeros(len(seeds), 4, 8, 8), 1000, config(**options))


@pytest.mark.parametrize("num_instances, rows", [(1, 2), (2, 4), (3, 6)])
def test_instance_rows_and_class_rows_are_averaged_apart(num_instances, rows):
    losses = torch.arange(1.0, rows + 1) ** 2
    instance_loss, prior_loss = dreambooth_losses(losses, num_instances)
    assert instance_loss.item() == pytest.approx(losses[:num_instances].mean().item())
    assert prior_loss.item() == pytest.approx(losses[num_instances:].mean().item())


def test_without_class_rows_the_prior_loss_is_zero():
    instance_loss, prior_loss = dreambooth_losses(torch.ones(2), 2)
    assert (instance_loss.item(), prior_loss.item()) == (1, 0)


def test_noise_and_timesteps_of_a_row_depend_on_its_seed_alone():
    noise, timesteps = draw([5, 6, 7])
    for together, alone in zip((noise, timesteps), draw([6])):
        assert torch.equal(together[1:2], alone)
    assert noise.shape == (3, 4, 8, 8) and not torch.allclose(noise[0], noise[1])


def test_noise_is_normal_and_timesteps_are_uniform():
    noise, timesteps = draw(range(2000))
    assert noise.mean().abs() < 0.01 and noise.std().item() == pytest.approx(1, abs=0.01)
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    counts = torch.histc(timesteps.float(), bins=10, min=0, max=1000)
    assert counts.min() > 150 and counts.max() < 250


def test_timesteps_stay_within_the_limits_and_reach_them():
    _, timesteps = draw(range(200), min_timestep=10, max_timestep=13)
    assert set(timesteps.tolist()) == {10, 11, 12, 13}


def test_noise_offset_is_constant_over_a_channel_and_moves_nothing_else():
    plain, timesteps = draw(range(500))
    noise, same = draw(range(500), noise_offset=0.5)
    offsets = (noise - plain).flatten(2)
    assert torch.equal(timesteps, same)
    torch.testing.assert_close(offsets.std(2), torch.zeros(500, 4), atol=1e-5, rtol=0)
    assert offsets.mean(2).std().item() == pytest.approx(0.5, rel=0.1)


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
