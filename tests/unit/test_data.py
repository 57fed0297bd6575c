"""Files to photos, photos to samples, samples to batches: on images that the tests make, and by pixel values."""

import dataclasses
import io
import itertools
import struct
import typing
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth.config import TrainingConfig, UserError
from dreambooth.data import (
    DreamBoothDataset,
    GlobalSampler,
    Photo,
    build_loader,
    collate,
    distinct_prompts,
    read_image,
    read_photos,
)

RESOLUTION = 16
WHITE, BLACK, RED, LIME, BLUE = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)


def make_config(**options):
    required = {"pretrained_model_name_or_path": "base", "instance_data_dir": "photos", "instance_prompt": "sks dog"}
    return TrainingConfig(**required | {"resolution": RESOLUTION} | options)


def read(folder, **options):
    return read_photos(str(folder), "--instance_data_dir", "a photo of sks dog", make_config(**options))


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "dreambooth.data"]


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
    "zero bytes": (write(".png", b""), "image.png: cannot identify image file"),
    "text": (write(".JPG", b"<html>404 Not Found</html>"), "image.JPG: cannot identify image file"),
    "HEIC": (write(".HEIC", b"ftypheic"), "image.HEIC: HEIC is not supported; convert it to JPEG or PNG"),
    "decompression bomb": (write(".png", png(60000, 60000, 8, 2, b"")), "image.png: Image size (3600000000 pixels)"),
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


@pytest.fixture
def strays(tmp_path):
    """A folder with what operating systems, editors and people leave in folders of photos."""
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._a.jpg", "notes.txt", "a.txt", "a.json", "movie.mp4"):
        (tmp_path / name).write_bytes(b"not a photo")
    for name in (".ipynb_checkpoints", "more photos", "album.png"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / name / "a-checkpoint.jpg")
    return tmp_path


def test_stray_files_are_ignored_in_silence(strays, caplog):
    Image.new("RGB", (20, 20)).save(strays / "a.jpg")
    assert [photo.path for photo in read(strays)] == [strays / "a.jpg"]
    assert not warnings_in(caplog)


def test_a_folder_of_stray_files_is_an_error(strays):
    with pytest.raises(UserError, match="--instance_data_dir .*there is no readable image .*it holds no image files"):
        read(strays)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="--instance_data_dir .*there is no readable image .*it holds no image files"):
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
    assert {photo.prompt for photo in photos} == {"a photo of sks dog"}


# ---- sizes ----


