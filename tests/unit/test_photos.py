"""Files and datasets to photos: decoding, captions, masks, sizes; on images that the tests make."""

import io
import json
import struct
import typing
import zlib

import numpy as np
import pytest
from PIL import Image

from dreambooth.data.images import read_image
from dreambooth.data.photos import NoPhotosError, read_class_photos, read_instance_photos
from dreambooth.data.references import read_references
from dreambooth.data.sizes import buckets, shape_of
from dreambooth.errors import UserError
from dreambooth.options.training import TrainingConfig

RESOLUTION = 16
WHITE, BLACK, RED, LIME, BLUE = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)
PROMPT = "a photo of sks dog"


def read_class(**options):
    config = make_config(**options)
    return read_class_photos(config.all_subjects[0], config)


def make_config(**options):
    required = {"pretrained_model_name_or_path": "base", "instance_prompt": PROMPT}
    return TrainingConfig(**required | {"resolution": RESOLUTION} | options)


def read(folder, **options):
    return read_instance_photos(make_config(instance_data_dir=str(folder), **options))


def read_dataset(name, **options):
    return read_instance_photos(make_config(dataset_name=str(name), **options))


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("dreambooth.")]


# ---- files to pixels ----

# Six colours in 2 rows of 3, in blocks that JPEG keeps as they are
UPRIGHT = np.array([[RED, LIME, BLUE], [WHITE, BLACK, (200, 100, 50)]], np.uint8).repeat(16, 0).repeat(16, 1)
STORED = {  # EXIF orientation: how a camera that writes it stores the picture
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.swapaxes(0, 1),
    6: np.rot90(UPRIGHT),
    7: UPRIGHT[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    "mode, suffix, how",
    [
        ("RGB", ".jpg", {"quality": 100, "subsampling": 0}),
        ("RGB", ".png", {}),
        ("RGBA", ".webp", {"lossless": True}),
        ("RGB", ".tif", {}),
        ("RGBA", ".tif", {}),
        ("RGBA", ".tif", {"compression": "tiff_lzw"}),
    ],
)
def test_photos_are_turned_upright(tmp_path, orientation, mode, suffix, how):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(STORED[orientation]).convert(mode).save(path, exif=exif, **how)
    np.testing.assert_allclose(np.asarray(read_image(path)), UPRIGHT, atol=2 if suffix == ".jpg" else 0)


@pytest.mark.parametrize("damaged", [None, 0, 3])
def test_the_last_photos_are_held_out_readable_or_not(tmp_path, caplog, damaged):
    for number in range(4):
        row("RGB", RED).resize((20, 20)).save(tmp_path / f"{number}.png")
    if damaged is not None:
        (tmp_path / f"{damaged}.png").write_bytes(b"damaged")
    with caplog.at_level("INFO"):
        names = [photo.path.name for photo in read(tmp_path, holdout=2)]
    assert names == (["1.png"] if damaged == 0 else ["0.png", "1.png"])
    assert "--holdout 2): 2.png, 3.png" in caplog.text
    held_out = [photo.path.name for photo in read_references(str(tmp_path), "--instance_data_dir", 2)]
    assert held_out == (["2.png"] if damaged == 3 else ["2.png", "3.png"])


def test_at_least_one_photo_has_to_be_left_to_train_on(tmp_path):
    for number in range(2):
        row("RGB", RED).resize((20, 20)).save(tmp_path / f"{number}.png")
    assert len(read(tmp_path, holdout=1)) == 1
    with pytest.raises(UserError, match="--holdout 2: --instance_data_dir .* has 2 photos"):
        read(tmp_path, holdout=2)


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, bits, colour_type, rows):
    """The bytes of a PNG file, also of kinds that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = (png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def row(mode, *pixels):
    """An image of one row."""
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


def palette(*indices):
    """An image of one row; its colours are 0 red, 1 lime, 2 blue."""
    image = row("P", *indices)
    image.putpalette([*RED, *LIME, *BLUE])
    return image


def array(dtype, *values):
    return Image.fromarray(np.array([values], dtype))


def save(suffix, image, **how):
    return lambda folder: image.save(folder / f"image{suffix}", **how)


def write(suffix, content):
    return lambda folder: (folder / f"image{suffix}").write_bytes(content)


HALF_BLUE = (127, 127, 255)  # blue at half alpha, on white
VEILED = row("RGBA", (*RED, 0), (*BLUE, 128), (*LIME, 255))  # red must never be seen
VEILED_GREY = row("LA", (0, 0), (0, 128), (100, 255))
FRAMES = [Image.new("RGB", (1, 1), colour) for colour in (RED, LIME, BLUE)]
ANIMATED = {"save_all": True, "append_images": FRAMES[1:]}
RGB16 = png(3, 1, 16, 2, b"\0" + struct.pack(">9H", 65535, 0, 0, 0x8000, 0x4000, 0xC0FF, 0, 0, 0))
RGBA16 = png(2, 1, 16, 6, b"\0" + struct.pack(">8H", 65535, 0, 0, 0, 0, 0, 65535, 65535))


KINDS = {  # a kind of file: what makes one, and the pixels to be read from it
    "RGBA PNG": (save(".png", VEILED), [WHITE, HALF_BLUE, LIME]),
    "RGBA TIFF": (save(".tif", VEILED), [WHITE, HALF_BLUE, LIME]),
    "RGBA WebP": (save(".webp", VEILED, lossless=True, exact=True), [WHITE, HALF_BLUE, LIME]),
    "LA PNG": (save(".png", VEILED_GREY), [WHITE, (127,) * 3, (100,) * 3]),
    "palette with a transparent colour, PNG": (save(".png", palette(0, 1, 2), transparency=0), [WHITE, LIME, BLUE]),
    "palette with a transparent colour, GIF": (save(".gif", palette(0, 1, 2), transparency=0), [WHITE, LIME, BLUE]),
    "palette with an alpha table": (
        save(".png", palette(0, 1, 2), transparency=bytes([0, 255, 128])),
        [WHITE, LIME, HALF_BLUE],
    ),
    "RGB with a transparent colour": (save(".png", row("RGB", RED, BLUE), transparency=RED), [WHITE, BLUE]),
    "grey with a transparent shade": (save(".png", row("L", 10, 40), transparency=10), [WHITE, (40,) * 3]),
    "16-bit RGBA PNG": (write(".png", RGBA16), [WHITE, BLUE]),
    "RGB JPEG": (save(".jpg", Image.new("RGB", (8, 8), (200, 200, 200)), quality=100), [(200,) * 3] * 64),
    "grey JPEG": (save(".jpeg", Image.new("L", (8, 8), 200), quality=100), [(200,) * 3] * 64),
    "CMYK JPEG": (save(".jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100), [RED] * 64),
    "CMYK TIFF": (save(".tif", row("CMYK", (0, 255, 255, 0), (0, 0, 0, 255))), [RED, BLACK]),
    "palette": (save(".png", palette(2, 0, 1)), [BLUE, RED, LIME]),
    "1 bit": (save(".png", row("1", 0, 255)), [BLACK, WHITE]),
    "16-bit RGB PNG": (write(".png", RGB16), [RED, (0x80, 0x40, 0xC0), BLACK]),
    "16-bit grey PNG": (save(".png", array("<u2", 0, 32768, 65535)), [BLACK, (128,) * 3, WHITE]),
    "16-bit grey TIFF": (save(".tif", array("<u2", 0, 32768, 65535)), [BLACK, (128,) * 3, WHITE]),
    "16-bit grey TIFF, big-endian": (save(".tiff", array(">u2", 0, 32768, 65535)), [BLACK, (128,) * 3, WHITE]),
    "dark 16-bit grey PNG stays dark": (save(".png", array("<u2", 0, 128, 255)), [BLACK, BLACK, (1,) * 3]),
    "32-bit grey TIFF": (save(".tif", array("<i4", -5, 32768, 65535)), [BLACK, (128,) * 3, WHITE]),
    "float TIFF, 0 to 1": (save(".tif", array("<f4", -1, 0.5, 1)), [BLACK, (128,) * 3, WHITE]),
    "float TIFF, 0 to 255": (save(".tif", array("<f4", np.nan, 128, 255)), [BLACK, (128,) * 3, WHITE]),
    "float TIFF, 0 to 65535": (save(".tif", array("<f4", 0, 32768, 65535)), [BLACK, (128,) * 3, WHITE]),
    "animated GIF": (save(".gif", FRAMES[0], **ANIMATED), [RED]),
    "animated WebP": (save(".webp", FRAMES[0], lossless=True, **ANIMATED), [RED]),
    "animated PNG": (save(".png", FRAMES[0], **ANIMATED), [RED]),
    "TIFF of several pages": (save(".tif", FRAMES[0], **ANIMATED), [RED]),
    "PNG that calls itself JPEG": (save(".jpg", row("RGB", RED, BLUE), format="PNG"), [RED, BLUE]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_of_every_kind_of_file(tmp_path, kind):
    make, expected = KINDS[kind]
    make(tmp_path)
    (path,) = tmp_path.iterdir()
    image = read_image(path)
    assert image.mode == "RGB"
    assert [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()] == expected


# ---- folders to photos ----


def encoded(kind):
    """The bytes of an image of noise, so that they are many."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def dangling_link(folder):
    (folder / "image.jpg").symlink_to(folder / "moved-away.jpg")


