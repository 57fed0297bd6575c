"""Image formats: those that are decoded, by the suffixes of their files, and what to do about others."""

import functools
import importlib
from contextlib import suppress
from pathlib import PurePath

from PIL import Image

# Pillow's name of a format: its suffixes. These are what Pillow decodes by itself, except icons, cursors, film strips
# and scientific data. Whatever a file is called, nothing else is tried: Pillow would run Ghostscript on an EPS that is
# named photo.jpg. TGA comes last, since its files do not begin with a mark of their own.
FORMATS = {
    "JPEG": ".jpg .jpeg .jpe .jfif .mpo",
    "PNG": ".png .apng",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "TIFF": ".tif .tiff",
    "GIF": ".gif",
    "AVIF": ".avif .avifs",
    "JPEG2000": ".jp2 .j2k .j2c .jpc .jpf .jpx",
    "PPM": ".ppm .pgm .pbm .pnm .pfm",
    "QOI": ".qoi",
    "DDS": ".dds",
    "PSD": ".psd",
    "SGI": ".sgi .rgb .rgba .bw",
    "SUN": ".ras",
    "PCX": ".pcx",
    "XBM": ".xbm",
    "XPM": ".xpm",
    "MSP": ".msp",
    "PIXAR": ".pxr",
    "DIB": ".dib",
    "TGA": ".tga .icb .vda .vst",
}
# The same of formats that Pillow decodes with a package: its suffixes, the package, and the module to import
PLUGINS = {
    "HEIF": (".heic .heif .hif", "pillow-heif", "pillow_heif"),
    "JXL": (".jxl", "pillow-jxl-plugin", "pillow_jxl"),
}
BEGINNINGS = {"HEIF": ((4, b"ftyp"),), "JXL": ((0, b"\xff\x0a"), (0, b"\0\0\0\x0cJXL "))}  # offset, bytes
SUFFIXES = frozenset(" ".join([*FORMATS.values(), *(suffixes for suffixes, _, _ in PLUGINS.values())]).split())

# Pictures that are not decoded, and what they are
RAW = frozenset(".dng .cr2 .cr3 .crw .nef .nrw .arw .sr2 .orf .rw2 .raf .pef .srw .3fr .erf .kdc .mrw .x3f".split())
OTHERS = {".svg": "vector graphics", ".eps": "vector graphics", ".pdf": "a document", ".ico": "an icon"}


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return PurePath(name).suffix.lower() in SUFFIXES


@functools.cache
def decodable() -> tuple[str, ...]:
    """Return Pillow's names of the formats that can be decoded here, with the plugins that are installed."""
    for _, _, module in PLUGINS.values():
        with suppress(ImportError):
            plugin = importlib.import_module(module)  # pillow_jxl registers itself
            getattr(plugin, "register_heif_opener", lambda: None)()
    Image.init()
    return tuple(name for name in (*FORMATS, *PLUGINS) if name in Image.OPEN)


def why_unidentified(name: str, beginning: bytes) -> str:
    """Return why a file with this name and these first bytes cannot be identified as an image, and what to do."""
    for format, (suffixes, package, _) in PLUGINS.items():
        begins_so = any(beginning[offset:].startswith(mark) for offset, mark in BEGINNINGS[format])
        if format not in decodable() and (begins_so or PurePath(name).suffix.lower() in suffixes.split()):
            return f"{format} needs another package: pip install {package}; or convert it to JPEG or PNG"
    return "it is not an image, or its beginning is damaged"


def remark_on(name: str) -> str:
    """Return the name of a file that is not used, with what it is if it is a picture after all."""
    suffix = PurePath(name).suffix.lower()
    what = "camera raw" if suffix in RAW else OTHERS.get(suffix)
    return f"{name} ({what}; convert it to JPEG or PNG)" if what else name
