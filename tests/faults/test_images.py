"""Photos from strangers. Each is used as it looks, skipped with a warning that names it and says why, or ignored; what
could teach something else than was meant is refused. Nothing hangs, and nothing waits for training to come out."""

import io
import os
import re
import socket
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

import train_dreambooth_kronecker as sd
from dreambooth.data.images import read_picture
from dreambooth.data.photos import read_instance_photos
from dreambooth.errors import UserError
from dreambooth.options.training import TrainingConfig
from dreambooth.scoring.subject import read_subject_photos
from tests.conftest import factors

ORANGE, RED, BLUE = (230, 120, 20), (255, 0, 0), (0, 0, 255)
SIZE = (40, 30)  # width, height, px
PLAIN = Image.new("RGB", SIZE, ORANGE)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8))
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", SIZE, colour) for colour in (RED, BLUE)]}
TILTED = Image.new("RGB", SIZE, RED)  # red at the left, blue at the right
TILTED.paste(BLUE, (20, 0, 40, 30))


# ---- makers: each writes a file whose name begins with the stem ----


def encoded(kind, image=PLAIN, **how):
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def file(suffix, content):
    return lambda stem: stem.with_name(stem.name + suffix).write_bytes(content)


def image(suffix, picture=PLAIN, append_images=(), **how):
    def make(stem):
        frames = [frame.copy() for frame in append_images]  # saving leaves traces in images, and another format trips
        picture.copy().save(stem.with_name(stem.name + suffix), append_images=frames, **how)

    return make


def cut(kind, suffix, share):
    content = encoded(kind, NOISE)
    return file(suffix, content[: int(len(content) * share)])


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, *chunks):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def with_chunk(content):
    """A good PNG with one more chunk behind its header of 33 bytes."""
    whole = encoded("PNG")
    return whole[:33] + content + whole[33:]


def jpeg(segment):
    """A good JPEG with one more segment, (marker, content), behind its first two bytes."""
    whole, (marker, content) = encoded("JPEG", quality=100), segment
    return whole[:2] + b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content + whole[2:]


def exif(*entries):
    """EXIF data of entries (tag, type, count, value or offset)."""
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + table + bytes(4)


def tilted(*entries):
    """A JPEG that its EXIF data turn by 90 degrees: then it is red at the left, blue at the right."""
    whole = encoded("JPEG", TILTED.transpose(Image.Transpose.ROTATE_90), quality=100, subsampling=0)
    content = exif((0x0112, 3, 1, 6), *entries)
    return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + whole[2:]


def tiff(width, height):
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
               (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 2**32 - 1)]  # fmt: skip
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)


def called(name):
    """A good picture under a name of bytes."""
    return lambda stem: Path(os.fsdecode(os.fsencode(stem) + name)).write_bytes(encoded("PNG"))


def link(to):
    return lambda stem: stem.with_name(stem.name + ".jpg").symlink_to(to or stem.name + ".jpg")


def pipe(stem):
    os.mkfifo(stem.with_name(stem.name + ".png"))


