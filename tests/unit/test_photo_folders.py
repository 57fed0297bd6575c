"""Folders of photos: what is read and what is not, whose captions and masks are whose, and what is said about it."""

import functools
import json
import sys
import unicodedata
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dreambooth.data.formats import FORMATS, decodable
from dreambooth.data.images import read_image
from dreambooth.data.photos import NoPhotosError, read_class_photos, read_instance_photos
from dreambooth.errors import UserError
from dreambooth.options.training import TrainingConfig
from dreambooth.report.opening import opening_line
from dreambooth.scoring.subject import read_subject_photos

PROMPT = "a photo of sks dog"
PHOTO = Image.new("RGB", (20, 20), (230, 120, 20))
PRIOR = {"with_prior_preservation": True, "class_prompt": "a photo of dog"}
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def read_class(**options):
    config = make_config(**options)
    return read_class_photos(config.all_subjects[0], config)


def make_config(**options):
    required = {"pretrained_model_name_or_path": "base", "instance_prompt": PROMPT, "resolution": 16}
    return TrainingConfig(**required | options)


@pytest.fixture
def fill(tmp_path):
    """Return a way to write files into a folder: images by their suffixes, unless a text is given."""

    def write(*images, **texts):
        for name in images:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix.lower() in (".jpg", ".png", ".tif", ".webp"):
                PHOTO.save(path)
            else:
                path.write_bytes(b"something")
        for name, text in texts.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path

    return write


def read(folder, **options):
    return {
        photo.path.name: photo for photo in read_instance_photos(make_config(instance_data_dir=str(folder), **options))
    }


def prompts(folder, **options):
    return {name: photo.prompt for name, photo in read(folder, **options).items()}


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("dreambooth.")]


def only_warning(caplog):
    (warning,) = warnings_in(caplog)
    return warning


# ---- what is used, named or ignored ----


def test_what_is_not_used_is_named_with_the_subfolders_and_their_images(fill, caplog):
    folder = fill(
        "a.jpg", "notes.md", "more/b.jpg", "more/deeper/c.png", "texts/a.txt", "c.DNG", "d.svg", "e-condlabel.png"
    )
    assert set(read(folder)) == {"a.jpg"}
    warning = only_warning(caplog)
    assert warning.startswith(f"--instance_data_dir {folder}: not used: ")
    assert all(name in warning for name in ("notes.md", "c.DNG (camera raw", "d.svg (vector", "e-condlabel.png"))
    assert "more/ (2 images)" in warning and "texts/ (0 images)" in warning


@pytest.mark.parametrize(
    "name",
    ["Thumbs.db", "desktop.ini", ".DS_Store", "._a.jpg", ".a.txt", "a.xmp", "a.AAE", "a_0064x0064_sd.npz"]
    + [f"{folder}/a.jpg" for folder in ("__MACOSX", ".ipynb_checkpoints", "@eaDir", "_latent_cache")],
)  # fmt: skip
def test_litter_is_ignored_in_silence(fill, caplog, name):
    assert set(read(fill("a.jpg", name))) == {"a.jpg"}
    assert not warnings_in(caplog)


def test_an_empty_subfolder_is_nothing_unused(fill, caplog):
    (fill("a.jpg") / "empty" / "empty too").mkdir(parents=True)
    assert set(read(fill())) == {"a.jpg"} and not warnings_in(caplog)


def test_many_names_are_cut_short_and_on_one_line(fill, caplog):
    folder = fill("a.jpg", "x\n\x1b[2J.md", *(f"{i:03d}.md" for i in range(100)))
    read(folder)
    warning = only_warning(caplog)
    assert warning.isprintable() and "000.md" in warning and "050.md" not in warning and " and 91 more" in warning


def test_the_evaluation_says_what_it_does_not_use(fill, caplog):
    assert len(read_subject_photos(str(fill("a.jpg", "notes.md", "more/b.jpg", "a_mask.png")))) == 1
    assert "not used: notes.md, more/ (1 image)" in only_warning(caplog)


