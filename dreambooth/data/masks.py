"""Masks of photos: made by rembg, a package that is installed for that, and written where training reads them."""

import contextlib
import importlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreambooth.data.folder import Folder, same_name
from dreambooth.data.images import is_black, read_image, read_mask
from dreambooth.errors import SaveError, UserError
from kron_formats.files import printable, whole_file

REMBG = "rembg[cpu]==2.0.86"
THUMBNAIL = (256, 256)  # px
FEW, MOST = 0.02, 0.95  # of a photo's area: a subject smaller or larger than that is likely to be a mistake

Segment = Callable[[Image.Image], Image.Image]  # a photo -> its mask, 8-bit grey of the same size


@dataclass(frozen=True)
class Masked:
    """A photo and its mask, small."""

    name: str
    mask_name: str | None  # None if the mask is black everywhere, which is not written
    photo: Image.Image
    mask: Image.Image  # 8-bit grey, of the photo's size
    share: float  # of the photo's area that is subject, 0 to 1

    @property
    def doubt(self) -> str | None:
        """What may be wrong with the mask."""
        if self.mask_name is None:
            return "no subject was found, so no mask is written; draw one by hand if the photo shows the subject"
        if self.share < FEW:
            return f"only {self.share:.1%} is subject; look at the sheet, and draw the mask by hand if it is wrong"
        if self.share > MOST:
            return f"{self.share:.1%} is subject, so that the mask hides next to nothing; look at the sheet"
        return None


def mask_path(photo: Path, folder: Folder) -> Path:
    """Return where a photo's new mask is written: over the PNG that is its mask now, or as photo.mask.png.

    It is photo.jpg.mask.png if another photo of the folder has the same name but for its suffix. Raises UserError if
    the mask that is there is also another photo's.
    """
    used = next(iter(folder.of_photo(photo, "mask")), None)
    stem = same_name(photo.stem).casefold()  # also where file names differ in more than case
    twins = [other for other in folder.photos if other != photo and same_name(other.stem).casefold() == stem]
    if used is None or used.suffix.lower() != ".png":
        return photo.with_name(f"{photo.name if twins else photo.stem}.mask.png")
    if shared := [other.name for other in twins if used in folder.of_photo(other, "mask")]:
        raise UserError(
            f"{folder.source}: {printable(used.name)} is the mask of {printable(photo.name)} and of "
            f"{printable(shared[0])}; remove it, or rename one of the photos"
        )
    return used


def load_segmenter(model: str) -> Segment:
    """Return what makes masks with one of rembg's models, which rembg downloads.

    Raises UserError if rembg is not installed or the model cannot be had, and later if it makes no mask of a photo.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints half a page if it lacks onnxruntime, and exits
            rembg: Any = importlib.import_module("rembg")
    except (ImportError, SystemExit) as error:
        reason = "onnxruntime is missing" if isinstance(error, SystemExit) else error
        raise UserError(f"masks are made by rembg ({reason}): pip install '{REMBG}'") from None
    with _blaming(model):
        session = rembg.new_session(model)

    def segment(photo: Image.Image) -> Image.Image:
        with _blaming(model):
            mask = rembg.remove(photo, session=session, only_mask=True)
        if mask.size != photo.size:  # several masks are one below the other
            raise UserError(f"--model {model} makes several masks of a photo; choose a model that makes one")
        return mask.convert("L")

    return segment


@contextlib.contextmanager
def _blaming(model: str) -> Iterator[None]:
    """Turn errors in this context into a UserError that names the model."""
    try:
        yield
    except Exception as error:  # unknown names, no network, damaged files, prompts that a model needs
        reason = printable(str(error) or type(error).__name__)
        advice = "rembg's page lists its models, which it downloads at their first use"
        raise UserError(f"--model {model}: {reason}; {advice}") from error


def make_mask(photo: Path, path: Path, segment: Segment) -> Masked:
    """Make a photo's mask and write it to `path`, unless it is black everywhere.

    Raises what `read_image` does, UserError if no mask can be made, and SaveError if it cannot be written.
    """
    # Anew from its pixels: the image remembers how its file was turned, and rembg would turn it again
    image = Image.fromarray(np.asarray(read_image(photo)))
    mask = segment(image)
    if is_black(mask):
        return _masked(photo, None, image, mask)
    try:
        with whole_file(path) as unfinished:
            mask.save(unfinished, format="PNG", optimize=True)
    except OSError as error:
        raise SaveError(f"{path} cannot be written: {error.strerror or error}") from error
    return _masked(photo, path.name, image, mask)


def read_masked(photo: Path, path: Path, source: str) -> Masked:
    """Return a photo with the mask that it has. Raises what `read_image` and `read_mask` do."""
    image = read_image(photo)
    mask = read_mask(path, (image.height, image.width), source)
    assert mask is not None
    return _masked(photo, path.name, image, mask)


def _masked(photo: Path, mask_name: str | None, image: Image.Image, mask: Image.Image) -> Masked:
    share = float(np.asarray(mask).mean() / 255)
    small = image.copy()
    small.thumbnail(THUMBNAIL)
    return Masked(photo.name, mask_name, small, mask.resize(small.size), share)
