"""Markdown for model cards, in which the user's own text is never taken for Markdown, and for tables."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dreambooth.wording import size
from kron_formats.files import size_on_disk


def size_in_words(path: Path, layers: int, parameters: int) -> str:
    """Return a model card's sentence on the size of the result, a file or a folder."""
    return f"{code(path.name)}: {layers} layers, {parameters:,} parameters, {size(size_on_disk(path))}."


def code(text: str) -> str:
    """Return a text as Markdown inline code, whatever backticks it has; white space becomes single spaces."""
    text = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text or not text else f"`{text}`"


def python_string(text: str) -> str:
    """Return a text as a Python string literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def loading_lines(base_model: str, pipeline_class: str) -> tuple[str, str]:
    """Return the Python lines that import and load a base model, which may be one file, in fp16 on a GPU."""
    owner, function = "DiffusionPipeline", "from_pretrained"
    if base_model.endswith(".safetensors"):
        owner, function = pipeline_class, "from_single_file"
    arguments = f"{python_string(base_model)}, torch_dtype=torch.float16"
    return f"from diffusers import {owner}", f'pipeline = {owner}.{function}({arguments}).to("cuda")'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with its columns aligned: names to the left, numbers to the right."""
    rows = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
