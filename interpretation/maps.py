"""Maps of a model: where an adapter changes it, and how that grew over the steps of its training."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dreambooth.report.figures import GREY, GRID, INK, new_figure, rendered, style, tick_label
from interpretation.measuring import Portrait
from interpretation.places import CROSS, OTHER, PROJECTIONS, SELF, TEXT, Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELL = 22  # px
SHARP = 180  # dpi
BOX, GAP = 4.0, 1.6  # cells: width of a box, and space between two, in which its rows are named
HEAD = 1.5  # cells above a box, for its title and its columns
COLOURS = "viridis_r"
RANGE = 1000  # of the sizes that have colours of their own
COLUMNS = [f"{kind} {projection}" for kind in (SELF, CROSS) for projection in PROJECTIONS]
EMPTY = (0.965, 0.973, 0.98)  # colour of what the file does not change
FRAMES = 8  # of a film strip


@dataclass(frozen=True)
class Scale:
    """What the colours mean, in all maps of a page alike: logarithms, down to 1 / RANGE of the largest and below."""

    label: str
    largest: float

    @property
    def norm(self) -> Any:
        """matplotlib's normalisation."""
        from matplotlib.colors import LogNorm

        largest = self.largest or 1.0
        return LogNorm(largest / RANGE, largest, clip=True)

    def colour(self, value: float) -> Any:
        from matplotlib import colormaps

        return colormaps[COLOURS](float(self.norm(value)) if value > 0 else 0.0)


def scale_of(portraits: Iterable[Portrait]) -> Scale:
    """Return the scale up to the largest change of any cell, their checkpoints included."""
    shown = [frame for portrait in portraits for frame in (portrait, *portrait.steps.values())]
    sizes = [portrait.size_at(*cell) or 0.0 for portrait in shown for cell in portrait.by_cell]
    relative = all(entry.base is not None for portrait in shown for entry in portrait.layers)
    return Scale("‖ΔW‖ / ‖W‖ (Frobenius)" if relative else "‖ΔW‖ (Frobenius)", max(sizes, default=0.0))


# ---- the map ----


def draw_map(portrait: Portrait, scale: Scale) -> Image.Image:
    """Draw the UNet as a U, a box for each transformer with self- and cross-attention's q, k, v and out.

    Text encoders, where the file changes them, are strips below: a column for each layer.
    """
    boxes = dict.fromkeys([*portrait.sites, *(entry.place.site for entry in portrait.layers)])
    unet = [site for site in boxes if site.stage in ("down", "mid", "up")]
    encoders = list(dict.fromkeys(site.component for site in boxes if site.stage == TEXT))
    corners, width, height = _arrange(portrait, unet)
    strips = {name: height + number * 7.0 for number, name in enumerate(encoders)}
    longest = max((site.block + 1 for site in boxes if site.stage == TEXT), default=0)
    width, height = max(width, longest * 1.0 + GAP + 1), height + 7.0 * len(encoders)
    figure = new_figure(int(CELL * (width + 1)) + 90, int(CELL * (height + 0.4)) + 30, dpi=SHARP)
    axes = figure.add_subplot()
    for site, corner in corners.items():
        _draw_box(axes, portrait, site, corner, scale)
    for name, top in strips.items():
        _draw_strip(axes, portrait, [site for site in boxes if site.component == name and site.stage], top, scale)
    axes.set_xlim(-0.2, width)
    axes.set_ylim(height, -0.2)
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_title(portrait.label, loc="left", color=INK, fontsize=11, parse_math=False)
    _colour_bar(figure, axes, scale)
    return rendered(figure)


def _arrange(portrait: Portrait, sites: Sequence[Site]) -> tuple[dict[Site, tuple[float, float]], float, float]:
    """Return the upper left corner of each box, and the width and height of all: down left, mid below, up right."""
    if not sites:
        return {}, 0.0, 0.0
    levels = sorted({site.level for site in sites})
    down = {level: [s for s in sites if s.level == level and s.stage == "down"] for level in levels}
    up = {level: [s for s in sites if s.level == level and s.stage == "up"] for level in levels}
    middle = [site for site in sites if site.stage == "mid"]
    step = BOX + GAP
    width = max(len(middle) * step, *(step * (len(down[level]) + len(up[level]) + 0.4) for level in levels))
    corners, top = {}, 0.0
    for level in levels:
        row = down[level] + [site for site in middle if site.level == level] + up[level]
        for number, site in enumerate(down[level]):
            corners[site] = (GAP + number * step, top + HEAD)
        for number, site in enumerate(reversed(up[level])):
            corners[site] = (width - BOX - number * step, top + HEAD)
        for number, site in enumerate(row):
            if site.stage == "mid":
                corners[site] = ((width - len(row) * step) / 2 + GAP + number * step, top + HEAD)
        top += HEAD + max(len(_rows(portrait, site)) for site in row) + 0.5
    return corners, width, top


