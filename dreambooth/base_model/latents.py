"""Latents: where a batch's come from, how long the VAE stays for it, and the scale on which the denoiser knows them."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from dreambooth.base_model.loading import BaseModel, free_memory
from dreambooth.base_model.moments import encode_moments
from dreambooth.data.dataset import Batch

LatentsOf = Callable[[Batch], Tensor]


def latent_source(base: BaseModel, is_cached: bool, keep_vae: bool) -> LatentsOf:
    """Return a function that samples a batch's latents (rows, channels, height, width), fp32, from the VAE's posterior.

    If the moments of photos are cached, the VAE is freed, or, if `keep_vae` since samples are still to be decoded with
    it, leaves the device.
    """
    vae = None if is_cached else base.load_vae()
    if is_cached and keep_vae:
        base.load_vae().to("cpu")
        free_memory()
    elif is_cached:
        base.free(["vae"])

    @torch.no_grad()
    def latents_of(batch: Batch) -> Tensor:
        moments = batch.moments if vae is None else encode_moments(vae, batch.pixel_values)
        posterior = DiagonalGaussianDistribution(moments.float())
        return normalise(posterior.mean + posterior.std * batch.posterior_noise, base.vae_config)

    return latents_of


def normalise(latents: Tensor, vae_config: Mapping[str, Any]) -> Tensor:
    """Return latents as the UNet knows them, by whichever constants the VAE's configuration has."""
    mean, std = vae_config.get("latents_mean"), vae_config.get("latents_std")
    if mean is not None and std is not None:  # EDM models: mean and std of every channel
        mean, std = (_per_channel(tuple(values), latents.device).to(latents) for values in (mean, std))
        return (latents - mean) * vae_config["scaling_factor"] / std
    return (latents - (vae_config.get("shift_factor") or 0.0)) * vae_config["scaling_factor"]


@functools.cache  # at every step anew, copying it would have the step wait for the device
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def denormalise(latents: Tensor, vae_config: Mapping[str, Any]) -> Tensor:
    """Return latents as the VAE knows them: the inverse of `normalise`."""
    unit = torch.ones_like(latents)
    offset = normalise(torch.zeros_like(unit), vae_config)
    return (latents - offset) / (normalise(unit, vae_config) - offset)


@contextmanager
def vae_on_device(pipeline: DiffusionPipeline, device: torch.device) -> Iterator[None]:
    """Have the VAE on the device for a while, wherever it is kept."""
    home = pipeline.vae.device
    pipeline.vae.to(device)
    try:
        yield
    finally:
        pipeline.vae.to(home)
