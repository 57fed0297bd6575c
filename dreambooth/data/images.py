"""Pixels of image files: decoded, upright, 8-bit sRGB; and masks."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from dreambooth.data.colour import ColourError, colours_of, to_srgb
from dreambooth.data.formats import decodable, why_unidentified
from dreambooth.data.sizes import Size
from dreambooth.errors import UserError
from kron_formats.files import check_regular, printable

logger = logging.getLogger(__name__)

TURNS = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap height and width
LARGEST = 2**28  # pixels of a file, 268 million: a decoded image takes 4 bytes for each, and as much again to turn it
LARGEST_WHOLE = 10**8  # pixels of a JPEG that is decoded as it is; larger ones at a fraction of their sides
LARGEST_TEXT = 2**26  # bytes, unpacked, of each text and colour profile in a PNG


@dataclass(frozen=True)
class Picture:
    """A decoded image file."""

    image: Image.Image  # upright, 8-bit sRGB
    size: Size  # (height, width) in the file, upright; more than the image's if it was decoded at a fraction of them
    flaw: str | None  # why its colours, which are taken for sRGB, may be wrong


def resize(pixels: np.ndarray, size: Size, interpolation: str) -> np.ndarray:
    """Return an 8-bit image, (height, width) or (height, width, 3), resized to `size`."""
    return pixels if pixels.shape[:2] == size else resize_image(Image.fromarray(pixels), size, interpolation)


def resize_image(image: Image.Image, size: Size, interpolation: str) -> np.ndarray:
    """Return the pixels of an image, resized to `size`."""
    height, width = size
    if image.size == (width, height):
        return np.asarray(image)
    return np.asarray(image.resize((width, height), Image.Resampling[interpolation.upper()]))


def read_image(path: Path) -> Image.Image:
    """Return an image file as upright 8-bit sRGB; warn if its colours may be wrong. Raises what `read_picture` does."""
    picture = read_picture(path)
    warn_of_flaw(picture, path)
    return picture.image


def warn_of_flaw(picture: Picture, path: Path) -> None:
    """Warn if the colours of the image at `path` may be wrong."""
    if picture.flaw is not None:
        logger.warning("%s: %s. Its colours are taken for sRGB", printable(str(path)), picture.flaw)


def read_picture(path: Path, background: str = "white", is_mask: bool = False) -> Picture:
    """Return an image file: its first frame, with transparent parts on `background`.

    The numbers in a mask are values, not colours, and are not converted to sRGB. Raises OSError, ValueError or anything
    else that Pillow raises for damaged files, and ValueError for sizes that cannot be a photo's.
    """
    check_regular(path)
    # Opened here because Pillow memory-maps uncompressed TIFFs that it opens itself, and scrambles rotated ones.
    with path.open("rb") as data:
        return decode_picture(data, background, is_mask)


def decode_picture(data: BinaryIO, background: str = "white", is_mask: bool = False) -> Picture:
    """Return an open image file as `read_picture` does."""
    profile = flaw = None
    with _own_limits(), _open(data) as file:
        height, width = _check_size(file)
        _decode_at_a_fraction(file)
        try:
            profile = None if is_mask else colours_of(file, data)
        except ColourError as error:
            flaw = str(error)
        file.load()
        orientation = _orientation(file)
        image = file.transpose(TURNS[orientation]) if orientation in TURNS else file
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if profile is not None:
        try:
            image = to_srgb(image, profile)
        except ColourError as error:
            flaw = str(error)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    return Picture(image, (width, height) if orientation in SIDEWAYS else (height, width), flaw)


def read_text(path: Path, key: str) -> str | None:
    """Return the text of a PNG under a key, from before its pixels; None if there is none. Decodes no pixels."""
    with path.open("rb") as data, _own_limits(), _open(data) as file:
        text = file.info.get(key) if file.format == "PNG" else None
        return str(text) if isinstance(text, str) else None


@contextmanager
def _own_limits() -> Iterator[None]:
    """In this context Pillow's limits are those of this module.

    Pillow's own refuse photos of 179 million pixels, and PNGs in which ComfyUI keeps a workflow of 1 MiB. They are
    variables of its modules and cannot be given for one file. Raises ValueError for what is beyond ours.
    """
    pixels, text, texts = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    try:
        Image.MAX_IMAGE_PIXELS = LARGEST
        PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = LARGEST_TEXT, 4 * LARGEST_TEXT
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_check_size` refuses what it is about
            yield
    except Image.DecompressionBombError:  # more than twice MAX_IMAGE_PIXELS
        raise ValueError(f"it has more than the {LARGEST:,} pixels that are decoded; make it smaller") from None
    except ValueError as error:
        if "MAX_TEXT" not in str(error):
            raise
        raise ValueError(
            f"text or a colour profile in it is too large, more than {LARGEST_TEXT:,} bytes; save it without metadata"
        ) from None
    finally:
        Image.MAX_IMAGE_PIXELS = pixels
        PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = text, texts


def _open(data: BinaryIO) -> ImageFile:
    """Return an image file, not decoded yet."""
    try:
        return Image.open(data, formats=decodable())
    except UnidentifiedImageError:
        data.seek(0)
        raise ValueError(why_unidentified(str(getattr(data, "name", "")), data.read(32))) from None


def _check_size(file: ImageFile) -> Size:
    """Return the size of an image as it is stored. Raises ValueError if it cannot be a photo's."""
    width, height = file.size
    # Resizing it could take any amount of memory: 24 GB for 30,000 x 1 px.
    if max(file.size) > 100 * min(file.size):
        raise ValueError(f"{width} x {height} px is too elongated")
    if width * height > LARGEST:
        raise ValueError(f"{width} x {height} px is more than the {LARGEST:,} pixels that are decoded; make it smaller")
    return height, width


