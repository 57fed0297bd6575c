"""HTML pages that need no network: templates with their content, pictures in the page, in the style of style.css."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from PIL import Image

HERE = Path(__file__).parent


def environment(folders: Sequence[Path] = ()) -> Environment:
    """Return an environment for the templates in `folders` and in this one. Values are escaped in HTML alone."""
    return Environment(
        loader=FileSystemLoader([*folders, HERE]),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def address(kind: str, content: bytes) -> str:
    """Return the address of an image that holds a file of a kind, "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def jpeg(image: Image.Image) -> str:
    """Return a picture as the address of an image that holds it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return address("jpeg", file.getvalue())
