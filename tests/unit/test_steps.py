"""The pieces of a step: noise by row, how many steps there are; and that none waits."""

import itertools
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import EDMEulerScheduler

from dreambooth.base_model.process import noise_process
from dreambooth.data.crops import Crops
from dreambooth.data.dataset import DreamBoothDataset, build_loader
from dreambooth.data.noise import draw_noise, noise_drawer
from dreambooth.data.photos import Photo
from dreambooth.data.pixels import Pixels
from dreambooth.loop.health import read_reports
from dreambooth.loop.steps import Denoiser, count_steps, train_steps
from dreambooth.options.training import TrainingConfig
from toyworld.tiny_pipeline import build_pipeline, build_scheduler


def config(**options) -> TrainingConfig:
    return TrainingConfig(
        pretrained_model_name_or_path="base", instance_data_dir="photos", instance_prompt="sks", **options
    )


def draw(seeds, **options):
    rows = [draw_noise(seed, (64, 64), 4, 8, 1000, config(**options)) for seed in seeds]
    return torch.stack([row.noise for row in rows]), torch.stack([row.timestep for row in rows])


def test_a_row_has_two_noises_and_neither_moves_the_global_generator():
    state = torch.get_rng_state()
    row = draw_noise(5, (64, 96), 3, 4, 1000, config())
    assert row.noise.shape == row.posterior_noise.shape == (3, 16, 24)
    assert not torch.allclose(row.noise, row.posterior_noise)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_normal_and_timesteps_are_uniform():
    noise, timesteps = draw(range(2000))
    assert noise.mean().abs() < 0.01 and noise.std().item() == pytest.approx(1, abs=0.01)
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    counts = torch.histc(timesteps.float(), bins=10, min=0, max=1000)
    assert counts.min() > 150 and counts.max() < 250


def test_timesteps_stay_within_the_limits_and_reach_them():
    _, timesteps = draw(range(200), min_timestep=10, max_timestep=13)
    assert set(timesteps.tolist()) == {10, 11, 12, 13}


def test_thinned_timesteps_are_a_quarter_as_often_in_the_noisiest_fifth_and_noise_is_the_same():
    noise, timesteps = draw(range(4000), timestep_sampling="thinned")
    counts = torch.histc(timesteps.float(), bins=20, min=0, max=1000)
    expected = torch.cat([torch.full((16,), 1.0), torch.full((4,), 0.25)]) * 4000 / 17
    assert ((counts - expected).abs() < 4 * expected.sqrt()).all()
    assert torch.equal(noise, draw(range(4000))[0])


@pytest.mark.parametrize("first, last", [(798, 801), (900, 903), (10, 13), (999, 999)])
def test_thinned_timesteps_stay_within_the_limits_and_reach_them(first, last):
    limits = {"min_timestep": first, "max_timestep": last}
    _, timesteps = draw(range(300), timestep_sampling="thinned", **limits)
    assert set(timesteps.tolist()) == set(range(first, last + 1))


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


# ---- on a device that holds no values, nothing can be read: a step that would wait for one fails ----


class MetaAccelerator(Accelerator):
    device = torch.device("meta")


@pytest.fixture
def step_on_meta(fresh_accelerator):
    """Return a function that does two optimizer steps on the meta device and returns their reports."""

    def run(scheduler, **options):
        settings = config(resolution=64, train_batch_size=2, gradient_accumulation_steps=2, **options)
        photo = Photo(
            Path("a.png"), Pixels(np.zeros((64, 80, 3), np.uint8)), "", "", (64, 80), np.full((64, 80), 255, np.uint8)
        )
        crops = Crops([photo], [photo] * settings.uses_class_images, settings)
        dataset = DreamBoothDataset(crops, [""], None, settings)
        pipeline = build_pipeline("sd")
        unet = pipeline.unet.to("meta")
        process = noise_process(scheduler, settings)
        hidden = torch.zeros(1, 77, unet.config.cross_attention_dim, device="meta")
        denoiser = Denoiser(
            unet, lambda rows: {"hidden": hidden[rows]}, lambda e, _: {"encoder_hidden_states": e["hidden"]}
        )
        optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        draw = noise_drawer(unet.config.in_channels, pipeline.vae_scale_factor, process.num_timesteps, settings)
        batches = build_loader(dataset, draw, settings, 0, 1, 0)
        reports = train_steps(
            MetaAccelerator(cpu=True, gradient_accumulation_steps=2),
            denoiser,
            lambda batch: batch.posterior_noise,
            process,
            nullcontext,
            batches,
            optimizer,
            schedule,
            settings,
        )
        return list(itertools.islice(reports, 2))

    return run


PRIOR = {"with_prior_preservation": True, "class_prompt": "a dog"}
STEPS = {
    "plain": (build_scheduler("epsilon"), {}),
    "snr": (build_scheduler("v_prediction"), {"snr_gamma": 5.0, **PRIOR}),
    "huber": (build_scheduler("epsilon"), {"loss_type": "huber", **PRIOR, "prior_source": "base_model"}),
    "edm": (EDMEulerScheduler(sigma_data=0.5), {"noise_offset": 0.1}),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_reads_nothing_from_the_device(name, step_on_meta):
    scheduler, options = STEPS[name]
    reports = step_on_meta(scheduler, **options)
    assert len(reports) == 2 and all(report.numbers.is_meta for report in reports)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        read_reports(reports)


def test_steps_are_read_only_where_some_may_be_skipped(step_on_meta):
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        step_on_meta(build_scheduler("epsilon"), skip_nonfinite=1)
