"""What scoring reads: prompts, and photos of the subject."""

from collections.abc import Sequence

from PIL import Image

from dreambooth.data.folder import find_photos
from dreambooth.data.images import read_image
from dreambooth.data.photos import readable
from dreambooth.errors import UserError
from kron_formats.files import read_text

LARGEST_FILE = 2**20  # bytes
PLACEHOLDER = "{}"  # stands for the subject in a prompt


def read_prompts(path: str) -> list[str]:
    """Return the prompts of a file, one per line, without empty lines and those that begin with #.

    Raises UserError if the file cannot be read or has no prompts.
    """
    return list(prompt_lines(path).values())


def prompt_lines(path: str) -> dict[int, str]:
    """Return the prompts of a file by the numbers of their lines, counted from 1.

    Raises UserError if the file cannot be read or has no prompts.
    """
    try:
        lines = dict(enumerate(map(str.strip, read_text(path, LARGEST_FILE).splitlines()), 1))
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts {path}: {error}") from error
    prompts = {number: line for number, line in lines.items() if line and not line.startswith("#")}
    if not prompts:
        raise UserError(f"--prompts {path}: it has no prompts; write one per line, such as 'a {PLACEHOLDER} in snow'")
    return prompts


def name_subject(prompts: Sequence[str], subject: str) -> list[str]:
    """Return the prompts with the subject in place of {}."""
    return [prompt.replace(PLACEHOLDER, subject) for prompt in prompts]


def read_subject_photos(folder: str) -> list[Image.Image]:
    """Return the photos of a folder uncropped, upright, in sRGB. Raises UserError if none can be read."""
    found = find_photos(folder, "--instance_data_dir")
    return readable(((path.name, path) for path in found.photos), read_image, found.source)