@pytest.mark.parametrize(
    "names, words",
    [
        (["10_sks dog/a.jpg"], "--repeats 10 --instance_prompt 'sks dog'"),
        (["img/10_sks dog/a.jpg", "img/10_sks dog/b.jpg"], r"img/10_sks dog/ \(2 images\).*--repeats 10"),
        (["10_sks dog/a.jpg", "3_ohwx/a.jpg"], "--repeats 10 .*--repeats 3"),
        (["dog/a.jpg", "cat/b.jpg"], r"cat/ \(1 image\), dog/ \(1 image\).*--instance_data_dir .*/dog; .*--subjects$"),
    ],
)
def test_photos_in_subfolders_alone_are_refused_with_the_folder_to_give(fill, names, words):
    folder = fill(*names, "notes.md")
    with pytest.raises(UserError, match=f"--instance_data_dir {folder}: .*{words}") as error:
        read(folder)
    assert not isinstance(error.value, NoPhotosError)
    with pytest.raises(UserError, match=f"--instance_data_dir {folder}: .*image") as error:
        read_subject_photos(str(folder))
    assert "--repeats" not in str(error.value)


def test_class_images_in_subfolders_are_not_drawn_again(fill):
    folder = fill("1_dog/a.jpg")
    with pytest.raises(UserError, match=f"--class_data_dir '{folder}/1_dog'|--class_data_dir {folder}/1_dog") as error:
        read_class(class_data_dir=str(folder), **PRIOR)
    assert not isinstance(error.value, NoPhotosError)


def test_an_error_of_no_photos_names_what_there_is(fill):
    with pytest.raises(NoPhotosError, match="contains no image files, but c.dng .*; .*mask_mask.png"):
        read(fill("c.dng", "mask_mask.png"))


# ---- formats ----


@pytest.fixture
def fresh_formats():
    """Formats are looked for anew in this test, and again after it."""
    Image.init()
    decodable.cache_clear()
    yield
    decodable.cache_clear()


@pytest.mark.parametrize(
    "suffix, format, mode",
    [
        (".jp2", "JPEG2000", "RGB"),
        (".j2k", "JPEG2000", "RGBA"),
        (".ppm", "PPM", "RGB"),
        (".PGM", "PPM", "L"),
        (".pfm", "PPM", "F"),
        (".tga", "TGA", "RGB"),
        (".tga", "TGA", "RGBA"),
        (".dib", "DIB", "RGB"),
        (".sgi", "SGI", "RGB"),
        (".pcx", "PCX", "RGB"),
        (".qoi", "QOI", "RGB"),
        (".dds", "DDS", "RGB"),
        (".xbm", "XBM", "1"),
        (".msp", "MSP", "1"),
        (".apng", "PNG", "RGB"),
        (".mpo", "MPO", "RGB"),
    ],
)
def test_what_pillow_decodes_by_itself_is_read(tmp_path, caplog, suffix, format, mode):
    image = PHOTO.convert(mode)
    image.save(tmp_path / f"a{suffix}", format)
    expected = image.convert("L" if mode == "F" else mode).convert("RGB")
    pixels = np.asarray(read_image(tmp_path / f"a{suffix}")).astype(int)
    assert np.abs(pixels - np.asarray(expected)).max() <= 3
    assert len(read(tmp_path)) == 1 and not warnings_in(caplog)


def test_what_runs_other_programs_or_is_not_an_image_is_never_tried():
    assert not {"EPS", "WMF", "PDF", "MPEG", "HDF5", "GRIB", "BUFR"} & {*FORMATS}
    assert {*FORMATS} <= {*decodable()}


@pytest.mark.parametrize(
    "name, content, package",
    [
        ("a.heic", b"\0\0\0\x18ftypheic", "pillow-heif"),
        ("a.jxl", b"\xff\x0a\0\0", "pillow-jxl-plugin"),
        ("a.jpg", b"\0\0\0\x0cJXL \r\n\x87\n", "pillow-jxl-plugin"),
        ("a.HEIF", b"", "pillow-heif"),
    ],
)
def test_what_a_plugin_would_read_is_named_with_the_plugin(
    fill, caplog, monkeypatch, fresh_formats, name, content, package
):
    monkeypatch.setitem(sys.modules, package.replace("-", "_").removesuffix("_plugin"), None)
    monkeypatch.setattr(Image, "OPEN", {name: Image.OPEN[name] for name in FORMATS})
    folder = fill("good.png")
    (folder / name).write_bytes(content)
    assert set(read(folder)) == {"good.png"}
    warning = only_warning(caplog)
    assert name in warning and f"pip install {package}" in warning


