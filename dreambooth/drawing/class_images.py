"""Class images: drawn by the base model for the class prompt, and kept in a folder that is topped up if short."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from dreambooth.base_model.loading import BaseModel
from dreambooth.data.folder import NoPhotosError, list_folder
from dreambooth.data.images import read_text
from dreambooth.data.photos import Photo, read_class_photos
from dreambooth.drawing.draw import draw_batches
from dreambooth.options.subjects import Subject
from dreambooth.options.training import TrainingConfig
from dreambooth.seeds import Stream, seed_of
from kron_formats.files import excerpt, whole_file
from kron_formats.paths import shared_name

logger = logging.getLogger(__name__)

PROMPT_KEY = "class_prompt"  # in the text of an image that is drawn here: what it was drawn for


def ensure_class_images(base: BaseModel, config: TrainingConfig) -> list[Photo]:
    """Return num_class_images photos of each class, once all processes together have drawn those that its folder lacks.

    Image i of a class is drawn from a seed of its own, so no two processes and no later top-up draw the same image.
    All processes must call this.
    """
    return [photo for subject in config.one_of_each_class for photo in _ensure(subject, base, config)]


def _ensure(subject: Subject, base: BaseModel, config: TrainingConfig) -> list[Photo]:
    """Return the photos of a subject's class."""
    _folder(subject, config).mkdir(parents=True, exist_ok=True)
    photos = _read(subject, config)
    missing = _missing_indices(photos, config.num_class_images)
    base.accelerator.wait_for_everyone()  # all must count before the first new image appears
    _warn_of_other_prompts(photos, subject, config)
    if missing:
        _draw_missing(missing, subject, base, config)
        photos = _read(subject, config)
    _say_which(photos, subject, config)
    return photos


def _folder(subject: Subject, config: TrainingConfig) -> Path:
    assert config.class_data_dir is not None  # PriorOptions.check requires it
    return Path(config.class_data_dir) / subject.class_folder


def _draw_missing(missing: Sequence[int], subject: Subject, base: BaseModel, config: TrainingConfig) -> None:
    """Draw the missing images into the folder, each process its share."""
    accelerator, folder = base.accelerator, _folder(subject, config)
    logger.info("Drawing %d class images for '%s' into %s", len(missing), subject.class_prompt, folder)
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    progress = tqdm(total=len(mine), desc="Class images", unit="image", disable=not accelerator.is_local_main_process)
    indices = iter(mine)
    for batch in _draw(base, mine, subject, config):
        for image, index in zip(batch, indices):  # batch first: zip would else consume an index of the next batch
            with whole_file(folder / _name(index)) as unfinished:
                image.save(unfinished, format="PNG", pnginfo=_origin(index, subject, config))
        progress.update(len(batch))
    progress.close()
    accelerator.wait_for_everyone()


def _draw(
    base: BaseModel, indices: Sequence[int], subject: Subject, config: TrainingConfig
) -> Iterator[list[Image.Image]]:
    base.load_vae()
    base.load_text_encoders()
    base.pipeline.set_progress_bar_config(disable=True)
    return draw_batches(
        base.pipeline,
        [_seed(index, config) for index in indices],
        config.sample_batch_size,
        prompt=subject.class_prompt,
        negative_prompt=config.prior_negative_prompt,
        max_token_length=config.max_token_length,
        height=config.resolution,
        width=config.resolution,
        num_inference_steps=config.prior_num_inference_steps,
        guidance_scale=config.prior_guidance_scale,
    )


def _seed(index: int, config: TrainingConfig) -> int:
    return seed_of(config.seed if config.prior_seed is None else config.prior_seed, Stream.CLASS_IMAGE, index)


def _origin(index: int, subject: Subject, config: TrainingConfig) -> PngInfo:
    """Return what is written into an image: what it was drawn for, by which base model and from which seed."""
    text = PngInfo()
    for name, value in {
        PROMPT_KEY: subject.class_prompt,
        "negative_prompt": config.prior_negative_prompt,
        "base_model": shared_name(config.pretrained_model_name_or_path),
        "seed": _seed(index, config),
    }.items():
        text.add_itxt(name, str(value))
    return text


def _say_which(photos: Sequence[Photo], subject: Subject, config: TrainingConfig) -> None:
    """Log how many class images are used, and whether the folder has more."""
    folder = _folder(subject, config)
    count = len(list_folder(folder, "--class_data_dir").photos)
    more = f", the first of {count} in the order of their names (--num_class_images)" if count > len(photos) else ""
    logger.info("Using %d class images from %s%s", len(photos), folder, more)


def _warn_of_other_prompts(photos: Sequence[Photo], subject: Subject, config: TrainingConfig) -> None:
    """Warn if class images were drawn for another prompt than theirs. Those that do not say what for are the user's."""
    drawn_for = (read_text(photo.path, PROMPT_KEY) for photo in photos if photo.prompt == subject.class_prompt)
    others = Counter(prompt for prompt in drawn_for if prompt not in (None, subject.class_prompt))
    if others:
        logger.warning(
            "--class_data_dir %s: %d of %d class images were drawn for another prompt than %s '%s': %s. "
            "They would be taken for the class: name another folder, or remove them to have new ones drawn",
            *(_folder(subject, config), others.total(), len(photos)),
            *(subject.source("class_prompt"), subject.class_prompt),
            ", ".join(f"{count} for '{excerpt(str(prompt))}'" for prompt, count in others.most_common()),
        )


def _read(subject: Subject, config: TrainingConfig) -> list[Photo]:
    try:
        return read_class_photos(subject, config)
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
