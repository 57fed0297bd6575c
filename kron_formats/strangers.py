"""Files from strangers, opened so that nothing in them has to be trusted: safetensors, JSON, the paper's pickles.

What cannot be right is refused by KroneckerError, which names the file and the reason, before its tensors are read. No
code in a file is ever run, and no file has more memory taken than its own size justifies.
"""

import json
import os
import stat
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kron_formats.names import KroneckerError

LONGEST = 80  # characters of a stranger's words that a message shows
BEGINNINGS = (  # of files that are taken for safetensors, and what they are
    (b"PK\x03\x04", "a zip archive, as PyTorch's pickles are; scripts/convert.py --allow_pickle reads the paper's"),
    (b"\x80", "a pickle, perhaps, and those can run code"),
    (b"version https://git-lfs", "a pointer of Git LFS; fetch the file itself: git lfs pull"),
    (b"<", "a web page, perhaps"),
    (b"GGUF", "a GGUF file"),
)


def printable(text: str, longest: int = LONGEST) -> str:
    """Return a stranger's words as they can be shown: on one line, not too long, nothing that steers a terminal."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:longest])
    return shown if len(text) <= longest else f"{shown}... ({len(text)} characters)"


def reason(error: Exception) -> str:
    """Return the first line of an error of a library, which may quote the stranger."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0], longest=200)


def check_regular(path: Path) -> None:
    """Raise KroneckerError where there is no file, or one whose reading may never end: a pipe, a socket, a device."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise KroneckerError(f"there is no adapter file {path}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise KroneckerError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(mode):
        raise KroneckerError(f"{path} is no adapter file: it is a folder, pipe, socket or device")


# ---- safetensors ----


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file, its header checked against its size, for `keys`, `get_tensor` and `metadata`."""
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            _check_names(path)
            yield file
    # Types that torch lacks, sides beyond its integers, and names that are no UTF-8 have errors of their own.
    except (SafetensorError, OSError, TypeError, AttributeError, RuntimeError) as error:
        raise KroneckerError(f"{path} is not a readable safetensors file: {_kind(path) or reason(error)}") from error


def _check_names(path: Path) -> None:
    """Raise KroneckerError where the header says something twice, of which safetensors would believe the last."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise KroneckerError(f"{path} is ambiguous: its header says twice what {printable(twice)} is")
        return entries

    with path.open("rb") as file:
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=distinct)


def _kind(path: Path) -> str | None:
    """Return what a file that is no safetensors seems to be, None where its beginning does not tell."""
    try:
        with path.open("rb") as file:
            beginning = file.read(32).lstrip()
    except OSError:
        return None
    return next((f"it is {words}" for start, words in BEGINNINGS if beginning.startswith(start)), None)


# ---- pickles ----


def is_pickle(path: Path) -> bool:
    """Whether a file is an archive as torch.save writes them. Old ones, which are bare pickles, are not."""
    return os.path.isfile(path) and zipfile.is_zipfile(path)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of an archive as torch.save writes them; code in it is refused, not run."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, which torch.save does not do")
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise KroneckerError(f"{path} holds other things than tensors, or is damaged: {reason(error)}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_meta
        for key, tensor in tensors.items()
    ):
        raise KroneckerError(f"{path} is no mapping of names to tensors")
    # A tensor can claim any size by strides of 0.
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > os.path.getsize(path):
        raise KroneckerError(f"{path} claims larger tensors than it holds")
    return {key: tensor.detach() for key, tensor in tensors.items()}


# ---- JSON ----


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    check_regular(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KroneckerError(f"{path} cannot be read: {error}") from error
    return parse_json(text, str(path))


def parse_json(text: str, source: str) -> dict[str, Any]:
    """Return the object that a text in JSON is; `source` is what messages call it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        raise KroneckerError(f"{source} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise KroneckerError(f"{source} is no JSON object")
    return value


def positive_integer(value: Any) -> int | None:
    """Return a number from JSON, or from a string of metadata, None where it is no integer from 1 to 2³¹."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 10:
        value = int(value)
    return value if type(value) is int and 0 < value <= 2**31 else None


def integers(values: Any, count: int) -> tuple[int, ...] | None:
    """Return a list from JSON as `count` positive integers, None where it is none."""
    if not isinstance(values, Collection) or len(values) != count:
        return None
    found = tuple(positive_integer(value) for value in values)
    return None if None in found else found
