"""The VAE's moments of photos: encoded once, kept in memory, and in a folder for later runs.

Moments are the mean and the log-variance of an image's latents; what is random in them is drawn anew at every step.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm.auto import tqdm

from dreambooth.base_model.cache import key_of, load_or_make, vae_identity
from dreambooth.data.crops import Crop, Crops
from dreambooth.errors import UserError
from dreambooth.options.training import TrainingConfig

logger = logging.getLogger(__name__)
LoadVae = Callable[[], AutoencoderKL]


def cache_moments(
    crops: Crops, load_vae: LoadVae, config: TrainingConfig, accelerator: Accelerator
) -> dict[Crop, Tensor] | None:
    """Return the moments of every crop of the run, or None if crops vary, or --cache_latents is off.

    Training then needs the VAE no more. `load_vae` is called only if there is something to encode. Raises UserError if
    latents are not finite.
    """
    fixed = None if config.cache_latents == "off" else crops.fixed()
    if fixed is None:
        if config.cache_latents_to_disk:
            logger.warning(
                "--cache_latents_to_disk keeps no photos, since crops are drawn anew at every step; --center_crop or "
                "--cache_latents on fixes them"
            )
        return None
    if config.cache_latents_to_disk:
        return _cache_to_disk(fixed, crops, load_vae, config, accelerator)
    return {crop: _encode(crop, crops, load_vae) for crop in _progress(fixed, accelerator)}


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, pixel_values: Tensor) -> Tensor:
    """Return the moments of images, each encoded alone, so that they do not depend on what else is in a batch.

    pixel_values: (rows, 3, height, width)    ->    (rows, 2 · latent channels, height / 8, width / 8) fp32
    """
    images = pixel_values.to(vae.device, vae.dtype).split(1)
    return torch.cat([vae.encode(image).latent_dist.parameters for image in images]).float()


def _encode(crop: Crop, crops: Crops, load_vae: LoadVae) -> Tensor:
    """Return the moments of one crop, (2 · latent channels, height / 8, width / 8), on the CPU.

    Raises UserError where they are not finite, as those of SDXL's VAE in fp16.
    """
    moments = encode_moments(load_vae(), crops.pixel_values(crop)[None])[0].cpu()
    if not moments.isfinite().all():
        raise UserError(
            f"the VAE's latents of {crops.photo(crop).path} are not finite; use --vae_precision fp32, or "
            "--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix"
        )
    return moments


def _progress(crops: Sequence[Crop], accelerator: Accelerator) -> tqdm:
    return tqdm(crops, desc="Latents", unit="image", disable=not accelerator.is_main_process)


# ---- in a folder ----


def _cache_to_disk(
    fixed: Sequence[Crop],
    crops: Crops,
    load_vae: LoadVae,
    config: TrainingConfig,
    accelerator: Accelerator,
) -> dict[Crop, Tensor]:
    """Return the moments of all crops. Each device encodes its share of those that the folder lacks."""
    folder, identity = Path(config.cache_latents_to_disk), vae_identity(config)

    def load_or_encode(crop: Crop) -> Tensor:
        # The very pixels name the file: content, size, crop and mirroring are all in them.
        pixels = crops.pixels(crop)
        path = folder / f"{key_of(identity, repr(pixels.shape).encode(), pixels.tobytes())}.safetensors"
        return load_or_make(path, lambda: {"moments": _encode(crop, crops, load_vae)})["moments"]

    try:
        folder.mkdir(parents=True, exist_ok=True)
        mine = fixed[accelerator.process_index :: accelerator.num_processes]
        moments = {crop: load_or_encode(crop) for crop in _progress(mine, accelerator)}
        accelerator.wait_for_everyone()
        # What another device has written is read; it is encoded here too where the devices do not share the folder.
        return moments | {crop: load_or_encode(crop) for crop in fixed if crop not in moments}
    except OSError as error:
        raise UserError(f"--cache_latents_to_disk {folder}: {error}") from error