def listening(stem):
    """A socket; its name in the file system may have no more than a hundred characters."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{folder}/s")
        os.rename(f"{folder}/s", stem.with_name(stem.name + ".png"))


def folder(stem):
    stem.with_name(stem.name + ".png").mkdir()


def beside(name, content=b"no photo"):
    return lambda stem: stem.with_name(name).write_bytes(content)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="30"><rect width="40" height="30"/></svg>'
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
BOMB_TEXT = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80 * 2**20), 9))
VEILED = Image.new("P", SIZE, 1)
VEILED.putpalette([*RED, *ORANGE])

USED = {  # kind: maker. They are orange
    "PNG with alpha": image(".png", PLAIN.convert("RGBA")),
    "CMYK JPEG": image(".jpg", PLAIN.convert("CMYK"), quality=100),
    "palette with a transparent colour": image(".png", VEILED, transparency=0),
    "animated GIF": image(".gif", **FRAMES),
    "animated WebP": image(".webp", lossless=True, **FRAMES),
    "animated PNG": image(".png", **FRAMES),
    "TIFF of several pages": image(".tif", **FRAMES),
    "MPO": image(".jpg", format="MPO", quality=100, **FRAMES),
    "MPO with a damaged index": file(".jpg", jpeg((0xE2, b"MPF\0II*\0\xff\xff\xff\xff"))),
    "orientation that there is not": file(".jpg", jpeg((0xE1, exif((0x0112, 3, 1, 99))))),
    "orientation that is text": file(".jpg", jpeg((0xE1, exif((0x0112, 2, 4, 0x41414141))))),
    "EXIF data beyond the file": file(".jpg", jpeg((0xE1, exif((0x010F, 2, 2**31, 2**31))))),
    "EXIF data cut off": file(".jpg", jpeg((0xE1, exif((0x0112, 3, 1, 6))[:15]))),
    "EXIF data that are none": file(".jpg", jpeg((0xE1, b"Exif\0\0" + bytes(range(200))))),
    "EXIF data of 60 KB": file(".jpg", jpeg((0xE1, exif((0x927C, 7, 60000, 26)) + bytes(60000)))),
    "EXIF data that loop": file(".jpg", jpeg((0xE1, exif((0x8769, 4, 1, 8))))),
    "colour profile of 3 MiB": image(".png", icc_profile=SRGB.ljust(3 * 2**20, b"\0")),
    "text of 2 MiB": file(".png", with_chunk(chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2 * 2**20))))),
    "colour profile": image(".png", icc_profile=SRGB),
    "bytes behind the end": file(".jpg", encoded("JPEG", quality=100) + b"MotionPhoto" * 1000),
    "PNG called JPEG": file(".jpg", encoded("PNG")),
    "JPEG called PNG, in capitals": file(".PNG", encoded("JPEG", quality=100)),
    "name of two lines": called(b"\nskipped: all\x1b[2J.png"),
    "name that is not UTF-8": called(b"\xff\xfe.png"),
    "name in other letters": called("-собака-犬-🐕.png".encode()),
    "name of 200 characters": called(b"a" * 200 + b".png"),
}  # fmt: skip
FLAWED = {  # kind: maker. They are used with a warning, since their colours may be others than they seem
    "colour profile that is none, JPEG": file(".jpg", jpeg((0xE2, b"ICC_PROFILE\0\1\1" + b"garbage" * 100))),
    "colour profile that is in pieces": file(".jpg", jpeg((0xE2, b"ICC_PROFILE\0\1\2" + SRGB))),
    "colour profile that is none, PNG": file(".png", with_chunk(chunk(b"iCCP", b"x\0\0garbage"))),
    "colour profile that is none, WebP": image(".webp", icc_profile=b"garbage", lossless=True),
    "colour profile that is a number": image(".tif", tiffinfo={34675: 7}),
    "colour profile of inks": image(".tif", icc_profile=SRGB.replace(b"RGB ", b"CMYK")),
}  # fmt: skip
SKIPPED = {  # kind: maker, and the reason in the warning
    "JPEG cut at its beginning": (cut("JPEG", ".jpg", 0.005), "it is not an image|Truncated"),
    "JPEG cut in its header": (cut("JPEG", ".jpg", 0.05), "it is not an image|Truncated"),
    "JPEG cut in the middle": (cut("JPEG", ".jpg", 0.5), "truncated"),
    "JPEG cut near its end": (cut("JPEG", ".jpg", 0.9), "truncated"),
    "PNG cut at its beginning": (cut("PNG", ".png", 0.001), "it is not an image"),
    "PNG cut in its header": (cut("PNG", ".png", 0.003), "truncated|it is not an image|broken"),
    "PNG cut in the middle": (cut("PNG", ".png", 0.5), "truncated"),
    "PNG cut near its end": (cut("PNG", ".png", 0.95), "truncated"),
    "GIF cut": (cut("GIF", ".gif", 0.5), "truncated"),
    "WebP cut": (cut("WEBP", ".webp", 0.5), "."),
    "TIFF cut": (cut("TIFF", ".tif", 0.5), "."),
    "BMP cut": (cut("BMP", ".bmp", 0.5), "truncated"),
    "no bytes": (file(".jpg", b""), "it is not an image"),
    "zeros": (file(".png", bytes(5000)), "it is not an image"),
    "text": (file(".jpg", b"404 Not Found"), "it is not an image"),
    "SVG": (file(".png", SVG), "it is not an image"),
    "EPS, which would be run": (file(".jpg", EPS), "it is not an image"),
    "PDF": (file(".png", b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n"), "it is not an image"),
    "PSD": (file(".jpg", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30, 40, 8, 3)), "it is not an image"),
    "HEIC": (file(".heic", b"\0\0\0\x18ftypheic" + bytes(99)), "pip install pillow-heif; or convert it to JPEG or PNG"),
    "HEIC called JPEG": (file(".jpg", b"\0\0\0\x18ftypheic" + bytes(99)), "pip install pillow-heif"),
    "bomb, PNG": (file(".png", png(60000, 60000, chunk(b"IDAT", zlib.compress(bytes(9))))), "268,435,456 pixels"),
    "bomb, GIF": (file(".gif", b"GIF89a\xff\xff\xff\xff\0\0\0;"), "."),
    "bomb, TIFF": (file(".tif", tiff(2**31 - 1, 2**31 - 1)), "."),
    "bomb of text in a PNG": (file(".png", with_chunk(BOMB_TEXT)), "too large"),
    "TIFF of bytes beyond its end": (file(".tif", tiff(40, 30)), "."),
    "PNG with a wrong checksum": (file(".png", encoded("PNG")[:45] + b"\0" + encoded("PNG")[46:]), "."),
    "PNG of no width": (file(".png", png(0, 30)), "."),
    "PNG of no data": (file(".png", png(40, 30)), "."),
    "one pixel": (image(".png", Image.new("RGB", (1, 1))), "1 x 1 px is too small for --resolution 64"),
    "a line": (image(".png", Image.new("RGB", (9000, 2))), "9000 x 2 px is too elongated"),
    "link to nowhere": (link("moved-away.jpg"), "No such file"),
    "link to itself": (link(None), "symbolic links"),
    "pipe": (pipe, "regular file"),
    "socket": (listening, "regular file"),
    "link to a device": (link("/dev/zero"), "regular file"),
}  # fmt: skip
IGNORED = {
    "folder": folder,
    "Thumbs.db": beside("Thumbs.db"),
    "a Mac's second half": beside("._a.jpg", b"\0\5\x16\7"),
    ".DS_Store": beside(".DS_Store"),
    "hidden photo": beside(".a.jpg", encoded("JPEG")),
}
UNUSED = {  # kind: maker, and the name in the warning
    "unfinished download": (beside("a.jpg.part", encoded("JPEG")[:99]), "a.jpg.part"),
    "camera raw": (beside("a.DNG", tiff(40, 30)), "a.DNG \\(camera raw; convert"),
    "name that is not UTF-8": (called(b"\xff"), r"image\\udcff"),
    "pipe without a name of a photo": (lambda stem: os.mkfifo(stem), "image"),
}


def read(directory, **options):
    required = {"pretrained_model_name_or_path": "base", "instance_prompt": "a photo of sks dog"}
    return read_instance_photos(TrainingConfig(**required, instance_data_dir=str(directory), resolution=64, **options))


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("dreambooth.")]


@pytest.fixture
def photos(tmp_path):
    """A folder with one good photo."""
    (tmp_path / "photos").mkdir()
    PLAIN.save(tmp_path / "photos" / "good.png")
    return tmp_path / "photos"


def test_there_are_enough_kinds():
    assert len(SKIPPED) + len(IGNORED) + len(UNUSED) >= 40 and len({*USED, *SKIPPED, *IGNORED}) >= 65


@pytest.mark.parametrize("kind", USED)
def test_what_can_be_seen_is_used_as_it_looks(photos, caplog, kind):
    USED[kind](photos / "image")
    used, good = sorted(read(photos), key=lambda photo: photo.path.name == "good.png")
    assert good.path.name == "good.png" and used.path.name.startswith("image")
    assert np.abs(used.pixels.astype(int) - ORANGE).max() <= 4
    assert not warnings_in(caplog)


@pytest.mark.parametrize("kind", FLAWED)
def test_what_may_have_other_colours_is_used_and_named(photos, caplog, kind):
    FLAWED[kind](photos / "image")
    used, good = sorted(read(photos), key=lambda photo: photo.path.name == "good.png")
    assert good.path.name == "good.png" and np.abs(used.pixels.astype(int) - ORANGE).max() <= 4
    (warning,) = warnings_in(caplog)
    assert warning.startswith(f"{photos}/image.") and "colour profile" in warning


DAMAGED_EXIF = {  # entries beside the orientation
    "value beyond the file": (0x010F, 2, 2**31, 2**31),
    "type that there is not": (0x927C, 99, 9, 9),
    "text that is a number": (0x010F, 12, 1, 8),
    "bytes that are numbers": (0x927C, 3, 9, 8),
    "table that is none": (0x8769, 5, 1, 8),
}


@pytest.mark.parametrize("kind", DAMAGED_EXIF)
def test_a_photo_is_turned_upright_whatever_lies_beside_its_orientation(photos, kind):
    (photos / "image.jpg").write_bytes(tilted(DAMAGED_EXIF[kind]))
    _, photo = read(photos)
    height, width, _ = photo.pixels.shape
    assert width > height and photo.pixels[30, 5, 0] > 200 and photo.pixels[30, -5, 2] > 200


@pytest.mark.parametrize("kind", SKIPPED)
def test_what_cannot_be_trained_on_is_skipped_and_named_with_the_reason(photos, caplog, kind):
    make, words = SKIPPED[kind]
    make(photos / "image")
    assert [photo.path.name for photo in read(photos)] == ["good.png"]
    (warning,) = warnings_in(caplog)
    assert warning.startswith(f"--instance_data_dir {photos}: ") and "good" not in warning
    assert re.search(rf"image\.\w+: .*({words})", warning) and "\n" not in warning


@pytest.mark.parametrize("kind", IGNORED)
def test_what_is_no_photo_is_ignored(photos, caplog, kind):
    IGNORED[kind](photos / "image")
    assert [photo.path.name for photo in read(photos)] == ["good.png"]
    assert not warnings_in(caplog)


@pytest.mark.parametrize("kind", UNUSED)
def test_what_is_not_used_is_named(photos, caplog, kind):
    make, words = UNUSED[kind]
    make(photos / "image")
    assert [photo.path.name for photo in read(photos)] == ["good.png"]
    (warning,) = warnings_in(caplog)
    assert re.fullmatch(rf"--instance_data_dir {photos}: not used: {words}.*", warning)


def test_names_are_told_on_one_line_in_letters_alone(photos, caplog):
    for number, name in enumerate([b"a\nb.jpg", b"\xff.jpg", b"\x1b[2J.jpg", "\u202egpj.jpg".encode()]):
        Path(os.fsdecode(os.fsencode(photos) + b"/" + bytes([65 + number]) + name)).write_bytes(b"no image")
    read(photos)
    (warning,) = warnings_in(caplog)
    assert warning.removeprefix(f"--instance_data_dir {photos}: ").isprintable()
    assert all(name in warning for name in ("a\\nb.jpg", "\\udcff.jpg", "\\x1b[2J.jpg", "\\u202egpj.jpg"))


def test_a_folder_of_nothing_but_damaged_photos_is_refused(tmp_path):
    for number, (make, _) in enumerate(SKIPPED.values()):
        make(tmp_path / f"image-{number}")
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert all(f"image-{number}." in str(error.value) for number in range(len(SKIPPED)))


@pytest.fixture
def nobody():
    """Another user than root, whom permissions do not bind, and a folder that all users may enter."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        PLAIN.save(f"{directory}/good.png")
        user = os.geteuid()
        yield Path(directory), lambda: os.seteuid(user or 65534)
        os.seteuid(user)
        os.chmod(directory, 0o700)


