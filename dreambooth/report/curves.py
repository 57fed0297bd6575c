"""The picture of a run: its losses, learning rate and gradient norm over the steps, drawn with Pillow alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

SMOOTH = 3  # drawn this many times larger, then shrunk: Pillow does not antialias lines
WIDTH, HEIGHT = 1100, 260  # px, of one panel
LEFT, RIGHT, TOP, BOTTOM = 86, 24, 46, 34  # px, between a panel's edge and its frame
INK, GREY, GRID = "#1f2328", "#656d76", "#e6e8eb"
COLOURS = ("#0969da", "#d1570a", "#1a7f37")

# Each panel's title, its metrics with their labels in the legend, and whether they are noisy
PANELS: tuple[tuple[str, dict[str, str], bool], ...] = (
    ("Loss", {"loss": "loss", "instance_loss": "instance", "prior_loss": "prior"}, True),
    ("Learning rate", {"learning_rate": "learning rate"}, False),
    ("Gradient norm", {"grad_norm": "before clipping"}, True),
)


@dataclass(frozen=True)
class Frame:
    """Where a panel's values lie in the picture, px."""

    top: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, step: float) -> float:
        low, high = self.x_range
        return LEFT + (step - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        part = min(max((value - low) / (high - low), 0.0), 1.0)  # values out of range run along the frame
        return self.top + HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)


def draw_curves(metrics: Sequence[dict[str, Any]]) -> Image.Image:
    """Return a picture of the rows of metrics.jsonl: noisy values thin, their running mean thick.

    Metrics that no row has, or that are always 0, are left out. Raises ValueError if there is nothing to draw.
    """
    steps = np.array([row["step"] for row in metrics], dtype=float)
    panels = [(title, curves, noisy) for title, names, noisy in PANELS if (curves := _curves(metrics, names))]
    if not panels:
        raise ValueError("there are no metrics to draw")
    picture = Image.new("RGB", (WIDTH * SMOOTH, (HEIGHT * len(panels) + 8) * SMOOTH), "white")
    for number, (title, curves, noisy) in enumerate(panels):
        window = max(1, len(steps) // 20) if noisy else 1
        _draw_panel(ImageDraw.Draw(picture), HEIGHT * number, title, steps, curves, window)
    return picture.reduce(SMOOTH)


def _curves(metrics: Sequence[dict[str, Any]], names: dict[str, str]) -> dict[str, np.ndarray]:
    """Return label -> values, NaN where a row lacks the metric."""
    curves = {}
    for name, label in names.items():
        values = np.array([np.nan if row.get(name) is None else row[name] for row in metrics], dtype=float)
        if np.any(np.nan_to_num(values)):
            curves[label] = values
    if len(curves) == 2 and "prior" not in curves:
        curves.pop("instance", None)  # without a prior it equals the loss
    return curves


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean over each value and up to `window - 1` values before it, NaN left out."""
    known = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    first = np.maximum(np.arange(1, len(values) + 1) - window, 0)
    total, count = sums[1:] - sums[first], counts[1:] - counts[first]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Return about `wanted` round numbers from `low` to `high`: their distance is 1, 2 or 5 times a power of ten."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [number * apart for number in range(math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9) + 1)]


def tick_label(value: float) -> str:
    """Return a short label: 0.25 -> "0.25", 0.0005 -> "5e-4", 20000 -> "20,000"."""
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.6g}"
    if 1e3 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    mantissa, exponent = f"{value:.4e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _draw_panel(
    draw: ImageDraw.ImageDraw, top: int, title: str, steps: np.ndarray, curves: dict[str, np.ndarray], window: int
) -> None:
    means = {label: running_mean(values, window) for label, values in curves.items()}
    frame = Frame(top, (min(steps[0], steps[-1] - 1), steps[-1]), _value_range([*curves.values()], [*means.values()]))
    _draw_axes(draw, frame)
    for colour, values in zip(COLOURS, curves.values()):
        if window > 1:
            _draw_curve(draw, frame, steps, values, _pale(colour), 1)
    for colour, values in zip(COLOURS, means.values()):
        _draw_curve(draw, frame, steps, values, colour, 2.2)
    _text(draw, LEFT, top + 24, title, INK, 17, "ls")
    _draw_legend(draw, top, means)
    note = f"steps; thick: mean of {window:,} steps" if window > 1 else "steps"
    _text(draw, WIDTH - RIGHT, top + HEIGHT - 2, note, GREY, 12, "rs")


def _value_range(curves: list[np.ndarray], means: list[np.ndarray]) -> tuple[float, float]:
    """Return 0 and a value above all means and 98 % of values: single peaks must not flatten the rest."""
    values = np.concatenate(curves)
    high = max(np.nanquantile(values, 0.98), max(np.nanmax(mean) for mean in means))
    return 0.0, 1.08 * float(high) if high > 0 else 1.0


def _draw_axes(draw: ImageDraw.ImageDraw, frame: Frame) -> None:
    bottom = frame.top + HEIGHT - BOTTOM
    for value in ticks(*frame.y_range):
        _line(draw, [(LEFT, frame.y(value)), (WIDTH - RIGHT, frame.y(value))], GREY if value == 0 else GRID, 1)
        _text(draw, LEFT - 8, frame.y(value), tick_label(value), GREY, 12, "rm")
    for step in ticks(*frame.x_range, wanted=10):
        if step == int(step):
            _line(draw, [(frame.x(step), bottom), (frame.x(step), bottom + 4)], GREY, 1)
            _text(draw, frame.x(step), bottom + 17, tick_label(step), GREY, 12, "ms")


def _draw_curve(
    draw: ImageDraw.ImageDraw, frame: Frame, steps: np.ndarray, values: np.ndarray, colour: str, width: float
) -> None:
    """Draw a polyline, broken at missing values; an isolated value is a dot."""
    known = np.flatnonzero(~np.isnan(values))
    for run in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1):
        points = [(frame.x(step), frame.y(value)) for step, value in zip(steps[run].tolist(), values[run].tolist())]
        if len(points) == 1:
            x, y = (SMOOTH * part for part in points[0])
            draw.circle((x, y), 3 * SMOOTH, fill=colour)
        elif points:
            _line(draw, points, colour, width)


def _draw_legend(draw: ImageDraw.ImageDraw, top: int, means: dict[str, np.ndarray]) -> None:
    """Draw each curve's colour, label and last value, from the right."""
    right = WIDTH - RIGHT
    for colour, (label, values) in reversed(list(zip(COLOURS, means.items()))):
        known = values[~np.isnan(values)]
        text = f"{label}  {tick_label(float(f'{known[-1]:.3g}'))}"
        _text(draw, right, top + 24, text, INK, 13, "rs")
        right -= _font(13).getlength(text) / SMOOTH + 8
        _line(draw, [(right - 18, top + 20), (right, top + 20)], colour, 3)
        right -= 18 + 22


def _pale(colour: str) -> str:
    """Return a colour as it looks on white at a fifth of its opacity."""
    red, green, blue = (255 - (255 - part) // 5 for part in ImageColor.getrgb(colour))
    return f"#{red:02x}{green:02x}{blue:02x}"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * SMOOTH)


def _text(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, colour: str, size: int, anchor: str) -> None:
    draw.text((x * SMOOTH, y * SMOOTH), text, fill=colour, font=_font(size), anchor=anchor)


def _line(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: str, width: float) -> None:
    scaled = [(x * SMOOTH, y * SMOOTH) for x, y in points]
    draw.line(scaled, fill=colour, width=max(1, round(width * SMOOTH)), joint="curve")
