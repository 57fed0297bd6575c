"""A labelled sheet: where its images and words are."""

import numpy as np
import pytest
from PIL import Image

from dreambooth.drawing.sheet import GAP, LINE, _wrap, draw_sheet


def test_a_sheet_has_a_row_of_images_under_each_label():
    red, green, blue = ([Image.new("RGB", (192, 192), colour)] for colour in ("red", "lime", "blue"))
    sheet = draw_sheet([red + green, blue + blue], ["first", "second"], "step 7")
    assert sheet.size == (2 * 192 + GAP, LINE + 8 + 2 * (LINE + 10 + 192))
    first_row, second_row = LINE + 8 + LINE + 10, LINE + 8 + 2 * (LINE + 10) + 192
    assert sheet.getpixel((0, first_row)) == (255, 0, 0) and sheet.getpixel((192 + GAP, first_row)) == (0, 255, 0)
    assert sheet.getpixel((191, second_row + 191)) == (0, 0, 255)
    for top, bottom in ((0, LINE + 8), (LINE + 8, first_row), (first_row + 192, second_row)):
        assert np.asarray(sheet)[top:bottom].min() < 128  # something is written there


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
