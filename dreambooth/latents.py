"""The VAE's moments of photos: encoded once, kept in memory, and in a folder for later runs.

Moments are the mean and the log-variance of an image's latents; what is random in them is drawn anew at every step.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from dreambooth.config import TrainingConfig, UserError
from dreambooth.data import Crop, DreamBoothDataset

logger = logging.getLogger(__name__)


def cache_latents(
    dataset: DreamBoothDataset, vae: AutoencoderKL, config: TrainingConfig, accelerator: Accelerator
) -> bool:
    """Give the dataset the moments of every crop that it can show, and return True; False where crops vary.

    Afterwards its samples hold moments instead of pixel values, and training needs the VAE no more. Raises UserError
    for latents that are not finite.
    """
    crops = None if config.cache_latents == "off" else dataset.fixed_crops()
    if crops is None:
        if config.cache_latents_to_disk:
            logger.warning(
                "--cache_latents_to_disk keeps nothing, since crops are drawn anew at every step; --center_crop or "
                "--cache_latents on fixes them"
            )
        return False
    if config.cache_latents_to_disk:
        moments = _cache_to_disk(crops, dataset, vae, Path(config.cache_latents_to_disk), accelerator)
    else:
        moments = {crop: _encode(crop, dataset, vae) for crop in _progress(crops, accelerator)}
    dataset.moments = moments
    return True


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, pixel_values: Tensor, name: str | Path) -> Tensor:
    """Return the moments of images, each encoded alone, so that they do not depend on what else is in a batch.

    pixel_values: (rows, 3, height, width)    ->    (rows, 2 · latent channels, height / 8, width / 8) fp32

    Raises UserError, calling the images by `name`, where the moments are not finite, as those of SDXL's VAE in fp16.
    """
    images = pixel_values.to(vae.device, vae.dtype).split(1)
    moments = torch.cat([vae.encode(image).latent_dist.parameters for image in images]).float()
    if not moments.isfinite().all():
        raise UserError(
            f"the VAE's latents of {name} are not finite; use --vae_precision fp32, or "
            "--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix"
        )
    return moments


def _encode(crop: Crop, dataset: DreamBoothDataset, vae: AutoencoderKL) -> Tensor:
    """Return the moments of one crop, (2 · latent channels, height / 8, width / 8), on the CPU."""
    return encode_moments(vae, dataset.pixel_values(crop)[None], dataset.photo(crop).path)[0].cpu()


def _progress(crops: Sequence[Crop], accelerator: Accelerator) -> tqdm:
    return tqdm(crops, desc="Latents", unit="image", disable=not accelerator.is_main_process)


# ---- in a folder ----


def _cache_to_disk(
    crops: Sequence[Crop], dataset: DreamBoothDataset, vae: AutoencoderKL, folder: Path, accelerator: Accelerator
) -> dict[Crop, Tensor]:
    """Return the moments of all crops. Each device encodes its share of those that the folder lacks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        identity = vae_identity(vae)
        paths = {crop: folder / f"{_key(dataset.pixels(crop), identity)}.safetensors" for crop in crops}
        mine = crops[accelerator.process_index :: accelerator.num_processes]
        moments = {crop: _load_or_encode(crop, paths[crop], dataset, vae) for crop in _progress(mine, accelerator)}
        accelerator.wait_for_everyone()
        # What another device has written is read; it is encoded here too where the devices do not share the folder.
        others = [crop for crop in crops if crop not in moments]
        return moments | {crop: _load_or_encode(crop, paths[crop], dataset, vae) for crop in others}
    except OSError as error:
        raise UserError(f"--cache_latents_to_disk {folder}: {error}") from error


def _load_or_encode(crop: Crop, path: Path, dataset: DreamBoothDataset, vae: AutoencoderKL) -> Tensor:
    moments = load_moments(path)
    if moments is None:
        moments = _encode(crop, dataset, vae)
        save_moments(moments, path)
    return moments


def vae_identity(vae: AutoencoderKL) -> bytes:
    """Return a digest of what the VAE's moments depend on: its configuration, its weights and their precision."""
    digest = hashlib.sha256(json.dumps(public_config(vae), sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.digest()


def public_config(vae: AutoencoderKL) -> dict[str, object]:
    """Return the configuration without where it came from and which version of diffusers wrote it."""
    return {name: value for name, value in vae.config.items() if not name.startswith("_")}


def _key(pixels: np.ndarray, identity: bytes) -> str:
    """Return a name for the moments of these very pixels: content, size, crop and mirroring are all in them."""
    digest = hashlib.sha256(identity)
    digest.update(str(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels))
    return digest.hexdigest()


def save_moments(moments: Tensor, path: Path) -> None:
    """Write a file that is there as a whole or not at all."""
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_bytes(save({"moments": moments}, metadata={"sha256": _checksum(moments)}))
    os.replace(unfinished, path)


def load_moments(path: Path) -> Tensor | None:
    """Return what `save_moments` wrote, or None where the file is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            moments, metadata = file.get_tensor("moments"), file.metadata() or {}
    except (FileNotFoundError, SafetensorError):
        return None
    return moments if metadata.get("sha256") == _checksum(moments) else None


def _checksum(tensor: Tensor) -> str:
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