DAMAGED = {  # what makes a file that cannot be trained on, and what its name and the reason say
    "truncated JPEG": (write(".jpg", encoded("JPEG")[:2000]), "image.jpg: image file is truncated"),
    "truncated PNG": (write(".png", encoded("PNG")[:2000]), "image.png: image file is truncated"),
    "truncated GIF": (write(".gif", encoded("GIF")[:2000]), "image.gif: image file is truncated"),
    "truncated WebP": (write(".webp", encoded("WEBP")[:2000]), "image.webp: "),
    "zero bytes": (write(".png", b""), "image.png: it is not an image"),
    "text": (write(".JPG", b"<html>404 Not Found</html>"), "image.JPG: it is not an image"),
    "HEIC": (
        write(".HEIC", b"\0\0\0\x18ftypheic"),
        "image.HEIC: HEIF needs another package: pip install pillow-heif; or convert",
    ),
    "decompression bomb": (
        write(".png", png(60000, 60000, 8, 2, b"")),
        "image.png: it has more than the 268,435,456 pixels",
    ),
    "a line": (save(".png", Image.new("RGB", (2000, 1))), "image.png: 2000 x 1 px is too elongated"),
    "link to nowhere": (dangling_link, "image.jpg: [Errno 2] No such file"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_image_beside_a_good_one_is_named_in_a_warning(tmp_path, caplog, kind):
    make, words = DAMAGED[kind]
    make(tmp_path)
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    assert [photo.path.name for photo in read(tmp_path)] == ["good.png"]
    (warning,) = warnings_in(caplog)
    assert warning.startswith(f"--instance_data_dir {tmp_path}: ") and words in warning and "good" not in warning


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_image_alone_is_an_error_that_names_it(tmp_path, kind):
    make, words = DAMAGED[kind]
    make(tmp_path)
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert str(error.value).startswith(f"--instance_data_dir {tmp_path}: ") and words in str(error.value)


def test_all_damaged_images_are_named(tmp_path):
    names = ["a.jpg", "b.png", "c.heic"]
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert all(f"{name}: " in str(error.value) for name in names)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(
        UserError, match="--instance_data_dir .*there is no readable image .*it contains no image files"
    ):
        read(tmp_path)


@pytest.mark.parametrize("name", ["missing", "file.png"])
def test_a_folder_that_is_none_is_an_error(tmp_path, name):
    Image.new("RGB", (20, 20)).save(tmp_path / "file.png")
    with pytest.raises(UserError, match=f"--instance_data_dir .*{name}: there is no such folder"):
        read(tmp_path / name)


def test_photos_come_in_the_order_of_their_names_with_the_prompt(tmp_path):
    names = ["b.JPG", "c.png", "a.webp", "B.bmp"]
    for name in names:
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    photos = read(tmp_path)
    assert [photo.path.name for photo in photos] == sorted(names)
    assert {photo.prompt for photo in photos} == {PROMPT}


# ---- sizes ----


@pytest.mark.parametrize("resolution", [8, 64])
@pytest.mark.parametrize(
    "width, height", [(100, 60), (60, 100), (64, 64), (7, 9), (2, 2), (49, 60), (333, 331), (500, 9), (9, 500)]
)
def test_the_shorter_side_is_the_resolution_and_the_aspect_is_kept(tmp_path, width, height, resolution):
    Image.new("RGB", (width, height), RED).save(tmp_path / "photo.png")
    pixels = read(tmp_path, resolution=resolution)[0].pixels
    scale = resolution / min(width, height)
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and min(pixels.shape[:2]) == resolution
    assert abs(pixels.shape[0] - height * scale) < 1 and abs(pixels.shape[1] - width * scale) < 1
    assert (pixels == RED).all()


def test_a_photo_of_the_right_size_is_kept_bit_for_bit(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (RESOLUTION, 2 * RESOLUTION, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    assert np.array_equal(read(tmp_path)[0].pixels, noise)


@pytest.mark.parametrize("mode", typing.get_args(typing.get_type_hints(TrainingConfig)["image_interpolation_mode"]))
def test_every_interpolation_mode_is_pillow_s(tmp_path, mode):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8))
    noise.save(tmp_path / "photo.png")
    expected = noise.resize((24, 16), getattr(Image.Resampling, mode.upper()))
    assert np.array_equal(read(tmp_path, image_interpolation_mode=mode)[0].pixels, np.asarray(expected))


@pytest.mark.parametrize("orientation, size", [(1, (20, 30)), (6, (30, 20))])
def test_the_original_size_is_that_of_the_upright_photo(tmp_path, orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(tmp_path / "photo.jpg", exif=exif)
    photo = read(tmp_path)[0]
    assert photo.original_size == size
    assert photo.pixels.shape[:2] == ((16, 24) if size == (20, 30) else (24, 16))


# ---- buckets ----


@pytest.mark.parametrize("resolution", [64, 96, 128, 256, 512, 768, 832, 1000, 1024, 1536])
def test_buckets_are_of_nearly_equal_area_and_multiples_of_64(resolution):
    shapes = buckets(resolution)
    side = resolution // 64 * 64
    assert (side, side) in shapes and len(set(shapes)) == len(shapes)
    for height, width in shapes:
        assert height % 64 == width % 64 == 0
        assert height * width <= resolution**2 < (min(height, width) + 64) * (max(height, width) + 64)
        assert max(height, width) <= 2 * min(height, width)
        assert (width, height) in shapes


def test_buckets_of_known_resolutions():
    assert buckets(64) == ((64, 64),)
    assert buckets(512) == ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))


@pytest.mark.parametrize(
    "size, shape",
    [
        ((100, 100), (512, 512)),
        ((3000, 4000), (448, 576)),
        ((4000, 3000), (576, 448)),
        ((1080, 1920), (384, 640)),
        ((10, 900), (384, 640)),
        ((900, 10), (640, 384)),
        ((510, 520), (512, 512)),
    ],
)
def test_each_photo_goes_to_the_nearest_aspect(size, shape):
    assert shape_of(size, make_config(resolution=512, aspect_ratio_buckets=True)) == shape
    assert shape_of(size, make_config(resolution=512)) == (512, 512)


@pytest.mark.parametrize("width, height", [(400, 300), (300, 400), (1000, 600), (100, 100), (90, 30), (192, 320)])
def test_a_photo_covers_its_bucket_and_no_more_than_it_must(tmp_path, width, height):
    Image.new("RGB", (width, height)).save(tmp_path / "photo.png")
    config = make_config(instance_data_dir=str(tmp_path), resolution=256, aspect_ratio_buckets=True)
    (photo,) = read_instance_photos(config)
    spare = np.subtract(photo.pixels.shape[:2], shape_of((height, width), config))
    assert min(spare) == 0 and photo.original_size == (height, width)
    scale = photo.pixels.shape[0] / height
    assert abs(photo.pixels.shape[1] - width * scale) < 1 + scale


@pytest.mark.parametrize(
    "size, expected", [((256, 256), (256, 256)), ((100, 80), (100, 80)), ((1280, 640), (640, 320))]
)
def test_class_images_keep_enough_pixels_for_every_bucket(tmp_path, size, expected):
    """The longest side of a bucket is 320; what is smaller is enlarged only for the bucket that it is used in."""
    Image.new("RGB", size[::-1]).save(tmp_path / "class.png")
    options = {"class_data_dir": str(tmp_path), "class_prompt": "dog", "resolution": 256}
    (photo,) = read_class(**options, aspect_ratio_buckets=True)
    assert photo.pixels.shape[:2] == expected and photo.original_size == size
    (photo,) = read_class(**options)
    assert min(photo.pixels.shape[:2]) == 256


# ---- captions and class prompts ----


@pytest.fixture
def album(tmp_path):
    """Two photos, a.jpg and b.png, and a way to write files beside them."""

    def write(**files):
        for name, text in files.items():
            (tmp_path / name.replace("__", ".")).write_text(text, encoding="utf-8")
        return tmp_path

    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    return write


def prompts(folder, **options):
    return {photo.path.name: photo.prompt for photo in read(folder, **options)}


def class_prompts(folder, **options):
    prior = {"with_prior_preservation": True, "prior_source": "base_model", "class_prompt": "a dog"}
    return {photo.path.name: photo.class_prompt for photo in read(folder, **prior | options)}


def jsonl(*rows):
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def test_without_captions_all_prompts_are_the_options(album, caplog):
    assert prompts(album()) == {"a.jpg": PROMPT, "b.png": PROMPT}
    assert class_prompts(album()) == {"a.jpg": "a dog", "b.png": "a dog"}
    assert read(album())[0].class_prompt is None
    assert not warnings_in(caplog)


@pytest.mark.parametrize(
    "text, prompt",
    [
        ("sks dog on grass", "sks dog on grass"),
        ("  \n sks dog   on\tgrass \r\n", "sks dog on grass"),
        ("\ufeffein Hündchen, SKS 🐶", "ein Hündchen, SKS 🐶"),
        ("{instance_prompt} on grass, {instance_prompt}", f"{PROMPT} on grass, {PROMPT}"),
        ("a {sks} dog {} %s", "a {sks} dog {} %s"),
    ],
)
def test_a_caption_beside_a_photo_is_its_prompt_and_only_its(album, caplog, text, prompt):
    assert prompts(album(a__txt=text)) == {"a.jpg": prompt, "b.png": PROMPT}
    assert not warnings_in(caplog)


def test_class_prompts_beside_photos(album, caplog):
    folder = album(a__txt="sks dog on grass", a__class__txt="a dog on grass")
    assert prompts(folder, prior_source="base_model", with_prior_preservation=True)["a.jpg"] == "sks dog on grass"
    assert class_prompts(folder) == {"a.jpg": "a dog on grass", "b.png": "a dog"}
    assert not warnings_in(caplog)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"with_prior_preservation": True, "class_prompt": "a dog"},
        {"prior_source": "base_model", "class_prompt": "a dog"},
    ],
)
def test_class_prompts_that_nothing_uses_are_worth_a_warning(album, caplog, options):
    assert read(album(a__class__txt="a dog on grass"), **options)[0].class_prompt == "a dog on grass"
    (warning,) = warnings_in(caplog)
    assert "--prior_source base_model" in warning


