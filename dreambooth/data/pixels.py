"""The training pixels of a photo: held in memory, or read again from its file whenever they are asked for."""

import functools
import hashlib
from collections.abc import Callable

import numpy as np

from dreambooth.data.sizes import Size
from dreambooth.errors import UserError

HELD = 2**27  # bytes of pixels that the photos of one folder or dataset keep in memory, 128 MiB


class Pixels:
    """The training pixels of one photo, (height, width, 3) uint8, their size and a digest of them.

    `read` reads them again, and can be pickled; pixels without it are always held.
    """

    def __init__(self, values: np.ndarray, read: Callable[[], np.ndarray] | None = None):
        height, width = values.shape[:2]
        self.size: Size = (height, width)
        self.digest = _digest(values)
        self._held: np.ndarray | None = values
        self._read = read

    def get(self, name: str) -> np.ndarray:
        """Return the pixels of the photo that messages call `name`.

        Raises UserError if they have to be read again, and cannot be or are not those that were read first.
        """
        return _read_again(self, name) if self._held is None else self._held

    def release(self) -> None:
        """Keep the pixels in memory no longer, if they can be read again."""
        if self._read is not None:
            self._held = None


class Held:
    """The pixels that are held in memory, of one folder or dataset."""

    def __init__(self):
        self.room = HELD

    def add(self, pixels: Pixels) -> None:
        """Hold pixels if there is room, or else release them."""
        needed = 3 * pixels.size[0] * pixels.size[1]
        if needed <= self.room:
            self.room -= needed
        else:
            pixels.release()


@functools.lru_cache(maxsize=1)  # crops of one photo are encoded one after the other
def _read_again(pixels: Pixels, name: str) -> np.ndarray:
    assert pixels._read is not None  # else they would be held
    advice = "it was read when the run began, and must stay as it is until the run ends"
    try:
        values = pixels._read()
    except Exception as error:  # image codecs raise almost anything on damaged files
        raise UserError(f"{name} cannot be read any more: {error or type(error).__name__}; {advice}") from error
    if (*values.shape[:2],) != pixels.size or _digest(values) != pixels.digest:
        raise UserError(f"{name} has changed: {advice}")
    return values


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
