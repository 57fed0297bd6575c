"""What the files of a folder are: photos, captions and masks that belong to them, litter, and what is not used."""

import itertools
import logging
import os
import re
import shlex
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dreambooth.data.formats import is_image, remark_on
from dreambooth.errors import UserError
from dreambooth.wording import counted, shortlist
from kron_formats.files import printable

logger = logging.getLogger(__name__)

TABLES = ("metadata.jsonl", "metadata.csv")  # of captions; the first takes precedence
# What belongs to a photo is called like the photo, with or without its suffix, and then this. Tried in this order
KINDS = {
    "class prompt": re.compile(r"(?P<photo>.+)(?P<tag>\.class\.txt)", re.IGNORECASE | re.DOTALL),
    "mask": re.compile(r"(?P<photo>.+)(?P<tag>[._-]mask(label)?\.[^.]+)", re.IGNORECASE | re.DOTALL),
    "caption": re.compile(r"(?P<photo>.+)(?P<tag>\.txt|\.caption)", re.IGNORECASE | re.DOTALL),
}
PREFERRED = (".class.txt", ".mask.png", ".txt")  # take precedence over other names of their kind
CONDITIONING = re.compile(r".+-condlabel\.[^.]+", re.IGNORECASE | re.DOTALL)  # OneTrainer's, which are not photos
KOHYA = re.compile(r"(?P<repeats>\d+)_(?P<prompt>.+)", re.DOTALL)  # a folder of sd-scripts: "10_sks dog"

# What systems, phones and trainers leave behind. It is ignored in silence, and so is every hidden file
LITTER = frozenset("thumbs.db ehthumbs.db desktop.ini __macosx @eadir $recycle.bin _latent_cache _t_e_cache".split())
LITTER_SUFFIXES = (".xmp", ".aae", ".thm", ".npz")  # edits, previews, and the latents that sd-scripts keeps
MOST_FOLDERS = 1000  # in which images are counted, below a folder of photos


class NoPhotosError(UserError):
    """There is no readable image."""


class Names:
    """Photos by their names, compared as Unicode does, and regardless of case if no photo has the very name."""

    def __init__(self, photos: Iterable[Path]):
        self._by_stem, self._by_name = defaultdict(list), defaultdict(list)
        for photo in photos:
            for index, name in ((self._by_stem, photo.stem), (self._by_name, photo.name)):
                index[same_name(name)].append(photo)
                index["any case", same_name(name).casefold()].append(photo)

    def named(self, name: str) -> list[Path]:
        """Return the photos of a name with its suffix; none or one, unless names differ in case alone."""
        return self._find(self._by_name, name)

    def called(self, name: str) -> tuple[list[Path], bool]:
        """Return the photos of a name without its suffix, or else with it; and whether it was with it."""
        photos = self._find(self._by_stem, name)
        return (photos, False) if photos else (self.named(name), True)

    @staticmethod
    def _find(index: dict, name: str) -> list[Path]:
        return index.get(same_name(name)) or index.get(("any case", same_name(name).casefold())) or []


@dataclass
class Folder:
    """The files of a folder, by their names. What belongs to a photo: first what takes precedence."""

    path: Path
    source: str  # what messages call the folder
    photos: list[Path]  # in the order of their names
    belongings: dict[str, dict[Path, list[Path]]]  # kind -> photo -> files
    tables: list[Path]  # of captions
    orphans: list[str] = field(default_factory=list)  # captions and masks that belong to no photo
    unused: list[str] = field(default_factory=list)  # other files
    subfolders: dict[Path, int] = field(default_factory=dict)  # that hold files -> how many of these are images

    def of_photo(self, photo: Path, kind: str) -> list[Path]:
        """Return the files of a kind that belong to a photo: first the one that takes precedence."""
        return self.belongings[kind].get(photo, [])


