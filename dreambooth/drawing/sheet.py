"""A labelled sheet: rows of images in one picture, each row under its label. Its file says where the images are."""

import bisect
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from dreambooth.drawing.fonts import draw_text, legible, text_width
from dreambooth.drawing.kept_images import DAMAGED
from kron_formats.files import printable, whole_file

logger = logging.getLogger(__name__)

SMALLEST, LARGEST = 192, 512  # px; smaller images are enlarged to be seen, larger ones shrunk to keep the file small
GAP = 4  # px, between images
LINE = 21  # px, height of a line of text
LETTERS = 15  # px
MOST_LINES = 4  # of a label; the rest of a prompt is cut off
ROWS_NAME = "rows"  # in a sheet's file

Box = tuple[int, int, int, int]  # left, top, right, bottom, px


class SheetRow(NamedTuple):
    """A row of a sheet: its label, in full, and where its images are."""

    label: str
    boxes: list[Box]


def draw_sheet(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], title: str = "") -> Image.Image:
    """Return one picture: each row of images under its label, the title above them all.

    A label that no installed font can write in full is numbered, and a warning has all of it.
    """
    return _laid_out(rows, labels, title)[0]


def save_sheet(
    path: Path, rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], title: str = ""
) -> Image.Image:
    """Write what `draw_sheet` returns as a PNG, whole or not at all, and return it. Its text has its rows."""
    sheet, placed = _laid_out(rows, labels, title)
    text = PngInfo()
    text.add_text(ROWS_NAME, json.dumps(placed))
    with whole_file(path) as unfinished:
        sheet.save(unfinished, format="PNG", pnginfo=text)
    return sheet


def rows_of_sheet(path: Path) -> list[SheetRow]:
    """Return the rows of a sheet that `save_sheet` wrote; [] if the file is something else. Decodes no pixels."""
    try:
        with Image.open(path, formats=["PNG"]) as sheet:
            rows = json.loads(sheet.info[ROWS_NAME])
        return [SheetRow(label, [tuple(box) for box in boxes]) for label, boxes in rows]
    except (*DAMAGED, KeyError, TypeError):
        return []


def _laid_out(
    rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], title: str
) -> tuple[Image.Image, list[SheetRow]]:
    cells = [[_fitted(image) for image in row] for row in rows]
    width = max(sum(cell.width + GAP for cell in row) - GAP for row in cells)
    texts = [_wrap(_written(label, number), width - 12) for number, label in enumerate(labels, 1)]
    heights = [LINE * len(text) + 10 + max(cell.height for cell in row) for text, row in zip(texts, cells)]
    top = LINE + 8 if title else 0
    sheet = Image.new("RGB", (width, top + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    draw_text(draw, 6, 5, title, "#656d76", LETTERS)
    placed = []
    for label, row, lines, height in zip(labels, cells, texts, heights):
        for number, line in enumerate(lines):
            draw_text(draw, 6, top + 4 + number * LINE, line, "black", LETTERS)
        left, boxes = 0, []
        for cell in row:
            upper = top + LINE * len(lines) + 10
            sheet.paste(cell, (left, upper))
            boxes.append((left, upper, left + cell.width, upper + cell.height))
            left += cell.width + GAP
        placed.append(SheetRow(label, boxes))
        top += height
    return sheet, placed


_told: set[str] = set()  # labels that were warned of: the same ones are drawn again and again


def _written(label: str, number: int) -> str:
    """Return a label as it can be written: "2: a photo of …" if the rest is in a script that no font has."""
    if (shown := legible(label, LETTERS)).count("…") == label.count("…"):
        return shown
    if label not in _told:
        _told.add(label)
        logger.warning(
            'row %d of a sheet is "%s", which no font found here can write in full; install one that has its script, '
            "for example Noto (Debian: fonts-noto-cjk, fonts-noto-core)",
            number,
            printable(label),
        )
    return f"{number}: {shown}"


def _fitted(image: Image.Image) -> Image.Image:
    """Return the image with its longer side at least SMALLEST, by a whole factor, and at most LARGEST."""
    longer = max(image.size)
    factor = LARGEST / longer if longer > LARGEST else -(-SMALLEST // longer)
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image if (width, height) == image.size else image.resize((width, height), Image.Resampling.BICUBIC)


def _wrap(text: str, width: int) -> list[str]:
    """Return a text as at most MOST_LINES lines, broken between words if possible; "…" stands for the rest."""
    lines, rest = [], " ".join(text.split())
    while rest:
        ends = range(1, len(rest) + 1)
        end = max(1, bisect.bisect_right(ends, width, key=lambda end: text_width(rest[:end], LETTERS)))
        if end < len(rest) and " " in rest[: end + 1]:
            end = rest[: end + 1].rindex(" ")
        line, rest = rest[:end], rest[end:].lstrip()
        lines.append(line)
        if rest and len(lines) == MOST_LINES:
            return [*lines[:-1], line[:-1].rstrip() + "…"]
    return lines or [""]
