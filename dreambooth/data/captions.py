"""Captions and class prompts of photos, from files beside them or from a table in their folder."""

import csv
import io
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.data.folder import CAPTION_SUFFIXES, CLASS_SUFFIX, Folder, key_of_name, listed
from dreambooth.errors import UserError
from dreambooth.options.data import ImageOptions
from dreambooth.options.photos import PhotoOptions
from dreambooth.tokens import bare_words, subject_words
from kron_formats.files import printable, read_text

logger = logging.getLogger(__name__)

CAPTION_COLUMN, CLASS_COLUMN = "text", "class_text"
LARGEST_CAPTION, LARGEST_TABLE = 2**16, 2**26  # bytes
# Words of an instance prompt that do not tell the subject from others
FRAME = frozenset("a an the of in on at with and this my one photo photograph picture image portrait".split())


@dataclass(frozen=True)
class Caption:
    """The text and the class prompt given for one photo; None if there is none."""

    text: str | None = None
    class_text: str | None = None

    def prompts(self, prompt: str, config: ImageOptions) -> tuple[str, str | None]:
        """Return the photo's prompt, which is `prompt` if it has no caption, and its class prompt."""
        text = prompt if self.text is None else self.text.replace("{instance_prompt}", config.instance_prompt)
        return text, self.class_text or config.class_prompt


# ---- from a folder ----


def read_captions(folder: Folder, config: PhotoOptions) -> dict[str, Caption]:
    """Return the caption of each photo of a folder, by its name.

    photo.txt takes precedence over photo.caption, and both over the tables. Warns of empty captions, of those that
    disagree, of several lines, and of rows without a photo. Raises UserError if a file cannot be read.
    """
    tables = [(path.name, _read_table(path, folder.source, config.caption_column)) for path in folder.tables()]
    _warn_of_rows_without_photo(folder, tables)
    captions, disagreeing, folded = {}, [], []
    for photo in folder.photos:
        rows = [(name, table[key]) for name, table in tables if (key := key_of_name(photo.name)) in table]
        beside = [(path.name, _read_lines(path, folder)) for path in folder.beside(photo, *CAPTION_SUFFIXES)]
        folded += [printable(name) for name, lines in beside if len(lines) > 1]
        texts = [(name, " ".join(lines)) for name, lines in beside] + [(name, row.text) for name, row in rows]
        texts = [(name, text) for name, text in texts if text]
        if len({text for _, text in texts}) > 1:
            disagreeing.append(f"{printable(photo.name)} ({printable(texts[0][0])} is used)")
        classes = [" ".join(_read_lines(path, folder)) for path in folder.beside(photo, CLASS_SUFFIX)]
        classes += [row.class_text or "" for _, row in rows]
        captions[photo.name] = Caption(texts[0][1] if texts else None, next(filter(None, classes), None))
    if disagreeing:
        logger.warning("%s: photos with several different captions: %s", folder.source, listed(disagreeing))
    if folded:
        logger.warning("%s: captions of several lines, which are joined into one: %s", folder.source, listed(folded))
    return captions


def _read_lines(path: Path, folder: Folder) -> list[str]:
    """Return the lines of a caption file, without empty ones and white space that does not count."""
    try:
        text = read_text(path, LARGEST_CAPTION)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder.source}: {printable(path.name)} cannot be read as UTF-8 text: {error}") from error
    lines = [" ".join(line.split()) for line in text.splitlines()]
    if not any(lines):
        logger.warning("%s: %s is empty and is ignored", folder.source, printable(path.name))
    return list(filter(None, lines))


def _read_table(path: Path, source: str, column: str | None) -> dict[str, Caption]:
    """Return the captions in a table whose rows have file_name and text, by the name of the photo."""
    try:
        rows = list((_rows_of_csv if path.suffix == ".csv" else _rows_of_jsonl)(read_text(path, LARGEST_TABLE)))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{source}: {path.name}, {error}") from error
    for line, row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise UserError(
                f"{source}: {path.name}, line {line}: expected a row with the name of a photo: "
                '{"file_name": "photo.jpg", "text": "..."}, in a .csv the columns file_name and text'
            )
    columns = sorted({name for _, row in rows for name in row if name})
    # A file with only class prompts is fine, unless --caption_column asks for captions.
    if rows and (column or CAPTION_COLUMN) not in columns and (column or CLASS_COLUMN not in columns):
        raise UserError(
            f"{source}: {path.name} has no column {column or CAPTION_COLUMN} for --caption_column; "
            f"it has {', '.join(columns)}"
        )
    return {key_of_name(row["file_name"]): caption_of(row, column or CAPTION_COLUMN) for _, row in rows}


def _rows_of_jsonl(text: str) -> Iterator[tuple[int, Any]]:
    """Yield line number and content of every line. Raises ValueError if one is not JSON."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # also raised for numbers with thousands of digits
                raise ValueError(f"line {number}: {error}") from error


def _rows_of_csv(text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        yield reader.line_num, row


def _warn_of_rows_without_photo(folder: Folder, tables: list[tuple[str, dict[str, Caption]]]) -> None:
    names = {key_of_name(photo.name) for photo in folder.photos}
    lost = [f"{printable(row)} in {name}" for name, table in tables for row in table if row not in names]
    if lost:
        logger.warning("%s: captions without a photo of that name: %s", folder.source, listed(lost))


# ---- from a row ----


def caption_of(row: Mapping[str, Any], column: str | None) -> Caption:
    """Return the caption in a row of a table, from a column if one is given. An empty entry counts as missing."""

    def text(name: str | None) -> str | None:
        return " ".join(str(row.get(name) or "").split()) or None if name else None

    return Caption(text(column), text(CLASS_COLUMN))


# ---- whether they name the subject ----


def warn_of_missing_subject(captions: Mapping[str, str], source: str, config: ImageOptions) -> None:
    """Warn of captions, {photo: text}, that lack the subject's name in --instance_prompt."""
    names = subject_names(config)
    lacking = [printable(photo) for photo, text in captions.items() if not {*names} & {*bare_words(text)}]
    if names and lacking:
        logger.warning(
            "%s: captions without '%s', the subject's name in --instance_prompt, do not teach it: %s; "
            "{instance_prompt} in a caption stands for that prompt",
            source,
            " ".join(names),
            listed(lacking),
        )


def subject_names(config: ImageOptions) -> list[str]:
    """Return the words of --instance_prompt that tell the subject from its class: those that --class_prompt lacks.

    Without a class prompt it is the first word that is not of FRAME, since the name is written before the class: "a
    photo of sks dog".
    """
    words = subject_words(config.instance_prompt, config.class_prompt).split()
    names = [word for word in dict.fromkeys(words) if word not in FRAME]
    return names if config.class_prompt else names[:1]
