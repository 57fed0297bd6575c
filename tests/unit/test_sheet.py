"""A labelled sheet: where its images and words are."""

import numpy as np
import pytest
from PIL import Image

from dreambooth.drawing import fonts
from dreambooth.drawing.fonts import _font_of, _letters, _runs, legible
from dreambooth.drawing.sheet import GAP, LETTERS, LINE, _wrap, draw_sheet, rows_of_sheet, save_sheet


def test_a_sheet_has_a_row_of_images_under_each_label():
    red, green, blue = ([Image.new("RGB", (192, 192), colour)] for colour in ("red", "lime", "blue"))
    sheet = draw_sheet([red + green, blue + blue], ["first", "second"], "step 7")
    assert sheet.size == (2 * 192 + GAP, LINE + 8 + 2 * (LINE + 10 + 192))
    first_row, second_row = LINE + 8 + LINE + 10, LINE + 8 + 2 * (LINE + 10) + 192
    assert sheet.getpixel((0, first_row)) == (255, 0, 0) and sheet.getpixel((192 + GAP, first_row)) == (0, 255, 0)
    assert sheet.getpixel((191, second_row + 191)) == (0, 0, 255)
    for top, bottom in ((0, LINE + 8), (LINE + 8, first_row), (first_row + 192, second_row)):
        assert np.asarray(sheet)[top:bottom].min() < 128  # something is written there


def test_the_file_of_a_sheet_says_where_each_image_is(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (3, 200, 300, 3), np.uint8)
    images, path = [Image.fromarray(pixels) for pixels in noise], tmp_path / "sheet.png"
    labels = ["小狗 " * 60, "second"]  # the first has several lines, and may not be written in full
    sheet = save_sheet(path, [images[:2], images[2:]], labels, "step 7")
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(sheet))
    rows = rows_of_sheet(path)
    assert [(row.label, len(row.boxes)) for row in rows] == [(labels[0], 2), (labels[1], 1)]
    cut = [sheet.crop(box) for row in rows for box in row.boxes]
    assert all(np.array_equal(np.asarray(ours), own) for ours, own in zip(cut, noise, strict=True))
    assert [entry.name for entry in tmp_path.iterdir()] == ["sheet.png"]


def test_what_is_no_sheet_has_no_rows(tmp_path):
    path = tmp_path / "sheet.png"
    save_sheet(path, [[Image.new("RGB", (192, 192))]], ["one"])
    content = path.read_bytes()
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    for damaged in (b"", b"not a PNG", content[:40], content.replace(b"[[", b"{["), plain.read_bytes()):
        path.write_bytes(damaged)
        assert rows_of_sheet(path) == []


@pytest.mark.parametrize("size, shown", [((64, 32), (192, 96)), ((100, 100), (200, 200)), ((1024, 768), (512, 384))])
def test_small_images_are_enlarged_and_large_ones_shrunk(size, shown):
    assert draw_sheet([[Image.new("RGB", size)]], [""]).size == (shown[0], LINE + 10 + shown[1])


@pytest.mark.parametrize(
    "label, lines",
    [
        ("short", 1),
        ("", 1),
        ("over\nmore\tlines", 1),
        ("a photo of sks dog on the beach", 2),
        ("x" * 40, 2),
        ("word " * 100, 4),
        ("x" * 1000, 4),
        ("Welpe, щенок, 小狗, 🐶", 1),
    ],
)
def test_labels_are_wrapped_and_cut(label, lines):
    sheet = draw_sheet([[Image.new("RGB", (192, 192), "red")]], [label])
    assert sheet.size == (192, LINE * lines + 10 + 192)
    assert np.asarray(sheet)[: LINE * lines + 10, 190:].min() == 255  # nothing runs over the edge


def test_every_word_of_a_label_that_fits_is_there():
    text = "a photo of sks dog on the beach at night"
    assert " ".join(_wrap(text, 180)) == text and len(_wrap(text, 180)) > 1
    assert "".join(_wrap("x" * 50, 180)) == "x" * 50
    assert _wrap("word " * 100, 180)[-1].endswith("…")


# ---- scripts that Pillow's own font lacks ----


@pytest.fixture(params=[True, False], ids=["fonts of this machine", "no font"])
def installed(request, monkeypatch):
    caches = (fonts._installed, fonts._font_of)
    if not request.param:
        monkeypatch.setattr(fonts, "INSTALLED", [])
    for cache in caches:
        cache.cache_clear()
    yield request.param
    for cache in caches:
        cache.cache_clear()


SCRIPTS = [
    "小狗在海滩上的照片", "子犬の写真", "강아지 사진", "фото собаки", "كلب صغير", "כלב קטן", "हिन्दी", "👨‍👩‍👧 ☀️",
    "\ud800 \0 \u0301e",
]  # fmt: skip


def test_no_label_has_boxes_and_what_cannot_be_written_is_numbered_and_told_once(installed, caplog, monkeypatch):
    monkeypatch.setattr("dreambooth.drawing.sheet._told", set())
    images = [[Image.new("RGB", (192, 192))]] * len(SCRIPTS)
    for _ in range(2):
        draw_sheet(images, SCRIPTS)
    for number, label in enumerate(SCRIPTS, 1):
        shown = legible(label, LETTERS)
        assert all(_font_of(letter, LETTERS) is not None for letter in _letters(shown))
        assert caplog.text.count(f"row {number} of a sheet") == ("…" in shown)
        if "…" in shown:
            label = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in label)
            assert f'"{label}"' in caplog.text
        if not installed:
            assert "".join(shown.split()).strip("…e") == ""


def test_a_label_that_pillow_can_write_stays_as_it_is(caplog):
    text = "a photo of sks dog…"
    assert legible(text, LETTERS) == text and len(list(_runs(text, LETTERS))) == 1
    draw_sheet([[Image.new("RGB", (192, 192))]], [text])
    assert not caplog.text


def test_a_mixed_label_is_written_in_two_fonts_on_one_line(installed):
    if installed and _font_of("щ", LETTERS) is None:
        pytest.skip("no font with Cyrillic is installed")
    runs = [run for _, run in _runs(legible("Welpe щенок сидит, café", LETTERS), LETTERS)]
    assert runs == (["Welpe ", "щенок сидит, café"] if installed else ["Welpe … …, caf…"])
