"""Pictures of a sweep beside each other: the same prompt and seed, rows and columns by two of its axes."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dreambooth.errors import UserError
from kron_formats.files import reason
from studies.grid import STEP
from studies.results import BASE, CLASS, Record, entries_of, entry_of, pictures
from studies.sheets import thumbnail

MOST_PICTURES = 1500  # of one page, about 6 KB each
PROMPT = "prompt"  # the slider over prompts


@dataclass(frozen=True)
class Grid:
    """One prompt of the cells that agree in all axes but two."""

    key: tuple[int, ...]  # the place of each slider
    prompt: str
    images: Mapping[tuple[str, str], Image.Image]  # (row, column) -> thumbnail
    missing: Mapping[tuple[str, str], str]  # why a cell has no picture
    base: Image.Image | None  # what the base model draws


@dataclass(frozen=True)
class Gallery:
    """All grids, and the sliders that choose among them."""

    row_axis: str
    column_axis: str
    rows: Sequence[str]
    columns: Sequence[str]
    sliders: Mapping[str, Sequence[str]]  # prompt or axis -> entries; the first of them first
    first: Sequence[int]  # the place of each slider at the beginning
    grids: Sequence[Grid]
    left_out: int  # prompts


def make_gallery(
    sweep: Path, records: Sequence[Record], axes: Mapping[str, Sequence[str]], rows: str, columns: str
) -> Gallery | None:
    """Return the pictures of a sweep; None if it has none. Raises UserError if a picture is damaged."""
    files = {(record.cell, record.step): pictures(sweep, record) for record in records}
    prompts = sorted({prompt for found in files.values() for prompt in found})
    if not prompts:
        return None
    shown = prompts[: max(1, MOST_PICTURES // len(records))]
    others = {axis: entries for axis, entries in axes.items() if axis not in (rows, columns) and len(entries) > 1}
    places = itertools.product(enumerate(shown), *(enumerate(entries) for entries in others.values()))
    grids = []
    for (number, prompt), *chosen in places:
        wanted = {axis: entry for axis, (_, entry) in zip(others, chosen)}
        # Cells of another grid in the same folder may lack an axis; they belong to all of its entries
        members = [record for record in records if wanted.items() <= {**wanted, **record.labels}.items()]
        grid = _grid((number, *(place for place, _ in chosen)), prompt, members, files, (rows, columns), sweep)
        grids.append(grid)
    sliders = {PROMPT: [_text(records, prompt) for prompt in shown], **others}
    first = [len(entries) - 1 if axis == STEP else 0 for axis, entries in sliders.items()]
    left_out = len(prompts) - len(shown)
    names = entries_of(records, rows), entries_of(records, columns)
    return Gallery(rows, columns, names[0], names[1], sliders, first, grids, left_out)


def _grid(
    key: tuple[int, ...],
    prompt: str,
    records: Sequence[Record],
    files: Mapping[tuple[str, int | None], Mapping[str, Path]],
    axes: tuple[str, str],
    sweep: Path,
) -> Grid:
    images, missing = {}, {}
    for record in records:
        row, column = (entry_of(record, axis) for axis in axes)
        if path := files[record.cell, record.step].get(prompt):
            images[row, column] = _read(path)
        else:
            missing[row, column] = record.reason or "not drawn"
    bases = (pictures(sweep, record, BASE).get(prompt) for record in records)
    base = next((path for path in bases if path), None)
    return Grid(key, _text(records, prompt), images, missing, _read(base) if base else None)


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return thumbnail(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} is damaged: {reason(error)}. Delete it, or evaluate its cell again") from error


def _text(records: Sequence[Record], prompt: str) -> str:
    """Return the words of a prompt by its number."""
    if prompt == CLASS:
        return "the class prompt"
    place = int(prompt)
    rows = (record.prompts[place] for record in records if place < len(record.prompts))
    return next((str(row["prompt"]) for row in rows if "prompt" in row), f"prompt {place}")