@pytest.mark.parametrize("resolution", [8, 64])
@pytest.mark.parametrize(
    "width, height", [(100, 60), (60, 100), (64, 64), (7, 9), (1, 1), (49, 60), (333, 331), (500, 9), (9, 500)]
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


# ---- photos to samples ----


def make_photos(numbers, height=24, width=40):
    """Photos whose pixels say (number of the photo, row, column), each with a prompt of its own."""
    rows, columns = np.indices((height, width))
    pixels = {i: np.stack([np.full_like(rows, i), rows, columns], -1).astype(np.uint8) for i in numbers}
    return [Photo(Path(f"{i}.png"), pixels[i], f"photo {i}") for i in numbers]


INSTANCES, CLASSES = range(5), range(100, 103)


def make_dataset(instances=INSTANCES, classes=CLASSES, **options):
    """A dataset whose prompts are encoded in another order than that of the photos."""
    photos = [*make_photos(instances), *make_photos(classes)]
    prompts = ["", *sorted(distinct_prompts(photos, "a validation prompt"), reverse=True)]
    config = make_config(**options)
    return DreamBoothDataset(photos[: len(instances)], photos[len(instances) :], prompts, config), prompts, config


def decode(pixel_values):
    """Return (number of the photo, top, left) of a crop that is whole and one piece."""
    pixels = ((pixel_values + 1) * 127.5).round().int()
    number, top, left = pixels[:, 0, 0].tolist()
    rows, columns = torch.meshgrid(torch.arange(RESOLUTION), torch.arange(RESOLUTION), indexing="ij")
    assert torch.equal(pixels, torch.stack([torch.full_like(rows, number), top + rows, left + columns]).int())
    return number, top, left


def draws(dataset, kind, count):
    """What samples 0 to count - 1 show of one kind (0 instance, 1 class): [(number, top, left)]."""
    return [decode(dataset[k][kind][0]) for k in range(count)]


def make_loader(rank=0, num_ranks=1, first_step=0, **options):
    dataset, _, config = make_dataset(**options)
    return build_loader(dataset, config, rank, num_ranks, first_step)


def assert_equal(batch, other):
    for field in dataclasses.fields(batch):
        a, b = getattr(batch, field.name), getattr(other, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
@pytest.mark.parametrize("classes", [CLASSES, []])
def test_every_row_has_the_prompt_of_its_photo(batch_size, classes):
    dataset, prompts, config = make_dataset(classes=classes, train_batch_size=batch_size)
    for batch in itertools.islice(build_loader(dataset, config, 0, 1, 0), 10):
        numbers = [decode(pixel_values)[0] for pixel_values in batch.pixel_values]
        assert [prompts[row] for row in batch.prompt_rows] == [f"photo {number}" for number in numbers]
        assert batch.num_instances == batch_size and len(numbers) == batch_size * (2 if classes else 1)
        assert all(number in INSTANCES for number in numbers[:batch_size])
        assert all(number in classes for number in numbers[batch_size:])


def test_a_batch_is_what_the_training_step_expects():
    halves = Photo(Path("halves.png"), np.array([[BLACK, WHITE]], np.uint8).repeat(20, 0).repeat(10, 1), "")
    dataset = DreamBoothDataset([halves], [], [""], make_config(center_crop=True))
    batch = collate([dataset[0], dataset[1]])
    assert batch.pixel_values.shape == (2, 3, RESOLUTION, RESOLUTION) and batch.pixel_values.dtype == torch.float32
    assert batch.pixel_values.unique().tolist() == [-1, 1]
    assert batch.prompt_rows.shape == batch.noise_seeds.shape == (2,)
    assert batch.prompt_rows.dtype == batch.noise_seeds.dtype == torch.int64
    moved = batch.to(torch.device("meta"))
    assert moved.pixel_values.is_meta and moved.prompt_rows.is_meta and moved.num_instances == 2
    assert torch.equal(moved.noise_seeds, batch.noise_seeds)  # the noise is drawn on the CPU


@pytest.mark.parametrize("count", [1, 2, 5, 13])
@pytest.mark.parametrize("kind", [0, 1])
def test_every_pass_shows_every_photo_once_in_an_order_of_its_own(kind, count):
    dataset = make_dataset(instances=range(count), classes=range(100, 100 + count))[0]
    numbers = [number for number, _, _ in draws(dataset, kind, 30 * count)]
    passes = [tuple(numbers[first : first + count]) for first in range(0, len(numbers), count)]
    assert {tuple(sorted(numbers)) for numbers in passes} == {tuple(range(100 * kind, 100 * kind + count))}
    assert len(set(passes)) > {1: 0, 2: 1, 5: 20, 13: 29}[count]


def test_every_class_image_meets_every_instance():
    dataset = make_dataset(instances=range(3), classes=range(100, 103))[0]
    pairs = zip(draws(dataset, 0, 90), draws(dataset, 1, 90))
    assert len({(instance[0], class_image[0]) for instance, class_image in pairs}) == 9


@pytest.mark.parametrize("kind", [0, 1])
def test_every_sample_has_a_crop_of_its_own(kind):
    corners = {crop[1:] for crop in draws(make_dataset()[0], kind, 300)}
    assert len(corners) > 100
    for axis, last in enumerate((24 - RESOLUTION, 40 - RESOLUTION)):  # the edges of the photo are within reach
        assert {corner[axis] for corner in corners} == set(range(last + 1))


@pytest.mark.parametrize("kind", [0, 1])
def test_center_crop_is_always_the_middle(kind):
    assert {crop[1:] for crop in draws(make_dataset(center_crop=True)[0], kind, 20)} == {(4, 12)}


def test_instances_and_class_images_are_cropped_apart():
    dataset = make_dataset()[0]
    same = [a[1:] == b[1:] for a, b in zip(draws(dataset, 0, 50), draws(dataset, 1, 50))]
    assert sum(same) < 10


def test_every_row_has_noise_of_its_own():
    seeds = torch.cat([batch.noise_seeds for batch in itertools.islice(make_loader(train_batch_size=2), 100)])
    assert len(seeds.unique()) == 400
    assert (seeds < 0).any()  # the upper half of the 64-bit seeds
    assert all(torch.Generator().manual_seed(seed).initial_seed() for seed in seeds.tolist())


def test_the_seed_changes_order_crops_and_noise():
    one, other = make_dataset(seed=0)[0], make_dataset(seed=1)[0]
    for kind in (0, 1):
        ours, theirs = np.array(draws(one, kind, 30)), np.array(draws(other, kind, 30))
        assert (ours != theirs).any(0).all()  # the photos, the tops and the lefts
        assert all(one[k][kind][2] != other[k][kind][2] for k in range(30))


def test_a_sample_depends_on_nothing_but_its_number():
    numbers = range(20)
    dataset = make_dataset()[0]
    in_order = [collate([dataset[k]]) for k in numbers]
    dataset = make_dataset()[0]
    torch.manual_seed(7)
    np.random.seed(7)
    state = torch.get_rng_state()
    backwards = [collate([dataset[k]]) for k in reversed([*numbers, 3, 10**12])]
    for sample, same in zip(in_order, reversed(backwards)):
        assert_equal(sample, same)
    assert torch.equal(torch.get_rng_state(), state)  # and drawing it moves no other random numbers


# ---- samples to devices ----

SPLITS = [(12, 1, 1), (6, 2, 1), (6, 1, 2), (3, 2, 2), (2, 3, 2), (1, 3, 4), (2, 1, 6), (1, 12, 1), (1, 1, 12)]


@pytest.mark.parametrize("first_step", [0, 3])
@pytest.mark.parametrize("batch_size, accumulation, num_ranks", SPLITS)
def test_each_step_uses_the_same_samples_however_it_is_split(batch_size, accumulation, num_ranks, first_step):
    ranks = [iter(GlobalSampler(batch_size, accumulation, rank, num_ranks, first_step)) for rank in range(num_ranks)]
    for step in range(first_step, first_step + 4):
        used = [next(rank) for rank in ranks for _ in range(accumulation)]
        assert {len(samples) for samples in used} == {batch_size}
        assert sorted(itertools.chain(*used)) == list(range(12 * step, 12 * step + 12))


@pytest.mark.parametrize("batch_size, accumulation", [(2, 1), (1, 2)])
def test_two_devices_train_on_what_one_would(batch_size, accumulation):
    def rows(batches):
        columns = zip(*((batch.noise_seeds, batch.prompt_rows, batch.pixel_values) for batch in batches))
        seeds, prompt_rows, pixel_values = map(torch.cat, columns)
        order = seeds.argsort()
        return seeds[order], prompt_rows[order], pixel_values[order]

    alone = make_loader(train_batch_size=4)
    split = {"train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    ranks = [iter(make_loader(rank, 2, **split)) for rank in (0, 1)]
    for batch in itertools.islice(alone, 3):
        shares = [next(rank) for rank in ranks for _ in range(accumulation)]
        for whole, parts in zip(rows([batch]), rows(shares)):
            assert torch.equal(whole, parts)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_later_start_continues_where_the_run_was_also_with_workers(num_workers):
    options = {"train_batch_size": 3, "gradient_accumulation_steps": 2}
    run = itertools.islice(make_loader(1, 2, **options), 10)
    resumed = make_loader(1, 2, first_step=3, dataloader_num_workers=num_workers, **options)
    assert resumed.num_workers == num_workers
    for batch, same in zip(itertools.islice(run, 6, None), itertools.islice(resumed, 4), strict=True):
        assert_equal(batch, same)


# ---- prompts ----


def test_distinct_prompts_are_in_the_order_of_their_first_use():
    photos = [dataclasses.replace(photo, prompt=prompt) for photo, prompt in zip(make_photos(range(4)), "baba")]
    assert distinct_prompts(photos, "c", "a", "") == ["b", "a", "c", ""]
    assert distinct_prompts([], "") == [""]
