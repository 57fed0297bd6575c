"""Captions and class prompts of photos, from files beside them or from tables, metadata.jsonl and metadata.csv."""

import csv
import io
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from dreambooth.data.folder import Folder, Names
from dreambooth.errors import UserError
from dreambooth.options.photos import PhotoOptions
from dreambooth.options.subjects import Subject
from dreambooth.wording import shortlist
from kron_formats.files import printable, read_text

logger = logging.getLogger(__name__)

CAPTION_COLUMN, CLASS_COLUMN = "text", "class_text"
LARGEST_CAPTION, LARGEST_METADATA = 2**16, 2**26  # bytes


@dataclass(frozen=True)
class Caption:
    """The text and the class prompt given for one photo, as they are written; None if there is none."""

    text: str | None = None
    class_text: str | None = None

    def prompts(self, prompt: str, subject: Subject) -> tuple[str, str | None]:
        """Return the photo's prompt, which is `prompt` if it has no caption, and its class prompt."""
        text = prompt
        if self.text is not None:
            text = one_line(self.text).replace("{instance_prompt}", subject.instance_prompt)
        return text, subject.class_prompt if self.class_text is None else one_line(self.class_text)

    @property
    def has_lines(self) -> bool:
        """Whether one of the texts has several lines that are not empty."""
        return any(has_lines(text) for text in (self.text, self.class_text) if text is not None)


@dataclass(frozen=True)
class Written:
    """A text for a photo, as it is written somewhere."""

    photo: Path
    kind: str  # "caption" or "class prompt"
    text: str
    place: str  # what messages call it


def read_captions(folder: Folder, config: PhotoOptions) -> dict[Path, Caption]:
    """Return the caption of each photo in a folder.

    In order of precedence: photo.txt, photo.jpg.txt, photo.caption, metadata.jsonl, metadata.csv. Warns of empty
    captions, of captions of several lines, of those that differ, and of rows without a photo. Raises UserError if a
    file cannot be read.
    """
    written = [*_beside_photos(folder), *_in_tables(folder, config.caption_column)]
    warn_of_lines([text.place for text in written if has_lines(text.text)], folder.source)
    first: dict[tuple[Path, str], Written] = {}
    for text in written:
        first.setdefault((text.photo, text.kind), text)
    others = [(text, first[text.photo, text.kind]) for text in written]
    differing = [
        f"{text.place} ({used.place} is)" for text, used in others if one_line(text.text) != one_line(used.text)
    ]
    if differing:
        logger.warning(
            "%s: captions that differ from another one of the photo are not used: %s",
            folder.source,
            shortlist(differing),
        )
    texts = {key: text.text for key, text in first.items()}
    return {
        photo: Caption(texts.get((photo, "caption")), texts.get((photo, "class prompt"))) for photo in folder.photos
    }


def one_line(text: str) -> str:
    """Return a text on one line, its lines and words joined with single spaces."""
    return " ".join(text.split())


def has_lines(text: str) -> bool:
    """Whether a text has several lines that are not empty."""
    return sum(bool(line.strip()) for line in text.splitlines()) > 1


def warn_of_lines(places: list[str], source: str) -> None:
    """Warn that captions have several lines, if there are such `places`."""
    if places:
        logger.warning(
            "%s: captions of several lines, which are read as one line, joined with spaces: %s",
            source,
            shortlist([*dict.fromkeys(places)]),
        )


# ---- files beside photos ----


def _beside_photos(folder: Folder) -> Iterator[Written]:
    for kind in ("caption", "class prompt"):
        for photo in folder.photos:
            for path in folder.of_photo(photo, kind):
                text = _read_text(path, folder.source)
                if text.strip():
                    yield Written(photo, kind, text, path.name)
                else:
                    logger.warning("%s: %s is empty and is ignored", folder.source, printable(path.name))


def _read_text(path: Path, source: str) -> str:
    try:
        return read_text(path, LARGEST_CAPTION)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {printable(path.name)} cannot be read as UTF-8 text: {error}") from error


# ---- tables ----


def _in_tables(folder: Folder, column: str | None) -> list[Written]:
    """Return the texts in the tables of captions; the last of several rows for a photo comes first."""
    names, written, orphans = Names(folder.photos), [], []
    for path in folder.tables:
        rows = _read_table(path, folder.source, column)
        orphans += [f"{name} in {path.name}" for name, _ in rows if not names.named(name)]
        for name, caption in reversed(rows):
            for photo in names.named(name):
                texts = {"caption": caption.text, "class prompt": caption.class_text}
                place = f"{path.name} for {photo.name}"
                written += [Written(photo, kind, text, place) for kind, text in texts.items() if text is not None]
    if orphans:
        logger.warning("%s: captions or masks without a photo of the same name: %s", folder.source, shortlist(orphans))
    return written


def _read_table(path: Path, source: str, column: str | None) -> list[tuple[str, Caption]]:
    """Return the file name and the caption of each row of metadata.jsonl or metadata.csv."""
    table = f"{source}: {path.name}"
    try:
        text = read_text(path, LARGEST_METADATA)
    except (OSError, ValueError) as error:
        raise UserError(f"{table} cannot be read as UTF-8 text: {error}") from error
    rows = list(_rows_of_csv(text, table) if path.suffix == ".csv" else _rows_of_jsonl(text, table))
    for place, row in rows:
        if not isinstance(row.get("file_name"), str):
            raise UserError(f"{place}: expected a file_name and a {column or CAPTION_COLUMN}")
    columns = sorted(set().union(*(row for _, row in rows)))
    # A file with only class prompts is fine, unless --caption_column asks for captions.
    if rows and (column or CAPTION_COLUMN) not in columns and (column or CLASS_COLUMN not in columns):
        raise UserError(
            f"{table} has no column {column or CAPTION_COLUMN} for --caption_column; it has {shortlist(columns)}"
        )
    return [
        (PurePath(row["file_name"]).as_posix(), caption_of(row, column or CAPTION_COLUMN, place)) for place, row in rows
    ]


def _rows_of_jsonl(text: str, table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row, an object on a line, after what messages call it."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{table}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also raised for numbers with thousands of digits
            raise UserError(f"{place}: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f'{place}: expected {{"file_name": "photo.jpg", "text": "..."}}')
        yield place, row


def _rows_of_csv(text: str, table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row after what messages call it. The first line names the columns."""
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        for row in reader:
            place = f"{table}, line {reader.line_num}"
            if None in row:  # where DictReader puts what is too much
                raise UserError(f'{place}: it has more columns than the first line; texts with commas need "quotes"')
            yield place, row
    except csv.Error as error:
        raise UserError(f"{table}, after line {reader.line_num}: {error}") from error


def caption_of(row: Mapping[str, Any], column: str | None, place: str) -> Caption:
    """Return the caption in a row of a table, as it is written there. An empty entry counts as missing.

    `place` is what messages call the row. Raises UserError if an entry is not text.
    """

    def text(name: str | None) -> str | None:
        value = None if name is None else row.get(name)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{place}: {name} is not text, but {printable(repr(value), 40)}; captions must be text")
        return value if value and value.strip() else None

    return Caption(text(column), text(CLASS_COLUMN))
