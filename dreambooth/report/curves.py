"""The picture of a run: its losses, learning rate, gradient norm and the scores of its checkpoints over the steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from dreambooth.report.figures import COLOURS, GREY, INK, new_figure, rendered, running_mean, style, tick_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 1100, 260  # px, of one panel
LEFT, RIGHT, TOP, BOTTOM = 86, 24, 46, 34  # px, between a panel's edge and its axes

Kind = Literal["noisy", "exact", "rare"]  # noisy values have a running mean; rare ones, of some steps alone, are dots

# Each panel's title, its metrics with their labels in the legend, and what kind they are
PANELS: tuple[tuple[str, dict[str, str], Kind], ...] = (
    ("Loss", {"loss": "loss", "instance_loss": "instance", "prior_loss": "prior"}, "noisy"),
    ("Learning rate", {"learning_rate": "learning rate"}, "exact"),
    ("Gradient norm", {"grad_norm": "before clipping"}, "noisy"),
    ("Loss on photos that are not trained on", {"held_out_loss": "held-out loss"}, "rare"),
    ("Squared change of the prediction for the class", {"drift": "drift"}, "rare"),
)


def draw_curves(metrics: Sequence[dict[str, Any]]) -> Image.Image:
    """Return a picture of the rows of metrics.jsonl: noisy values thin, their running mean thick.

    Metrics that no row has, or that are always 0, are left out. Raises ValueError if there is nothing to draw.
    """
    rows = _by_step(metrics)
    steps = np.array([row["step"] for row in rows], dtype=float)
    panels = [(title, curves, kind) for title, names, kind in PANELS if (curves := _curves(rows, names))]
    if not panels:
        raise ValueError("there are no metrics to draw")
    height = HEIGHT * len(panels) + 8
    figure = new_figure(WIDTH, height, layout=None)
    size = ((WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - TOP - BOTTOM) / height)
    for number, (title, curves, kind) in enumerate(panels):
        bottom = 1 - (HEIGHT * (number + 1) - BOTTOM) / height
        axes = figure.add_axes((LEFT / WIDTH, bottom, *size))
        _draw_panel(axes, title, steps, curves, max(1, len(steps) // 20) if kind == "noisy" else 1, kind == "rare")
    return rendered(figure)


def _by_step(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each step: the scores of a checkpoint have a row of their own."""
    rows: dict[int, dict[str, Any]] = {}
    for row in metrics:
        rows.setdefault(row["step"], {}).update(row)
    return [*rows.values()]


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


def _draw_panel(
    axes: "Axes", title: str, steps: np.ndarray, curves: dict[str, np.ndarray], window: int, rare: bool
) -> None:
    means = {label: running_mean(values, window) for label, values in curves.items()}
    style(axes, title)
    axes.set_xlim(min(steps[0], steps[-1] - 1), steps[-1])
    if not rare:
        axes.set_ylim(0, _highest([*curves.values()], [*means.values()]))
    axes.locator_params("x", integer=True)
    axes.xaxis.set_major_formatter(tick_label)
    axes.yaxis.set_major_formatter(tick_label)
    if window > 1:
        for colour, values in zip(COLOURS, curves.values()):
            _draw_curve(axes, steps, values, colour, linewidth=0.8, alpha=0.25)
    for colour, (label, values) in zip(COLOURS, means.items()):
        draw = _draw_dots if rare else _draw_curve
        draw(axes, steps, values, colour, linewidth=1.8, label=f"{label}  {_last(values)}")
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


def _draw_dots(axes: "Axes", steps: np.ndarray, values: np.ndarray, colour: str, **line: Any) -> None:
    """Draw a dot for each value, and lines from one to the next, whatever is missing between them."""
    known = ~np.isnan(values)
    axes.plot(steps[known], values[known], "o-", color=colour, markersize=4, clip_on=False, **line)


def _last(values: np.ndarray) -> str:
    return tick_label(float(f"{values[~np.isnan(values)][-1]:.3g}"))
