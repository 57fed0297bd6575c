"""The report on a sweep: what studies/results.py read, as tables, plots, Markdown and one page of HTML."""

import base64
import csv
import io
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from PIL import Image

from dreambooth.errors import UserError
from dreambooth.markdown import code
from dreambooth.report.figures import tick_label
from dreambooth.wording import counted
from kron_formats.files import whole_file, write_text
from studies.analysis import Explained, Stable, explained_variance, spread, stable_interval
from studies.gallery import Gallery, make_gallery
from studies.grid import REPLICATES
from studies.plots import (
    draw_heatmap,
    draw_lines,
    draw_pictures,
    draw_steps,
    draw_tradeoff,
    is_logarithmic,
    number,
)
from studies.results import (
    DONE,
    FAILED,
    LACKING,
    MEASURES,
    UNFINISHED,
    Measure,
    Record,
    axes_of,
    axis_numbers,
    entry_of,
    grouped,
    read_sweep,
    values,
)
from studies.rounds import Rounds, as_data, choose, rounds_in

FIRST = "learning_rate"  # the axis that is drawn from left to right if there is one
LIKENESS = ("dino", "clip_i")
AGAINST = ("clip_t", "class_drift", "parameters")
METRICS = ("loss", "grad_norm")
COSTS = ("parameters", "seconds", "peak_memory")
PLOTS_NAME = "plots"
LOSS = 0.05  # of the best score, inside the stable interval
SHEETS = 4  # pictures of prompts in the Markdown report; the page has them all


@dataclass(frozen=True)
class Choice:
    """What a report shows of a sweep; None for the defaults."""

    scores: Sequence[str] | None = None
    over: Sequence[str] | None = None  # axes that spreads are over
    heatmap: Sequence[str] | None = None  # the axes from left to right and from top to bottom
    pictures: Sequence[str] | None = None  # the axes of rows and of columns


@dataclass(frozen=True)
class Layout:
    """The axes of a sweep, and what each is used for."""

    axes: Mapping[str, Sequence[str]]
    over: Sequence[str]
    settings: Sequence[str]  # all other axes: together they name a setting
    x: str | None
    y: str | None
    measures: Sequence[Measure]
    rows: str
    columns: str

    def others(self, *axes: str | None) -> list[str]:
        """The axes with several entries that tell settings apart besides `axes`."""
        return [axis for axis in self.settings if axis not in axes]


@dataclass(frozen=True)
class Plot:
    """A picture of a report."""

    name: str
    alt: str
    image: Image.Image


def write_report(sweep: Path, output: Path, choice: Choice) -> list[Path]:
    """Write results.csv, results.json, plots, report.md and report.html on a sweep; return their paths, plots apart.

    The same run folders make the same bytes. Raises UserError if the folder is not a sweep, if a file in it is damaged,
    or if `choice` has what the sweep lacks.
    """
    records, rounds = read_sweep(sweep), rounds_in(sweep)
    compared = of_first_round(records, rounds)
    axes, layout = axes_of(records), plan(compared, choice)
    content = contents(sweep, records, layout, compared, rounds)
    (output / PLOTS_NAME).mkdir(parents=True, exist_ok=True)
    for plot in content["plots"]:
        with whole_file(output / PLOTS_NAME / f"{plot.name}.png") as unfinished:
            unfinished.write_bytes(_png(plot.image))
    texts = {
        "results.csv": csv_text(records, axes),
        "results.json": json_text(sweep, records, axes, rounds),
        "report.md": render("report.md.j2", content),
        "report.html": render("page.html.j2", content),
    }
    for name, text in texts.items():
        with whole_file(output / name) as unfinished:
            write_text(unfinished, text)
    return [output / name for name in texts]


# ---- what to show ----


def of_first_round(records: Sequence[Record], rounds: Sequence[Rounds]) -> list[Record]:
    """Return the cells without those that second rounds have added.

    Settings would otherwise be compared unfairly: the best entry of an axis has more subjects and seeds than others.
    """
    added = {name for each in rounds for name in each.added}
    return [record for record in records if record.cell not in added]


def plan(records: Sequence[Record], choice: Choice) -> Layout:
    """Return what each axis is used for. Raises UserError for an axis or a score that the sweep lacks."""
    axes = axes_of(records)
    varied = [axis for axis, entries in axes.items() if len(entries) > 1]
    for flag, chosen in (("--over", choice.over), ("--heatmap", choice.heatmap), ("--pictures", choice.pictures)):
        if missing := [axis for axis in chosen or () if axis not in axes]:
            raise UserError(f"{flag} {missing[0]}: the sweep has no such axis; it has {', '.join(axes)}")
        if chosen and len({*chosen}) < len(chosen):
            raise UserError(f"{flag} {' '.join(chosen)}: an axis is named twice")
    over = [axis for axis in REPLICATES if axis in axes] if choice.over is None else [*choice.over]
    settings = [axis for axis in varied if axis not in over]
    candidates = [FIRST] if FIRST in settings else [axis for axis in settings if axis_numbers(axes[axis])]
    x = next(iter([*candidates, *settings, *varied]), None)
    y = next((axis for axis in [*settings, *varied] if axis != x), None)
    x, y = choice.heatmap or (x, y)
    rows, columns = choice.pictures or (y or "", x or "")
    return Layout(axes, over, settings, x, y, _measures(records, choice.scores), rows, columns)