def same_name(name: str) -> str:
    """Return a name in the form in which names are compared, NFC: "é" may also be stored as two characters."""
    return unicodedata.normalize("NFC", name)


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name says nothing about photos."""
    lower = name.lower()
    return lower.startswith(".") or lower in LITTER or lower.endswith(LITTER_SUFFIXES)


# ---- listing ----


def list_folder(path: Path, source: str) -> Folder:
    """Return what the files of a folder are, by their names alone; `source` is what messages call the folder.

    Raises NoPhotosError if there is no such folder, and UserError if it cannot be read.
    """
    try:
        if not path.is_dir():
            raise NoPhotosError(f"{source}: there is no such folder")
        entries = [entry for entry in path.iterdir() if not is_litter(entry.name)]
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from error
    entries.sort(key=lambda entry: (same_name(entry.name), entry.name))
    photos = [entry for entry in entries if _is_photo(entry)]
    tables = [path / name for name in TABLES if path / name in entries]
    folder = Folder(path, source, photos, {kind: {} for kind in KINDS}, tables)
    taken = {*photos, *tables}
    _place_others(folder, [entry for entry in entries if entry not in taken])
    return folder


def _place_others(folder: Folder, entries: Iterable[Path]) -> None:
    """Give what belongs to a photo to it, and put the other entries of a folder where they are named in messages."""
    names, ranks = Names(folder.photos), {}
    for entry in entries:
        kind, tag, photos, has_suffix = _belongs(same_name(entry.name), names)
        ranks[entry] = (tag not in PREFERRED, has_suffix, entry.name)
        for photo in photos:
            folder.belongings[kind].setdefault(photo, []).append(entry)
        if photos:
            continue
        if entry.is_dir():
            folder.subfolders |= _count_images(entry)
        else:
            (folder.orphans if kind else folder.unused).append(entry.name)
    for files_of in folder.belongings.values():
        for files in files_of.values():
            files.sort(key=ranks.__getitem__)


def _is_photo(path: Path) -> bool:
    """Whether a path is a photo by its name: an image, and not a mask."""
    name = same_name(path.name)
    return (
        is_image(name) and not KINDS["mask"].fullmatch(name) and not CONDITIONING.fullmatch(name) and not path.is_dir()
    )


def _belongs(name: str, names: Names) -> tuple[str, str, list[Path], bool]:
    """Return the kind of a file by its name, the end of the name that says so, and the photos that it belongs to.

    Also whether the name has the photo's suffix in it. If it belongs to none, the kind is the first possible one, or
    empty.
    """
    first = ""
    for kind, pattern in KINDS.items():
        match = pattern.fullmatch(name)
        if match is None or (kind == "mask" and not is_image(name)):
            continue
        photos, has_suffix = names.called(match["photo"])
        if photos:
            return kind, match["tag"].lower(), photos, has_suffix
        first = first or kind
    return first, "", [], False


def _count_images(folder: Path) -> dict[Path, int]:
    """Return the folders from `folder` down that hold files other than litter, and how many images each holds."""
    counts = {}
    for path, below, files in itertools.islice(os.walk(folder), MOST_FOLDERS):
        below[:] = sorted(name for name in below if not is_litter(name))
        if kept := [name for name in files if not is_litter(name)]:
            counts[Path(path)] = sum(map(is_image, kept))
    return counts


# ---- saying what is not used ----


def find_photos(directory: str, flag: str, kohya: str = "") -> Folder:
    """Return what the files of a folder are; warn of those that are not used. `flag` is the option that names it.

    `kohya` says what an sd-scripts folder, {repeats}_{prompt}, is in options. Raises NoPhotosError if there are no
    photos, and UserError if they are in subfolders, which are not read.
    """
    folder = list_folder(Path(directory), f"{flag} {printable(directory)}")
    with_images = {path: count for path, count in folder.subfolders.items() if count}
    if not folder.photos and with_images:
        where = [f"{_below(path, folder)} ({counted(count, 'image')})" for path, count in with_images.items()]
        give = [_options_for(path, flag, kohya) for path in with_images]
        several = "; or describe several subjects in --subjects" if flag == "--instance_data_dir" and give[1:] else ""
        raise UserError(
            f"{folder.source}: its photos are in subfolders, which are not read: {shortlist(where)}. "
            f"Give the one with the photos: {shortlist(give[:3])}{several}"
        )
    unused = [*map(remark_on, folder.unused), *_subfolders(folder)]
    if not folder.photos:
        found = f"it contains no image files, but {shortlist(unused)}" if unused else "it contains no image files"
        masks = f"; no photo has the name of {shortlist(folder.orphans)}" if folder.orphans else ""
        raise NoPhotosError(f"{folder.source}: there is no readable image ({found}{masks})")
    if folder.orphans:
        advice = ". An image with the name of a mask is not a photo; rename it if it is one"
        logger.warning(
            "%s: captions or masks without a photo of the same name: %s%s",
            folder.source,
            shortlist(folder.orphans),
            advice if any(map(is_image, folder.orphans)) else "",
        )
    if unused:
        logger.warning("%s: not used: %s", folder.source, shortlist(unused))
    second = [file.name for files in folder.belongings["mask"].values() for file in files[1:]]
    if second:
        logger.warning("%s: not used, since their photos have other masks: %s", folder.source, shortlist(second))
    return folder


def _below(path: Path, folder: Folder) -> str:
    return f"{path.relative_to(folder.path)}{os.sep}"


def _subfolders(folder: Folder) -> list[str]:
    """Return the subfolders that are not used, each with the number of images in and below it."""
    images: dict[Path, int] = defaultdict(int)
    for path, count in folder.subfolders.items():
        images[folder.path / path.relative_to(folder.path).parts[0]] += count
    return [f"{_below(path, folder)} ({counted(count, 'image')})" for path, count in images.items()]


def _options_for(path: Path, flag: str, kohya: str) -> str:
    """Return the options that read a subfolder instead."""
    match = KOHYA.fullmatch(path.name)
    if match is None or not kohya:
        return f"{flag} {shlex.quote(str(path))}"
    repeats, prompt = max(1, int(match["repeats"])), shlex.quote(match["prompt"])
    return f"{flag} {shlex.quote(str(path))} {kohya.format(repeats=repeats, prompt=prompt)}"
