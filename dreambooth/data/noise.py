"""Noise and timesteps of the rows of a batch, each drawn from the row's own seed while the batch is prepared.

They are drawn on the CPU, which makes them the same on every device and for any number of devices.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dreambooth.data.sizes import Size
from dreambooth.options.steps import LossOptions


@dataclass(frozen=True)
class RowNoise:
    """What is random in a row."""

    posterior_noise: Tensor  # (channels, height, width) of the latents: for sampling them from the VAE's moments
    noise: Tensor  # (channels, height, width) of the latents: what is added to them
    timestep: Tensor  # () int64, 0 is the cleanest


Draw = Callable[[int, Size], RowNoise]


def noise_drawer(channels: int, factor: int, num_timesteps: int, config: LossOptions) -> Draw:
    """Return a function from the seed and the image size, px, of a row to its noise: `draw_noise` for one base model.

    channels: of its latents. factor: px per latent. num_timesteps: of its noise process.
    """
    return functools.partial(draw_noise, channels=channels, factor=factor, num_timesteps=num_timesteps, config=config)


def draw_noise(seed: int, size: Size, channels: int, factor: int, num_timesteps: int, config: LossOptions) -> RowNoise:
    """Return the noise of a row, fp32. size: (height, width) of its image, px; factor: px per latent."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    shape = (channels, height // factor, width // factor)
    last = config.highest_timestep(num_timesteps)
    posterior_noise, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    timestep = torch.randint(config.min_timestep, last + 1, (), generator=generator)
    if config.noise_offset:
        noise = noise + config.noise_offset * torch.randn(channels, 1, 1, generator=generator)
    return RowNoise(posterior_noise, noise, timestep)
