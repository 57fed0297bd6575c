"""The picture of a run: its losses, learning rate and gradient norm over the steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dreambooth.report.figures import COLOURS, GREY, INK, new_figure, rendered, running_mean, style, tick_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 1100, 260  # px, of one panel
LEFT, RIGHT, TOP, BOTTOM = 86, 24, 46, 34  # px, between a panel's edge and its axes

# Each panel's title, its metrics with their labels in the legend, and whether they are noisy
PANELS: tuple[tuple[str, dict[str, str], bool], ...] = (
    ("Loss", {"loss": "loss", "instance_loss": "instance", "prior_loss": "prior"}, True),
    ("Learning rate", {"learning_rate": "learning rate"}, False),
    ("Gradient norm", {"grad_norm": "before clipping"}, True),
)


def draw_curves(metrics: Sequence[dict[str, Any]]) -> Image.Image:
    """Return a picture of the rows of metrics.jsonl: noisy values thin, their running mean thick.

    Metrics that no row has, or that are always 0, are left out. Raises ValueError if there is nothing to draw.
    """
    steps = np.array([row["step"] for row in metrics], dtype=float)
    panels = [(title, curves, noisy) for title, names, noisy in PANELS if (curves := _curves(metrics, names))]
    if not panels:
        raise ValueError("there are no metrics to draw")
    height = HEIGHT * len(panels) + 8
    figure = new_figure(WIDTH, height, layout=None)
    size = ((WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - TOP - BOTTOM) / height)
    for number, (title, curves, noisy) in enumerate(panels):
        bottom = 1 - (HEIGHT * (number + 1) - BOTTOM) / height
        window = max(1, len(steps) // 20) if noisy else 1
        _draw_panel(figure.add_axes((LEFT / WIDTH, bottom, *size)), title, steps, curves, window)
    return rendered(figure)


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


def _draw_panel(axes: "Axes", title: str, steps: np.ndarray, curves: dict[str, np.ndarray], window: int) -> None:
    means = {label: running_mean(values, window) for label, values in curves.items()}
    style(axes, title)
    axes.set_xlim(min(steps[0], steps[-1] - 1), steps[-1])
    axes.set_ylim(0, _highest([*curves.values()], [*means.values()]))
    axes.locator_params("x", integer=True)
    axes.xaxis.set_major_formatter(tick_label)
    axes.yaxis.set_major_formatter(tick_label)
    if window > 1:
        for colour, values in zip(COLOURS, curves.values()):
            _draw_curve(axes, steps, values, colour, linewidth=0.8, alpha=0.25)
    for colour, (label, values) in zip(COLOURS, means.items()):
        _draw_curve(axes, steps, values, colour, linewidth=1.8, label=f"{label}  {_last(values)}")
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.01, 0.99), ncols=len(means), frameon=False, labelcolor=INK, fontsize=10
    )
    note = f"steps; thick: mean of {window:,} steps" if window > 1 else "steps"
    axes.text(1, -0.14, note, transform=axes.transAxes, color=GREY, fontsize=9, ha="right", va="top")


def _highest(curves: list[np.ndarray], means: list[np.ndarray]) -> float:
    """Return a value above all means and 98 % of values: single peaks must not flatten the rest."""
    high = max(np.nanquantile(np.concatenate(curves), 0.98), max(np.nanmax(mean) for mean in means))
    return 1.08 * float(high) if high > 0 else 1.0


def _draw_curve(axes: "Axes", steps: np.ndarray, values: np.ndarray, colour: str, **line: Any) -> None:
    """Draw a line, broken at missing values; an isolated value is a dot."""
    known = np.concatenate([[False], ~np.isnan(values), [False]])
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    axes.plot(steps, values, color=colour, solid_joinstyle="round", **line)
    axes.scatter(steps[alone], values[alone], s=12 * line["linewidth"], color=colour, alpha=line.get("alpha"))


def _last(values: np.ndarray) -> str:
    return tick_label(float(f"{values[~np.isnan(values)][-1]:.3g}"))
