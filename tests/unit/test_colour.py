"""Colours of image files: every way to say what they are, against the arithmetic of the standards."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from dreambooth.data.colour import BT709, ColourError, matrix_profile
from dreambooth.data.images import read_image, read_picture
from dreambooth.data.photos import read_instance_photos
from dreambooth.options.training import TrainingConfig
from dreambooth.scoring.subject import read_subject_photos

COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
PLAIN = Image.fromarray(COLOURS)
GREYS = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(4, 0))

# Linear RGB to XYZ under D65, as published: by W3C (CSS Color 4) for sRGB, Display P3 and Adobe RGB
TO_XYZ = {
    "sRGB": [[506752 / 1228815, 87881 / 245763, 12673 / 70218],
             [87098 / 409605, 175762 / 245763, 12673 / 175545],
             [7918 / 409605, 87881 / 737289, 1001167 / 1053270]],
    "P3": [[608311 / 1250200, 189793 / 714400, 198249 / 1000160],
           [35783 / 156275, 247089 / 357200, 198249 / 2500400],
           [0, 32229 / 714400, 5220557 / 5000800]],
    "Adobe": [[573536 / 994567, 263643 / 1420810, 187206 / 994567],
              [591459 / 1989134, 6239551 / 9945670, 374412 / 4972835],
              [53769 / 1989134, 351524 / 4972835, 4929758 / 4972835]],
}  # fmt: skip


def decoded(values):
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def encoded(linear):
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def as_srgb(pixels, space, gamma=None):
    """What 8-bit pixels of a space look like in sRGB, not rounded; its curve is sRGB's unless it has a gamma."""
    values = np.asarray(pixels) / 255
    linear = decoded(values) if gamma is None else values**gamma
    return encoded(linear @ np.transpose(np.linalg.inv(TO_XYZ["sRGB"]) @ TO_XYZ[space]))


# ---- ICC profiles, made by hand: version 2, with the columns that Apple and Adobe publish for D50 ----

D50 = (0.9642, 1.0, 0.8249)
COLUMNS = {
    "P3": [(0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)],
    "Adobe": [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)],
    "sRGB": [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141)],
}


def xyz(values):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def curve(gamma=None, points=1024):
    numbers = (
        (65535 * decoded(np.linspace(0, 1, points))).round().astype(int) if gamma is None else [round(gamma * 256)]
    )
    return b"curv\0\0\0\0" + struct.pack(f">I{len(numbers)}H", len(numbers), *numbers)


def icc(space, tags, connection=b"XYZ ", kind=b"mntr"):
    tags = {name: value + bytes(-len(value) % 4) for name, value in tags.items()}
    table, content, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(content), len(value))
        content += value
    header = struct.pack(">I4xI", start + len(content), 0x02100000) + kind + space + connection + bytes(12) + b"acsp"
    return header.ljust(68, b"\0") + xyz(D50)[8:] + bytes(48) + table + content


def rgb_profile(space, gamma=None, points=1024):
    columns = {name: xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), COLUMNS[space])}
    return icc(b"RGB ", columns | {name: curve(gamma, points) for name in (b"rTRC", b"gTRC", b"bTRC")})


def grey_profile(gamma):
    return icc(b"GRAY", {b"kTRC": curve(gamma), b"wtpt": xyz(D50)})


def ink_profile():
    """A profile of CMYK in which black ink is black, cyan ink is Lab (63, -20, -10), and the other inks are paper."""
    grid = [(160, 108, 118) if c else (255, 128, 128) for c in (0, 1) for _ in range(8)]
    grid = [(0, 128, 128) if number % 2 else colour for number, colour in enumerate(grid)]
    identity = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536, 0, 0, 0, 65536, 0, 0, 0, 65536))
    table += 4 * identity + bytes(value for colour in grid for value in colour) + 3 * identity
    return icc(b"CMYK", {b"A2B0": table}, b"Lab ", b"prtr")


P3, ADOBE = rgb_profile("P3"), rgb_profile("Adobe", 563 / 256)


def saved(path, image, **how):
    image.save(path, **how)
    return path


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("dreambooth.")]


def assert_close(image, expected, tolerance=1.1):
    assert np.abs(np.asarray(image, float) - expected).max() <= tolerance


@pytest.mark.parametrize(
    "suffix, how", [(".png", {}), (".webp", {"lossless": True}), (".tif", {}), (".jpg", {"quality": 100})]
)
@pytest.mark.parametrize("profile, space, gamma", [(P3, "P3", None), (ADOBE, "Adobe", 563 / 256)])
def test_a_photo_with_a_profile_is_converted(tmp_path, caplog, suffix, how, profile, space, gamma):
    path = saved(tmp_path / f"photo{suffix}", PLAIN, icc_profile=profile, **how)
    stored = np.asarray(Image.open(path))
    expected = as_srgb(stored, space, gamma)
    assert np.abs(expected - stored).mean() > 3
    assert_close(read_image(path), expected)
    assert not warnings_in(caplog)