def test_a_photo_that_may_not_be_read_is_skipped(nobody, caplog):
    directory, become = nobody
    PLAIN.save(directory / "image.png")
    (directory / "image.png").chmod(0)
    become()
    assert [photo.path.name for photo in read(directory)] == ["good.png"]
    assert "image.png: [Errno 13] Permission denied" in warnings_in(caplog)[0]


def test_a_folder_that_may_not_be_read_is_refused(nobody):
    directory, become = nobody
    directory.chmod(0o111)
    become()
    with pytest.raises(UserError, match=f"--instance_data_dir {directory} cannot be read: Permission denied"):
        read(directory)


# ---- very large photos ----


@pytest.fixture
def small_limits(monkeypatch):
    """Limits as if a pixel were a hundred thousand."""
    monkeypatch.setattr("dreambooth.data.images.LARGEST", 4000)
    monkeypatch.setattr("dreambooth.data.images.LARGEST_WHOLE", 1500)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_large_jpeg_is_decoded_at_a_half_and_keeps_its_size(
    photos, caplog, recwarn, small_limits, orientation, progressive
):
    tags = Image.Exif()
    tags[0x0112] = orientation
    picture = (
        TILTED.resize((71, 53)).transpose(Image.Transpose.ROTATE_90) if orientation == 6 else TILTED.resize((71, 53))
    )
    picture.save(photos / "image.jpg", exif=tags, quality=100, progressive=progressive)
    picture = read_picture(photos / "image.jpg")
    assert picture.size == (53, 71) and picture.image.size == (36, 27)
    left, right = picture.image.getpixel((3, 13)), picture.image.getpixel((32, 13))
    assert left[0] > 200 > 50 > left[2] and right[2] > 200 > 50 > right[0]
    _, photo = read(photos)
    assert photo.original_size == (53, 71) and photo.size == (64, 86)
    assert not warnings_in(caplog) and not recwarn.list and Image.MAX_IMAGE_PIXELS == 500


