"""What the files of a folder are, by their names: photos, what belongs to a photo, and the rest.

Names are compared in NFC: macOS writes "é" as two characters, and other tools write it as one.
"""

import logging
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from dreambooth.errors import UserError
from kron_formats.files import printable

logger = logging.getLogger(__name__)

# Those of formats that are decoded, and of a few that need a plugin or a converter, which messages then name
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .dib .tif .tiff .gif .avif .avifs .jp2 .j2k .jpf .jpx .j2c .ppm .pgm "
    ".pbm .pnm .pfm .tga .qoi .psd .pcx .sgi .heic .heif .hif .jxl".split()
)
METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_SUFFIXES = (".txt", ".caption")  # the second is sd-scripts' default
CLASS_SUFFIX = ".class.txt"
MASK_STEM = re.compile(r"(.+?)(\.mask|[-_]mask|[-_]masklabel)", re.IGNORECASE)  # ours; other tools'
# What systems, cameras and other trainers leave in folders: not worth a word
LITTER = re.compile(
    r"\..*|thumbs\.db|ehthumbs.*\.db|desktop\.ini|icon\r|__macosx|@eadir|#recycle|\$recycle\.bin|lost\+found|__pycache__"
    r"|(readme|license|licence)(\..*)?|.*\.(npz|xmp|aae)",
    re.IGNORECASE,
)
KOHYA_FOLDER = re.compile(r"(\d+)_(.+)")  # repeats and prompt
MOST_NAMES = 12  # in one message


class NoPhotosError(UserError):
    """There is no readable image."""


class Folder:
    """The files of a folder. `source` is what messages call it, its option and its path.

    Raises NoPhotosError if there is no such folder, UserError if it cannot be read, has images in its subfolders alone,
    or two masks for one photo.
    """

    def __init__(self, path: Path, source: str):
        self.path, self.source = path, source
        try:
            if not path.is_dir():
                raise NoPhotosError(f"{source}: there is no such folder")
            entries = [entry for entry in sorted(path.iterdir()) if not LITTER.fullmatch(entry.name)]
            # A folder that is named like a caption, a mask or a photo is taken for one, and refused by that name
            self._inside = {entry: _count_images(entry) for entry in entries if entry.is_dir() and not _is_named(entry)}
        except OSError as error:
            raise UserError(f"{source} cannot be read: {error.strerror}") from error
        self._files = [entry for entry in entries if entry not in self._inside]
        # photo.TXT is photo.txt, unless there is one too; capitals come first
        self._by_name = {_key(file.name): file for file in self._files}
        images = [file for file in self._files if file.suffix.lower() in IMAGE_SUFFIXES]
        self._masks = self._find_masks(images)
        self.photos = [image for image in images if not self._is_mask(image) and not image.is_dir()]
        if not self.photos and any(self._inside.values()):
            raise UserError(f"{source} has no images itself; {self._say_where()}")

    def beside(self, photo: Path, *suffixes: str) -> Iterable[Path]:
        """Return the files photo.SUFFIX and photo.jpg.SUFFIX that exist, in the order of the suffixes."""
        names = [_key(stem + suffix) for suffix in suffixes for stem in (photo.stem, photo.name)]
        return [self._by_name[name] for name in dict.fromkeys(names) if name in self._by_name]

    def mask_of(self, photo: Path) -> Path | None:
        """Return the mask of a photo: photo.mask.png, or as other tools name it, photo-masklabel.png."""
        return self._masks.get(_nfc(photo.stem))

    def tables(self) -> list[Path]:
        """Return the files of METADATA that exist."""
        return [self.path / name for name in METADATA if (self.path / name).exists()]

    def warn_of_unused(self) -> None:
        """Warn of files and subfolders that are not used, and of photos that are named like masks."""
        companions = {file for photo in self.photos for file in self.beside(photo, *CAPTION_SUFFIXES, CLASS_SUFFIX)}
        known = {*self.photos, *self._masks.values(), *companions, *self.tables()}
        unused = [printable(file.name) for file in self._files if file not in known]
        unused += [f"{printable(folder.name)}/ ({count} images)" for folder, count in self._inside.items()]
        if unused:
            logger.warning("%s: not used: %s", self.source, listed(unused))
        suspects = [printable(photo.name) for photo in self.photos if "mask" in re.split(r"[\W_]+", photo.stem.lower())]
        if suspects:
            logger.warning(
                "%s: used as photos: %s; a mask has the name of its photo, as photo.mask.png beside photo.jpg",
                self.source,
                listed(suspects),
            )

    def _find_masks(self, images: list[Path]) -> dict[str, Path]:
        """Return stem of the photo -> its mask, for images that are named like masks and have a photo."""
        stems, masks = {_nfc(image.stem) for image in images}, {}
        for image in images:
            match = MASK_STEM.fullmatch(_nfc(image.stem))
            if match is None or match[1] not in stems:
                continue
            if match[1] in masks:
                raise UserError(
                    f"{self.source}: {printable(masks[match[1]].name)} and {printable(image.name)} are masks of one "
                    "photo; remove one of them"
                )
            masks[match[1]] = image
        return masks

    def _is_mask(self, image: Path) -> bool:
        """Whether an image is the mask of a photo, or has the name of one without a photo: photo.mask.png."""
        return image in self._masks.values() or image.stem.lower().endswith(".mask")

    def _say_where(self) -> str:
        """Return which subfolders have the images, and what to write instead."""
        found = [folder for folder, count in self._inside.items() if count]
        text = "its subfolders do: " + listed([f"{printable(f.name)}/ ({self._inside[f]} images)" for f in found])
        flag = self.source.partition(" ")[0]
        text += f". Give one of them, for example {flag} {found[0]}"
        if match := KOHYA_FOLDER.fullmatch(found[0].name):
            text += f" with --repeats {match[1]} and the prompt that the name has ({printable(match[2])})"
        return text


def listed(names: list[str]) -> str:
    """Return names for a message, separated by commas; the first ones and a count if there are many."""
    rest = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def key_of_name(name: str) -> str:
    """Return a path as written in a table, in the form in which names are compared: relative, with slashes, NFC."""
    return _nfc(Path(name).as_posix())


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _key(name: str) -> str:
    """Return a file name in the form in which names are compared: NFC, its suffix in lower case."""
    stem, dot, suffix = _nfc(name).rpartition(".")
    return f"{stem}{dot}{suffix.lower()}"


def _is_named(path: Path) -> bool:
    """Whether a path has the suffix of a caption, a table or an image."""
    return path.suffix.lower() in (*CAPTION_SUFFIXES, *IMAGE_SUFFIXES) or path.name in METADATA


def _count_images(folder: Path) -> int:
    """Return the number of images in a folder and its subfolders."""
    return sum(path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "." for path in folder.rglob("*"))
