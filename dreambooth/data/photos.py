"""Files, and rows of datasets, to photos: decoded, upright, resized, with their prompts and masks."""

import io
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from dreambooth.data.captions import MASK_SUFFIX, METADATA, caption_of, read_captions
from dreambooth.data.sizes import Size, class_size, instance_size
from dreambooth.errors import UserError
from dreambooth.options.training import TrainingConfig
from kron_formats.files import check_regular, printable

logger = logging.getLogger(__name__)
T = TypeVar("T")

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jfif .png .webp .bmp .tif .tiff .gif .avif .heic .heif".split()  # the last two get an explanation
)
# What is decoded, whatever a file is called: not all that Pillow can, which runs Ghostscript on an EPS called photo.jpg
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
TURNS = {  # EXIF orientation: what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LARGEST_SCALE = 32  # by which a photo may be smaller than --resolution; below lie icons and tracking pixels
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass(frozen=True)
class Photo:
    """An image as it is trained on: upright RGB, resized so that a crop of its training shape fits in."""

    path: Path  # a readable label where there is no file
    pixels: np.ndarray  # (height, width, 3) uint8
    prompt: str
    class_prompt: str | None
    original_size: Size  # (height, width) before resizing, upright
    mask: np.ndarray | None = None  # (height, width) uint8: 255 where the subject is


class NoPhotosError(UserError):
    """There is no readable image."""


def read_instance_photos(config: TrainingConfig) -> list[Photo]:
    """Return the photos of the subject, from a folder or a dataset. Raises UserError if there is none to read."""
    folder = config.instance_data_dir
    if config.dataset_name is not None:
        photos = _read_dataset(config)
    else:
        photos = _read_folder(folder, "--instance_data_dir", config.instance_prompt, instance_size, config)
        if config.caption_column is not None and not (Path(folder) / METADATA).exists():
            raise UserError(f"--caption_column {config.caption_column}: --instance_data_dir {folder} has no {METADATA}")
    if not prior_from_base_model(config) and any(photo.class_prompt != config.class_prompt for photo in photos):
        logger.warning("Class prompts of single photos are used with --prior_source base_model only")
    return photos


def prior_from_base_model(config: TrainingConfig) -> bool:
    """Whether the prior is what the base model predicts for the instance photos, under their class prompts."""
    return config.with_prior_preservation and config.prior_source == "base_model"


def read_class_photos(config: TrainingConfig) -> list[Photo]:
    """Return the class images that there are. Raises NoPhotosError if none is readable."""
    return _read_folder(config.class_data_dir, "--class_data_dir", config.class_prompt, class_size, config)


# ---- folders ----


def _read_folder(
    folder: str, flag: str, prompt: str, size: Callable[[Size, TrainingConfig], Size], config: TrainingConfig
) -> list[Photo]:
    """Return the readable images of a folder in the order of their names; `flag` is what messages call the folder.

    Files that are neither images nor captions nor masks are ignored; `size` maps an image's size to that in training.
    """
    directory, source = Path(folder), f"{flag} {folder}"
    paths = image_files(directory, source)
    captions = read_captions(directory, [path.name for path in paths], source, config)

    def read(path: Path) -> Photo:
        image = read_image(path)
        mask = _read_mask(path.with_suffix(MASK_SUFFIX), image, source)
        return make_photo(path, image, captions[path.name].prompts(prompt, config), size, config, mask)

    return readable(((path.name, path) for path in paths), read, source)


def image_files(folder: Path, source: str) -> list[Path]:
    """Return the image files of a folder in the order of their names; `source` is what messages call it."""
    try:
        if not folder.is_dir():
            raise NoPhotosError(f"{source}: there is no such folder")
        return [path for path in sorted(folder.iterdir()) if _is_photo(path)]
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from error


def _is_photo(path: Path) -> bool:
    name = path.name.lower()
    return (
        path.suffix.lower() in IMAGE_SUFFIXES
        and not name.startswith(".")
        and not name.endswith(MASK_SUFFIX)
        and not path.is_dir()
    )


def readable(entries: Iterable[tuple[str, Any]], read: Callable[[Any], T], source: str) -> list[T]:
    """Read the entries, named for messages; those that cannot be read are skipped, and named in a warning."""
    photos, unreadable = [], []
    for name, entry in entries:
        try:
            photos.append(read(entry))
        except UserError:
            raise
        except Exception as error:  # image codecs raise nearly anything on damaged files
            unreadable.append(f"{printable(name)}: {printable(str(error) or type(error).__name__)}")
    if not photos:
        found = "; ".join(unreadable) or "it holds no image files"
        raise NoPhotosError(f"{source}: there is no readable image ({found})")
    if unreadable:
        logger.warning("%s: skipped unreadable images (%s)", source, "; ".join(unreadable))
    return photos


# ---- datasets ----


def _read_dataset(config: TrainingConfig) -> list[Photo]:
    """Return the photos of the training split of a dataset, in its order."""
    source = f"--dataset_name {config.dataset_name}"
    dataset = _load_dataset(config, source)
    wanted = {"image_column": config.image_column, "caption_column": config.caption_column}
    for flag, column in wanted.items():
        if column is not None and column not in dataset.column_names:
            raise UserError(f"--{flag} {column}: {source} has the columns {', '.join(dataset.column_names)}")
    dataset = _undecoded(dataset, config.image_column, source)

    def read(number: int) -> Photo:
        row = dataset[number]
        stored = row[config.image_column]
        if stored is None:
            raise ValueError("there is no image")
        image = decode_image(io.BytesIO(stored["bytes"])) if stored["bytes"] else read_image(Path(stored["path"]))
        prompts = caption_of(row, config.caption_column).prompts(config.instance_prompt, config)
        return make_photo(Path(stored["path"] or f"row {number}"), image, prompts, instance_size, config)

    return readable(((f"row {number}", number) for number in range(len(dataset))), read, source)


def _load_dataset(config: TrainingConfig, source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source} needs the package datasets: pip install datasets") from error
    name, kind = config.dataset_name, TABLES.get(Path(config.dataset_name).suffix.lower())
    try:
        if Path(name).is_file() and kind:
            return datasets.load_dataset(kind, data_files=name, split="train")
        return datasets.load_dataset(name, config.dataset_config_name, split="train")
    except Exception as error:  # a dataset can fail in any way: no network, no such name, a damaged file
        raise UserError(f"{source} cannot be loaded: {error or type(error).__name__}") from error


def _undecoded(dataset: Any, column: str, source: str) -> Any:
    """Return the dataset with its images as files, for `decode_image` to treat as all others."""
    from datasets import Image as ImageColumn

    try:
        return dataset.cast_column(column, ImageColumn(decode=False))
    except Exception as error:  # pyarrow and datasets have many for what cannot be cast
        raise UserError(f"--image_column {column}: there are no images in that column of {source}") from error


# ---- images ----


def make_photo(
    path: Path,
    image: Image.Image,
    prompts: tuple[str, str | None],
    size: Callable[[Size, TrainingConfig], Size],
    config: TrainingConfig,
    mask: Image.Image | None = None,
) -> Photo:
    """Return a photo at its training size. Raises ValueError where it is too small for it."""
    if config.resolution > LARGEST_SCALE * min(image.size):
        raise ValueError(f"{image.width} x {image.height} px is too small for --resolution {config.resolution}")
    original_size = (image.height, image.width)
    training_size = size(original_size, config)
    pixels = resize(np.asarray(image), training_size, config.image_interpolation_mode)
    mask = None if mask is None else resize(np.asarray(mask), training_size, "bilinear")
    return Photo(path, pixels, *prompts, original_size, mask)


def resize(pixels: np.ndarray, size: Size, interpolation: str) -> np.ndarray:
    """Resize an image of 8 bits, (height, width) or (height, width, 3)."""
    if pixels.shape[:2] == size:
        return pixels
    height, width = size
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling[interpolation.upper()]))


