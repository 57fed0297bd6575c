"""Photos from files or rows of a dataset: decoded, upright, resized, with their prompts and masks."""

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
from dreambooth.options.data import ImageOptions
from dreambooth.options.photos import PhotoOptions
from kron_formats.files import check_regular, printable

logger = logging.getLogger(__name__)
T = TypeVar("T")
TrainingSize = Callable[[Size, PhotoOptions], Size]  # an image's original size -> the size to which it is resized

# The last two are not decoded, but are named in messages instead of being ignored.
IMAGE_SUFFIXES = frozenset(".jpg .jpeg .jfif .png .webp .bmp .tif .tiff .gif .avif .heic .heif".split())
# The only formats that are decoded, whatever a file is called: Pillow would run Ghostscript on an EPS named photo.jpg.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
TURNS = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LARGEST_SCALE = 32  # of --resolution to a photo's shorter side; smaller ones are icons and tracking pixels
# Suffixes of table files and the builders of `datasets` that read them
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass(frozen=True)
class Photo:
    """An image for training: upright RGB, resized to hold a crop of its training shape."""

    path: Path  # a label if there is no file
    pixels: np.ndarray  # (height, width, 3) uint8
    prompt: str
    class_prompt: str | None
    original_size: Size  # (height, width) before resizing, upright
    mask: np.ndarray | None = None  # (height, width) uint8: 255 where the subject is


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
    """Return the class images in class_data_dir. Raises NoPhotosError if none is readable."""
    assert config.class_data_dir is not None and config.class_prompt is not None  # PriorOptions.check
    return _read_folder(config.class_data_dir, "--class_data_dir", config.class_prompt, class_size, config)


# ---- folders ----


def _read_folder(folder: str, flag: str, prompt: str, size: TrainingSize, config: ImageOptions) -> list[Photo]:
    """Return the readable images in a folder in the order of their names; `flag` is the option that names the folder.

    `prompt` is for images without a caption. Files that are not images, captions or masks are ignored.
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


def readable(entries: Iterable[tuple[str, Any]], read: Callable[[Any], T], source: str) -> list[T]:
    """Return read(entry) of each (name, entry). Those that cannot be read are skipped with a warning.

    `source` is what messages call the folder or dataset. Raises NoPhotosError if none can be read.
    """
    photos, unreadable = [], []
    for name, entry in entries:
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
    dataset = _load_dataset(name, config.dataset_config_name, source)
    wanted = {"image_column": config.image_column, "caption_column": config.caption_column}
    for flag, column in wanted.items():
        if column is not None and column not in dataset.column_names:
            raise UserError(f"--{flag} {column}: {source} only has the columns {', '.join(dataset.column_names)}")
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


def _load_dataset(name: str, configuration: str | None, source: str) -> Any:
    """Return the training split of a dataset on the Hub, in a folder or in a table file."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source} needs the package datasets: pip install datasets") from error
    builder = TABLES.get(Path(name).suffix.lower())
    try:
        if Path(name).is_file() and builder:
            return datasets.load_dataset(builder, data_files=name, split="train")
        return datasets.load_dataset(name, configuration, split="train")
    except Exception as error:  # it can fail in many ways: no network, an unknown name, a damaged file
        raise UserError(f"{source} cannot be loaded: {error or type(error).__name__}") from error


def _undecoded(dataset: Any, column: str, source: str) -> Any:
    """Return a dataset with its images as encoded files, for `decode_image`, which treats all images alike."""
    from datasets import Image as ImageColumn

    try:
        return dataset.cast_column(column, ImageColumn(decode=False))
    except Exception as error:  # pyarrow and datasets raise many kinds if the column cannot be cast
        raise UserError(f"--image_column {column}: that column of {source} does not contain images") from error


# ---- images ----


def make_photo(
    path: Path,
    image: Image.Image,
    prompts: tuple[str, str | None],
    size: TrainingSize,
    config: PhotoOptions,
    mask: Image.Image | None = None,
) -> Photo:
    """Return a photo, resized for training. Raises ValueError if it is too small."""
    if config.resolution > LARGEST_SCALE * min(image.size):
        raise ValueError(f"{image.width} x {image.height} px is too small for --resolution {config.resolution}")
    original_size = (image.height, image.width)
    training_size = size(original_size, config)
    pixels = resize(np.asarray(image), training_size, config.image_interpolation_mode)
    mask_pixels = None if mask is None else resize(np.asarray(mask), training_size, "bilinear")
    return Photo(path, pixels, *prompts, original_size, mask_pixels)


def resize(pixels: np.ndarray, size: Size, interpolation: str) -> np.ndarray:
    """Return an 8-bit image, (height, width) or (height, width, 3), resized to `size`."""
    if pixels.shape[:2] == size:
        return pixels
    height, width = size
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling[interpolation.upper()]))


def read_image(path: Path, background: str = "white") -> Image.Image:
    """Return an image file as upright 8-bit RGB: its first frame, with transparent parts on `background`.

    Raises OSError, ValueError or anything else that Pillow raises for damaged files, and ValueError for sizes that
    cannot be a photo's.
    """
    check_regular(path)
    # Opened here because Pillow memory-maps uncompressed TIFFs that it opens itself, and scrambles rotated ones.
    with path.open("rb") as data:
        return decode_image(data, background)


def decode_image(data: BinaryIO, background: str = "white") -> Image.Image:
    """Return an open image file as `read_image` does."""
    try:
        file = Image.open(data, formats=FORMATS)
    except UnidentifiedImageError:
        data.seek(4)
        if data.read(4) == b"ftyp":
            raise ValueError("HEIC is not supported; convert it to JPEG or PNG") from None
        raise ValueError("it is not an image, or its beginning is damaged") from None
    with file:
        # Resizing it could take any amount of memory: 24 GB for 30,000 x 1 px.
        if max(file.size) > 100 * min(file.size):
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
    """Return an image turned upright by its EXIF orientation, or as it is stored if that is missing or unreadable.

    Pillow's exif_transpose also rewrites the rest of the EXIF data, and fails if they are damaged.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data raise many kinds of errors, but the pixels are intact
        orientation = None
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image.copy()


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Return a 16-bit, 32-bit or floating-point grey image in 8 bits.

    Its full range is the smallest of the usual ones that its values fit in, or else its largest value.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    full = next((top for top in ranges if values.max() <= top), values.max())
    return Image.fromarray((values.clip(0) * (255 / full)).round().astype(np.uint8))


def _read_mask(path: Path, image: Image.Image, source: str) -> Image.Image | None:
    """Return the mask of a photo, 8-bit grey and of any size, or None if there is none. Transparent parts are outside.

    Raises UserError if it cannot be read, has another aspect ratio than the photo or is black everywhere.
    """
    if not os.path.lexists(path):
        return None
    try:
        mask = read_image(path, background="black").convert("L")
    except Exception as error:  # without its mask, the photo would teach what was to be masked
        raise UserError(f"{source}: {printable(path.name)}: {error or type(error).__name__}") from error
    if abs(mask.height - mask.width * image.height / image.width) > 1:
        raise UserError(
            f"{source}: {path.name} is {mask.width} x {mask.height} px, which is not the aspect ratio of its photo, "
            f"{image.width} x {image.height} px"
        )
    if np.asarray(mask).max() <= 1:
        raise UserError(f"{source}: {path.name} is black everywhere; white (255) marks what is trained on")
    return mask
