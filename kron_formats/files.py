"""The one way to open files that others made, and the one way to write a file: whole, or not at all.

Untrusted files are safetensors, JSON, text and the paper's pickles. Invalid ones are refused before their content is
used; no code in a file is ever run, and no file takes more memory than its own size justifies.

Two layers, told apart by what they raise:

    check_regular, read_text                                OSError or ValueError with the reason alone, for callers
                                                            that name the file and turn it into their own error
    open_safetensors, read_pickle, read_json, parse_json    KroneckerError, which names the file and the reason

Importing this module does not import torch.
"""

import codecs
import json
import os
import secrets
import shutil
import stat
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from kron_formats.errors import KroneckerError

if TYPE_CHECKING:
    from torch import Tensor

DEEPEST = 3  # dicts in dicts of a pickle
EXCERPT = 80  # characters of untrusted text that a message shows
LARGEST_JSON = 2**24  # bytes
UNFINISHED = ".*.tmp"  # glob pattern of the temporary names that `whole_file` writes to
BEGINNINGS = (  # of files that are taken for safetensors, and what they are
    (b"PK\x03\x04", "a zip archive, as PyTorch's pickles are; --allow_pickle reads those that are known"),
    (b"\x80", "perhaps a pickle, and those can run code"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself: git lfs pull"),
    (b"<", "perhaps a web page"),
    (b"GGUF", "a GGUF file"),
)


# ---- writing ----


@contextmanager
def whole_file(path: str | os.PathLike, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; rename it to `path` if the block ends without an error.

        with whole_file("dog.safetensors", durable=True) as unfinished:
            save_file(tensors, unfinished)

    An earlier file stays in place until the new one is whole. After an error the temporary file is removed and the
    error raised again. The temporary name begins with a dot, ends in ".tmp" (UNFINISHED) and is unique, so that several
    processes and machines may write the same file: the last one wins.

    `durable` also waits until content and name are on the disk, so that the file survives a power failure.
    """
    path = Path(path)
    unfinished = _unfinished(path)
    try:
        yield unfinished
        if durable:
            flush(unfinished)
        os.replace(unfinished, path)
        if durable:
            flush(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside `path` to write to; rename it to `path` if the block ends without an error.

    As `whole_file` with `durable` does for a file. What is at `path`, a file or a folder, is replaced at the end.
    """
    path = Path(path)
    unfinished, replaced = _unfinished(path), _unfinished(path)
    unfinished.mkdir()
    try:
        yield unfinished
        for entry in (*unfinished.rglob("*"), unfinished):
            flush(entry)
        if path.exists():
            os.rename(path, replaced)
        os.rename(unfinished, path)
        flush(path.parent)
    finally:
        remove(unfinished)
        remove(replaced)


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.tmp")


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; do nothing if there is neither."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, the same bytes on every system: UTF-8, lines ending in \\n."""
    Path(path).write_text(text, encoding="utf-8", newline="\n")


def size_on_disk(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def flush(path: str | os.PathLike) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk.

    Windows flushes files that are open for writing only, and no folders: its file system keeps a journal of names.
    """
    windows = os.name == "nt"
    if windows and os.path.isdir(path):
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- any file ----


def check_regular(path: str | os.PathLike) -> None:
    """Raise OSError unless `path` is a regular file: reading a pipe, socket or device may never end.

    FileNotFoundError if there is nothing; ValueError if no file can have the name, which holds a NUL.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is not a regular file, but a folder, pipe, socket or device")


def read_text(path: str | os.PathLike, largest: int) -> str:
    """Return the text of a UTF-8 file of at most `largest` bytes, without its byte order mark.

    Raises OSError if it cannot be read, ValueError if it is too large or not UTF-8.
    """
    check_regular(path)
    if (size := os.stat(path).st_size) > largest:
        raise ValueError(f"it has {size:,} bytes; at most {largest:,} are read")
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = "UTF-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "not UTF-8"
        raise ValueError(f"it is {kind} (byte {error.start}: {error.reason}); save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def printable(text: str, longest: int | None = None) -> str:
    """Return untrusted text as it can be shown: on one line, without anything that steers a terminal.

    Text beyond `longest` characters is cut off, and its length given.
    """
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:longest])
    return shown if longest is None or len(text) <= longest else f"{shown}... ({len(text)} characters)"


def excerpt(text: str) -> str:
    """Return the beginning of untrusted text, for a message."""
    return printable(text, EXCERPT)


def reason(error: Exception) -> str:
    """Return the first line of a library's error, which may quote the file."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0], longest=200)


def _check_adapter(path: Path) -> None:
    try:
        check_regular(path)
    except FileNotFoundError as error:
        raise KroneckerError(f"there is no adapter file {path}") from error
    except (OSError, ValueError) as error:
        raise KroneckerError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


# ---- safetensors ----


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file, its header checked against its size, for `keys`, `get_tensor` and `metadata`."""
    _check_adapter(path)
    try:
        with safe_open(path, framework="pt") as file:
            _check_header(path)
            yield file
    # Types that torch lacks, sides beyond its integers and names that are not UTF-8 have errors of their own.
    except (SafetensorError, OSError, TypeError, AttributeError, RuntimeError) as error:
        raise KroneckerError(f"{path} is not a readable safetensors file: {_kind(path) or reason(error)}") from error


def _check_header(path: Path) -> None:
    """Raise KroneckerError if the header has a key twice, of which safetensors would take the last."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise KroneckerError(f"{path} is ambiguous: its header has {excerpt(twice)} twice")
        return entries

    with path.open("rb") as file:
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=distinct)


def _kind(path: Path) -> str | None:
    """Return what a file that is not safetensors seems to be; None if its beginning does not tell."""
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


def read_pickle(path: Path) -> "dict[str, Tensor]":
    """Return the tensors in an archive as torch.save writes them. Code in it is refused, not run.

    The names of tensors in dicts of dicts, or in lists in them, are joined by dots.
    """
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, which torch.save does not do")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise KroneckerError(f"{path} holds something other than tensors, or is damaged: {reason(error)}") from error
    if isinstance(content, dict) and "string_to_param" in content:
        content = content["string_to_param"]  # an embedding of A1111: the rest says how it was trained
    tensors, claimed = {}, 0
    for name, tensor in _named_tensors(content, path):
        claimed += tensor.numel() * tensor.element_size()
        if claimed > os.path.getsize(path):  # a tensor can claim any size through strides of 0
            raise KroneckerError(f"{path} claims larger tensors than it holds")
        if name in tensors:
            raise KroneckerError(f"{path} is ambiguous: it has {excerpt(name)} twice")
        tensors[name] = tensor.detach()
    return tensors


def _named_tensors(content: Any, path: Path, prefix: tuple[str, ...] = ()) -> "Iterator[tuple[str, Tensor]]":
    """Yield (name, tensor) for each in what a pickle holds. Raises KroneckerError if there is anything else in it."""
    import torch

    if isinstance(content, torch.Tensor) and content.layout is torch.strided and not content.is_meta and prefix:
        yield ".".join(prefix), content
    elif isinstance(content, dict) and len(prefix) < DEEPEST and all(isinstance(key, str) for key in content):
        for key, entry in content.items():
            yield from _named_tensors(entry, path, (*prefix, key))
    elif isinstance(content, list) and 0 < len(prefix) < DEEPEST:
        for number, entry in enumerate(content):
            yield from _named_tensors(entry, path, (*prefix, str(number)))
    else:
        raise KroneckerError(f"{path} is not a mapping of names to tensors")


# ---- JSON ----


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    try:
        text = read_text(path, LARGEST_JSON)
    except (OSError, ValueError) as error:
        raise KroneckerError(f"{path} cannot be read: {reason(error)}") from error
    return parse_json(text, str(path))


def parse_json(text: str, source: str) -> dict[str, Any]:
    """Return the object that a JSON text is; `source` is what messages call it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        raise KroneckerError(f"{source} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise KroneckerError(f"{source} is not a JSON object")
    return value


def positive_integer(value: Any) -> int | None:
    """Return a number from JSON, or from a string of metadata; None if it is not an integer from 1 to 2³¹."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 10:
        value = int(value)
    return value if type(value) is int and 0 < value <= 2**31 else None


def integer_pair(values: Any) -> tuple[int, int] | None:
    """Return a list from JSON as two positive integers; None if it is anything else."""
    if not isinstance(values, Collection) or len(values) != 2:
        return None
    first, second = (positive_integer(value) for value in values)
    return None if first is None or second is None else (first, second)