def test_a_plugin_that_is_installed_is_used(tmp_path, monkeypatch, fresh_formats):
    """A module that registers a reader as pillow_heif does."""
    register = functools.partial(Image.register_open, "HEIF", *Image.OPEN["PPM"])
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    monkeypatch.setattr(Image, "OPEN", {**Image.OPEN})
    monkeypatch.setattr(Image, "ID", [*Image.ID])
    monkeypatch.setattr("dreambooth.data.formats.FORMATS", {"JPEG": ".jpg"})
    PHOTO.save(tmp_path / "a.HEIC", "PPM")
    assert "HEIF" in decodable() and read_image(tmp_path / "a.HEIC").getpixel((0, 0)) == PHOTO.getpixel((0, 0))


# ---- captions ----


def jsonl(*rows):
    return "\n".join(map(json.dumps, rows))


SOURCES = {  # in order of precedence: name and content of each, which says "sks" and a number
    "a.txt": "sks 1",
    "a.jpg.txt": "sks 2",
    "a.caption": "sks 3",
    "a.jpg.caption": "sks 4",
    "metadata.jsonl": jsonl({"file_name": "a.jpg", "text": "sks 5"}),
    "metadata.csv": "file_name,text\na.jpg,sks 6\n",
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_of_captions_is_read(fill, caplog, source):
    folder = fill("a.jpg", "b.jpg", **{source: SOURCES[source]})
    number = [*SOURCES].index(source) + 1
    photos = read(folder)
    assert photos["a.jpg"].prompt == f"sks {number}" and photos["a.jpg"].captioned
    assert photos["b.jpg"].prompt == PROMPT and not photos["b.jpg"].captioned
    assert not warnings_in(caplog)


@pytest.mark.parametrize("first", range(len(SOURCES) - 1))
def test_captions_that_differ_are_named_and_the_first_source_wins(fill, caplog, first):
    sources = [*SOURCES][first:]
    assert prompts(fill("a.jpg", **{name: SOURCES[name] for name in sources})) == {"a.jpg": f"sks {first + 1}"}
    warning = only_warning(caplog)
    assert all(name in warning for name in sources)


def test_captions_that_agree_are_not_worth_a_word(fill, caplog):
    row = jsonl({"file_name": "a.jpg", "text": " sks  dog "}) + "\n"
    assert prompts(fill("a.jpg", **{"a.txt": "sks dog\n", "metadata.jsonl": row * 2})) == {"a.jpg": "sks dog"}
    assert not warnings_in(caplog)


def test_of_two_rows_for_a_photo_the_last_counts_and_the_first_is_named(fill, caplog):
    rows = jsonl({"file_name": "a.jpg", "text": "sks 1"}, {"file_name": "a.jpg", "text": "sks 2"})
    assert prompts(fill("a.jpg", **{"metadata.jsonl": rows})) == {"a.jpg": "sks 2"}
    assert "metadata.jsonl for a.jpg" in only_warning(caplog)


@pytest.mark.parametrize("name", ["a.TXT", "A.txt", "A.JPG.txt", "a.Caption"])
def test_the_case_of_a_caption_does_not_matter(fill, caplog, name):
    assert prompts(fill("a.jpg", **{name: "sks"})) == {"a.jpg": "sks"}
    assert not warnings_in(caplog)


def test_photos_whose_names_differ_in_case_have_captions_of_their_own(fill, caplog):
    folder = fill("a.jpg", "A.jpg", **{"a.txt": "sks small", "A.txt": "sks large"})
    assert prompts(folder) == {"a.jpg": "sks small", "A.jpg": "sks large"} and not warnings_in(caplog)


def test_photos_of_one_stem_have_captions_by_their_whole_names(fill, caplog):
    folder = fill("a.jpg", "a.png", **{"a.jpg.txt": "sks jpg", "a.png.txt": "sks png"})
    assert prompts(folder) == {"a.jpg": "sks jpg", "a.png": "sks png"} and not warnings_in(caplog)


def test_the_stem_of_one_photo_may_be_the_name_of_another(fill, caplog):
    folder = fill("a.jpg", "a.jpg.png", **{"a.jpg.txt": "sks"})
    assert prompts(folder) == {"a.jpg": PROMPT, "a.jpg.png": "sks"} and not warnings_in(caplog)


@pytest.mark.parametrize("stored, named", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_names_are_the_same_however_their_accents_are_stored(fill, caplog, stored, named):
    rows = {"file_name": f"{named}.jpg", "class_text": "a dog"}
    texts = {f"{named}.txt": "sks", "metadata.jsonl": jsonl(rows)}
    (photo,) = read(fill(f"{stored}.jpg", f"{named}.mask.png", **texts), prior_source="base_model", **PRIOR).values()
    assert (photo.prompt, photo.class_prompt) == ("sks", "a dog") and photo.mask is not None
    assert not warnings_in(caplog)


@pytest.mark.parametrize(
    "name, text",
    [("a.txt", "sks\n\nsecond\n"), ("metadata.jsonl", jsonl({"file_name": "a.jpg", "text": "sks\nsecond"})),
     ("metadata.csv", 'file_name,text\na.jpg,"sks\nsecond"\n'), ("a.caption", "sks\rsecond")],
)  # fmt: skip
def test_several_lines_are_joined_and_named(fill, caplog, name, text):
    assert prompts(fill("a.jpg", **{name: text})) == {"a.jpg": "sks second"}
    warning = only_warning(caplog)
    assert "lines" in warning and name in warning


@pytest.mark.parametrize(
    "text, words",
    [
        ("name,text\na.jpg,sks\n", "metadata.csv, line 2: .*file_name"),
        ("file_name;text\na.jpg;sks\n", "metadata.csv, line 2: .*file_name"),
        ("file_name,caption\na.jpg,sks\n", "no column text for --caption_column; it has caption, file_name"),
        ("file_name,text\na.jpg,sks, on grass\n", "metadata.csv, line 2: .*quotes"),
        ('file_name,text\na.jpg,"sks\n', "metadata.csv, after line 1: "),
    ],
)
def test_a_metadata_csv_that_does_not_read_is_refused(fill, text, words):
    folder = fill("a.jpg", **{"metadata.csv": text})
    with pytest.raises(UserError, match=f"--instance_data_dir {folder}: .*{words}"):
        read(folder)


def test_a_metadata_csv_as_spreadsheets_write_it(fill, caplog):
    text = '\ufefffile_name,text,class_text\r\n./a.jpg,"sks, ""asleep""",\r\nb.jpg,,a dog\r\n\r\n'
    photos = read(fill("a.jpg", "b.jpg", **{"metadata.csv": text}), prior_source="base_model", **PRIOR)
    assert photos["a.jpg"].prompt == 'sks, "asleep"' and photos["b.jpg"].prompt == PROMPT
    assert photos["b.jpg"].class_prompt == "a dog" and not photos["b.jpg"].captioned
    assert not warnings_in(caplog)


@pytest.mark.parametrize("value", [["sks", "dog"], 3, {"a": "b"}])
def test_captions_that_are_not_text_are_refused(fill, value):
    with pytest.raises(UserError, match="metadata.jsonl, line 1: text is not text"):
        read(fill("a.jpg", **{"metadata.jsonl": jsonl({"file_name": "a.jpg", "text": value})}))


# ---- masks ----


@pytest.mark.parametrize(
    "name",
    ["a.mask.png", "a-masklabel.png", "a_mask.png", "a-mask.png", "A_MASK.PNG", "a.jpg.mask.png", "a_mask.tif",
     "a-mask.webp", "a_mask.jpg"],
)  # fmt: skip
def test_a_mask_under_any_tool_s_name_is_a_mask(fill, caplog, name):
    folder = fill("a.jpg", "b.jpg", name)
    photos = read(folder)
    assert set(photos) == {"a.jpg", "b.jpg"} and photos["a.jpg"].mask is not None and photos["b.jpg"].mask is None
    assert not warnings_in(caplog)


@pytest.mark.parametrize("name", ["b_mask.png", "b-masklabel.png", "b-mask.jpg", "b.mask.png"])
def test_a_mask_without_a_photo_is_named_and_not_trained_on(fill, caplog, name):
    assert set(read(fill("a.jpg", name))) == {"a.jpg"}
    assert name in only_warning(caplog)


def test_names_that_only_sound_like_masks_are_photos(fill, caplog):
    names = {"mask.png", "a mask.png", "unmask.png", "mask_1.png", "a_masked.png"}
    assert set(read(fill(*names))) == names and not warnings_in(caplog)


def test_of_two_masks_the_second_is_named(fill, caplog):
    folder = fill("a.jpg", "a.mask.png", "a-masklabel.png")
    Image.new("L", (20, 20), 100).save(folder / "a.mask.png")
    assert (read(folder)["a.jpg"].mask == 100).all()
    warning = only_warning(caplog)
    assert "a-masklabel.png" in warning and "a.mask.png" not in warning


def test_a_folder_of_masks_is_named(fill, caplog):
    assert read(fill("a.jpg", "mask/a.png"))["a.jpg"].mask is None
    assert "not used: mask/ (1 image)" in only_warning(caplog)


# ---- prompts ----


@pytest.mark.parametrize(
    "instance, prior, caption, lacks",
    [
        (PROMPT, PRIOR, "a dog on grass", "sks"),
        (PROMPT, PRIOR, "a SKS dog on grass", None),
        (PROMPT, PRIOR, "{instance_prompt} on grass", None),
        (PROMPT, PRIOR, "tasksheet", "sks"),
        (PROMPT, {}, "a dog on grass", "sks"),
        (PROMPT, {}, "sks puppy", None),
        ("a cute sks dog", {}, "a cute dog", "sks"),
        ("TOK", {}, "a dog", "tok"),
        ("olis garbanzo dog", PRIOR, "olis dog", None),
        ("a photo", {}, "a dog", None),
    ],
)
def test_a_caption_without_the_rare_word_is_named(fill, caplog, instance, prior, caption, lacks):
    options = {"prior_source": "base_model", **prior} if prior else {}
    read(fill("a.jpg", "b.jpg", **{"a.txt": caption}), instance_prompt=instance, **options)
    if lacks is None:
        assert not warnings_in(caplog)
    else:
        assert lacks in only_warning(caplog) and only_warning(caplog).endswith(": a.jpg")


@pytest.mark.parametrize(
    "class_prompt, source, warned",
    [
        (PROMPT, "images", True),
        (" A photo  of SKS dog", "base_model", True),
        ("sks dog", "images", True),
        ("a photo of dog", "images", False),
    ],
)
def test_a_class_prompt_about_the_subject_is_worth_a_warning(fill, caplog, class_prompt, source, warned):
    options = {"with_prior_preservation": True, "class_prompt": class_prompt, "prior_source": source}
    read(fill("a.jpg"), **options)
    assert [("--class_prompt" in warning) for warning in warnings_in(caplog)] == [True] * warned


@pytest.mark.parametrize(
    "files, warned",
    [
        ({"a.txt": "A Photo of  dog"}, True),
        ({"a.txt": "sks dog", "a.class.txt": "sks dog asleep"}, True),
        ({"a.txt": "sks dog", "a.class.txt": "a dog asleep"}, False),
    ],
)
def test_a_photo_s_class_prompt_about_the_subject_is_named(fill, caplog, files, warned):
    read(fill("a.jpg", **files), prior_source="base_model", **PRIOR)
    assert any(w.startswith("Class prompts") and w.endswith(": a.jpg") for w in warnings_in(caplog)) == warned


def test_captions_of_class_images_about_the_subject_are_named(fill, caplog):
    folder = fill("a.jpg", "b.jpg", **{"a.txt": "sks dog", "b.txt": "a dog"})
    read_class(class_data_dir=str(folder), **PRIOR)
    assert only_warning(caplog).endswith(": a.jpg")


# ---- the opening line ----


@pytest.mark.parametrize(
    "options, class_images, samples, ranks, first, expected",
    [
        ({}, 0, 3, 1, 0, "3 photos, 2 with captions, 1 with masks; 800 steps = 266.7 passes"),
        (PRIOR, 1, 3, 2, 0, "3 photos, 2 with captions, 1 with masks; 1 class image; 800 steps = 533.3 passes"),
        ({"train_batch_size": 3, "gradient_accumulation_steps": 2}, 0, 3, 1, 0, "; 800 steps = 1,600 passes"),
        ({"repeats": 10}, 0, 30, 1, 0, "; 800 steps = 26.7 passes of 30 samples"),
        ({}, 0, 3, 1, 200, "; 800 steps = 266.7 passes, of which 200 are done"),
        ({"prior_source": "base_model", **PRIOR}, 0, 3, 1, 0, "; prior of the base model for 'a photo of dog'; 800"),
    ],
)  # fmt: skip
def test_the_opening_line_counts_what_was_read(fill, options, class_images, samples, ranks, first, expected):
    folder = fill("a.jpg", "b.jpg", "c.jpg", "a_mask.png", **{"a.txt": PROMPT, "b.caption": "sks on grass"})
    config = make_config(instance_data_dir=str(folder), class_data_dir=str(folder), **options)
    photos = read_instance_photos(config)
    assert expected in opening_line(photos, photos[:class_images], samples, first, 800, ranks, config)
    without = [replace(photo, captioned=False, mask=None) for photo in photos[:1]]
    assert opening_line(without, [], 1, 0, 1, 1, make_config()) == "1 photo; 1 step = 1 pass"
