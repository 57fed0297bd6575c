"""Photos from files or rows of a dataset: decoded, upright, resized, with their prompts and masks."""

import functools
import io
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from dreambooth.data.captions import CLASS_COLUMN, caption_of, read_captions, warn_of_missing_subject
from dreambooth.data.folder import METADATA, Folder, NoPhotosError, listed
from dreambooth.data.images import (
    Picture,
    decode_picture,
    read_mask,
    read_picture,
    resize,
    resize_image,
    warn_of_flaw,
)
from dreambooth.data.pixels import Held, Pixels
from dreambooth.data.sizes import Size, class_size, instance_size
from dreambooth.data.tables import file_of, load_table, undecoded
from dreambooth.errors import UserError
from dreambooth.options.data import ImageOptions
from dreambooth.options.photos import PhotoOptions
from kron_formats.files import printable

logger = logging.getLogger(__name__)
T = TypeVar("T")
TrainingSize = Callable[[Size, PhotoOptions], Size]  # an image's original size -> the size to which it is resized
Decode = Callable[[], Picture]  # reads an image from where it is; can be pickled, for workers of the data loader

LARGEST_SCALE = 32  # of --resolution to a photo's shorter side; smaller ones are icons and tracking pixels


@dataclass(frozen=True)
class Photo:
    """An image for training: upright sRGB, resized to hold a crop of its training shape."""

    path: Path  # a label if there is no file
    stored: Pixels
    prompt: str
    class_prompt: str | None
    original_size: Size  # (height, width) before resizing, upright
    mask: np.ndarray | None = None  # (height, width) uint8: 255 where the subject is
    has_caption: bool = False  # whether the prompt is its own

    @property
    def size(self) -> Size:
        """Height and width of its training pixels."""
        return self.stored.size

    @property
    def pixels(self) -> np.ndarray:
        """Its training pixels, (height, width, 3) uint8. Raises UserError if they have to be read again and differ."""
        return self.stored.get(str(self.path))


def read_instance_photos(config: ImageOptions) -> list[Photo]:
    """Return the photos of the subject, from a folder or a dataset. Raises UserError if none is readable."""
    folder = config.instance_data_dir
    if config.dataset_name is not None:
        photos = _read_dataset(config.dataset_name, config)
    else:
        assert folder is not None  # PhotoOptions.check
        photos = _read_folder(folder, "--instance_data_dir", config.instance_prompt, instance_size, config)
        if config.caption_column is not None and not any((Path(folder) / name).exists() for name in METADATA):
            raise UserError(
                f"--caption_column {config.caption_column}: --instance_data_dir {folder} has no {' or '.join(METADATA)}"
            )
    captions = {photo.path.name: photo.prompt for photo in photos if photo.has_caption}
    warn_of_missing_subject(
        captions, f"--instance_data_dir {folder}" if folder else f"--dataset_name {config.dataset_name}", config
    )
    _warn_of_equal_prompts(photos, config)
    if not config.uses_base_model_prior and any(photo.class_prompt != config.class_prompt for photo in photos):
        logger.warning("Class prompts of single photos are only used with --prior_source base_model")
    if config.unmasked_weight and all(photo.mask is None for photo in photos):
        logger.warning("--unmasked_weight %g has no effect: no photo has a mask", config.unmasked_weight)
    return photos


def _warn_of_equal_prompts(photos: Sequence[Photo], config: ImageOptions) -> None:
    """Warn of a class prompt that is a prompt of the subject too: the prior would hold the subject back."""
    if not config.with_prior_preservation:
        return
    same = [photo for photo in photos if photo.class_prompt and _normal(photo.class_prompt) == _normal(photo.prompt)]
    if same:
        logger.warning(
            "the class prompt '%s' is the prompt of %s too, so that the prior holds the subject back; leave out of "
            "--class_prompt what names the subject",
            printable(same[0].class_prompt or ""),
            listed([printable(photo.path.name) for photo in same]),
        )


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def read_class_photos(config: ImageOptions) -> list[Photo]:
    """Return the first num_class_images of the class images in class_data_dir, or all if there are fewer.

    Others are not decoded. Raises NoPhotosError if none is readable.
    """
    assert config.class_data_dir is not None and config.class_prompt is not None  # PriorOptions.check
    return _read_folder(
        config.class_data_dir, "--class_data_dir", config.class_prompt, class_size, config, config.num_class_images
    )


# ---- folders ----


def _read_folder(
    folder: str, flag: str, prompt: str, size: TrainingSize, config: ImageOptions, at_most: int | None = None
) -> list[Photo]:
    """Return the readable images in a folder in the order of their names; `flag` is the option that names the folder.

    `prompt` is for images without a caption. Warns of files that are not used.
    """
    files = Folder(Path(folder), f"{flag} {folder}")
    captions = read_captions(files, config)
    files.warn_of_unused()

    held = Held()

    def read(path: Path) -> Photo:
        decode, caption = functools.partial(read_picture, path), captions[path.name]
        mask_of = functools.partial(read_mask, files.mask_of(path), source=files.source)
        photo = make_photo(path, decode, caption.prompts(prompt, config), size, config, mask_of)
        held.add(photo.stored)
        return replace(photo, has_caption=caption.text is not None)

    return readable(((path.name, path) for path in files.photos), read, files.source, at_most)


