"""Plots by matplotlib, through its objects alone: pyplot keeps state that threads would share.

matplotlib is imported in the functions, since that takes a second and most programs draw nothing.
"""

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from dreambooth.drawing.fonts import font_files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

INK, GREY, GRID = "#1f2328", "#656d76", "#e6e8eb"
COLOURS = ("#0969da", "#d1570a", "#1a7f37", "#8250df", "#bf3989", "#9a6700", "#1b7c83", "#57606a")
DPI = 100
FONT_SIZE = 12  # px, at which fonts are asked for their characters


def new_figure(
    width: int, height: int, layout: Literal["constrained"] | None = "constrained", dpi: int = DPI
) -> "Figure":
    """Return an empty figure of a size in px at 100 dpi; at a larger `dpi` everything in it is larger."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=dpi, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def style(axes: "Axes", title: str = "", x_label: str = "", y_label: str = "") -> None:
    """Give axes their title, at the left, and labels; leave them a pale grid and no box."""
    axes.set_title(title, loc="left", color=INK, fontsize=12, parse_math=False)
    axes.set_xlabel(x_label, color=GREY, fontsize=10, parse_math=False)
    axes.set_ylabel(y_label, color=GREY, fontsize=10, parse_math=False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_color(GRID)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY, labelsize=9, length=3)


def rendered(figure: "Figure") -> Image.Image:
    """Return a figure as a picture, the same bytes for the same figure."""
    choose_fonts(_texts(figure))
    canvas = figure.canvas
    with _no_word_of_missing_characters():
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba()).copy()).convert("RGB")  # pyright: ignore[reportAttributeAccessIssue]


def arrange(figure: "Figure") -> None:
    """Put everything in a figure in its place, so that it can be measured."""
    choose_fonts(_texts(figure))
    with _no_word_of_missing_characters():
        figure.draw_without_rendering()


def choose_fonts(texts: Iterable["Text"]) -> None:
    """Let texts that are not ASCII have fonts for what their own lacks, as far as any are installed."""
    for text in texts:
        if not text.get_text().isascii() and (others := _families(text.get_text())):
            text.set_fontfamily([*text.get_fontfamily(), *others])


def _texts(figure: "Figure") -> list[Any]:
    """Return all texts of a figure, those at ticks included."""
    from matplotlib.text import Text

    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_ticklabels()  # gets their texts made
    return figure.findobj(Text)


@lru_cache(maxsize=1024)
def _families(text: str) -> tuple[str, ...]:
    """Return the names by which matplotlib finds the fonts of a text."""
    from matplotlib.font_manager import FontProperties, fontManager

    names = []
    for file in font_files(text, FONT_SIZE):
        try:
            name = FontProperties(fname=file).get_name()
            if file not in {font.fname for font in fontManager.ttflist}:
                fontManager.addfont(file)
        except (OSError, RuntimeError, ValueError):  # one that Pillow reads and matplotlib does not
            continue
        names.append(name)
    return tuple(names)


@contextmanager
def _no_word_of_missing_characters() -> Iterator[None]:
    """Leave out matplotlib's warnings of characters that no font has: one for each, at each drawing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def tick_label(value: float, _: float | None = None) -> str:
    """Return a short label: 0.25 -> "0.25", 0.0005 -> "5e-4", 20000 -> "20,000". A formatter for matplotlib."""
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.6g}"
    if not math.isfinite(value):
        return str(value)
    if 1e3 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    mantissa, exponent = f"{value:.4e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean over each value and up to `window - 1` values before it, NaN left out."""
    known = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    first = np.maximum(np.arange(1, len(values) + 1) - window, 0)
    total, count = sums[1:] - sums[first], counts[1:] - counts[first]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