def _measures(records: Sequence[Record], names: Sequence[str] | None) -> list[Measure]:
    """Return the scores that are compared: those asked for, else likeness and truth to the prompt, else the loss."""
    known = [name for name in MEASURES if values(records, name)]
    if missing := [name for name in names or () if name not in known]:
        there = f"its cells have {', '.join(known)}" if known else "none of its cells is done"
        raise UserError(f"--scores {missing[0]}: no finished cell has it; {there}")
    usual = [name for name in ("dino", "clip_t") if name in known] or [name for name in ("loss",) if name in known]
    return [MEASURES[name] for name in names or usual]


def contents(
    sweep: Path, records: Sequence[Record], layout: Layout, compared: Sequence[Record], rounds: Sequence[Rounds]
) -> dict[str, Any]:
    """Return everything that the templates show; settings are compared by the `compared` cells alone."""
    axes = axes_of(records)
    gallery = make_gallery(sweep, records, axes, layout.rows, layout.columns)
    sections = {
        "stability": stability(compared, layout),
        "heatmaps": heatmaps(compared, layout),
        "tradeoffs": tradeoffs(compared, layout),
        "steps": steps(compared, layout),
        "sheets": sheets(gallery),
    }
    plots = [entry["plot"] if isinstance(entry, dict) else entry for section in sections.values() for entry in section]
    states = {state: sum(record.state == state for record in records) for state in (DONE, FAILED, UNFINISHED)}
    return {
        "title": sweep.resolve().name,
        "axes": axes,
        "layout": layout,
        "rounds": [rounds_table(each, records, layout) for each in rounds],
        "compared": counted(len(compared), "cell"),
        "count": counted(len(records), "cell"),
        "states": {state: count for state, count in states.items() if count},
        "devices": sorted({record.summary["device"] for record in records if "device" in record.summary}),
        "versions": versions(records),
        "open": [record for record in records if record.state != DONE],
        "gallery": gallery,
        "settings": settings_table(compared, layout),
        "variance": variance_table(compared, layout),
        "records": records,
        "loss": f"{LOSS:.0%}",
        "plots": plots,
        **sections,
    }


def versions(records: Sequence[Record]) -> list[str]:
    """Return the versions of the libraries, each set once: "python 3.11.7, torch 2.13.0"."""
    found = (record.summary.get("versions", {}) for record in records)
    return sorted({", ".join(f"{name} {version}" for name, version in each.items()) for each in found if each})


# ---- sections ----


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
    for likeness in LIKENESS:
        for other in AGAINST:
            x, y = MEASURES[other], MEASURES[likeness]
            if image := draw_tradeoff(records, layout.settings, [axis for axis in colour_by if axis], x, y):
                found.append(Plot(f"{likeness}-{other}", f"{y.label}, against {x.label}", image))
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
    """Return the pictures of the first prompts as sheets, other sliders at their first place."""
    if gallery is None:
        return []
    first = [grid for grid in gallery.grids if not any(grid.key[1:])][:SHEETS]
    return [
        Plot(
            f"pictures-{grid.key[0]:02d}",
            f"{grid.prompt}; rows: {gallery.row_axis}, columns: {gallery.column_axis}",
            draw_pictures(gallery.rows, gallery.columns, grid.images, grid.prompt),
        )
        for grid in first
    ]


# ---- tables ----


def settings_table(records: Sequence[Record], layout: Layout) -> dict[str, Any]:
    """Return the mean of every score at every setting, its deviation and the number of runs; the best are marked."""
    measures = [measure for name, measure in MEASURES.items() if values(records, name)]
    groups = grouped(records, layout.settings)
    table = {
        (name, measure.name): spread(found)
        for name, members in groups.items()
        for measure in measures
        if (found := values(members, measure.name))
    }
    best = {}
    for measure in measures:
        means = {name: table[name, measure.name].mean for name in groups if (name, measure.name) in table}
        best[measure.name] = (max if measure.higher_is_better else min)(means.values())
    rows = []
    for name, members in groups.items():
        cells = []
        for measure in measures:
            if (entry := table.get((name, measure.name))) is None:
                cells.append({"text": "-", "best": False})
                continue
            text = number(entry.mean, measure.name)
            if entry.deviation is not None and measure.name not in COSTS:
                text += f" ± {number(entry.deviation, measure.name)}"
            cells.append({"text": text, "best": entry.mean == best[measure.name] and measure.name not in COSTS})
        done = sum(record.state == DONE for record in members)
        entries = [entry_of(members[0], axis) for axis in layout.settings]
        rows.append({"entries": entries, "runs": f"{done} of {len(members)}", "cells": cells})
    return {"measures": measures, "rows": rows, "axes": layout.settings}


