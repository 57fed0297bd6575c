"""Class images: drawn by the base model for the class prompt, and kept in a folder that is topped up if short."""

import logging
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from dreambooth.base_model.loading import BaseModel
from dreambooth.data.photos import NoPhotosError, Photo, read_class_photos
from dreambooth.drawing.draw import draw_batches
from dreambooth.options.training import TrainingConfig
from dreambooth.seeds import Stream, seed_of
from kron_formats.files import whole_file

logger = logging.getLogger(__name__)


def ensure_class_images(base: BaseModel, config: TrainingConfig) -> list[Photo]:
    """Return the class photos, once all processes together have drawn those that the folder lacks.

    Image i is drawn from a seed of its own, so no two processes and no later top-up draw the same image.
    All processes must call this.
    """
    assert config.class_data_dir is not None  # PriorOptions.check requires it
    accelerator, folder = base.accelerator, Path(config.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    photos = _read(config)
    missing = _missing_indices(photos, config.num_class_images)
    accelerator.wait_for_everyone()  # all must count before the first new image appears
    if not missing:
        return photos
    logger.info("Drawing %d class images for '%s' into %s", len(missing), config.class_prompt, folder)
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    progress = tqdm(total=len(mine), desc="Class images", unit="image", disable=not accelerator.is_local_main_process)
    indices = iter(mine)
    for batch in _draw(base, mine, config):
        for image, index in zip(batch, indices):  # batch first: zip would else consume an index of the next batch
            with whole_file(folder / _name(index)) as unfinished:
                image.save(unfinished, format="PNG")
        progress.update(len(batch))
    progress.close()
    accelerator.wait_for_everyone()
    return _read(config)


def _draw(base: BaseModel, indices: list[int], config: TrainingConfig) -> Iterator[list[Image.Image]]:
    base.load_vae()
    base.load_text_encoders()
    base.pipeline.set_progress_bar_config(disable=True)
    return draw_batches(
        base.pipeline,
        [seed_of(config.seed, Stream.CLASS_IMAGE, index) for index in indices],
        config.sample_batch_size,
        prompt=config.class_prompt,
        negative_prompt=config.prior_negative_prompt,
        max_token_length=config.max_token_length,
        height=config.resolution,
        width=config.resolution,
        num_inference_steps=config.prior_num_inference_steps,
        guidance_scale=config.prior_guidance_scale,
    )


def _read(config: TrainingConfig) -> list[Photo]:
    try:
        return read_class_photos(config)
    except NoPhotosError:
        return []  # all are still to be drawn


def _missing_indices(photos: list[Photo], wanted: int) -> list[int]:
    """Return the lowest numbers that no image in the folder has yet, one for each missing image."""
    names = {photo.path.name for photo in photos}
    short = max(0, wanted - len(photos))
    free = (index for index in range(wanted) if _name(index) not in names)
    return [index for _, index in zip(range(short), free)]


def _name(index: int) -> str:
    return f"class-{index:06d}.png"