def _decode_at_a_fraction(file: ImageFile) -> None:
    """Have a very large JPEG decoded at a half of its sides, or less, which takes as much less memory.

    It stays far larger than images for training.
    """
    if not isinstance(file, JpegImageFile):
        return
    width, height = file.size
    divisor = next((n for n in (1, 2, 4) if width * height <= n * n * LARGEST_WHOLE), 8)
    if divisor > 1:
        file.draft(None, (width // divisor, height // divisor))


def _orientation(image: Image.Image) -> int | None:
    """Return an image's EXIF orientation, or None if it is missing or unreadable.

    Pillow's exif_transpose also rewrites the rest of the EXIF data, and fails if they are damaged.
    """
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data raise many kinds of errors, but the pixels are intact
        return None


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Return a 16-bit, 32-bit or floating-point grey image in 8 bits.

    Its full range is the smallest of the usual ones that its values fit in, or else its largest value.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    full = next((top for top in ranges if values.max() <= top), values.max())
    return Image.fromarray((values.clip(0) * (255 / full)).round().astype(np.uint8))


def is_black(mask: Image.Image) -> bool:
    """Whether a mask, 8-bit grey, marks nothing. So does one that holds 0 and 1, which is not what was meant."""
    return np.asarray(mask).max() <= 1


def read_mask(path: Path | None, photo_size: Size, source: str) -> Image.Image | None:
    """Return the mask of a photo, 8-bit grey and of any size, or None if there is none. Transparent parts are outside.

    Raises UserError if it cannot be read, has another aspect ratio than the photo or is black everywhere.
    """
    if path is None:
        return None
    try:
        picture = read_picture(path, background="black", is_mask=True)
    except Exception as error:  # without its mask, the photo would teach what was to be masked
        raise UserError(f"{source}: {printable(path.name)}: {error or type(error).__name__}") from error
    (height, width), (photo_height, photo_width) = picture.size, photo_size
    if abs(height - width * photo_height / photo_width) > 1:
        raise UserError(
            f"{source}: {path.name} is {width} x {height} px, which is not the aspect ratio of its photo, "
            f"{photo_width} x {photo_height} px"
        )
    mask = picture.image.convert("L")
    if is_black(mask):
        raise UserError(f"{source}: {path.name} is black everywhere; white (255) marks what is trained on")
    return mask
