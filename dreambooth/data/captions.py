"""Captions and class prompts of photos, from files beside them or from metadata.jsonl."""

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.options.data import ImageOptions
from dreambooth.options.photos import PhotoOptions
from kron_formats.files import printable, read_text

logger = logging.getLogger(__name__)

METADATA = "metadata.jsonl"
CAPTION_SUFFIX, CLASS_SUFFIX, MASK_SUFFIX = ".txt", ".class.txt", ".mask.png"
CAPTION_COLUMN, CLASS_COLUMN = "text", "class_text"
LARGEST_CAPTION, LARGEST_METADATA = 2**16, 2**26  # bytes


@dataclass(frozen=True)
class Caption:
    """The text and the class prompt given for one photo; None if there is none."""

    text: str | None = None
    class_text: str | None = None

    def prompts(self, prompt: str, config: ImageOptions) -> tuple[str, str | None]:
        """Return the photo's prompt, which is `prompt` if it has no caption, and its class prompt."""
        text = prompt if self.text is None else self.text.replace("{instance_prompt}", config.instance_prompt)
        return text, self.class_text or config.class_prompt


def read_captions(directory: Path, names: Collection[str], source: str, config: PhotoOptions) -> dict[str, Caption]:
    """Return the caption of each of the photos `names` in a folder; `source` is what messages call the folder.

    photo.txt takes precedence over metadata.jsonl. Warns of empty captions, and of captions and masks without a photo.
    Raises UserError if a file cannot be read.
    """
    metadata = _read_metadata(directory, source, config.caption_column)
    _warn_of_orphans(directory, names, metadata, source)
    captions = {}
    for name in names:
        listed = metadata.get(name, Caption())
        captions[name] = Caption(
            _read_text(directory / name, CAPTION_SUFFIX, source) or listed.text,
            _read_text(directory / name, CLASS_SUFFIX, source) or listed.class_text,
        )
    return captions


def _read_text(photo: Path, suffix: str, source: str) -> str | None:
    """Return the text beside a photo as one line, or None if there is none."""
    path = photo.with_suffix(suffix)
    try:
        text = " ".join(read_text(path, LARGEST_CAPTION).split())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {printable(path.name)} cannot be read as UTF-8 text: {error}") from error
    if not text:
        logger.warning("%s: %s is empty and is ignored", source, printable(path.name))
    return text or None


def _read_metadata(directory: Path, source: str, column: str | None) -> dict[str, Caption]:
    """Return the captions in metadata.jsonl, which has an object with file_name and text on each line."""
    path = directory / METADATA
    if not path.exists():
        return {}
    try:
        lines = read_text(path, LARGEST_METADATA).split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {METADATA} cannot be read as UTF-8 text: {error}") from error
    rows = [
        _parse(line, f"{source}: {METADATA}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    columns = sorted(set().union(*rows))
    # A file with only class prompts is fine, unless --caption_column asks for captions.
    if rows and (column or CAPTION_COLUMN) not in columns and (column or CLASS_COLUMN not in columns):
        raise UserError(
            f"{source}: {METADATA} has no column {column or CAPTION_COLUMN} for --caption_column; "
            f"it has {', '.join(columns)}"
        )
    return {Path(row["file_name"]).as_posix(): caption_of(row, column) for row in rows}


def _parse(line: str, place: str) -> dict[str, Any]:
    """Return a line of metadata.jsonl; `place` is what messages call it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also raised for numbers with thousands of digits
        raise UserError(f"{place}: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise UserError(f'{place}: expected {{"file_name": "photo.jpg", "text": "..."}}')
    return row


def caption_of(row: Mapping[str, Any], column: str | None) -> Caption:
    """Return the caption in a row of a table, by default from the column `text`. An empty entry counts as missing."""

    def text(name: str) -> str | None:
        return " ".join(str(row.get(name) or "").split()) or None

    return Caption(text(column or CAPTION_COLUMN), text(CLASS_COLUMN))


def _warn_of_orphans(directory: Path, names: Collection[str], metadata: Collection[str], source: str) -> None:
    suffixes = (CAPTION_SUFFIX, CLASS_SUFFIX, MASK_SUFFIX)
    used = {Path(name).with_suffix(suffix).name for name in names for suffix in suffixes}
    files = [path.name for path in sorted(directory.iterdir()) if path.name.lower().endswith((".txt", ".mask.png"))]
    orphans = [name for name in files if name not in used and not name.startswith(".")]
    orphans += [f"{name} in {METADATA}" for name in metadata if name not in names]
    if orphans:
        logger.warning(
            "%s: captions or masks without a photo of the same name: %s", source, ", ".join(map(printable, orphans))
        )