@pytest.mark.parametrize("name", ["a__txt", "a__class__txt"])
@pytest.mark.parametrize("text", ["", " \n", "\ufeff"])
def test_an_empty_caption_is_ignored_with_a_warning(album, caplog, name, text):
    folder = album(**{name: text})
    assert prompts(folder)["a.jpg"] == PROMPT
    (warning,) = warnings_in(caplog)
    assert warning.startswith(f"--instance_data_dir {folder}: {name.replace('__', '.')} is empty")


def test_a_caption_that_is_not_utf_8_is_an_error_that_names_it(album):
    folder = album()
    (folder / "b.txt").write_bytes("Hündchen".encode("latin-1"))
    with pytest.raises(UserError, match=f"--instance_data_dir {folder}: b.txt cannot be read as UTF-8"):
        read(folder)


def test_captions_and_masks_without_a_photo_are_named_in_a_warning(album, caplog):
    folder = album(notes__txt="x", c__class__txt="x", b__txt="sks", _hidden__txt="x")
    (folder / "_hidden.txt").rename(folder / "._b.txt")
    Image.new("L", (20, 20), 255).save(folder / "d.mask.png")
    assert prompts(folder) == {"a.jpg": PROMPT, "b.png": "sks"}
    (warning,) = warnings_in(caplog)
    assert warning.startswith(f"--instance_data_dir {folder}: ") and "c.class.txt, d.mask.png, notes.txt" in warning


