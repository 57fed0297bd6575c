"""Class images: what the base model itself draws for the class prompt, kept in a folder and topped up when short."""

import logging
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from dreambooth.config import TrainingConfig
from dreambooth.models import ensure_text_encoders, ensure_vae
from dreambooth.order import Stream, seed_of
from dreambooth.photos import NoPhotosError, Photo, read_class_photos
from dreambooth.vae import draw_images

logger = logging.getLogger(__name__)


def ensure_class_images(pipeline: DiffusionPipeline, config: TrainingConfig, accelerator: Accelerator) -> list[Photo]:
    """Return the class photos, after the devices together have drawn those that the folder lacks.

    Image i is drawn from a seed of its own, so no device and no later top-up draws it again.
    """
    folder = Path(config.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    photos = _read(config)
    missing = _missing_indices(photos, config.num_class_images)
    accelerator.wait_for_everyone()  # all have counted before the first new image appears
    if not missing:
        return photos
    ensure_vae(pipeline, config, accelerator)
    ensure_text_encoders(pipeline, config, accelerator)
    logger.info("Drawing %d class images for '%s' into %s", len(missing), config.class_prompt, folder)
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    progress = tqdm(total=len(mine), desc="Class images", unit="image", disable=not accelerator.is_local_main_process)
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(mine), config.sample_batch_size):
        indices = mine[start : start + config.sample_batch_size]
        for index, image in zip(indices, _draw(pipeline, indices, config)):
            unfinished = folder / f".{_name(index)}.tmp"
            image.save(unfinished, format="PNG")
            os.replace(unfinished, folder / _name(index))
        progress.update(len(indices))
    progress.close()
    accelerator.wait_for_everyone()
    return _read(config)


def _draw(pipeline: DiffusionPipeline, indices: list[int], config: TrainingConfig) -> list[Image.Image]:
    return draw_images(
        pipeline,
        prompt=[config.class_prompt] * len(indices),
        negative_prompt=[config.prior_negative_prompt] * len(indices),
        height=config.resolution,
        width=config.resolution,
        num_inference_steps=config.prior_num_inference_steps,
        guidance_scale=config.prior_guidance_scale,
        generator=[torch.Generator().manual_seed(seed_of(config.seed, Stream.CLASS_IMAGE, i)) for i in indices],
    )


def _read(config: TrainingConfig) -> list[Photo]:
    try:
        return read_class_photos(config)
    except NoPhotosError:
        return []  # nothing readable yet: all are to be drawn


def _missing_indices(photos: list[Photo], wanted: int) -> list[int]:
    """Return the lowest numbers that no image in the folder bears, as many as there are images short."""
    names = {photo.path.name for photo in photos}
    short = max(0, wanted - len(photos))
    free = (index for index in range(wanted) if _name(index) not in names)
    return [index for _, index in zip(range(short), free)]


def _name(index: int) -> str:
    return f"class-{index:06d}.png"
