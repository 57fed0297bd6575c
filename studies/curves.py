"""Plots over the training steps, a panel below another."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dreambooth.report.figures import GREY, new_figure, rendered, running_mean, style, tick_label
from studies.grid import STEP
from studies.plots import SHARP, WIDTH, colours, draw_line, legend, number_ticks
from studies.results import Measure, Record, entries_of, grouped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


SMOOTH = 20  # a metric is smoothed over such a part of the steps
MOST_DOTS = 20  # of a line whose values are dots too
Draw = Callable[["Axes", str, Sequence[Record], Any], None]  # draws some runs as a line of a name and a colour


def draw_steps(
    records: Sequence[Record], metric: str, panels: Sequence[str], lines: Sequence[str]
) -> Image.Image | None:
    """Draw a metric over the training steps, the mean of the runs, smoothed: a panel for each entry of `panels`, a line
    for each entry of `lines`. None if no run has the metric."""
    logged = [record for record in records if any(row.get(metric) for row in record.metrics)]
    if not logged:
        return None

    def draw(axes: "Axes", line: str, runs: Sequence[Record], colour: Any) -> None:
        steps, mean = mean_metric(runs, metric)
        smooth = running_mean(mean, max(1, len(steps) // SMOOTH))
        marker = "o" if len(steps) <= MOST_DOTS else ""
        axes.plot(steps, smooth, marker=marker, markersize=4, color=colour, linewidth=1.5, label=line)
        axes.margins(x=0.01)

    figure, every = _in_panels(logged, metric, panels, lines, draw)
    _limit_peaks(every[0])
    legend(figure, every, ", ".join(lines))
    return rendered(figure)


def draw_scores(
    records: Sequence[Record], measure: Measure, panels: Sequence[str], lines: Sequence[str]
) -> Image.Image:
    """Draw the mean score over the steps at which cells were scored, with a band of its deviation: a panel for each
    entry of `panels`, a line for each entry of `lines`. `records` are those of studies/steps.py."""
    numbers = {step: float(step) for step in entries_of(records, STEP)}

    def draw(axes: "Axes", line: str, runs: Sequence[Record], colour: Any) -> None:
        draw_line(axes, line, grouped(runs, [STEP]), numbers, colour, measure)

    figure, every = _in_panels(records, measure.name, panels, lines, draw)
    number_ticks(every[-1], numbers)
    legend(figure, every, ", ".join(lines))
    return rendered(figure)


def _in_panels(
    records: Sequence[Record], y_label: str, panels: Sequence[str], lines: Sequence[str], draw: Draw
) -> tuple["Figure", Any]:
    """Return a figure and its axes, one for each entry of `panels`, in which each entry of `lines` is drawn."""
    groups, names = grouped(records, panels), [*grouped(records, lines)]
    palette = dict(zip(names, colours(len(names), ordered=True)))
    figure = new_figure(WIDTH, 60 + 190 * len(groups), dpi=SHARP)
    every = figure.subplots(len(groups), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (panel, members) in zip(every, groups.items()):
        style(axes, panel if panels else "", y_label=y_label)
        for line, runs in grouped(members, lines).items():
            draw(axes, line, runs, palette[line])
        axes.yaxis.set_major_formatter(tick_label)
    every[-1].set_xlabel("steps", color=GREY, fontsize=10)
    return figure, every


def mean_metric(records: Sequence[Record], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps that any of the runs has, and the mean of the metric over the runs that have it."""
    by_step: dict[int, list[float]] = {}
    for record in records:
        for row in record.metrics:
            if row.get(metric) is not None:
                by_step.setdefault(row["step"], []).append(row[metric])
    steps = sorted(by_step)
    return np.array(steps), np.array([fmean(by_step[step]) for step in steps])


def _limit_peaks(axes: "Axes") -> None:
    """Let single peaks leave the top: they must not flatten the rest."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    top = 1.5 * float(np.nanquantile(drawn, 0.98))
    if np.nanmax(drawn) > top > 0:
        axes.set_ylim(min(0.0, float(np.nanmin(drawn))), top)