def test_the_caption_of_a_damaged_photo_is_no_orphan(album, caplog):
    folder = album(c__txt="a caption")
    (folder / "c.jpg").touch()
    read(folder)
    (warning,) = warnings_in(caplog)
    assert "skipped unreadable images (c.jpg" in warning


def test_metadata_in_datasets_layout(album, caplog):
    rows = [{"file_name": "b.png", "text": "{instance_prompt} in snow", "class_text": "snow"}, {"file_name": "a.jpg"}]
    folder = album(metadata__jsonl="\ufeff" + jsonl(*rows) + "\n \n")
    assert prompts(folder, with_prior_preservation=True, prior_source="base_model") == {
        "a.jpg": PROMPT,
        "b.png": f"{PROMPT} in snow",
    }
    assert class_prompts(folder) == {"a.jpg": "a dog", "b.png": "snow"}
    assert not warnings_in(caplog)


def test_the_column_with_captions_can_be_named(album):
    folder = album(metadata__jsonl=jsonl({"file_name": "./a.jpg", "text": "one", "caption": "two\u2028lines"}))
    assert prompts(folder)["a.jpg"] == "one"
    assert prompts(folder, caption_column="caption")["a.jpg"] == "two lines"


def test_a_file_beside_the_photo_wins_over_metadata(album):
    rows = [{"file_name": name, "text": "listed", "class_text": "class"} for name in ("a.jpg", "b.png")]
    folder = album(metadata__jsonl=jsonl(*rows), a__txt="beside", b__class__txt="class beside")
    assert prompts(folder) == {"a.jpg": "beside", "b.png": "listed"}
    assert class_prompts(folder) == {"a.jpg": "class", "b.png": "class beside"}


