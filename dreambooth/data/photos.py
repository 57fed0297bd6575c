"""Photos from files or rows of a dataset: decoded, upright, resized, with their prompts and masks."""

import functools
import io
import logging
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from dreambooth.data.captions import caption_of, read_captions, warn_of_lines
from dreambooth.data.folder import TABLES, Folder, NoPhotosError, find_photos, list_folder
from dreambooth.data.holdout import hold_out
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
from dreambooth.data.rare_words import warn_of_class_captions, warn_of_prompts
from dreambooth.data.sizes import Size, class_size, instance_size
from dreambooth.data.tables import beside_table, load_table, undecoded
from dreambooth.errors import UserError
from dreambooth.options.data import ImageOptions
from dreambooth.options.photos import PhotoOptions
from dreambooth.options.subjects import Subject
from dreambooth.wording import shortlist
from kron_formats.files import printable

logger = logging.getLogger(__name__)
T = TypeVar("T")
TrainingSize = Callable[[Size, PhotoOptions], Size]  # an image's original size -> the size to which it is resized
Decode = Callable[[], Picture]  # reads an image from where it is; can be pickled, for workers of the data loader

LIKELY_CAPTIONS = frozenset("text texts caption captions prompt prompts description descriptions".split())  # columns
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
    captioned: bool = False  # whether the prompt is a caption
    folder: str = ""  # of its subject or its class, below those of the options

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.folder}/{self.path.name}" if self.folder else self.path.name

    @property
    def size(self) -> Size:
        """Height and width of its training pixels."""
        return self.stored.size

    @property
    def pixels(self) -> np.ndarray:
        """Its training pixels, (height, width, 3) uint8. Raises UserError if they have to be read again and differ."""
        return self.stored.get(str(self.path))


def read_instance_photos(config: ImageOptions) -> list[Photo]:
    """Return the photos to train on, of one subject after the other, from folders or a dataset.

    Raises UserError, naming the subject if there are several, if a subject has no readable photo.
    """
    if config.subjects is not None:
        _warn_beside_subjects(config)
    photos_of = {subject: _read_subject(subject, config) for subject in config.all_subjects}
    photos = [photo for own in photos_of.values() for photo in own]
    strays = [
        photo for subject, own in photos_of.items() for photo in own if photo.class_prompt != subject.class_prompt
    ]
    if strays and not config.uses_base_model_prior:
        logger.warning("Class prompts of single photos are only used with --prior_source base_model")
    for subject, own in photos_of.items():
        captioned = {photo.name: (photo.prompt, photo.class_prompt) for photo in own if photo.captioned}
        warn_of_prompts(captioned, subject, config)
    if config.unmasked_weight and all(photo.mask is None for photo in photos):
        logger.warning("--unmasked_weight %g has no effect: no photo has a mask", config.unmasked_weight)
    return photos


def read_class_photos(subject: Subject, config: ImageOptions) -> list[Photo]:
    """Return the first num_class_images of the class images for a subject's class, or all if there are fewer.

    Others are not decoded. Raises NoPhotosError if none is readable.
    """
    assert config.class_data_dir is not None and subject.class_prompt is not None  # PriorOptions.check
    path = str(Path(config.class_data_dir) / subject.class_folder)
    folder = find_photos(path, "--class_data_dir", "--class_prompt {prompt}")
    photos = _read_folder(
        folder, folder.photos, subject.class_prompt, subject, class_size, config, config.num_class_images
    )
    photos = [replace(photo, folder=subject.class_folder) for photo in photos]
    warn_of_class_captions({photo.name: photo.prompt for photo in photos if photo.captioned}, subject)
    return photos


# ---- subjects ----


def _read_subject(subject: Subject, config: ImageOptions) -> list[Photo]:
    """Return the photos of one subject that are trained on."""
    if config.dataset_name is not None:
        return _read_dataset(config.dataset_name, subject, config)
    assert config.instance_data_dir is not None  # PhotoOptions.check
    path = str(Path(config.instance_data_dir) / subject.folder)
    if subject.folder:
        folder = find_photos(path, f"--subjects, {printable(subject.folder)}: --instance_data_dir")
    else:
        folder = find_photos(path, "--instance_data_dir", "--repeats {repeats} --instance_prompt {prompt}")
    if config.caption_column is not None and not folder.tables:
        raise UserError(f"--caption_column {config.caption_column}: {folder.source} has no {' or '.join(TABLES)}")
    trained, held_out = hold_out(folder.photos, config.holdout, folder.source)
    _say_held_out([path.name for path in held_out], folder.source)
    photos = _read_folder(folder, trained, subject.instance_prompt, subject, instance_size, config)
    return [replace(photo, folder=subject.folder) for photo in photos]


