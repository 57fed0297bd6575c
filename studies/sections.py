"""The sections of a report that have plots: stability, two axes, trade-offs, steps, pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dreambooth.report.figures import tick_label
from studies.analysis import Stable, spread, stable_interval
from studies.choice import Layout
from studies.curves import draw_scores, draw_steps
from studies.gallery import Gallery
from studies.plots import draw_heatmap, draw_lines, draw_tradeoff, is_logarithmic, number
from studies.results import COSTS, FAILED, MEASURES, Measure, Record, axis_numbers, grouped, values
from studies.sheets import draw_pictures

LIKENESS = ("dino", "clip_i")
AGAINST = ("clip_t", "class_drift", "parameters")
DRIFT = MEASURES["class_drift"]  # what more steps cost, drawn over them whatever scores are compared
METRICS = ("loss", "grad_norm", "held_out_loss", "drift")  # the last two with --score_checkpoints
LOSS = 0.05  # of the best score, inside the stable interval
SHEETS = 4  # pictures of prompts in the Markdown report; the page has them all


@dataclass(frozen=True)
class Plot:
    """A picture of a report."""

    name: str
    alt: str
    image: Image.Image


def stability(records: Sequence[Record], layout: Layout) -> list[dict[str, Any]]:
    """Return, for each score and each axis of numbers, a plot and how far each line stays close to its best."""
    found = []
    numeric = {axis: numbers for axis in layout.settings if (numbers := axis_numbers(layout.axes[axis]))}
    for axis, numbers in sorted(numeric.items(), key=lambda entry: entry[0] != layout.x):
        for measure in layout.measures:
            others = layout.others(axis)
            image = draw_lines(records, axis, numbers, others, measure)
            plot = Plot(f"stability-{axis}-{measure.name}", f"{measure.label}, over {axis}", image)
            rows = []
            if is_logarithmic([*numbers.values()]):
                lines = grouped([record for record in records if axis in record.labels], others)
                rows = [_stable_row(line, members, axis, numbers, measure) for line, members in lines.items()]
            shapes = any("-" in label and numbers[label] > 0 and not label.startswith("-") for label in numbers)
            title = f"{', '.join(others)}" or "all"
            found.append(
                {"plot": plot, "axis": axis, "measure": measure, "rows": rows, "line": title, "shapes": shapes}
            )
    return found


def _stable_row(
    line: str, records: Sequence[Record], axis: str, numbers: Mapping[str, float], measure: Measure
) -> dict[str, str]:
    scores: dict[float, float | None] = {}
    labels, counts = {}, []
    for label, runs in grouped(records, [axis]).items():
        labels[numbers[label]] = label
        if any(run.state == FAILED for run in runs):
            scores[numbers[label]] = None
        elif known := values(runs, measure.name):
            scores[numbers[label]] = spread(known).mean
            counts.append(len(known))
    stable = stable_interval(scores, LOSS, measure.higher_is_better)
    if stable is None:
        return {"line": line, "best": "-", "score": "-", "interval": "-", "factors": "-", "runs": "0"}
    best = scores[stable.best]
    assert best is not None
    few, most = min(counts), max(counts)
    return {
        "line": line,
        "best": labels[stable.best],
        "score": number(best, measure.name),
        "interval": interval(stable),
        "factors": f"{'≥ ' if stable.is_open else ''}{stable.factors:.1f}",
        "runs": str(most) if few == most else f"{few} to {most}",
    }


def interval(stable: Stable) -> str:
    """Return an interval in words; an end that lies beyond the settings tried has a sign of inequality."""
    low, high = (tick_label(float(f"{end:.2g}")) for end in (stable.low, stable.high))
    return f"{'≤ ' if stable.open_low else ''}{low} to {'≥ ' if stable.open_high else ''}{high}"


def heatmaps(records: Sequence[Record], layout: Layout) -> list[Plot]:
    x, y = layout.x, layout.y
    if x is None or y is None:
        return []
    return [
        Plot(
            f"heatmap-{x}-{y}-{measure.name}",
            f"{measure.label}, by {x} and {y}",
            draw_heatmap(records, x, y, measure),
        )
        for measure in layout.measures
    ]


def tradeoffs(records: Sequence[Record], layout: Layout) -> list[Plot]:
    colour_by = [layout.y] if layout.y in layout.settings else layout.settings[:1]
    found = []
    against = [name for name in AGAINST if name not in COSTS or len({*values(records, name)}) > 1]
    for likeness in LIKENESS:
        for other in against:
            x, y = MEASURES[other], MEASURES[likeness]
            if image := draw_tradeoff(records, layout.settings, [axis for axis in colour_by if axis], x, y):
                found.append(Plot(f"{likeness}-{other}", f"{y.label}, against {x.label}", image))
    return found


def checkpoints(records: Sequence[Record], layout: Layout) -> list[Plot]:
    """Return a plot of each score over the steps at which cells were scored.

    `records` are those of studies/steps.py.
    """
    lines = [axis for axis in layout.settings if axis == layout.x]
    found = []
    for measure in dict.fromkeys([*layout.measures, DRIFT]):
        if values(records, measure.name):
            image = draw_scores(records, measure, layout.others(*lines), lines)
            found.append(Plot(f"checkpoints-{measure.name}", f"{measure.label}, over the training steps", image))
    return found


def steps(records: Sequence[Record], layout: Layout) -> list[Plot]:
    lines = [axis for axis in layout.settings if axis == layout.x]
    panels = layout.others(*lines)
    found = []
    for metric in METRICS:
        if image := draw_steps(records, metric, panels, lines):
            found.append(Plot(f"steps-{metric}", f"{metric} over the training steps", image))
    return found


def sheets(gallery: Gallery | None) -> list[Plot]:
    """Return the pictures of the first prompts as sheets, other sliders as they stand at the beginning."""
    if gallery is None:
        return []
    first = [grid for grid in gallery.grids if [*grid.key[1:]] == [*gallery.first[1:]]][:SHEETS]
    return [
        Plot(
            f"pictures-{grid.key[0]:02d}",
            f"{grid.prompt}; rows: {gallery.row_axis}, columns: {gallery.column_axis}",
            draw_pictures(gallery.rows, gallery.columns, grid.images, grid.prompt),
        )
        for grid in first
    ]
