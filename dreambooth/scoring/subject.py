"""What scoring reads: prompts, and photos of the subject."""

import json
import logging
from collections.abc import Mapping, Sequence

from PIL import Image

from dreambooth.data.folder import find_photos
from dreambooth.data.images import read_image
from dreambooth.data.photos import readable
from dreambooth.errors import UserError
from kron_formats.files import printable, read_text

logger = logging.getLogger(__name__)

LARGEST_FILE = 2**20  # bytes
PLACEHOLDER = "{}"  # stands for the subject in a prompt


def read_prompts(path: str) -> list[str]:
    """Return the prompts of a file, one per line, without empty lines and those that begin with #.

    Raises UserError if the file cannot be read or has no prompts.
    """
    return list(prompt_lines(path).values())


def prompt_lines(path: str, flag: str = "--prompts", example: str = f"a {PLACEHOLDER} in snow") -> dict[int, str]:
    """Return the prompts of a file by the numbers of their lines, counted from 1. Messages show the example.

    Raises UserError if the file cannot be read or has no prompts.
    """
    try:
        lines = dict(enumerate(map(str.strip, read_text(path, LARGEST_FILE).splitlines()), 1))
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: {error}") from error
    prompts = {number: line for number, line in lines.items() if line and not line.startswith("#")}
    if not prompts:
        raise UserError(f"{flag} {path}: it has no prompts; write one per line, such as '{example}'")
    return prompts


def name_subject(prompts: Sequence[str], subject: str) -> list[str]:
    """Return the prompts with the subject in place of {}."""
    return [prompt.replace(PLACEHOLDER, subject) for prompt in prompts]


def read_subject_photos(folder: str) -> list[Image.Image]:
    """Return the photos of a folder uncropped, upright, in sRGB. Raises UserError if none can be read."""
    found = find_photos(folder, "--instance_data_dir")
    return readable(((path.name, path) for path in found.photos), read_image, found.source)


def warn_of_trained_photos(metadata: Mapping[str, Mapping[str, str]], holdout: int) -> None:
    """Warn of adapters that did not keep as many photos out of training, as far as their files say.

    `metadata` are those of each adapter, by its name in messages.
    """
    for name, entries in metadata.items():
        kept_out = _kept_out(entries.get("config", ""))
        if kept_out is not None and kept_out < holdout:
            logger.warning(
                "--holdout %d: %s was trained with --holdout %d. If its photos were those of this folder, it has seen "
                "some of those that it is scored against",
                *(holdout, printable(name), kept_out),
            )


def _kept_out(config: str) -> int | None:
    """Return how many photos a training kept out by its options in JSON; None if they do not say."""
    try:
        return int(json.loads(config).get("holdout", 0))
    except (ValueError, TypeError, AttributeError):
        return None
