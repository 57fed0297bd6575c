"""OUTPUT_DIR/samples/index.html: samples before and after training, step by step, and the scores of the photos.

The page is made from what is in the output folder alone: sheets, whose files say where their images are, and
photos.json. So it is the same whether a run was interrupted or not.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth.drawing.sheet import SheetRow, rows_of_sheet
from dreambooth.errors import warn_only
from dreambooth.layout import PAGE_NAME, SAMPLES_NAME, list_sheets, sheet_step
from dreambooth.options.output import OutputOptions
from dreambooth.report.html import environment, jpeg
from dreambooth.report.photos import read_photo_scores
from kron_formats.files import whole_file, write_text

TEMPLATE = "samples.html.j2"
PIXELS = 2**25  # in all pictures of a page
SIDES = (384, 320, 256, 192, 160, 128, 96, 64, 48, 32)  # px, of the longer side of a picture


def save_page(config: OutputOptions) -> None:
    """Write OUTPUT_DIR/samples/index.html, whole or not at all. Never raises: a failure is a warning.

    Without sheets and scores there is no page. All sheets are in it, as JPEGs whose longer side is at most 384 px, and
    less if they would have more than 2²⁵ pixels together (227 squares of 384 px). That is a page of about 15 MB, at 0.3
    bytes a pixel, and of 34 MB for pure noise.
    """
    output = Path(config.output_dir)
    path = output / SAMPLES_NAME / PAGE_NAME
    with warn_only(f"{path} was not written"):
        sheets = {sheet: rows for sheet in list_sheets(output) if (rows := rows_of_sheet(sheet))}
        photos = read_photo_scores(output)
        if not sheets and photos is None:
            path.unlink(missing_ok=True)
            return
        text = environment().get_template(TEMPLATE).render(_contents(sheets), photos=photos)
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as unfinished:
            write_text(unfinished, text)


def _contents(sheets: Mapping[Path, Sequence[SheetRow]]) -> dict[str, Any]:
    """Return what the template shows of the samples."""
    side = _side(sum(len(row.boxes) for rows in sheets.values() for row in rows))
    pictures = {sheet_step(path): _pictures(path, path.stat().st_mtime_ns, side) for path in sheets}
    prompts = dict.fromkeys(prompt for of_step in reversed(pictures.values()) for prompt in of_step)
    first, *later = pictures or [None]
    rows = {prompt: _images({step: of.get(prompt, []) for step, of in pictures.items()}) for prompt in prompts}
    return {"first": first, "later": later, "rows": rows}


def _side(number: int) -> int:
    """Return the longest side, px, with which so many pictures have no more than PIXELS."""
    return next((side for side in SIDES if number * side**2 <= PIXELS), SIDES[-1])


@functools.cache  # a run draws one sheet after the other, and its page has them all
def _pictures(path: Path, changed: int, side: int) -> dict[str, list[str]]:
    """Return the addresses of a sheet's images under each label, made smaller. `changed` is the file's time, ns."""
    pictures: dict[str, list[str]] = {}
    with Image.open(path, formats=["PNG"]) as sheet:
        for label, boxes in rows_of_sheet(path):
            for box in boxes:
                image = sheet.crop(box)
                image.thumbnail((side, side))
                pictures.setdefault(label, []).append(jpeg(image))
    return pictures


def _images(of_steps: Mapping[int, Sequence[str]]) -> list[dict[int, str]]:
    """Return for each image of a prompt: step -> its address, for all steps that have it."""
    number = max(map(len, of_steps.values()))
    return [{step: images[n] for step, images in of_steps.items() if n < len(images)} for n in range(number)]
