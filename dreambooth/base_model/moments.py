"""The VAE's moments of photos: encoded once, kept in memory and, for later runs, in a folder.

Moments are the mean and log-variance of an image's latents. The latents are sampled from them anew at every step.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor
from tqdm.auto import tqdm

from dreambooth.base_model.cache import vae_identity
from dreambooth.data.crops import Crop, Crops
from dreambooth.errors import UserError
from dreambooth.options.training import TrainingConfig
from kron_formats.kept import key_of, load_or_make

logger = logging.getLogger(__name__)
LoadVae = Callable[[], AutoencoderKL]
MomentsOf = Callable[[Crop], Tensor]


def cache_moments(
    crops: Crops, load_vae: LoadVae, config: TrainingConfig, accelerator: Accelerator
) -> dict[Crop, Tensor] | None:
    """Return the moments of every crop of the run, or None if crops vary or --cache_latents is off.

    With moments, training no longer needs the VAE. `load_vae` is called only if there is something to encode. Raises
    UserError if latents are not finite.
    """
    fixed = None if config.cache_latents == "off" else crops.fixed()
    if fixed is None:
        if config.cache_latents_to_disk:
            logger.warning(
                "--cache_latents_to_disk does not keep photos, because their crops vary; --center_crop or "
                "--cache_latents on fixes them"
            )
        return None
    if config.cache_latents_to_disk:
        folder = Path(config.cache_latents_to_disk)
        moments = _cache_to_disk(fixed, crops, load_vae, folder, vae_identity(config), accelerator)
    else:
        moments = _gather(fixed, lambda crop: _encode(crop, crops, load_vae), accelerator)
    for photo in (*crops.photos, *crops.class_photos):
        photo.stored.release()  # from now on, its moments stand for it
    return moments


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, pixel_values: Tensor) -> Tensor:
    """Return the moments of images. Each is encoded alone: the batch it is in must not change its bits.

    pixel_values: (rows, 3, height, width)    ->    (rows, 2 · latent channels, height / 8, width / 8) fp32
    """
    images = pixel_values.to(vae.device, vae.dtype).split(1)
    encoded = (cast(AutoencoderKLOutput, vae.encode(image)) for image in images)  # a tuple only if return_dict=False
    return torch.cat([output.latent_dist.parameters for output in encoded]).float()


def _encode(crop: Crop, crops: Crops, load_vae: LoadVae) -> Tensor:
    """Return the moments of one crop, (2 · latent channels, height / 8, width / 8), on the CPU.

    Raises UserError if they are not finite, as with SDXL's VAE in fp16.
    """
    moments = encode_moments(load_vae(), crops.pixel_values(crop)[None])[0].cpu()
    if not moments.isfinite().all():
        raise UserError(
            f"the VAE's latents of {crops.photo(crop).path} are not finite; use --vae_precision fp32, or "
            "--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix"
        )
    return moments


def _gather(crops: Sequence[Crop], moments_of: MomentsOf, accelerator: Accelerator) -> dict[Crop, Tensor]:
    """Return the moments of crops, under a progress bar that only the main process shows.

    Those of one shape are rows of one tensor. Kept singly, they would lie scattered among the larger, short-lived
    tensors of the encoding, whose memory could then not be used again: several times their own size.
    """
    counts, rooms = Counter(crop.shape for crop in crops), {}
    gathered = {}
    quiet = not (crops and accelerator.is_main_process)
    for crop in tqdm(crops, desc="Latents", unit="image", disable=quiet):
        moments = moments_of(crop)
        if crop.shape not in rooms:
            rooms[crop.shape] = iter(moments.new_empty(counts[crop.shape], *moments.shape))
        gathered[crop] = next(rooms[crop.shape]).copy_(moments)
    return gathered


# ---- in a folder ----


def _cache_to_disk(
    fixed: Sequence[Crop],
    crops: Crops,
    load_vae: LoadVae,
    folder: Path,
    identity: bytes,
    accelerator: Accelerator,
) -> dict[Crop, Tensor]:
    """Return the moments of all crops. Each process encodes its share of those that the folder lacks.

    `identity` is the VAE's. Raises UserError if the folder cannot be used.
    """

    def load_or_encode(crop: Crop) -> Tensor:
        # The file is named by the pixels, which depend on the photo, its size, crop and mirroring.
        pixels = crops.pixels(crop)
        path = folder / f"{key_of(identity, repr(pixels.shape).encode(), pixels.tobytes())}.safetensors"
        return load_or_make(path, lambda: {"moments": _encode(crop, crops, load_vae)})["moments"]

    try:
        folder.mkdir(parents=True, exist_ok=True)
        mine = fixed[accelerator.process_index :: accelerator.num_processes]
        moments = _gather(mine, load_or_encode, accelerator)
        accelerator.wait_for_everyone()
        # The others' shares are read; if the processes do not share the folder, they are encoded here too.
        return moments | _gather([crop for crop in fixed if crop not in moments], load_or_encode, accelerator)
    except OSError as error:
        raise UserError(f"--cache_latents_to_disk {folder}: {error}") from error