def test_metadata_of_photos_that_are_not_there_is_named_in_a_warning(album, caplog):
    folder = album(
        metadata__jsonl=jsonl({"file_name": "a.jpg", "text": "sks"}, {"file_name": "sub/c.jpg", "text": "y"})
    )
    assert prompts(folder)["a.jpg"] == "sks"
    (warning,) = warnings_in(caplog)
    assert warning.endswith("captions or masks without a photo of the same name: sub/c.jpg in metadata.jsonl")


@pytest.mark.parametrize(
    "text, options, words",
    [
        ("{", {}, "metadata.jsonl, line 1: "),
        (jsonl({"file_name": "a.jpg", "text": "x"}) + "nonsense", {}, "metadata.jsonl, line 2: "),
        ("[]", {}, "metadata.jsonl, line 1: expected"),
        (jsonl({"text": "x"}), {}, "metadata.jsonl, line 1: expected"),
        (
            jsonl({"file_name": "a.jpg", "caption": "x"}),
            {},
            "no column text for --caption_column; it has caption, file_",
        ),
        (
            jsonl({"file_name": "a.jpg", "text": "x"}),
            {"caption_column": "prompt"},
            "no column prompt .*file_name, text",
        ),
    ],
)
def test_metadata_that_does_not_read_is_an_error(album, text, options, words):
    folder = album(metadata__jsonl=text)
    with pytest.raises(UserError, match=f"--instance_data_dir {folder}: .*{words}"):
        read(folder, **options)


