"""Plots over the training steps, a panel below another."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dreambooth.report.figures import GREY, new_figure, rendered, running_mean, style, tick_label
from studies.plots import SHARP, WIDTH, colours, legend
from studies.results import Record, grouped

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_steps(
    records: Sequence[Record], metric: str, panels: Sequence[str], lines: Sequence[str]
) -> Image.Image | None:
    """Draw a metric over the training steps, the mean of the runs, smoothed: a panel for each entry of `panels`, a line
    for each entry of `lines`. None if no run has the metric."""
    logged = [record for record in records if any(row.get(metric) for row in record.metrics)]
    if not logged:
        return None
    groups, names = grouped(logged, panels), [*grouped(logged, lines)]
    palette = dict(zip(names, colours(len(names), ordered=True)))
    figure = new_figure(WIDTH, 60 + 190 * len(groups), dpi=SHARP)
    every = figure.subplots(len(groups), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (panel, members) in zip(every, groups.items()):
        style(axes, panel if panels else "", y_label=metric)
        for line, runs in grouped(members, lines).items():
            steps, mean = mean_metric(runs, metric)
            smooth = running_mean(mean, max(1, len(steps) // 20))
            axes.plot(steps, smooth, color=palette[line], linewidth=1.5, label=line)
        axes.yaxis.set_major_formatter(tick_label)
        axes.margins(x=0.01)
    every[-1].set_xlabel("steps", color=GREY, fontsize=10)
    _limit_peaks(every[0])
    legend(figure, every, ", ".join(lines))
    return rendered(figure)


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