def _rows(portrait: Portrait, site: Site) -> list[str]:
    """Return what a box has rows for."""
    attentions = [SELF, CROSS] if site.attention is not None else []
    return attentions + [OTHER] * ((site, OTHER) in portrait.by_cell)


def _draw_box(axes: "Axes", portrait: Portrait, site: Site, corner: tuple[float, float], scale: Scale) -> None:
    left, top = corner
    axes.text(left, top - HEAD + 0.45, str(site), fontsize=8.5, color=INK, va="center", weight="bold")
    for number, kind in enumerate(_rows(portrait, site)):
        word = "rest" if kind == OTHER else kind
        axes.text(left - 0.15, top + number + 0.5, word, fontsize=7, color=GREY, ha="right", va="center")
        if kind == OTHER:
            _cell(axes, portrait.size_at(site, kind), left, top + number, BOX, scale)
            continue
        for column, projection in enumerate(PROJECTIONS):
            _cell(axes, portrait.size_at(site, f"{kind} {projection}"), left + column, top + number, 1.0, scale)
            if number == 0:
                axes.text(left + column + 0.5, top - 0.25, projection, fontsize=7, color=GREY, ha="center", va="center")


def _draw_strip(axes: "Axes", portrait: Portrait, sites: Sequence[Site], top: float, scale: Scale) -> None:
    axes.text(GAP, top + 0.5, sites[0].component, fontsize=8.5, color=INK, va="center", weight="bold")
    for number, projection in enumerate(PROJECTIONS):
        y = top + 1.6 + number
        axes.text(GAP - 0.15, y + 0.5, projection, fontsize=7, color=GREY, ha="right", va="center")
        for site in sites:
            _cell(axes, portrait.size_at(site, f"{TEXT} {projection}"), GAP + site.block, y, 1.0, scale)
    for site in sites:
        axes.text(GAP + site.block + 0.5, top + 1.3, str(site.block), fontsize=7, color=GREY, ha="center", va="center")


def _cell(axes: "Axes", value: float | None, x: float, y: float, width: float, scale: Scale) -> None:
    from matplotlib.patches import Rectangle

    colour = EMPTY if value is None else scale.colour(value)
    axes.add_patch(Rectangle((x, y), width, 1, facecolor=colour, edgecolor=GRID if value is None else "white"))


def _colour_bar(figure: Any, axes: Any, scale: Scale) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable

    colours = ScalarMappable(scale.norm, colormaps[COLOURS])
    bar = figure.colorbar(colours, ax=axes, format=tick_label, fraction=0.03, pad=0.02)
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=GREY, labelsize=8, length=3)
    bar.set_label(scale.label, color=GREY, fontsize=9)


# ---- the film strip ----


def draw_film(portrait: Portrait, scale: Scale) -> Image.Image:
    """Draw the checkpoints of a run beside each other: rows are transformers, columns self- and cross-attention's."""
    steps = _spread([*portrait.steps])
    sites = [site for site in portrait.sites if site.component == "unet"]
    figure = new_figure(150 + len(steps) * 130, 90 + 16 * len(sites), dpi=SHARP)
    panels = figure.subplots(1, len(steps), sharey=True, squeeze=False)[0]
    for number, (axes, step) in enumerate(zip(panels, steps)):
        style(axes, title=f"step {step}")
        axes.grid(False)
        frame = portrait.steps[step]
        sizes = [[frame.size_at(site, column) for column in COLUMNS] for site in sites]
        image = np.array([[EMPTY if size is None else scale.colour(size)[:3] for size in row] for row in sizes])
        axes.imshow(image, aspect="auto", interpolation="nearest")
        axes.set_xticks(range(len(COLUMNS)), [*PROJECTIONS, *PROJECTIONS], fontsize=6.5)
        axes.axvline(len(PROJECTIONS) - 0.5, color="white", linewidth=2)
        axes.set_xlabel("self       cross", fontsize=8, color=GREY)
        if number == 0:
            axes.set_yticks(range(len(sites)), [str(site) for site in sites], fontsize=8)
    _colour_bar(figure, [*panels], scale)
    return rendered(figure)


def _spread(steps: Sequence[int]) -> list[int]:
    """Return at most FRAMES steps, evenly spread, the last among them."""
    places = np.linspace(0, len(steps) - 1, min(FRAMES, len(steps))).round().astype(int)
    return [steps[place] for place in dict.fromkeys(places.tolist())]
