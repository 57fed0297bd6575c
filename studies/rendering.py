"""The templates of reports with their content: Markdown, and HTML that holds its pictures."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dreambooth.markdown import code
from dreambooth.report.html import address, environment, jpeg
from studies.exports import command

HERE = Path(__file__).parent
NAME_KEY = "plot"  # in a plot's file


def render(template: str, content: Mapping[str, Any], folder: Path = HERE) -> str:
    """Return a template of a folder with its content. HTML is escaped; Markdown has filters of its own."""
    templates = environment([folder, HERE])
    templates.filters |= {"cell": markdown_cell, "code": markdown_code, "command": command, "png": png, "jpeg": jpeg}
    return templates.get_template(template).render(content)


def markdown_cell(text: str) -> str:
    """Return text for a cell of a Markdown table, in which nothing is markup."""
    escaped = "".join(f"\\{letter}" if letter in "\\`*_[]<>|#~" else letter for letter in " ".join(text.split()))
    return escaped.replace("&", "&amp;")


def markdown_code(text: str) -> str:
    """Return text as code in a Markdown table."""
    return code(text).replace("|", "\\|")


def png_bytes(image: Image.Image, name: str = "") -> bytes:
    """Return a plot as a file, which says its own `name` if it has one: a copy of another name is not the report's."""
    file, said = io.BytesIO(), PngInfo()
    if name:
        said.add_itxt(NAME_KEY, name)
    image.save(file, "PNG", optimize=True, pnginfo=said)
    return file.getvalue()


def name_of_plot(path: Path) -> str | None:
    """Return the name that a file got as a plot of a report; None if it is something else."""
    try:
        with Image.open(path) as image:
            return image.info.get(NAME_KEY)
    except (OSError, ValueError, SyntaxError):
        return None


def png(image: Image.Image) -> str:
    """Return a plot as the address of an image that holds it."""
    return address("png", png_bytes(image))