def readable(
    entries: Iterable[tuple[str, Any]], read: Callable[[Any], T], source: str, at_most: int | None = None
) -> list[T]:
    """Return read(entry) of each (name, entry), up to a number. Those that cannot be read are skipped with a warning.

    `source` is what messages call the folder or dataset. Raises NoPhotosError if none can be read.
    """
    photos, unreadable = [], []
    for name, entry in entries:
        if len(photos) == at_most:
            break
        try:
            photos.append(read(entry))
        except UserError:
            raise
        except Exception as error:  # image codecs raise almost anything on damaged files
            unreadable.append(f"{printable(name)}: {printable(str(error) or type(error).__name__)}")
    if not photos:
        found = "; ".join(unreadable) or "it contains no image files"
        raise NoPhotosError(f"{source}: there is no readable image ({found})")
    if unreadable:
        logger.warning("%s: skipped unreadable images (%s)", source, "; ".join(unreadable))
    return photos


# ---- datasets ----


def _read_dataset(name: str, config: ImageOptions) -> list[Photo]:
    """Return the photos in the training split of a dataset, in its order."""
    source = f"--dataset_name {name}"
    dataset = load_table(name, config.dataset_config_name, source)
    wanted = {"image_column": config.image_column, "caption_column": config.caption_column}
    for flag, column in wanted.items():
        if column is not None and column not in dataset.column_names:
            raise UserError(f"--{flag} {column}: {source} only has the columns {', '.join(dataset.column_names)}")
    _warn_of_unused_texts(dataset, source, config)
    dataset = undecoded(dataset, config.image_column, source)

    held = Held()

    def read(number: int) -> Photo:
        row = dataset[number]
        decode = functools.partial(_picture_of_row, dataset, config.image_column, number, name)
        caption = caption_of(row, config.caption_column)
        label = (row[config.image_column] or {}).get("path") or f"row {number}"
        prompts = caption.prompts(config.instance_prompt, config)
        photo = make_photo(Path(label), decode, prompts, instance_size, config)
        held.add(photo.stored)
        return replace(photo, has_caption=caption.text is not None)

    return readable(((f"row {number}", number) for number in range(len(dataset))), read, source)


def _warn_of_unused_texts(dataset: Any, source: str, config: ImageOptions) -> None:
    """Say so if a dataset has texts that are not used, since captions are only read if a column is named."""
    kinds = {name: getattr(feature, "dtype", None) for name, feature in dataset.features.items()}
    used = {config.image_column, CLASS_COLUMN}
    if config.caption_column is None and (
        texts := [name for name in kinds if kinds[name] == "string" and name not in used]
    ):
        logger.warning(
            "%s has texts that are not used: %s; --caption_column %s would take them as captions in place of "
            "--instance_prompt",
            source,
            listed(texts),
            texts[0],
        )


def _picture_of_row(dataset: Any, column: str, number: int, name: str) -> Picture:
    """Return the image in a row of the dataset `name`."""
    stored = dataset[number][column]
    if stored is None:
        raise ValueError("there is no image")
    return (
        decode_picture(io.BytesIO(stored["bytes"])) if stored["bytes"] else read_picture(file_of(stored["path"], name))
    )


# ---- one photo ----


def make_photo(
    path: Path,
    decode: Decode,
    prompts: tuple[str, str | None],
    size: TrainingSize,
    config: PhotoOptions,
    mask_of: Callable[[Size], Image.Image | None] = lambda size: None,
) -> Photo:
    """Return a photo, resized for training.

    `decode` reads it, now and whenever its pixels are needed again; `mask_of` reads the mask for its size. Raises
    ValueError if it is too small.
    """
    picture = decode()
    mask = mask_of(picture.size)
    height, width = picture.size
    if config.resolution > LARGEST_SCALE * min(picture.size):
        raise ValueError(f"{width} x {height} px is too small for --resolution {config.resolution}")
    warn_of_flaw(picture, path)
    training_size, interpolation = size(picture.size, config), config.image_interpolation_mode
    pixels = resize_image(picture.image, training_size, interpolation)
    mask_pixels = None if mask is None else resize(np.asarray(mask), training_size, "bilinear")
    again = functools.partial(_pixels_again, decode, training_size, interpolation)
    return Photo(path, Pixels(pixels, again), *prompts, picture.size, mask_pixels)


def _pixels_again(decode: Decode, size: Size, interpolation: str) -> np.ndarray:
    return resize_image(decode().image, size, interpolation)