def test_training_and_scoring_see_the_same_colours(tmp_path):
    saved(tmp_path / "photo.png", PLAIN, icc_profile=P3)
    options = {"pretrained_model_name_or_path": "base", "instance_prompt": "sks dog", "resolution": 8}
    (photo,) = read_instance_photos(TrainingConfig(**options, instance_data_dir=str(tmp_path)))
    (scored,) = read_subject_photos(str(tmp_path))
    assert np.array_equal(photo.pixels, np.asarray(scored))
    assert_close(photo.pixels, as_srgb(COLOURS, "P3"))


SRGB = {
    "of LittleCMS": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    "with a curve of 1,024 points": rgb_profile("sRGB"),
    "with a curve of 26 points, as in small ones": rgb_profile("sRGB", points=26),
    "of primaries": matrix_profile(BT709, None),
}


@pytest.mark.parametrize("kind", SRGB)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_a_photo_in_srgb_keeps_its_bits(tmp_path, kind, mode):
    image = PLAIN.convert(mode)
    if mode.endswith("A"):
        image.putalpha(PLAIN.getchannel("R"))
    tagged, plain = (
        read_image(saved(tmp_path / f"{number}.png", image, icc_profile=profile))
        for number, profile in enumerate((SRGB[kind], None))
    )
    assert np.array_equal(np.asarray(tagged), np.asarray(plain))


def test_a_profile_near_srgb_is_not_srgb(tmp_path):
    path = saved(tmp_path / "photo.png", GREYS.convert("RGB"), icc_profile=rgb_profile("sRGB", 2.2))
    assert_close(read_image(path), as_srgb(GREYS.convert("RGB"), "sRGB", 563 / 256), 1.5)


@pytest.mark.parametrize("mode", ["L", "I;16", "LA"])
def test_grey_with_a_profile_of_grey(tmp_path, mode):
    image = Image.fromarray(np.asarray(GREYS).astype("<u2") * 257) if mode == "I;16" else GREYS.convert(mode)
    path = saved(tmp_path / "photo.png", image, icc_profile=grey_profile(1.75))
    expected = encoded((np.asarray(GREYS) / 255) ** 1.75)[..., None].repeat(3, -1)
    assert_close(read_image(path), expected)


def test_a_palette_and_grey_with_a_profile_of_rgb(tmp_path):
    palette = PLAIN.quantize(16)
    path = saved(tmp_path / "palette.png", palette, icc_profile=P3)
    assert_close(read_image(path), as_srgb(palette.convert("RGB"), "P3"))
    path = saved(tmp_path / "grey.jpg", GREYS, icc_profile=rgb_profile("P3", 1.75), quality=100)
    assert_close(read_image(path), as_srgb(Image.open(path).convert("RGB"), "P3", 1.75), 1.5)


def test_what_is_transparent_stays_so(tmp_path):
    image = PLAIN.copy()
    image.putalpha(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4))
    path = saved(tmp_path / "photo.png", image, icc_profile=P3)
    alpha = np.asarray(image)[..., 3:] / 255
    assert_close(read_image(path), as_srgb(COLOURS, "P3") * alpha + 255 * (1 - alpha), 2)


@pytest.mark.parametrize("suffix, how", [(".tif", {}), (".jpg", {"quality": 100})])
def test_inks_with_a_profile(tmp_path, suffix, how):
    lab = np.array([100 * 160 / 255, -20, -10])
    fy = (lab[0] + 16) / 116
    f = np.array([fy + lab[1] / 500, fy, fy - lab[2] / 200])
    d50 = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * D50
    cyan = encoded(np.linalg.inv(np.transpose(COLUMNS["sRGB"])) @ d50)
    inks = {(0, 0, 0, 0): (255, 255, 255), (0, 255, 255, 0): (255, 255, 255), (0, 0, 0, 255): (0, 0, 0)}
    for ink, expected in (inks | {(255, 0, 0, 0): cyan}).items():
        path = saved(tmp_path / f"photo{suffix}", Image.new("CMYK", (8, 8), ink), icc_profile=ink_profile(), **how)
        assert_close(read_image(path), np.asarray(expected))


# ---- colours without a profile ----


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(path, *chunks, **how):
    """The colours as a PNG with chunks behind its header of 33 bytes."""
    buffer = io.BytesIO()
    PLAIN.save(buffer, "PNG", **how)
    path.write_bytes(buffer.getvalue()[:33] + b"".join(chunks) + buffer.getvalue()[33:])
    return path


def cicp(primaries, transfer):
    return chunk(b"cICP", bytes([primaries, transfer, 0, 1]))


def gamma_chunk(value):
    return chunk(b"gAMA", struct.pack(">I", value))


def primaries_chunk(*numbers):
    return chunk(b"cHRM", struct.pack(">8I", *numbers))


