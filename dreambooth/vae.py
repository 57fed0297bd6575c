"""Photos to latents: where a batch's latents come from, and how long the VAE stays for it."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor

from dreambooth.config import TrainingConfig
from dreambooth.data import Batch, DreamBoothDataset
from dreambooth.latents import cache_latents, encode_moments
from dreambooth.models import ensure_vae, free_components, free_memory, load_vae_config

LatentsOf = Callable[[Batch], Tensor]


def latent_source(
    pipeline: DiffusionPipeline, dataset: DreamBoothDataset, config: TrainingConfig, accelerator: Accelerator
) -> LatentsOf:
    """Return a function that samples a batch's latents (rows, channels, height, width), fp32, from the VAE's posterior.

    Photos are encoded here, once for the whole run, where their crops allow it; the VAE then goes, or, where samples
    are still to be decoded with it, leaves the device. It is not read where it has nothing to do.
    """
    load_vae = functools.partial(ensure_vae, pipeline, config, accelerator)
    cached = cache_latents(dataset, load_vae, config, accelerator)
    vae = None if cached else load_vae()
    vae_config = load_vae_config(config)
    if cached and config.validation_prompt:
        load_vae().to("cpu")
        free_memory()
    elif cached:
        free_components(pipeline, ["vae"])

    @torch.no_grad()
    def latents_of(batch: Batch) -> Tensor:
        moments = batch.moments if vae is None else encode_moments(vae, batch.pixel_values)
        posterior = DiagonalGaussianDistribution(moments.float())
        return normalise(posterior.mean + posterior.std * batch.posterior_noise, vae_config)

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


@torch.no_grad()
def draw_images(pipeline: DiffusionPipeline, **arguments) -> list[Image.Image]:
    """Return what the pipeline draws, decoded one image at a time in the VAE's own precision, whatever the UNet's."""
    vae = pipeline.vae
    latents = denormalise(pipeline(**arguments, output_type="latent").images.float(), vae.config).to(vae.dtype)
    images = torch.cat([vae.decode(image).sample for image in latents.split(1)])
    return pipeline.image_processor.postprocess(images.float(), output_type="pil")


@contextmanager
def vae_on_device(pipeline: DiffusionPipeline, device: torch.device) -> Iterator[None]:
    """Have the VAE on the device for a while, wherever it is kept."""
    home = pipeline.vae.device
    pipeline.vae.to(device)
    try:
        yield
    finally:
        pipeline.vae.to(home)
