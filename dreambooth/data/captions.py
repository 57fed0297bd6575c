"""What is said about photos: captions and class prompts in files beside them, or in metadata.jsonl."""

import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dreambooth.errors import UserError
from dreambooth.options.training import TrainingConfig
from kron_formats.files import printable, read_text

logger = logging.getLogger(__name__)

METADATA = "metadata.jsonl"
CAPTION_SUFFIX, CLASS_SUFFIX, MASK_SUFFIX = ".txt", ".class.txt", ".mask.png"
CAPTION_COLUMN, CLASS_COLUMN = "text", "class_text"
LARGEST_CAPTION, LARGEST_METADATA = 2**16, 2**26  # bytes


@dataclass(frozen=True)
class Caption:
    """What is said about one photo; None where nothing is."""

    text: str | None = None
    class_text: str | None = None

    def prompts(self, prompt: str, config: TrainingConfig) -> tuple[str, str | None]:
        """Return the prompt, `prompt` where there is no caption, and the class prompt."""
        text = prompt if self.text is None else self.text.replace("{instance_prompt}", config.instance_prompt)
        return text, self.class_text or config.class_prompt


def read_captions(directory: Path, names: Collection[str], source: str, config: TrainingConfig) -> dict[str, Caption]:
    """Return the caption of each of the photos `names` in a folder; `source` is what messages call the folder.

    photo.txt wins over metadata.jsonl. Empty captions, and captions and masks without a photo, are named in a warning.
    Raises UserError for files that do not read.
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
    """Return the text beside a photo, on one line."""
    path = photo.with_suffix(suffix)
    try:
        text = " ".join(read_text(path, LARGEST_CAPTION).split())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {printable(path.name)} is no text in UTF-8 ({error})") from error
    if not text:
        logger.warning("%s: %s is empty, so it is ignored", source, printable(path.name))
    return text or None


def _read_metadata(directory: Path, source: str, column: str | None) -> dict[str, Caption]:
    """Return the captions that metadata.jsonl holds: on each line an object with file_name and text."""
    path = directory / METADATA
    if not path.exists():
        return {}
    try:
        lines = read_text(path, LARGEST_METADATA).split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {METADATA} is no text in UTF-8 ({error})") from error
    rows = [
        _parse(line, f"{source}: {METADATA}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    columns = sorted(set().union(*rows))
    # A file with class prompts alone is fine, unless captions were asked for.
    if rows and (column or CAPTION_COLUMN) not in columns and (column or CLASS_COLUMN not in columns):
        raise UserError(
            f"{source}: {METADATA} has no column {column or CAPTION_COLUMN} for --caption_column; "
            f"it has {', '.join(columns)}"
        )
    return {Path(row["file_name"]).as_posix(): caption_of(row, column) for row in rows}


def _parse(line: str, place: str) -> dict[str, str | None]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        raise UserError(f"{place}: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise UserError(f'{place}: expected {{"file_name": "photo.jpg", "text": "..."}}')
    return row


def caption_of(row: dict[str, str | None], column: str | None) -> Caption:
    """Return the caption in a row of a table. What is empty counts as missing."""

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
            "%s: captions or masks without a photo of their name: %s", source, ", ".join(map(printable, orphans))
        )
