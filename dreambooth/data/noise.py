"""What is random in a row of a batch: drawn from the row's own seed, while the batch is prepared.

Drawn on the CPU, so that every device and every split over devices sees the same numbers.
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
    """The random numbers of a row."""

    posterior_noise: Tensor  # (channels, height, width) of the latents: samples them from what the VAE says of an image
    noise: Tensor  # (channels, height, width) of the latents: what they are hidden under
    timestep: Tensor  # () int64, 0 is the cleanest


Draw = Callable[[int, Size], RowNoise]


def noise_drawer(channels: int, factor: int, num_timesteps: int, config: LossOptions) -> Draw:
    """Return a function from a row's seed and image size, px, to its noise for a base model: its latents' channels, the
    px that are one latent, and its number of timesteps."""
    return functools.partial(draw_noise, channels=channels, factor=factor, num_timesteps=num_timesteps, config=config)


def draw_noise(seed: int, size: Size, channels: int, factor: int, num_timesteps: int, config: LossOptions) -> RowNoise:
    """Return the noise of a row, fp32. size: (height, width) of its image, px; `factor` px are one latent."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    shape = (channels, height // factor, width // factor)
    last = num_timesteps - 1 if config.max_timestep is None else config.max_timestep
    posterior_noise, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    timestep = torch.randint(config.min_timestep, last + 1, (), generator=generator)
    if config.noise_offset:
        noise = noise + config.noise_offset * torch.randn(channels, 1, 1, generator=generator)
    return RowNoise(posterior_noise, noise, timestep)
