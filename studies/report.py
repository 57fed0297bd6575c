"""The report on a sweep: what studies/results.py read, as tables, plots, Markdown and one page of HTML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreambooth.wording import counted
from kron_formats.files import whole_file, write_text
from studies.choice import Choice, Layout, plan
from studies.exports import csv_text, json_text, read_results
from studies.gallery import make_gallery
from studies.grid import STEP
from studies.rendering import name_of_plot, png_bytes, render
from studies.results import DONE, FAILED, UNFINISHED, Record, axes_of, read_sweep
from studies.rounds import Rounds, rounds_in
from studies.sections import LOSS, Plot, checkpoints, heatmaps, sheets, stability, steps, tradeoffs
from studies.steps import at_steps
from studies.tables import best_steps_table, rounds_table, settings_table, variance_table

PLOTS_NAME = "plots"


def write_report(sweep: Path, output: Path, choice: Choice) -> list[Path]:
    """Write results.csv, results.json, plots, report.md and report.html on a sweep; return their paths, plots apart.

    `sweep` is its folder, or the results.json of an earlier report, which has all but pictures and curves. The same run
    folders make the same bytes. Raises UserError if it is neither, if a file is damaged, or if `choice` has what the
    sweep lacks.
    """
    name, records, rounds = read_results(sweep) if sweep.is_file() else read_folder(sweep)
    compared = of_first_round(records, rounds)
    axes, layout = axes_of(records), plan(compared, choice)
    content = {"title": name, **contents(sweep, records, layout, compared, rounds)}
    write_plots(output / PLOTS_NAME, content["plots"])
    texts = {
        "results.csv": csv_text(records, axes),
        "results.json": json_text(name, records, axes, rounds),
        "report.md": render("report.md.j2", content),
        "report.html": render("page.html.j2", content),
    }
    for name, text in texts.items():
        with whole_file(output / name) as unfinished:
            write_text(unfinished, text)
    return [output / name for name in texts]


def read_folder(sweep: Path) -> tuple[str, list[Record], list[Rounds]]:
    """Return the name of a sweep, its cells and its second rounds. Raises UserError as `read_sweep` and `rounds_in`."""
    return sweep.resolve().name, read_sweep(sweep), rounds_in(sweep)


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


def of_first_round(records: Sequence[Record], rounds: Sequence[Rounds]) -> list[Record]:
    """Return the cells without those that second rounds have added.

    Settings would otherwise be compared unfairly: the best entry of an axis has more subjects and seeds than others.
    """
    added = {name for each in rounds for name in each.added}
    return [record for record in records if record.cell not in added]


def contents(
    sweep: Path, records: Sequence[Record], layout: Layout, compared: Sequence[Record], rounds: Sequence[Rounds]
) -> dict[str, Any]:
    """Return everything that the templates show; settings are compared by the `compared` cells alone."""
    axes, shown, stepped = axes_of(records), at_steps(records), at_steps(compared)
    with_steps = {**axes, STEP: layout.steps} if shown else axes
    gallery = make_gallery(sweep, shown or records, with_steps, layout.rows, layout.columns)
    sections = {
        "stability": stability(compared, layout),
        "heatmaps": heatmaps(stepped if STEP in (layout.x, layout.y) else compared, layout),
        "tradeoffs": tradeoffs(compared, layout),
        "checkpoints": checkpoints(stepped, layout),
        "steps": steps(compared, layout),
        "sheets": sheets(gallery),
    }
    plots = [entry["plot"] if isinstance(entry, dict) else entry for section in sections.values() for entry in section]
    states = {state: sum(record.state == state for record in records) for state in (DONE, FAILED, UNFINISHED)}
    return {
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
        "best_steps": best_steps_table(stepped, layout) if stepped else None,
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