OF_P3, OF_SRGB = (
    primaries_chunk(31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000),
    primaries_chunk(31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
)
CHUNKS = {  # chunks of a PNG: the space and gamma of its colours
    "numbers of Display P3": ([cicp(12, 13)], "P3", None),
    "numbers of sRGB": ([cicp(1, 13)], "sRGB", None),
    "numbers of video": ([cicp(1, 1)], "sRGB", None),
    "numbers count before a profile": ([cicp(12, 13), chunk(b"iCCP", b"x\0\0" + zlib.compress(ADOBE))], "P3", None),
    "a profile counts before primaries": ([chunk(b"iCCP", b"x\0\0" + zlib.compress(ADOBE)), OF_P3], "Adobe", 563 / 256),
    "primaries and gamma": ([OF_P3, gamma_chunk(100000)], "P3", 1),
    "primaries": ([OF_P3], "P3", None),
    "gamma": ([gamma_chunk(55556)], "sRGB", 1.8),
    "gamma that stands for sRGB": ([gamma_chunk(45455)], "sRGB", None),
    "gamma and primaries of sRGB": ([gamma_chunk(45455), OF_SRGB], "sRGB", None),
    "sRGB counts before primaries": ([chunk(b"sRGB", b"\0"), OF_P3, gamma_chunk(100000)], "sRGB", None),
    "gamma 0": ([gamma_chunk(0)], "sRGB", None),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHUNKS)
def test_chunks_of_a_png(tmp_path, caplog, kind):
    chunks, space, gamma = CHUNKS[kind]
    image = np.asarray(read_image(png(tmp_path / "photo.png", *chunks)))
    assert_close(image, as_srgb(COLOURS, space, gamma), 1.5)
    assert np.array_equal(image, COLOURS) == (space == "sRGB" and gamma is None)
    assert not warnings_in(caplog)


def test_numbers_in_an_avif(tmp_path):
    path = saved(tmp_path / "photo.avif", PLAIN, quality=100, subsampling="4:4:4")
    content = path.read_bytes()
    assert content.count(b"colrnclx") == 1
    plain = np.asarray(read_image(path))
    assert np.array_equal(plain, np.asarray(Image.open(path)))
    start = content.index(b"colrnclx") + 8
    path.write_bytes(content[:start] + struct.pack(">HH", 12, 13) + content[start + 4 :])
    assert_close(read_image(path), as_srgb(Image.open(path), "P3"))


@pytest.mark.parametrize(
    "space, index, adobe",
    [(0xFFFF, "R03", True), (2, None, True), (1, "R03", False), (0xFFFF, "R98", False), (1, None, False)],
)
@pytest.mark.parametrize("profile", [None, SRGB["of LittleCMS"]])
def test_a_camera_that_is_set_to_adobe_rgb(tmp_path, space, index, adobe, profile):
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.ColorSpace: space}
    if index is not None:
        exif[ExifTags.IFD.Exif][ExifTags.IFD.Interop] = {ExifTags.Interop.InteropIndex: index}
    path = saved(tmp_path / "photo.jpg", PLAIN, exif=exif, icc_profile=profile, quality=100)
    stored = np.asarray(Image.open(path))
    is_adobe = adobe and profile is None
    assert_close(read_image(path), as_srgb(stored, "Adobe", 563 / 256) if is_adobe else stored, 1.1 if is_adobe else 0)


# ---- colours that cannot be used ----

NO_SPACE = primaries_chunk(31270, 32900, 64000, 33000, 64000, 33000, 15000, 6000)
FLAWED = {  # what makes the file, and what the warning says
    "profile that is none": (lambda path: png(path, icc_profile=b"garbage" * 99), "profile"),
    "profile that is not compressed": (lambda path: png(path, chunk(b"iCCP", b"x\0\0garbage")), "profile"),
    "profile cut off": (lambda path: png(path, icc_profile=P3[:200]), "profile"),
    "profile of inks": (lambda path: png(path, icc_profile=ink_profile()), "CMYK"),
    "profile of grey": (lambda path: png(path, icc_profile=grey_profile(1.8)), "GRAY"),
    "HDR": (lambda path: png(path, cicp(9, 16)), "PQ"),
    "numbers that there are not": (lambda path: png(path, cicp(99, 13)), "99"),
    "primaries that are one colour": (lambda path: png(path, NO_SPACE), "primaries"),
    "primaries of zero": (lambda path: png(path, primaries_chunk(*[0] * 8)), "primaries"),
    "gamma that is out of range": (lambda path: png(path, gamma_chunk(1)), "gamma"),
}


@pytest.mark.parametrize("kind", FLAWED)
def test_colours_that_cannot_be_used_are_taken_for_srgb_with_a_warning(tmp_path, caplog, kind):
    make, words = FLAWED[kind]
    image = read_image(make(tmp_path / "photo.png"))
    assert np.array_equal(np.asarray(image), COLOURS)
    (warning,) = warnings_in(caplog)
    assert str(tmp_path / "photo.png") in warning and words in warning and "sRGB" in warning and "\n" not in warning


def test_primaries_that_span_nothing_are_refused():
    for points in (((0, 0),) * 4, (BT709[0], *BT709[1:2] * 3)):
        with pytest.raises(ColourError):
            matrix_profile(points, None)


def test_a_mask_holds_values_not_colours(tmp_path):
    path = saved(tmp_path / "photo.mask.png", GREYS, icc_profile=grey_profile(1))
    assert np.array_equal(np.asarray(read_picture(path, is_mask=True).image)[..., 0], np.asarray(GREYS))
