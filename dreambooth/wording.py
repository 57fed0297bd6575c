"""Counts, sizes and lists of names, as messages to the user have them."""

from collections.abc import Sequence

from kron_formats.files import printable

UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
SHOWN = 10  # names in a list, so that a folder of thousands of files does not fill the screen


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 photo", "1,200 photos"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size(number: float) -> str:
    """Return a number of bytes in the unit of which it is at least a half: "1.52 MiB"."""
    unit = next((unit for unit, scale in UNITS.items() if number >= scale / 2), "KiB")
    return f"{number / UNITS[unit]:.2f} {unit}"


def shortlist(names: Sequence[str], most: int = SHOWN) -> str:
    """Return untrusted names on one line: the first ones, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more
