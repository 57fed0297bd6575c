"""Photos to latents: where a batch's latents come from, and how long the VAE stays for it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from dreambooth.models import free_components

LatentsOf = Callable[[Batch, Sequence[torch.Generator]], Tensor]


def latent_source(
    pipeline: DiffusionPipeline, dataset: DreamBoothDataset, config: TrainingConfig, accelerator: Accelerator
) -> LatentsOf:
    """Return a function that samples a batch's latents (rows, channels, height, width), fp32, from the VAE's posterior.

    Photos are encoded here, once for the whole run, where their crops allow it; the VAE then goes, or, where samples
    are still to be decoded with it, leaves the device.
    """
    vae, vae_config = pipeline.vae, pipeline.vae.config
    if cache_latents(dataset, vae, config, accelerator):
        vae = None
        _release(pipeline, config)

    @torch.no_grad()
    def latents_of(batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        moments = batch.moments if batch.moments is not None else encode_moments(vae, batch.pixel_values, "a batch")
        latents = DiagonalGaussianDistribution(moments.float()).sample(list(generators))
        return normalise(latents, vae_config)

    return latents_of


def normalise(latents: Tensor, vae_config: Mapping[str, Any]) -> Tensor:
    """Return latents as the UNet knows them, by whichever constants the VAE's configuration has."""
    mean, std = vae_config.get("latents_mean"), vae_config.get("latents_std")
    if mean is not None and std is not None:  # EDM models: mean and std of every channel
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
        return (latents - mean) * vae_config["scaling_factor"] / std
    return (latents - (vae_config.get("shift_factor") or 0.0)) * vae_config["scaling_factor"]


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


def _release(pipeline: DiffusionPipeline, config: TrainingConfig) -> None:
    if not config.validation_prompt:
        free_components(pipeline, ["vae"])
        return
    pipeline.vae.to("cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def vae_on_device(pipeline: DiffusionPipeline, device: torch.device) -> Iterator[None]:
    """Have the VAE on the device for a while, wherever it is kept."""
    home = pipeline.vae.device
    pipeline.vae.to(device)
    try:
        yield
    finally:
        pipeline.vae.to(home)
