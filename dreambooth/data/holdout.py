"""Which photos of a folder or dataset are kept out of training, by their names alone."""

from collections.abc import Sequence
from typing import TypeVar

from dreambooth.errors import UserError
from dreambooth.wording import counted

T = TypeVar("T")


def hold_out(photos: Sequence[T], count: int, source: str) -> tuple[Sequence[T], Sequence[T]]:
    """Return the photos to train on, and the last `count` of them, which are held out.

    Photos are those of a folder in the order of their names, readable or not, or the rows of a dataset: so training and
    scoring agree on them. `source` is what messages call the folder or dataset. Raises UserError if none is left.
    """
    left = len(photos) - count
    if count and left < 1:
        raise UserError(
            f"--holdout {count}: {source} has {counted(len(photos), 'photo')}, so none would be left to train on"
        )
    return photos[:left], photos[left:]
