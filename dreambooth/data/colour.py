"""Colours of image files, as sRGB, which is what base models were trained on.

What an image's numbers mean is looked up as browsers do, in this order:

    PNG's cICP chunk    primaries and curve, as numbers of ITU-T H.273
    ICC profile         in JPEG, PNG, WebP, TIFF and AVIF
    PNG's sRGB, gAMA and cHRM chunks; AVIF's nclx box, with numbers of H.273
    EXIF                of cameras that are set to Adobe RGB, in JPEG; these write no profile
    nothing             sRGB
"""

import functools
import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms
from PIL.ImageFile import ImageFile

SPACES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}  # what an ICC profile is of -> Pillow's mode
# For photos, and what browsers use. Only profiles with tables tell it from relative colorimetric.
INTENT = ImageCms.Intent.PERCEPTUAL
SAME = 2  # of 255; a profile that changes no colour by more is sRGB, whose many makers round differently
D50, D65 = (0.3457, 0.3585), (0.3127, 0.3290)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
Chromaticities = tuple[tuple[float, float], ...]  # x, y of white, red, green and blue

BT709 = (D65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
ADOBE = (D65, (0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
ADOBE_GAMMA = 563 / 256
PRIMARIES: dict[int, Chromaticities] = {  # by their number in H.273; 2 is unspecified
    1: BT709,
    2: BT709,
    5: (D65, (0.64, 0.33), (0.29, 0.60), (0.15, 0.06)),  # BT.601, 625 lines
    6: (D65, (0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),  # BT.601, 525 lines
    7: (D65, (0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    9: (D65, (0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),  # BT.2020
    11: ((0.314, 0.351), (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # DCI-P3
    12: (D65, (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # Display P3
}
# Exponents by the curve's number in H.273; None is sRGB's curve, with which browsers show video's too (1, 6, 14, 15)
CURVES: dict[int, float | None] = {1: None, 2: None, 4: 2.2, 5: 2.8, 6: None, 8: 1.0, 13: None, 14: None, 15: None}
HDR = {16: "PQ", 18: "HLG"}


class ColourError(ValueError):
    """What a file says of its colours cannot be used. The message is the reason."""


def colours_of(file: ImageFile, data: BinaryIO) -> bytes | None:
    """Return an ICC profile of the colours of an open image; None if they are sRGB. `data` is the file's content.

    Raises ColourError if what the file says of them is damaged or not supported.
    """
    if file.format == "PNG" and (content := _png_chunk(data, b"cICP")):
        return _coded(*content[:2])
    if "icc_profile" in file.info:
        profile = file.info["icc_profile"]
        if not isinstance(profile, bytes) or profile[36:40] != b"acsp":  # which marks every profile
            raise ColourError("its colour profile is damaged")
        return profile
    if file.format == "PNG" and "srgb" not in file.info:
        return _png_colours(file.info)
    if file.format == "AVIF" and (codes := _nclx(data)):
        return _coded(*codes)
    return matrix_profile(ADOBE, ADOBE_GAMMA) if file.format in ("JPEG", "MPO") and _is_adobe_rgb(file) else None


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Return an 8-bit image in sRGB, as RGB or RGBA with the same alpha; `image` itself if it is in sRGB.

    Raises ColourError if the profile is damaged or is of other colours than the image, CMYK for one.
    """
    space = SPACES.get(profile[16:20])
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    colours = image
    if image.mode not in ("L", "RGB", "CMYK"):
        colours = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    if colours.mode == "L" and space == "RGB":
        colours = colours.convert("RGB")
    if space != colours.mode:
        raise ColourError(f"its colour profile is for {_space_of(profile)}, but its colours are {colours.mode}")
    transform = _transform(profile, colours.mode)
    if transform is None:
        return image
    converted = ImageCms.applyTransform(colours, transform)
    assert converted is not None  # it is not converted in place
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _space_of(profile: bytes) -> str:
    """Return the name of the space that a profile is of."""
    return ascii(profile[16:20].decode("latin-1").strip())


@functools.lru_cache(maxsize=16)  # a folder's photos are of few cameras
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from images of a mode to sRGB; None if the profile is sRGB."""
    srgb = ImageCms.createProfile("sRGB")
    try:
        # With black point compensation, the black of print stays black. It changes nothing for profiles of displays.
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            srgb,
            mode,
            "RGB",
            INTENT,
            ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.HIGHRESPRECALC,
        )
    except (OSError, ImageCms.PyCMSError) as error:
        raise ColourError("its colour profile is damaged") from error
    if mode == "CMYK":
        return transform
    samples = _samples(mode)
    changed = np.asarray(ImageCms.applyTransform(samples, transform), int)
    return None if np.abs(changed - np.asarray(samples.convert("RGB"), int)).max() <= SAME else transform


def _samples(mode: str) -> Image.Image:
    """Return an image of every grey, or of colours from all over the cube."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 18).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3))


# ---- what files say ----


def _coded(primaries: int, curve: int) -> bytes | None:
    """Return the profile of numbers in H.273, which PNG and AVIF write."""
    if curve in HDR:
        raise ColourError(f"its colours are HDR ({HDR[curve]}), which needs tone mapping; export it as SDR")
    if primaries not in PRIMARIES or curve not in CURVES:
        raise ColourError(f"its primaries {primaries} and curve {curve} (ITU-T H.273) are not supported")
    return matrix_profile(PRIMARIES[primaries], CURVES[curve])


def _png_chunk(data: BinaryIO, name: bytes) -> bytes | None:
    """Return the first bytes of a chunk that comes before a PNG's pixels; None if there is none."""
    position = data.tell()
    try:
        data.seek(8)
        while len(header := data.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == name:
                return data.read(min(length, 4))
            if kind == b"IDAT":
                break
            data.seek(length + 4, io.SEEK_CUR)
        return None
    finally:
        data.seek(position)


def _png_colours(info: dict) -> bytes | None:
    """Return the profile that gAMA and cHRM describe."""
    gamma, numbers = info.get("gamma"), info.get("chromaticity")
    if not gamma and not numbers:
        return None
    # 1 / 2.2 approximates sRGB's curve: the specification has it written beside an sRGB chunk, and many write it alone
    exponent = None if not gamma or abs(gamma - 1 / 2.2) < 0.005 else 1 / gamma
    points = BT709 if numbers is None else tuple(zip(numbers[::2], numbers[1::2]))
    return matrix_profile(points, exponent)


def _nclx(data: BinaryIO) -> tuple[int, int] | None:
    """Return the numbers of primaries and curve in an AVIF file."""
    position = data.tell()
    data.seek(0)
    content: bytes | None = data.read(2**20)
    data.seek(position)
    for name in (b"meta", b"iprp", b"ipco"):
        content = next((inside for kind, inside in _boxes(content) if kind == name), b"")
        content = content[4:] if name == b"meta" else content  # its version and flags
    coded = [inside for kind, inside in _boxes(content) if kind == b"colr" and inside[:4] == b"nclx"]
    return struct.unpack_from(">HH", coded[0], 4) if coded and len(coded[0]) >= 8 else None


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and content of the boxes in a file, or in a box, of ISO's base media format."""
    position = 0
    while position + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, position)
        if size < 8:  # boxes to the end of the file and of more than 4 GB, which hold pixels
            return
        yield kind, content[position + 8 : position + size]
        position += size


def _is_adobe_rgb(file: ImageFile) -> bool:
    """Whether a JPEG's EXIF data say Adobe RGB, as DCF has cameras write it: uncalibrated, with the index R03."""
    try:
        exif = file.getexif()
        space = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
        index = exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex)
    except Exception:  # damaged EXIF data raise many kinds of errors
        return False
    return space == 2 or (space != 1 and str(index).startswith("R03"))


# ---- ICC profiles ----


@functools.cache
def matrix_profile(chromaticities: Chromaticities, exponent: float | None) -> bytes:
    """Return an ICC profile of an RGB space: x, y of white, red, green and blue; the exponent, or sRGB's curve if None.

    Raises ColourError if no space has such primaries.
    """
    columns = _to_d50(chromaticities)
    if exponent is None:
        curve = struct.pack(">4sIHH", b"para", 0, 3, 0) + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    else:
        curve = struct.pack(">4sIHH", b"para", 0, 0, 0) + _fixed(exponent)
    tags = {
        f"{name}XYZ".encode(): struct.pack(">4sI", b"XYZ ", 0) + _fixed(*xyz) for name, xyz in zip("rgb", columns.T)
    }
    tags |= {f"{name}TRC".encode(): curve for name in "rgb"}
    table, content = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += struct.pack(">4sII", name, 128 + 4 + 12 * len(tags) + len(content), len(value))
        content += value
    size = 128 + len(table) + len(content)
    header = struct.pack(">I4xI4s4s4s12x4s28x", size, 0x04300000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    return (header + _fixed(*_xyz(D50))).ljust(128, b"\0") + table + content


def _to_d50(chromaticities: Chromaticities) -> np.ndarray:
    """Return the matrix (3, 3) from linear RGB to XYZ under D50, the white of ICC profiles."""
    try:
        white, *primaries = (_xyz(point) for point in chromaticities)
        matrix = np.stack(primaries, axis=1)
        matrix = matrix * np.linalg.solve(matrix, white)
    except (ZeroDivisionError, np.linalg.LinAlgError) as error:
        raise ColourError("its primaries span no colours") from error
    cones = (BRADFORD @ _xyz(D50)) / (BRADFORD @ white)
    return np.linalg.inv(BRADFORD) @ (cones[:, None] * (BRADFORD @ matrix))


def _xyz(point: tuple[float, float]) -> np.ndarray:
    """Return XYZ, with Y = 1, of a chromaticity."""
    x, y = point
    return np.array([x / y, 1, (1 - x - y) / y])


def _fixed(*values: float) -> bytes:
    """Return numbers in ICC's fixed-point format."""
    try:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))
    except (struct.error, ValueError, OverflowError) as error:
        raise ColourError("its primaries or its gamma are out of range") from error
