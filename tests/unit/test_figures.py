"""Plots in any script: the fonts that their texts are written in."""

import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import ImageFont

from dreambooth.drawing import fonts
from dreambooth.report import figures
from dreambooth.report.figures import arrange, new_figure, rendered


@pytest.fixture
def square_font(tmp_path, monkeypatch):
    """Install a font, by Pillow alone, that has one letter: 犬 is a black square."""
    pen = TTGlyphPen(None)
    for place, corner in enumerate([(0, 0), (0, 1000), (1000, 1000), (1000, 0)]):
        (pen.lineTo if place else pen.moveTo)(corner)
    pen.closePath()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "dog"])
    font.setupCharacterMap({ord("犬"): "dog"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "dog": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (500, 0), "dog": (1000, 0)})
    font.setupHorizontalHeader(ascent=1000, descent=-200)
    font.setupNameTable({"familyName": "Square", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "square.ttf")
    monkeypatch.setattr(fonts, "_installed", lambda size: [ImageFont.truetype(str(tmp_path / "square.ttf"), size)])
    fonts._font_of.cache_clear()
    figures._families.cache_clear()
    yield
    fonts._font_of.cache_clear()
    figures._families.cache_clear()


def black(figure) -> float:
    """How many pixels are dark, in parts of a square letter of a title of 12 points."""
    return float((np.asarray(rendered(figure).convert("L")) < 128).sum()) / (12 * figures.DPI / 72) ** 2


def written(where: str, text: str):
    """A figure with a text in one place."""
    figure = new_figure(300, 300)
    axes = figure.add_subplot()
    if where == "title":
        axes.set_title(text, color="black")
    elif where == "tick":
        axes.set_xlim(-1, 1)
        axes.set_xticks([0], [text], fontsize=12, color="black")
    else:
        figure.legend(axes.plot([0, 1], color="white"), [text], fontsize=12, labelcolor="black")
    return figure


@pytest.mark.parametrize("where", ["title", "tick", "legend"])
def test_a_plot_writes_each_character_in_a_font_that_has_it(where, square_font):
    assert black(written(where, "犬犬")) - black(written(where, "")) == pytest.approx(2, abs=0.3)


def test_a_plot_says_nothing_of_characters_that_no_font_has(square_font):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rendered(written("title", "\U0001f436 \u4e00"))
        arrange(written("title", "\U0001f436 \u4e00"))
