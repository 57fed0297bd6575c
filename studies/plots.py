"""The plots of a report: each function returns one picture."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dreambooth.report.figures import (
    COLOURS,
    DPI,
    GREY,
    INK,
    arrange,
    choose_fonts,
    new_figure,
    rendered,
    style,
    tick_label,
)
from dreambooth.wording import size
from studies.analysis import frontier, spread
from studies.results import FAILED, Measure, Record, as_number, entries_of, entry_of, grouped, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 560, 400  # px, at 100 dpi; small enough to be read on a phone
ROW = 19  # px, of a legend
SHARP = 180  # dpi of the pictures
LOG_FROM = 2  # an axis is drawn by its logarithm if its numbers differ by this factor
UNBEATEN, BASE_MODEL, PHOTOS = "not beaten", "base model", "photos"  # what legends end with
MOST_TICKS = 14  # of an axis whose entries are its ticks
MOST_LABELS = 8  # points that are written at


def is_logarithmic(numbers: Sequence[float]) -> bool:
    """Whether an axis with these numbers is drawn by their logarithm."""
    return min(numbers) > 0 and max(numbers) / min(numbers) >= LOG_FROM


# ---- a score over a numeric axis ----


def draw_lines(
    records: Sequence[Record], axis: str, numbers: Mapping[str, float], others: Sequence[str], measure: Measure
) -> Image.Image:
    """Draw the mean score over a numeric axis, a line for each entry of the `others`, with a band of its deviation.

    Settings at which every run failed are crosses at the bottom.
    """
    figure = new_figure(WIDTH, HEIGHT, dpi=SHARP)
    axes = figure.add_subplot()
    style(axes, x_label=axis, y_label=measure.label)
    groups = grouped([record for record in records if axis in record.labels], others)
    palette = colours(len(groups), ordered=all(as_number(line) is not None for line in groups))
    for (line, members), colour in zip(groups.items(), palette):
        draw_line(axes, line, grouped(members, [axis]), numbers, colour, measure)
    number_ticks(axes, numbers)
    legend(figure, axes, ", ".join(others))
    return rendered(figure)


def draw_line(
    axes: "Axes",
    line: str,
    settings: Mapping[str, Sequence[Record]],
    numbers: Mapping[str, float],
    colour: Any,
    measure: Measure,
) -> None:
    spreads = {numbers[label]: spread(found) for label in settings if (found := values(settings[label], measure.name))}
    x = sorted(spreads)
    mean = np.array([spreads[number].mean for number in x])
    deviation = np.array([spreads[number].deviation or 0.0 for number in x])
    axes.plot(x, mean, "o-", color=colour, linewidth=1.8, markersize=4, label=line)
    axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.14, linewidth=0)
    failed = [
        numbers[label]
        for label, runs in settings.items()
        if numbers[label] not in spreads and any(run.state == FAILED for run in runs)
    ]
    places = np.full(len(failed), 0.03)
    axes.plot(failed, places, "x", color=colour, transform=axes.get_xaxis_transform(), markersize=6)


def number_ticks(axes: "Axes", numbers: Mapping[str, float]) -> None:
    """Put a tick at every entry, by its label; at some of them if they are many."""
    if is_logarithmic([*numbers.values()]):
        axes.set_xscale("log", base=2)
    shown = dict(sorted(numbers.items(), key=lambda entry: entry[1])[:: 1 + len(numbers) // MOST_TICKS])
    axes.set_xticks([*shown.values()], [*shown], rotation=45 if len("".join(shown)) > 36 else 0)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(tick_label)


# ---- two axes ----


def draw_heatmap(records: Sequence[Record], x: str, y: str, measure: Measure) -> Image.Image:
    """Draw the mean score of every pair of entries of two axes. The best is ringed, failed ones are hatched."""
    from matplotlib.patches import Rectangle

    columns, rows = entries_of(records, x), entries_of(records, y)
    found = {(a, b): [r for r in records if (entry_of(r, x), entry_of(r, y)) == (a, b)] for a in columns for b in rows}
    means = {place: fmean(scores) for place, runs in found.items() if (scores := values(runs, measure.name))}
    table = np.array([[means.get((a, b), np.nan) for a in columns] for b in rows])
    figure = new_figure(max(WIDTH, 62 * len(columns) + 150), max(220, 44 * len(rows) + 130), dpi=SHARP)
    axes = figure.add_subplot()
    style(axes, x_label=x, y_label=y)
    axes.grid(False)
    image = axes.imshow(table, cmap="viridis" if measure.higher_is_better else "viridis_r", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=45 if len("".join(columns)) > 44 else 0)
    axes.set_yticks(range(len(rows)), rows)
    for row, b in enumerate(rows):
        for column, a in enumerate(columns):
            failed = sum(run.state == FAILED for run in found[a, b])
            if failed:
                # A cell that failed in part keeps its number and colour
                axes.add_patch(_box(column, row, hatch="////", edgecolor="#b35900", fill=False, linewidth=0))
            text = (
                number(means[a, b], measure.name)
                if (a, b) in means
                else "failed"
                if failed
                else "…"
                if found[a, b]
                else ""
            )
            dark = (a, b) in means and _is_dark(image.to_rgba(np.array([means[a, b]]))[0].tolist())
            ground = {"facecolor": "#222" if dark else "white", "alpha": 0.7, "linewidth": 0, "pad": 1.5}
            colour = "white" if dark else INK
            axes.text(
                column, row, text, ha="center", va="center", fontsize=9, color=colour, bbox=ground if failed else None
            )
    if means:
        best = (max if measure.higher_is_better else min)(means, key=means.__getitem__)
        place = (columns.index(best[0]), rows.index(best[1]))
        for colour, width in (("white", 5), ("#d1242f", 2.5)):
            axes.add_patch(
                Rectangle((place[0] - 0.46, place[1] - 0.43), 0.92, 0.86, fill=False, edgecolor=colour, linewidth=width)
            )
        bar = figure.colorbar(image, ax=axes, format=tick_label, fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        bar.ax.tick_params(colors=GREY, labelsize=9, length=3)
    return rendered(figure)


def _box(column: int, row: int, **look: Any):
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, **look)


def _is_dark(colour: Sequence[float]) -> bool:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.5


# ---- two scores ----


def draw_tradeoff(
    records: Sequence[Record], settings: Sequence[str], colour_by: Sequence[str], x: Measure, y: Measure
) -> Image.Image | None:
    """Draw two scores against each other, a point for each setting, better to the upper right.

    Settings that no other beats in both are joined and named; a star is the base model, a dashed line the photos
    compared with each other. None if no run has both.
    """
    groups = {}
    for name, members in grouped(records, settings).items():
        both = [record for record in members if {x.name, y.name} <= {*record.scores}]
        if both:
            short = " · ".join(both[0].labels[axis] for axis in settings if axis in both[0].labels)
            groups[short or name] = (both[0], spread(values(both, x.name)), spread(values(both, y.name)))
    if not groups:
        return None
    figure = new_figure(WIDTH, HEIGHT, dpi=SHARP)
    axes = figure.add_subplot()
    style(axes, x_label=x.label, y_label=y.label)
    kinds = grouped([record for record, _, _ in groups.values()], colour_by)
    for (kind, members), colour in zip(kinds.items(), colours(len(kinds))):
        points = [entry[1:] for entry in groups.values() if any(entry[0] is member for member in members)]
        axes.errorbar(
            [a.mean for a, _ in points],
            [b.mean for _, b in points],
            xerr=[a.deviation or 0 for a, _ in points],
            yerr=[b.deviation or 0 for _, b in points],
            fmt="o", color=colour, markersize=5, elinewidth=0.7, alpha=0.85, label=kind,
        )  # fmt: skip
    signs = [1 if measure.higher_is_better else -1 for measure in (x, y)]
    names, points = [*groups], [(a.mean, b.mean) for _, a, b in groups.values()]
    front = frontier([(signs[0] * a, signs[1] * b) for a, b in points])
    axes.plot(*zip(*[points[i] for i in front]), color=GREY, linewidth=1, linestyle="--", zorder=0, label=UNBEATEN)
    if x.name == "parameters":
        _round_ticks(axes, [a for a, _ in points])
    axes.xaxis.set_major_formatter(tick_label)
    axes.yaxis.set_major_formatter(tick_label)
    if not x.higher_is_better:
        axes.invert_xaxis()
    _references(axes, records, x, y)
    legend(figure, axes, ", ".join(colour_by))
    _name_points(axes, {names[i]: points[i] for i in front[:MOST_LABELS]}, points)  # when all else has its place
    return rendered(figure)


def _round_ticks(axes: "Axes", numbers: Sequence[float]) -> None:
    """Put ticks at round numbers, by logarithm; those of the settings themselves may lie on one another."""
    from matplotlib.ticker import LogLocator

    if is_logarithmic(numbers):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if max(numbers) > 100 * min(numbers) else (1, 2, 5)))
        axes.minorticks_off()


def _references(axes: "Axes", records: Sequence[Record], x: Measure, y: Measure) -> None:
    base = [record.base for record in records if {x.name, y.name} <= {*record.base}]
    if base:
        place = ([fmean(scores[measure.name] for scores in base)] for measure in (x, y))
        axes.plot(*place, "*", color=INK, markersize=10, label=BASE_MODEL)
    if photos := [record.photos[y.name] for record in records if y.name in record.photos]:
        axes.axhline(fmean(photos), color=INK, linewidth=0.8, linestyle=":", label=PHOTOS)


def _name_points(axes: "Axes", names: Mapping[str, tuple[float, float]], points: Sequence[tuple[float, float]]) -> None:
    """Write names beside their points, where they cover neither `points` nor each other; others are left out."""
    from matplotlib.transforms import Bbox

    figure = axes.get_figure()
    assert figure is not None
    arrange(figure)  # pyright: ignore[reportArgumentType]
    frame = axes.get_window_extent()
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform(points)]
    for name, point in names.items():
        for (x, horizontal), (y, vertical) in product([(6, "left"), (-6, "right")], [(4, "bottom"), (-4, "top")]):
            text = axes.annotate(
                name, point, (x, y), textcoords="offset points", ha=horizontal, va=vertical, fontsize=7.5, color=INK,
                parse_math=False,
            )  # fmt: skip
            choose_fonts([text])
            extent = text.get_window_extent()
            if frame.containsx(extent.x0) and frame.containsx(extent.x1) and not extent.count_overlaps(taken):
                taken.append(extent)
                break
            text.remove()


# ---- what they share ----


def number(value: float, measure: str) -> str:
    """Return a score as tables and plots have it."""
    if measure == "parameters":
        return f"{value:,.0f}"
    if measure in ("file_size", "peak_memory"):
        return size(value)
    if measure == "seconds":
        return f"{value:,.1f}"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else tick_label(float(f"{value:.2g}"))


def colours(count: int, ordered: bool = False) -> list[Any]:
    """Return as many colours: of a scale if they have an order or are many."""
    if count <= len(COLOURS) and not ordered:
        return [*COLOURS[:count]]
    from matplotlib import colormaps

    return [colormaps["viridis"](place) for place in np.linspace(0, 0.85, count)]


def legend(figure: "Figure", axes: Any, title: str) -> None:
    """Put one legend below everything, each label once."""
    entries = {}
    for one in np.atleast_1d(axes):
        for handle, label in zip(*one.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    entries = dict(sorted(entries.items(), key=lambda entry: entry[0] in (UNBEATEN, BASE_MODEL, PHOTOS)))
    if len(entries) < 2:
        return
    most = max(1, min(6, 66 // (max(map(len, entries)) + 6)))  # beside each other
    rows = math.ceil(len(entries) / most)
    figure.set_figheight(figure.get_figheight() + max(0, rows - 2) * ROW / DPI)  # the axes keep their height
    box = figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=math.ceil(len(entries) / rows),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        title=title or None,
    )
    box.get_title().set(fontsize=9, color=GREY, parse_math=False)
