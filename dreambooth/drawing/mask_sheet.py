"""The sheet of photos with their masks laid over them."""

from collections.abc import Sequence

from PIL import Image, ImageOps

from dreambooth.data.masks import Masked
from dreambooth.drawing.sheet import draw_sheet
from kron_formats.files import printable

COLUMNS = 4  # photos
OUTSIDE, OPACITY = "#c02060", 0.6  # what lies over that which the loss does not count


def mask_sheet(photos: Sequence[Masked]) -> Image.Image:
    """Return a sheet in which each photo is in grey under a colour where it is not subject."""
    rows = [photos[first : first + COLUMNS] for first in range(0, len(photos), COLUMNS)]
    labels = [" | ".join(f"{printable(photo.name)}: {photo.share:.0%}" for photo in row) for row in rows]
    return draw_sheet([[_laid_over(photo) for photo in row] for row in rows], labels)


def _laid_over(photo: Masked) -> Image.Image:
    grey = ImageOps.grayscale(photo.photo).convert("RGB")
    outside = Image.blend(grey, Image.new("RGB", grey.size, OUTSIDE), OPACITY)
    return Image.composite(photo.photo, outside, photo.mask)
