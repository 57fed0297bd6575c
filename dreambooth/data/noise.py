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

NOISIEST, THINNED = 0.8, 0.25  # above this share of the timesteps, how often one is drawn, beside 1 below


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
    posterior_noise, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    timestep = _draw_timestep(generator, num_timesteps, config)
    if config.noise_offset:
        noise = noise + config.noise_offset * torch.randn(channels, 1, 1, generator=generator)
    return RowNoise(posterior_noise, noise, timestep)


def _draw_timestep(generator: torch.Generator, num_timesteps: int, config: LossOptions) -> Tensor:
    """Return a timestep, () int64."""
    first, end = config.min_timestep, config.highest_timestep(num_timesteps) + 1
    if config.timestep_sampling == "uniform":
        return torch.randint(first, end, (), generator=generator)
    thinned = min(max(round(NOISIEST * num_timesteps), first), end)  # the first of those that are drawn less often
    usual, rest = thinned - first, (end - thinned) * THINNED
    place = torch.rand((), generator=generator, dtype=torch.float64) * (usual + rest)
    return torch.where(place < usual, first + place, thinned + (place - usual) / THINNED).clamp(max=end - 1).long()