def rounds_table(rounds: Rounds, records: Sequence[Record], layout: Layout) -> dict[str, Any]:
    """Return what the second round runs, from which scores of the first it follows, and what it scores."""
    chosen = choose(rounds, {record.cell: record for record in records})
    axes = [*dict.fromkeys(axis for one in chosen for axis in one.setting.labels)]
    rows = []
    for one in chosen:
        scores = {entry: number(mean, rounds.score) for entry, mean in one.means.items()} | {**one.missing}
        tried = [{"text": f"{entry}: {scores[entry]}", "best": entry == one.best} for entry in one.setting.tried]
        entries = [one.setting.labels.get(axis, LACKING) for axis in axes]
        rows.append({"entries": entries, "best": one.best or LACKING, "tried": tried})
    second = {name for one in chosen for name in one.cells}
    scored = settings_table(
        [record for record in records if record.cell in second], replace(layout, settings=[*axes, rounds.axis])
    )
    return {
        "axis": rounds.axis,
        "score": rounds.score,
        "over": rounds.over,
        "axes": axes,
        "rows": rows,
        "scored": scored,
    }


def variance_table(records: Sequence[Record], layout: Layout) -> list[dict[str, Any]]:
    """Return how much of each score's variance each axis explains."""
    axes = [axis for axis, entries in layout.axes.items() if len(entries) > 1]
    rows = []
    for measure in MEASURES.values():
        runs = [(record.labels, record.scores[measure.name]) for record in records if measure.name in record.scores]
        if measure.name not in COSTS and (explained := explained_variance(runs, axes)):
            rows.append({"measure": measure, "shares": _shares(explained, axes), "runs": explained.count})
    return rows


def _shares(explained: Explained, axes: Sequence[str]) -> list[str]:
    return [f"{share:.0%}" for share in (*(explained.shares[axis] for axis in axes), explained.rest)]


# ---- files ----


def csv_text(records: Sequence[Record], axes: Mapping[str, Sequence[str]]) -> str:
    """Return a line for each cell: its entries, state, scores, the base model's, and its command."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    based = [name for name in MEASURES if any(name in record.base for record in records)]
    head = ["cell", *axes, "state", "reason", "exit_code", *MEASURES, *(f"base_{name}" for name in based), "command"]
    writer.writerow(head)
    for record in records:
        writer.writerow(
            [
                record.cell,
                *(record.labels.get(axis, "") for axis in axes),
                record.state,
                record.reason,
                "" if record.ending is None else record.ending.exit_code,
                *(record.scores.get(name, "") for name in MEASURES),
                *(record.base.get(name, "") for name in based),
                command(record),
            ]
        )
    return file.getvalue()


def json_text(
    sweep: Path, records: Sequence[Record], axes: Mapping[str, Sequence[str]], rounds: Sequence[Rounds] = ()
) -> str:
    """Return everything that is known of each cell, its metrics apart, and what second rounds were chosen from it."""
    cells = [
        {
            "cell": record.cell,
            "labels": record.labels,
            "state": record.state,
            "reason": record.reason,
            "scores": record.scores,
            "base": record.base,
            "photos": record.photos,
            "prompts": record.prompts,
            "options": record.options,
            "summary": record.summary,
            "command": record.ending.command if record.ending else None,
            "exit_code": record.ending.exit_code if record.ending else None,
            "last_line": record.ending.last_line if record.ending else None,
            "wall_seconds": record.ending.seconds if record.ending else None,
        }
        for record in records
    ]
    second = [as_data(each, choose(each, {record.cell: record for record in records})) for each in rounds]
    content = _finite({"sweep": sweep.resolve().name, "axes": axes, "rounds": second, "cells": cells})
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    """Return a value with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def command(record: Record) -> str:
    """Return the command that trained a cell, for a shell; empty if it never ran."""
    return shlex.join(record.ending.command) if record.ending else ""


def render(template: str, content: Mapping[str, Any]) -> str:
    """Return a template of this folder with its content. HTML is escaped; Markdown has filters of its own."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": markdown_cell, "code": markdown_code, "command": command, "png": png, "jpeg": jpeg}
    return environment.get_template(template).render(content)


def markdown_cell(text: str) -> str:
    """Return text for a cell of a Markdown table, in which nothing is markup."""
    escaped = "".join(f"\\{letter}" if letter in "\\`*_[]<>|#~" else letter for letter in " ".join(text.split()))
    return escaped.replace("&", "&amp;")


def markdown_code(text: str) -> str:
    """Return text as code in a Markdown table."""
    return code(text).replace("|", "\\|")


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def png(image: Image.Image) -> str:
    """Return a plot as the address of an image that holds it."""
    return "data:image/png;base64," + base64.b64encode(_png(image)).decode()


def jpeg(image: Image.Image) -> str:
    """Return a picture as the address of an image that holds it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
