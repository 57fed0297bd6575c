"""The report on a sweep: what studies/results.py read, as tables, plots, Markdown and one page of HTML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreambooth.wording import counted
from kron_formats.files import whole_file, write_text
from studies.choice import Choice, Layout, plan
from studies.exports import csv_text, json_text
from studies.gallery import make_gallery
from studies.grid import STEP
from studies.rendering import name_of_plot, png_bytes, render
from studies.results import DONE, FAILED, UNFINISHED, Record, read_sweep
from studies.sections import LOSS, Plot, checkpoints, heatmaps, sheets, stability, steps, tradeoffs
from studies.steps import at_steps
from studies.tables import best_steps_table, settings_table, variance_table

PLOTS_NAME = "plots"


def write_report(sweep: Path, output: Path, choice: Choice) -> list[Path]:
    """Write results.csv, results.json, plots, report.md and report.html on a sweep; return their paths, plots apart.

    The same run folders make the same bytes. Raises UserError if the folder is not a sweep, if a file in it is damaged,
    or if `choice` has what the sweep lacks.
    """
    records = read_sweep(sweep)
    layout = plan(records, choice)
    content = contents(sweep, records, layout)
    write_plots(output / PLOTS_NAME, content["plots"])
    texts = {
        "results.csv": csv_text(records, layout.axes),
        "results.json": json_text(sweep, records, layout.axes),
        "report.md": render("report.md.j2", content),
        "report.html": render("page.html.j2", content),
    }
    for name, text in texts.items():
        with whole_file(output / name) as unfinished:
            write_text(unfinished, text)
    return [output / name for name in texts]


def write_plots(folder: Path, plots: Sequence[Plot]) -> None:
    """Write the plots, and remove those of an earlier report that are not among them. Other files stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        with whole_file(folder / f"{plot.name}.png") as unfinished:
            unfinished.write_bytes(png_bytes(plot.image, name=plot.name))
    names = {plot.name for plot in plots}
    for path in folder.glob("*.png"):
        if path.stem not in names and name_of_plot(path) == path.stem:
            path.unlink()


def contents(sweep: Path, records: Sequence[Record], layout: Layout) -> dict[str, Any]:
    """Return everything that the templates show."""
    stepped = at_steps(records)
    with_steps = {**layout.axes, STEP: layout.steps} if stepped else layout.axes
    gallery = make_gallery(sweep, stepped or records, with_steps, layout.rows, layout.columns)
    sections = {
        "stability": stability(records, layout),
        "heatmaps": heatmaps(stepped if STEP in (layout.x, layout.y) else records, layout),
        "tradeoffs": tradeoffs(records, layout),
        "checkpoints": checkpoints(stepped, layout),
        "steps": steps(records, layout),
        "sheets": sheets(gallery),
    }
    plots = [entry["plot"] if isinstance(entry, dict) else entry for section in sections.values() for entry in section]
    states = {state: sum(record.state == state for record in records) for state in (DONE, FAILED, UNFINISHED)}
    return {
        "title": sweep.resolve().name,
        "axes": layout.axes,
        "layout": layout,
        "count": counted(len(records), "cell"),
        "states": {state: count for state, count in states.items() if count},
        "devices": sorted({record.summary["device"] for record in records if "device" in record.summary}),
        "versions": versions(records),
        "open": [record for record in records if record.state != DONE],
        "gallery": gallery,
        "settings": settings_table(records, layout),
        "best_steps": best_steps_table(stepped, layout) if stepped else None,
        "variance": variance_table(records, layout),
        "records": records,
        "loss": f"{LOSS:.0%}",
        "plots": plots,
        **sections,
    }


def versions(records: Sequence[Record]) -> list[str]:
    """Return the versions of the libraries, each set once: "python 3.11.7, torch 2.13.0"."""
    found = (record.summary.get("versions", {}) for record in records)
    return sorted({", ".join(f"{name} {version}" for name, version in each.items()) for each in found if each})
