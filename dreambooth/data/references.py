"""Photos of the subject that are not trained on, so that what a model makes of them tells what it has learned."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dreambooth.data.folder import find_photos
from dreambooth.data.holdout import hold_out
from dreambooth.data.images import read_mask, read_picture, warn_of_flaw
from dreambooth.data.photos import readable
from dreambooth.data.sizes import Size
from dreambooth.errors import UserError
from kron_formats.files import printable


@dataclass(frozen=True)
class Reference:
    """A photo as it is in its file: upright, 8-bit sRGB, neither resized nor cropped."""

    path: Path
    image: Image.Image
    size: Size  # (height, width) in the file, px; more than the image's if it was decoded at a fraction of them
    mask: Image.Image | None = None  # 8-bit grey, of any size: white where the subject is


def read_references(directory: str, flag: str, holdout: int = 0) -> list[Reference]:
    """Return the readable photos of a folder with their masks, or only those that `holdout` keeps out of training.

    `flag` is the option that names the folder. Raises UserError if there are none, or if a mask cannot be used.
    """
    folder = find_photos(directory, flag)
    photos = hold_out(folder.photos, holdout, folder.source)[1] if holdout else folder.photos

    def read(path: Path) -> Reference:
        picture = read_picture(path)
        warn_of_flaw(picture, path)
        mask = read_mask(next(iter(folder.of_photo(path, "mask")), None), picture.size, folder.source)
        return Reference(path, picture.image, picture.size, mask)

    return readable(((path.name, path) for path in photos), read, folder.source)


def of_image(image: Image.Image, path: Path = Path("an image that was drawn")) -> Reference:
    """Return an image that is in no file as a photo."""
    return Reference(path, image, (image.height, image.width))


def refuse_trained(references: Sequence[Reference], trained: Iterable[Reference]) -> None:
    """Raise UserError if a reference is, pixel for pixel, a photo that was trained on."""
    by_content = {_content(reference): reference.path for reference in references}
    for photo in trained:
        if (path := by_content.get(_content(photo))) is not None:
            raise UserError(
                f"--reference_dir: {printable(path.name)} is the same picture as {printable(photo.path.name)} in "
                "--instance_data_dir, which was trained on; remove it from one of the two folders"
            )


def _content(photo: Reference) -> tuple[Size, bytes]:
    return photo.size, hashlib.sha256(photo.image.tobytes()).digest()
