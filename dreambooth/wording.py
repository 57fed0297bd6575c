"""Counts and lists of names, as messages to the user have them."""

from collections.abc import Sequence

from kron_formats.files import printable

SHOWN = 10  # names in a list, so that a folder of thousands of files does not fill the screen


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 photo", "1,200 photos"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shortlist(names: Sequence[str], most: int = SHOWN) -> str:
    """Return untrusted names on one line: the first ones, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more
