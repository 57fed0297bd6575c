"""Latents: sampled from the VAE's moments, and scaled between the VAE and the denoiser."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from dreambooth.base_model.loading import BaseModel, free_memory
from dreambooth.base_model.moments import encode_moments
from dreambooth.data.dataset import Batch

LatentsOf = Callable[[Batch], Tensor]


def latent_source(base: BaseModel, is_cached: bool, keep_vae: bool) -> LatentsOf:
    """Return a function that samples a batch's latents (rows, channels, height, width), fp32, from the VAE's posterior.

    If the moments are cached, the VAE is freed, or moved to the CPU if `keep_vae`: samples are still decoded with it.
    """
    vae = None if is_cached else base.load_vae()
    if is_cached and keep_vae:
        base.load_vae()
        base.pipeline.vae.to("cpu")
        free_memory()
    elif is_cached:
        base.free(["vae"])

    @torch.no_grad()
    def latents_of(batch: Batch) -> Tensor:
        if vae is None:
            moments = batch.moments
        else:
            assert batch.pixel_values is not None  # moments are not cached
            moments = encode_moments(vae, batch.pixel_values)
        assert moments is not None
        posterior = DiagonalGaussianDistribution(moments.float())
        return normalise(posterior.mean + posterior.std * batch.posterior_noise, base.vae_config)

    return latents_of


def normalise(latents: Tensor, vae_config: Mapping[str, Any]) -> Tensor:
    """Return the VAE's latents on the denoiser's scale, by the constants in the VAE's configuration."""
    mean, std = vae_config.get("latents_mean"), vae_config.get("latents_std")
    if mean is not None and std is not None:  # EDM models: per channel
        mean, std = (_per_channel(tuple(values), latents.device).to(latents) for values in (mean, std))
        return (latents - mean) * vae_config["scaling_factor"] / std
    return (latents - (vae_config.get("shift_factor") or 0.0)) * vae_config["scaling_factor"]


@functools.cache  # copying it to the device at every step would make the step wait
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def denormalise(latents: Tensor, vae_config: Mapping[str, Any]) -> Tensor:
    """Return the denoiser's latents on the VAE's scale: the inverse of `normalise`."""
    unit = torch.ones_like(latents)
    offset = normalise(torch.zeros_like(unit), vae_config)
    return (latents - offset) / (normalise(unit, vae_config) - offset)


@contextmanager
def vae_on_device(pipeline: Any, device: torch.device) -> Iterator[None]:
    """Inside this context the VAE is on the device; afterwards it returns to where it was."""
    home = pipeline.vae.device
    pipeline.vae.to(device)
    try:
        yield
    finally:
        pipeline.vae.to(home)