def test_metadata_may_hold_class_prompts_alone(album):
    folder = album(metadata__jsonl=jsonl({"file_name": "a.jpg", "class_text": "x"}))
    assert class_prompts(folder)["a.jpg"] == "x" and prompts(folder)["a.jpg"] == PROMPT


def test_a_caption_column_without_metadata_is_refused(album):
    with pytest.raises(UserError, match="--caption_column text: --instance_data_dir .* has no metadata.jsonl"):
        read(album(), caption_column="text")


def test_class_images_have_captions_the_same_way(album):
    folder = album(a__txt="a dog on grass")
    photos = read_class(class_data_dir=str(folder), class_prompt="a dog")
    assert [photo.prompt for photo in photos] == ["a dog on grass", "a dog"]


def test_class_images_that_are_missing_differ_from_captions_that_do_not_read(album, tmp_path):
    with pytest.raises(NoPhotosError):
        read_class(class_data_dir=str(tmp_path / "missing"), class_prompt="a dog")
    folder = album()
    (folder / "a.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="--class_data_dir .*a.txt") as error:
        read_class(class_data_dir=str(folder), class_prompt="a dog")
    assert not isinstance(error.value, NoPhotosError)


# ---- masks ----


def half_mask(width, height):
    """White on the left, black on the right."""
    return Image.fromarray(np.array([[255, 0]], np.uint8).repeat(height, 0).repeat(width // 2, 1))


@pytest.mark.parametrize("size", [(64, 32), (32, 16), (128, 64), (320, 160)])
def test_a_mask_lies_on_its_photo(tmp_path, size, caplog):
    for name in ("a", "b"):
        Image.new("RGB", (64, 32)).save(tmp_path / f"{name}.jpg")
    half_mask(*size).save(tmp_path / "b.mask.png")
    a, b = read(tmp_path)
    assert a.mask is None and b.mask.shape == b.pixels.shape[:2] == (16, 32) and b.mask.dtype == np.uint8
    assert (b.mask[:, :15] == 255).all() and (b.mask[:, 17:] == 0).all()
    assert not warnings_in(caplog)


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "LA", "RGBA", "P", "I;16"])
def test_masks_of_every_mode(tmp_path, mode):
    Image.new("RGB", (32, 16)).save(tmp_path / "a.jpg")
    mask = half_mask(32, 16)
    mask = Image.fromarray(np.asarray(mask).astype(np.uint16) * 257) if mode == "I;16" else mask.convert(mode)
    mask.save(tmp_path / "a.mask.png")
    assert np.array_equal(read(tmp_path)[0].mask, np.asarray(half_mask(32, 16)))


def test_the_weight_outside_masks_without_a_mask_is_warned_of(tmp_path, caplog):
    Image.new("RGB", (32, 16)).save(tmp_path / "a.png")
    read(tmp_path, unmasked_weight=0.5)
    assert "--unmasked_weight 0.5 has no effect" in caplog.text
    caplog.clear()
    half_mask(32, 16).save(tmp_path / "a.mask.png")
    read(tmp_path, unmasked_weight=0.5)
    assert not caplog.text


def test_what_is_transparent_in_a_mask_is_outside(tmp_path):
    """The subject cut out: its colours, and nothing around it."""
    Image.new("RGB", (32, 16)).save(tmp_path / "a.jpg")
    cut_out = Image.new("RGBA", (32, 16), (255, 255, 255, 255))
    cut_out.putalpha(half_mask(32, 16))
    cut_out.save(tmp_path / "a.mask.png")
    assert np.array_equal(read(tmp_path)[0].mask, np.asarray(half_mask(32, 16)))


def test_a_mask_fits_the_photo_as_it_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    half_mask(40, 60).save(tmp_path / "a.mask.png")
    assert read(tmp_path)[0].mask.shape == (24, 16)


MASKS = {
    "another shape": (Image.new("L", (32, 32), 255), "a.mask.png is 32 x 32 px, .*its photo, 64 x 32 px"),
    "turned": (Image.new("L", (32, 64), 255), "a.mask.png is 32 x 64 px, .*its photo, 64 x 32 px"),
    "black": (Image.new("L", (64, 32), 0), "a.mask.png is black everywhere"),
    "0 and 1": (Image.new("L", (64, 32), 1), "a.mask.png is black everywhere; white \\(255\\)"),
    "damaged": (None, "a.mask.png: it is not an image"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_that_does_not_fit_is_an_error_that_names_it(tmp_path, kind):
    mask, words = MASKS[kind]
    for name in ("a", "b"):
        Image.new("RGB", (64, 32)).save(tmp_path / f"{name}.jpg")
    (tmp_path / "a.mask.png").touch()
    if mask:
        mask.save(tmp_path / "a.mask.png")
    with pytest.raises(UserError, match=f"--instance_data_dir {tmp_path}: {words}"):
        read(tmp_path)


def test_masks_are_never_photos(tmp_path, caplog):
    for name in ("a.jpg", "b.MASK.PNG", "a.mask.png"):
        Image.new("RGB", (20, 20), "white").save(tmp_path / name)
    assert [photo.path.name for photo in read(tmp_path)] == ["a.jpg"]
    (warning,) = warnings_in(caplog)
    assert "b.MASK.PNG" in warning


# ---- datasets ----


@pytest.fixture
def quiet_datasets(tmp_path, monkeypatch):
    """Datasets without progress bars, whose cache is not the user's."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


@pytest.fixture
def image_folder(tmp_path, quiet_datasets):
    folder = tmp_path / "folder"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(STORED[6]).save(folder / "a.jpg", exif=exif, quality=100, subsampling=0)
    VEILED.resize((30, 20), Image.Resampling.NEAREST).save(folder / "b.png")
    rows = [{"file_name": name, "text": f"{{instance_prompt}} {name}", "note": name} for name in ("a.jpg", "b.png")]
    (folder / "metadata.jsonl").write_text(jsonl(*rows))
    return folder


def assert_same_photos(photos, others):
    for photo, other in zip(photos, others, strict=True):
        assert np.array_equal(photo.pixels, other.pixels)
        assert (photo.prompt, photo.class_prompt) == (other.prompt, other.class_prompt)
        assert photo.original_size == other.original_size


def test_an_image_folder_as_a_dataset_is_what_it_is_as_a_folder(image_folder):
    photos = read_dataset(image_folder, caption_column="text")
    assert_same_photos(photos, read(image_folder))
    assert [photo.path.name for photo in photos] == ["a.jpg", "b.png"]
    assert photos[0].prompt == f"{PROMPT} a.jpg" and photos[0].original_size == UPRIGHT.shape[:2]
    assert [photo.prompt for photo in read_dataset(image_folder, caption_column="note")] == ["a.jpg", "b.png"]


def parquet(path, datasets, image_folder, **columns):
    """A parquet file with the images of a folder inside, as bytes."""
    images = [{"bytes": (image_folder / name).read_bytes(), "path": None} for name in ("a.jpg", "b.png")]
    features = datasets.Features({"photo": datasets.Image(), **{name: datasets.Value("string") for name in columns}})
    datasets.Dataset.from_dict({"photo": images, **columns}, features).to_parquet(path)
    return path


def test_a_parquet_file_and_its_folder(tmp_path, quiet_datasets, image_folder):
    (tmp_path / "data").mkdir()
    columns = {"text": ["one", None], "class_text": ["class", ""]}
    path = parquet(tmp_path / "data" / "photos.parquet", quiet_datasets, image_folder, **columns)
    options = {"image_column": "photo", "class_prompt": "a dog", "caption_column": "text"}
    photos = read_dataset(path, **options)
    assert [photo.prompt for photo in photos] == ["one", PROMPT]
    assert [photo.class_prompt for photo in photos] == ["class", "a dog"]
    assert [str(photo.path) for photo in photos] == ["row 0", "row 1"]
    for photo, other in zip(photos, read(image_folder)):
        assert np.array_equal(photo.pixels, other.pixels)
    assert_same_photos(photos, read_dataset(path.parent, **options))


def test_a_dataset_without_captions_has_the_instance_prompt(tmp_path, quiet_datasets, image_folder):
    path = parquet(tmp_path / "photos.parquet", quiet_datasets, image_folder, note=["x", "y"])
    assert {photo.prompt for photo in read_dataset(path, image_column="photo")} == {PROMPT}


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "--image_column image: --dataset_name .* has the columns photo, text"),
        ({"image_column": "photo", "caption_column": "note"}, "--caption_column note: .*the columns photo, text"),
    ],
)
def test_a_missing_column_is_an_error_that_lists_those_there_are(
    tmp_path, quiet_datasets, image_folder, options, words
):
    path = parquet(tmp_path / "photos.parquet", quiet_datasets, image_folder, text=["x", "y"])
    with pytest.raises(UserError, match=words):
        read_dataset(path, **options)


def test_a_column_without_images_is_an_error(tmp_path, quiet_datasets):
    quiet_datasets.Dataset.from_dict({"image": [1, 2]}).to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(
        UserError, match="--image_column image: that column of --dataset_name .* does not contain images"
    ):
        read_dataset(tmp_path / "numbers.parquet")


def test_a_table_of_paths(tmp_path, quiet_datasets, image_folder):
    (tmp_path / "photos.csv").write_text(f"image,text\n{image_folder / 'a.jpg'},one\n{image_folder / 'b.png'},two\n")
    photos = read_dataset(tmp_path / "photos.csv", caption_column="text")
    assert [(photo.path, photo.prompt) for photo in photos] == [
        (image_folder / "a.jpg", "one"),
        (image_folder / "b.png", "two"),
    ]


@pytest.mark.parametrize("name", ["photos.csv", "photos.jsonl"])
def test_paths_in_a_table_are_relative_to_it(tmp_path, quiet_datasets, image_folder, caplog, name):
    rows = [("folder/a.jpg", "sks one"), ("folder/b.png", "sks two"), ("folder/moved.png", "sks three")]
    if name.endswith(".csv"):
        text = "image,text\n" + "".join(f"{path},{text}\n" for path, text in rows)
    else:
        text = jsonl(*({"image": path, "text": text} for path, text in rows))
    (tmp_path / name).write_text(text)
    photos = read_dataset(tmp_path / name, caption_column="text")
    assert [(photo.path, photo.prompt) for photo in photos] == [
        (image_folder / "a.jpg", "sks one"),
        (image_folder / "b.png", "sks two"),
    ]
    (warning,) = warnings_in(caplog)
    assert "row 2: " in warning and "folder/moved.png" in warning


def test_a_column_of_captions_is_used_if_it_is_asked_for_and_named_if_not(image_folder, quiet_datasets, caplog):
    photos = read_dataset(image_folder)
    assert {(photo.prompt, photo.captioned) for photo in photos} == {(PROMPT, False)}
    (warning,) = warnings_in(caplog)
    assert warning.startswith(f"--dataset_name {image_folder}: ") and "--caption_column text" in warning


def test_captions_of_a_dataset_that_are_not_text_or_have_several_lines(tmp_path, quiet_datasets, image_folder, caplog):
    path = parquet(tmp_path / "a.parquet", quiet_datasets, image_folder, words=["sks\nlines", "sks"])
    options = {"image_column": "photo", "caption_column": "words"}
    assert [photo.prompt for photo in read_dataset(path, **options)] == ["sks lines", "sks"]
    (warning,) = warnings_in(caplog)
    assert "lines" in warning and warning.endswith(": row 0")
    lists = quiet_datasets.load_dataset("parquet", data_files=str(path), split="train").map(lambda row: {"words": [[]]})
    lists.save_to_disk(tmp_path / "lists")
    with pytest.raises(UserError, match="--dataset_name .*row 0: words is not text"):
        read_dataset(tmp_path / "lists", **options)


@pytest.mark.parametrize(
    "splits, words",
    [
        (None, None),
        (["train"], None),
        (["validation"], None),
        (["test", "train"], None),
        (["test", "validation"], "the splits test, validation"),
    ],
)
def test_datasets_that_were_saved_to_disk(tmp_path, quiet_datasets, image_folder, splits, words):
    path = parquet(tmp_path / "a.parquet", quiet_datasets, image_folder, words=["sks 0", "sks 1"])
    dataset = quiet_datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    if splits is not None:
        few = {split: dataset if split in ("train", splits[0]) else dataset.select([0]) for split in splits}
        dataset = quiet_datasets.DatasetDict(few)
    dataset.save_to_disk(tmp_path / "saved")
    options = {"image_column": "photo", "caption_column": "words"}
    if words is None:
        photos = read_dataset(tmp_path / "saved", **options)
        assert [photo.prompt for photo in photos] == ["sks 0", "sks 1"]
        assert np.array_equal(photos[0].pixels, read(image_folder)[0].pixels)
    else:
        with pytest.raises(UserError, match=f"--dataset_name {tmp_path}/saved has {words}"):
            read_dataset(tmp_path / "saved", **options)


def test_the_only_split_of_a_folder_is_used_whatever_it_is_called(tmp_path, quiet_datasets, image_folder):
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "validation.parquet", quiet_datasets, image_folder, note=["x", "y"])
    assert len(read_dataset(tmp_path / "data", image_column="photo")) == 2


def test_a_damaged_row_is_named_in_a_warning(tmp_path, quiet_datasets, image_folder, caplog):
    good = (image_folder / "a.jpg").read_bytes()
    images = [{"bytes": good[:200], "path": None}, {"bytes": good, "path": None}, None]
    features = quiet_datasets.Features({"image": quiet_datasets.Image()})
    quiet_datasets.Dataset.from_dict({"image": images}, features).to_parquet(tmp_path / "photos.parquet")
    assert len(read_dataset(tmp_path / "photos.parquet")) == 1
    (warning,) = warnings_in(caplog)
    assert "--dataset_name" in warning and "row 0: " in warning and "row 2: there is no image" in warning


@pytest.mark.parametrize("name", ["missing", "no/such-dataset", "notes.md", "damaged.parquet"])
def test_a_dataset_that_cannot_be_loaded_is_an_error(tmp_path, quiet_datasets, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("notes")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match=f"--dataset_name {name} cannot be loaded: "):
        read_dataset(name)
