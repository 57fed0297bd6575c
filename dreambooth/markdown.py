"""Markdown of model cards, in which nothing of the user's own text is taken for Markdown."""

import json
import re
from pathlib import Path


def size_in_words(path: Path, layers: int, parameters: int) -> str:
    """Return the sentence of a model card that says how large the result is."""
    return f"{code(path.name)}: {layers} layers, {parameters:,} parameters, {path.stat().st_size / 2**20:.2f} MiB."


def code(text: str) -> str:
    """Return a text as inline code of Markdown, in which nothing of it is Markdown."""
    text = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text or not text else f"`{text}`"


def python_string(text: str) -> str:
    """Return a text as a string literal of Python in double quotes."""
    return json.dumps(text, ensure_ascii=False)
