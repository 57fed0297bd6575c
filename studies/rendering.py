"""The templates of pages with their content: Markdown, and HTML that holds its pictures, in the style of style.css."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dreambooth.markdown import code
from studies.exports import command

HERE = Path(__file__).parent
NAME_KEY = "plot"  # in a plot's file


def render(template: str, content: Mapping[str, Any], folder: Path = HERE) -> str:
    """Return a template of a folder with its content. HTML is escaped; Markdown has filters of its own."""
    environment = Environment(
        loader=FileSystemLoader([folder, HERE]),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": markdown_cell, "code": markdown_code, "command": command, "png": png, "jpeg": jpeg}
    return environment.get_template(template).render(content)


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
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()


def jpeg(image: Image.Image) -> str:
    """Return a picture as the address of an image that holds it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
