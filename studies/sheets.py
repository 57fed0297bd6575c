"""Sheets of small pictures with the entries of two axes at their edges."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from dreambooth.drawing.fonts import draw_text, text_width
from dreambooth.report.figures import GREY, GRID, INK

THUMBNAIL = 128  # px
LETTERS = 15  # px


def draw_pictures(
    rows: Sequence[str], columns: Sequence[str], images: Mapping[tuple[str, str], Image.Image], title: str
) -> Image.Image:
    """Return a sheet of small pictures with the entries of two axes at its edges; grey where there is none."""
    gap, head = 4, 2 * LETTERS + 24
    left = max([0, *(int(text_width(row, LETTERS)) for row in rows)]) + 12
    width = max(left + len(columns) * (THUMBNAIL + gap), int(text_width(title, LETTERS)) + 12)
    sheet = Image.new("RGB", (width, head + len(rows) * (THUMBNAIL + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw_text(draw, 6, 4, title, GREY, LETTERS)
    for number, column in enumerate(columns):
        draw_text(draw, left + number * (THUMBNAIL + gap), LETTERS + 14, column, INK, LETTERS)
    for down, row in enumerate(rows):
        top = head + down * (THUMBNAIL + gap)
        draw_text(draw, 6, top + THUMBNAIL // 2 - LETTERS // 2, row, INK, LETTERS)
        for across, column in enumerate(columns):
            corner = (left + across * (THUMBNAIL + gap), top)
            if (image := images.get((row, column))) is None:
                draw.rectangle((*corner, corner[0] + THUMBNAIL - 1, corner[1] + THUMBNAIL - 1), fill=GRID)
            else:
                sheet.paste(image, corner)
    return sheet


def thumbnail(image: Image.Image) -> Image.Image:
    """Return an image as a small square one: shrunk, or enlarged by whole pixels, on white."""
    image = image.convert("RGB")
    scale = THUMBNAIL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
    square = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    square.paste(image, ((THUMBNAIL - size[0]) // 2, (THUMBNAIL - size[1]) // 2))
    return square
