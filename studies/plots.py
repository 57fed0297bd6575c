"""The plots of a report: each function returns one picture."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from dreambooth.drawing.fonts import draw_text, text_width
from dreambooth.report.figures import (
    COLOURS,
    GREY,
    GRID,
    INK,
    new_figure,
    rendered,
    running_mean,
    style,
    tick_label,
)
from studies.analysis import frontier, spread
from studies.results import FAILED, Measure, Record, as_number, entries_of, entry_of, grouped, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 560, 400  # px, at 100 dpi; small enough to be read on a phone
SHARP = 180  # dpi of the pictures
LOG_FROM = 2  # an axis is drawn by its logarithm if its numbers differ by this factor
THUMBNAIL = 128  # px
LETTERS = 15  # px, on sheets of pictures
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
        _draw_line(axes, line, grouped(members, [axis]), numbers, colour, measure)
    _number_ticks(axes, numbers)
    _legend(figure, axes, ", ".join(others))
    return rendered(figure)


def _draw_line(
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


def _number_ticks(axes: "Axes", numbers: Mapping[str, float]) -> None:
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
    axes.xaxis.set_major_formatter(tick_label)
    axes.yaxis.set_major_formatter(tick_label)
    if x.name == "parameters":
        _number_ticks(axes, {number(a, x.name): a for a, _ in points})
    if not x.higher_is_better:
        axes.invert_xaxis()
    _references(axes, records, x, y)
    _name_points(axes, [(names[i], points[i]) for i in front[:MOST_LABELS]])
    _legend(figure, axes, ", ".join(colour_by))
    return rendered(figure)


def _references(axes: "Axes", records: Sequence[Record], x: Measure, y: Measure) -> None:
    base = [record.base for record in records if {x.name, y.name} <= {*record.base}]
    if base:
        place = ([fmean(scores[measure.name] for scores in base)] for measure in (x, y))
        axes.plot(*place, "*", color=INK, markersize=10, label=BASE_MODEL)
    if photos := [record.photos[y.name] for record in records if y.name in record.photos]:
        axes.axhline(fmean(photos), color=INK, linewidth=0.8, linestyle=":", label=PHOTOS)


def _name_points(axes: "Axes", points: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Write names beside points, on the side that has space; one that would lie on another is left out."""
    figure = axes.get_figure()
    assert figure is not None
    figure.draw_without_rendering()  # pyright: ignore[reportAttributeAccessIssue]
    frame, taken = axes.get_window_extent(), []
    for name, point in points:
        place = axes.transData.transform(point)
        left = place[0] > (frame.x0 + frame.x1) / 2
        text = axes.annotate(
            name, point, (-6 if left else 6, 5), textcoords="offset points", ha="right" if left else "left",
            fontsize=7.5, color=INK, parse_math=False,
        )  # fmt: skip
        extent = text.get_window_extent()
        if any(extent.overlaps(other) for other in taken):
            text.remove()
        else:
            taken.append(extent)


# ---- over the steps ----


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
    _legend(figure, every, ", ".join(lines))
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


# ---- what they share ----


def number(value: float, measure: str) -> str:
    """Return a score as tables and plots have it."""
    if measure == "parameters":
        return f"{value:,.0f}"
    if measure == "peak_memory":
        return f"{value / 2**30:.2f} GiB"
    if measure == "seconds":
        return f"{value:,.1f}"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else tick_label(float(f"{value:.2g}"))


def colours(count: int, ordered: bool = False) -> list[Any]:
    """Return as many colours: of a scale if they have an order or are many."""
    if count <= len(COLOURS) and not ordered:
        return [*COLOURS[:count]]
    from matplotlib import colormaps

    return [colormaps["viridis"](place) for place in np.linspace(0, 0.92, count)]


def _legend(figure: "Figure", axes: Any, title: str) -> None:
    """Put one legend below everything, each label once."""
    entries = {}
    for one in np.atleast_1d(axes):
        for handle, label in zip(*one.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    entries = dict(sorted(entries.items(), key=lambda entry: entry[0] in (UNBEATEN, BASE_MODEL, PHOTOS)))
    if len(entries) < 2:
        return
    widest = max(map(len, entries))
    legend = figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=max(1, min(6, 66 // (widest + 6))),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        title=title or None,
    )
    legend.get_title().set(fontsize=9, color=GREY, parse_math=False)


# ---- pictures ----


def draw_pictures(
    rows: Sequence[str], columns: Sequence[str], images: Mapping[tuple[str, str], Image.Image], title: str
) -> Image.Image:
    """Return a sheet of small pictures with the entries of two axes at its edges; grey where there is none."""
    gap, head = 4, 2 * LETTERS + 24
    left = max([0, *(int(text_width(row, LETTERS)) for row in rows)]) + 12
    width = max(left + len(columns) * (THUMBNAIL + gap), int(text_width(title, LETTERS)) + 12)
    sheet = Image.new("RGB", (width, head + len(rows) * (THUMBNAIL + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw_text(draw, 6, 4, title, GREY, LETTERS)
    for number, column in enumerate(columns):
        draw_text(draw, left + number * (THUMBNAIL + gap), LETTERS + 14, column, INK, LETTERS)
    for down, row in enumerate(rows):
        top = head + down * (THUMBNAIL + gap)
        draw_text(draw, 6, top + THUMBNAIL // 2 - LETTERS // 2, row, INK, LETTERS)
        for across, column in enumerate(columns):
            corner = (left + across * (THUMBNAIL + gap), top)
            if (image := images.get((row, column))) is None:
                draw.rectangle((*corner, corner[0] + THUMBNAIL - 1, corner[1] + THUMBNAIL - 1), fill=GRID)
            else:
                sheet.paste(image, corner)
    return sheet


def thumbnail(image: Image.Image) -> Image.Image:
    """Return an image as a small square one: shrunk, or enlarged by whole pixels, on white."""
    image = image.convert("RGB")
    scale = THUMBNAIL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
    square = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    square.paste(image, ((THUMBNAIL - size[0]) // 2, (THUMBNAIL - size[1]) // 2))
    return square