def read_image(path: Path, background: str = "white") -> Image.Image:
    """Return an image file as upright 8-bit RGB: the first frame, on `background` where it is transparent.

    Raises OSError, ValueError or whatever else Pillow does for damaged files, and for sizes that cannot be a photo's.
    """
    check_regular(path)
    # Opened here, since Pillow maps uncompressed TIFFs that it opens itself into memory, and scrambles the turned ones.
    with path.open("rb") as data:
        return decode_image(data, background)


def decode_image(data: BinaryIO, background: str = "white") -> Image.Image:
    """Return what `read_image` returns, from an open file."""
    try:
        file = Image.open(data, formats=FORMATS)
    except UnidentifiedImageError:
        data.seek(4)
        if data.read(4) == b"ftyp":
            raise ValueError("HEIC is not supported; convert it to JPEG or PNG") from None
        raise ValueError("it is no image, or damaged from its beginning") from None
    with file:
        if max(file.size) > 100 * min(file.size):  # resized, it would grow without bound: 30,000 x 1 px to 24 GB
            raise ValueError(f"{file.width} x {file.height} px is too elongated")
        file.load()
        image = _upright(file)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Return the image as its EXIF data say that it was held; as it is stored where they say nothing that reads.

    Pillow's own exif_transpose writes the other data anew, and fails where they are damaged.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as many kinds as there are kinds of damage; the pixels are whole
        orientation = None
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image.copy()


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale a 16-bit, 32-bit or floating-point grey image by the smallest of the usual full ranges that holds it."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    full = next((top for top in ranges if values.max() <= top), values.max())
    return Image.fromarray((values.clip(0) * (255 / full)).round().astype(np.uint8))


def _read_mask(path: Path, image: Image.Image, source: str) -> Image.Image | None:
    """Return the mask of a photo, grey, at any size; what is transparent in it is outside."""
    if not os.path.lexists(path):
        return None
    try:
        mask = read_image(path, background="black").convert("L")
    except Exception as error:  # trained without its mask, the photo would teach what was masked
        raise UserError(f"{source}: {printable(path.name)}: {error or type(error).__name__}") from error
    if abs(mask.height - mask.width * image.height / image.width) > 1:
        raise UserError(
            f"{source}: {path.name} is {mask.width} x {mask.height} px, of another shape than its photo of "
            f"{image.width} x {image.height} px"
        )
    if mask.getextrema()[1] <= 1:
        raise UserError(f"{source}: {path.name} is black everywhere; white (255) marks what is trained")
    return mask