def _warn_beside_subjects(config: ImageOptions) -> None:
    """Warn of photos beside the subjects' folders, and of other folders with images."""
    assert config.instance_data_dir is not None  # PhotoOptions.check
    root = list_folder(Path(config.instance_data_dir), f"--instance_data_dir {printable(config.instance_data_dir)}")
    named = [root.path / subject.folder for subject in config.all_subjects]
    others = [path for path, count in root.subfolders.items() if count and not {path, *path.parents} & {*named}]
    unused = [path.name for path in root.photos] + [f"{path.relative_to(root.path)}{os.sep}" for path in others]
    if unused:
        logger.warning("%s: not used, since they are of none of --subjects: %s", root.source, shortlist(unused))


# ---- folders ----


def _read_folder(
    folder: Folder,
    paths: Sequence[Path],
    prompt: str,
    subject: Subject,
    size: TrainingSize,
    config: ImageOptions,
    at_most: int | None = None,
) -> list[Photo]:
    """Return those photos of a folder that are readable, in their order; `prompt` is for those without a caption."""
    captions, held = read_captions(folder, config), Held()

    def read(path: Path) -> Photo:
        decode, caption = functools.partial(read_picture, path), captions[path]
        mask = next(iter(folder.of_photo(path, "mask")), None)
        mask_of = functools.partial(read_mask, mask, source=folder.source)
        photo = make_photo(path, decode, caption.prompts(prompt, subject), size, config, mask_of)
        held.add(photo.stored)
        return replace(photo, captioned=caption.text is not None)

    return readable(((path.name, path) for path in paths), read, folder.source, at_most)


def _say_held_out(names: Sequence[str], source: str) -> None:
    """Log which photos are not trained on, if there are any."""
    if names:
        logger.info("%s: held out, not trained on (--holdout %d): %s", source, len(names), shortlist(names))


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
        raise NoPhotosError(f"{source}: there is no readable image ({'; '.join(unreadable) or 'it has no rows'})")
    if unreadable:
        logger.warning("%s: skipped unreadable images (%s)", source, "; ".join(unreadable))
    return photos


# ---- datasets ----


def _read_dataset(name: str, subject: Subject, config: ImageOptions) -> list[Photo]:
    """Return the photos in a dataset, in its order."""
    source = f"--dataset_name {name}"
    dataset = load_table(name, config.dataset_config_name, source)
    wanted = {"image_column": config.image_column, "caption_column": config.caption_column}
    for flag, column in wanted.items():
        if column is not None and column not in dataset.column_names:
            raise UserError(f"--{flag} {column}: {source} only has the columns {shortlist(dataset.column_names)}")
    _note_unused_captions(dataset.column_names, source, config)
    dataset = undecoded(dataset, config.image_column, source)
    several_lines: list[str] = []
    held = Held()

    def read(number: int) -> Photo:
        row = dataset[number]
        decode = functools.partial(_picture_of_row, dataset, config.image_column, number, name)
        stored = row[config.image_column] or {"path": None, "bytes": None}
        path = Path(stored["path"] or f"row {number}")
        if not stored["bytes"]:
            path = beside_table(name, path)
        caption = caption_of(row, config.caption_column, f"{source}, row {number}")
        if caption.has_lines:
            several_lines.append(f"row {number}")
        prompts = caption.prompts(subject.instance_prompt, subject)
        photo = make_photo(path, decode, prompts, instance_size, config)
        held.add(photo.stored)
        return replace(photo, captioned=caption.text is not None)

    trained, held_out = hold_out(range(len(dataset)), config.holdout, source)
    _say_held_out([f"row {number}" for number in held_out], source)
    photos = readable(((f"row {number}", number) for number in trained), read, source)
    warn_of_lines(several_lines, source)
    return photos


def _note_unused_captions(columns: Collection[str], source: str, config: PhotoOptions) -> None:
    """Warn of columns that may hold captions, if no column was asked for: captions would replace --instance_prompt."""
    likely = [column for column in columns if column.lower() in LIKELY_CAPTIONS and column != config.image_column]
    if likely and config.caption_column is None:
        logger.warning(
            "%s: not used: the column %s; --caption_column %s would use its captions instead of --instance_prompt",
            source,
            shortlist(likely),
            printable(likely[0]),
        )


def _picture_of_row(dataset: Any, column: str, number: int, name: str) -> Picture:
    """Return the image in a row of the dataset `name`."""
    stored = dataset[number][column]
    if stored is None or not (stored["bytes"] or stored["path"]):
        raise ValueError("there is no image")
    if stored["bytes"]:
        return decode_picture(io.BytesIO(stored["bytes"]))
    return read_picture(beside_table(name, Path(stored["path"])))


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
