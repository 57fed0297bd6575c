"""Plots of how many dimensions a change has, and of when in the noise it helps."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from dreambooth.report.figures import new_figure, rendered, style
from interpretation.measuring import HELD, Portrait
from studies.plots import colours, legend

WIDTH, HEIGHT, SHARP = 560, 400, 180  # px at 100 dpi; dpi


def draw_shares(portraits: Sequence[Portrait]) -> Image.Image:
    """Draw the share of ‖ΔW‖_F² that the nearest LoRA holds over its rank: median of the layers, and 80 % as a band."""
    figure = new_figure(WIDTH, HEIGHT, dpi=SHARP)
    axes = figure.add_subplot()
    style(axes, x_label="rank of the nearest LoRA", y_label="share of ‖ΔW‖² that it holds")
    most = max((entry.spectrum.bound for portrait in portraits for entry in portrait.layers), default=1)
    ranks = np.unique(np.geomspace(1, most, 48).round().astype(int))
    for portrait, colour in zip(portraits, colours(len(portraits))):
        table = np.array([[entry.spectrum.share(int(rank)) for rank in ranks] for entry in portrait.layers])
        low, middle, high = np.percentile(table, [10, 50, 90], axis=0)
        axes.plot(ranks, middle, "o-", color=colour, markersize=3, linewidth=1.6, label=portrait.label)
        axes.fill_between(ranks, low, high, color=colour, alpha=0.14, linewidth=0)
    axes.axhline(HELD, color="#656d76", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    shown = [2**power for power in range(int(np.log2(most)) + 1)]
    axes.set_xticks(shown, [str(rank) for rank in shown])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    legend(figure, axes, "")
    return rendered(figure)


def draw_when(lines: Mapping[str, Sequence[tuple[int, float]]]) -> Image.Image:
    """Draw the share of the denoising loss that each adapter, or part of one, explains, over the timestep."""
    figure = new_figure(WIDTH, HEIGHT, dpi=SHARP)
    axes = figure.add_subplot()
    style(axes, x_label="timestep: 0 is almost no noise", y_label="share of the loss explained")
    axes.axhline(0, color="#656d76", linewidth=0.8)
    for (name, points), colour in zip(lines.items(), colours(len(lines))):
        axes.plot(*zip(*points), "o-", color=colour, markersize=4, linewidth=1.8, label=name)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    legend(figure, axes, "")
    return rendered(figure)
