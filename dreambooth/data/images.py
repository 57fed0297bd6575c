"""Pixels of image files: decoded, upright, 8-bit RGB; and masks."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from dreambooth.data.formats import decodable, why_unidentified
from dreambooth.data.sizes import Size
from dreambooth.errors import UserError
from kron_formats.files import check_regular, printable

TURNS = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
        file = Image.open(data, formats=decodable())
    except UnidentifiedImageError:
        data.seek(0)
        raise ValueError(why_unidentified(str(getattr(data, "name", "")), data.read(32))) from None
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


def read_mask(path: Path, image: Image.Image, source: str) -> Image.Image | None:
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
