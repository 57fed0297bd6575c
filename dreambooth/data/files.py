"""Files that others made: read only where reading ends."""

import stat
from pathlib import Path


def check_regular(path: Path) -> None:
    """Raise OSError where a path is a pipe, socket, device or folder, whose reading may never end, or leads nowhere."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no regular file, but a folder, pipe, socket or device")


def read_text(path: Path, largest: int) -> str:
    """Return a text in UTF-8, of at most `largest` bytes. Raises OSError or ValueError where it is none."""
    check_regular(path)
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"it is of {size:,} bytes; at most {largest:,} are read")
    return path.read_text(encoding="utf-8-sig")


def printable(name: str) -> str:
    """Return a name as it can be shown on one line of any terminal: what steers it, or is no text, is spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
