"""Photos from files or rows of a dataset: decoded, upright, resized, with their prompts and masks."""

import functools
import io
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from dreambooth.data.captions import MASK_SUFFIX, METADATA, caption_of, read_captions
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
from dreambooth.data.tables import load_table, undecoded
from dreambooth.errors import UserError
from dreambooth.options.data import ImageOptions
from dreambooth.options.photos import PhotoOptions
from kron_formats.files import printable

logger = logging.getLogger(__name__)
T = TypeVar("T")
TrainingSize = Callable[[Size, PhotoOptions], Size]  # an image's original size -> the size to which it is resized
Decode = Callable[[], Picture]  # reads an image from where it is; can be pickled, for workers of the data loader

# The last two are not decoded, but are named in messages instead of being ignored.
IMAGE_SUFFIXES = frozenset(".jpg .jpeg .jfif .png .webp .bmp .tif .tiff .gif .avif .heic .heif".split())
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

    @property
    def size(self) -> Size:
        """Height and width of its training pixels."""
        return self.stored.size

    @property
    def pixels(self) -> np.ndarray:
        """Its training pixels, (height, width, 3) uint8. Raises UserError if they have to be read again and differ."""
        return self.stored.get(str(self.path))


class NoPhotosError(UserError):
    """There is no readable image."""


def read_instance_photos(config: ImageOptions) -> list[Photo]:
    """Return the photos of the subject, from a folder or a dataset. Raises UserError if none is readable."""
    folder = config.instance_data_dir
    if config.dataset_name is not None:
        photos = _read_dataset(config.dataset_name, config)
    else:
        assert folder is not None  # PhotoOptions.check
        photos = _read_folder(folder, "--instance_data_dir", config.instance_prompt, instance_size, config)
        if config.caption_column is not None and not (Path(folder) / METADATA).exists():
            raise UserError(f"--caption_column {config.caption_column}: --instance_data_dir {folder} has no {METADATA}")
    if not config.uses_base_model_prior and any(photo.class_prompt != config.class_prompt for photo in photos):
        logger.warning("Class prompts of single photos are only used with --prior_source base_model")
    return photos


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

    `prompt` is for images without a caption. Files that are not images, captions or masks are ignored.
    """
    directory, source = Path(folder), f"{flag} {folder}"
    paths = image_files(directory, source)
    captions = read_captions(directory, [path.name for path in paths], source, config)
    held = Held()

    def read(path: Path) -> Photo:
        decode = functools.partial(read_picture, path)
        prompts = captions[path.name].prompts(prompt, config)
        mask_of = functools.partial(read_mask, path.with_suffix(MASK_SUFFIX), source=source)
        photo = make_photo(path, decode, prompts, size, config, mask_of)
        held.add(photo.stored)
        return photo

    return readable(((path.name, path) for path in paths), read, source, at_most)


def image_files(folder: Path, source: str) -> list[Path]:
    """Return the image files in a folder in the order of their names; `source` is what messages call the folder."""
    try:
        if not folder.is_dir():
            raise NoPhotosError(f"{source}: there is no such folder")
        return [path for path in sorted(folder.iterdir()) if _is_photo(path)]
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from error


def _is_photo(path: Path) -> bool:
    """Whether a path is an image file by its name: not hidden, and not a mask."""
    name = path.name.lower()
    return (
        path.suffix.lower() in IMAGE_SUFFIXES
        and not name.startswith(".")
        and not name.endswith(MASK_SUFFIX)
        and not path.is_dir()
    )


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
    dataset = undecoded(dataset, config.image_column, source)

    held = Held()

    def read(number: int) -> Photo:
        row = dataset[number]
        decode = functools.partial(_picture_of_row, dataset, config.image_column, number)
        prompts = caption_of(row, config.caption_column).prompts(config.instance_prompt, config)
        label = (row[config.image_column] or {}).get("path") or f"row {number}"
        photo = make_photo(Path(label), decode, prompts, instance_size, config)
        held.add(photo.stored)
        return photo

    return readable(((f"row {number}", number) for number in range(len(dataset))), read, source)


def _picture_of_row(dataset: Any, column: str, number: int) -> Picture:
    """Return the image in a row of a dataset."""
    stored = dataset[number][column]
    if stored is None:
        raise ValueError("there is no image")
    return decode_picture(io.BytesIO(stored["bytes"])) if stored["bytes"] else read_picture(Path(stored["path"]))


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