def test_a_jpeg_that_is_not_as_large_keeps_its_bits(photos, small_limits):
    NOISE.resize((30, 30)).save(photos / "image.jpg")
    assert np.array_equal(
        np.asarray(read_picture(photos / "image.jpg").image), np.asarray(Image.open(photos / "image.jpg"))
    )


def test_large_images_of_other_kinds_are_decoded_whole_up_to_a_limit_that_is_named(
    photos, caplog, recwarn, small_limits
):
    NOISE.save(photos / "image.png")
    NOISE.resize((80, 60)).save(photos / "larger.png")
    NOISE.resize((90, 100)).save(photos / "largest.jpg")
    assert [photo.path.name for photo in read(photos)] == ["good.png", "image.png"]
    (warning,) = warnings_in(caplog)
    assert "larger.png: 80 x 60 px is more than the 4,000 pixels" in warning and "largest.jpg: " in warning
    assert not recwarn.list


def test_a_large_jpeg_that_is_cut_is_skipped(photos, caplog, small_limits):
    content = encoded("JPEG", NOISE)
    (photos / "image.jpg").write_bytes(content[: len(content) // 2])
    assert [photo.path.name for photo in read(photos)] == ["good.png"]
    assert "image.jpg: image file is truncated" in warnings_in(caplog)[0]


# ---- what lies beside photos ----

BESIDE = {  # name, maker and words of the refusal: without them, other things would be taught than were meant
    "mask that is a pipe": ("good.mask.png", os.mkfifo, "regular file"),
    "mask that leads nowhere": ("good.mask.png", lambda path: path.symlink_to("gone.png"), "No such file"),
    "mask that is a folder": ("good.mask.png", Path.mkdir, "regular file"),
    "caption that is a pipe": ("good.txt", os.mkfifo, "regular file"),
    "caption that is a folder": ("good.txt", Path.mkdir, "regular file"),
    "caption that is not text": ("good.txt", lambda path: path.write_bytes(b"\x80\x04\xff"), "UTF-8"),
    "caption of a megabyte": ("good.txt", lambda path: path.write_text("a" * 2**20), "1,048,576 bytes"),
    "captions that are a pipe": ("metadata.jsonl", os.mkfifo, "regular file"),
    "captions nested too deep": ("metadata.jsonl", lambda path: path.write_text("[" * 100_000), "line 1"),
    "captions with endless numbers": ("metadata.jsonl", lambda path: path.write_text("9" * 5000), "line 1"),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_lies_beside_a_photo_is_read_or_refused_by_name(photos, kind):
    name, make, words = BESIDE[kind]
    make(photos / name)
    with pytest.raises(UserError, match=f"--instance_data_dir {photos}: {name}.*{words}"):
        read(photos)


# ---- all of it at once ----


@pytest.fixture
def all_kinds(photos):
    for number, make in enumerate(
        [*USED.values(), *FLAWED.values(), *(make for make, _ in SKIPPED.values()), *IGNORED.values()]
    ):
        make(photos / f"{number:02d}")
    return photos


def test_the_evaluation_reads_the_same_photos(all_kinds, caplog):
    used = read_subject_photos(str(all_kinds))
    one_pixel = 1  # which only training, that enlarges photos, cannot use
    assert len(used) == len(USED) + len(FLAWED) + 1 + one_pixel and {photo.mode for photo in used} == {"RGB"}
    assert len(warnings_in(caplog)) == 1 + len(FLAWED)


def test_a_folder_of_all_kinds_trains(all_kinds, options, run_main, capfd):
    run_main(sd, **options | {"instance_data_dir": all_kinds, "max_train_steps": 2, "train_batch_size": 4})
    (skipped,) = [line for line in capfd.readouterr().err.splitlines() if "skipped unreadable images" in line]
    assert len(re.findall(r"\b\d\d\.\w+: ", skipped)) == len(SKIPPED)
    assert all(tensor.isfinite().all() for tensor in factors(options["output_dir"]).values())
