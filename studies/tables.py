"""The tables of a report: scores by setting, and what explains their variance."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from studies.analysis import Explained, explained_variance, spread
from studies.choice import Layout
from studies.grid import STEP
from studies.plots import number
from studies.results import COSTS, DONE, LACKING, MEASURES, Measure, Record, entry_of, grouped, values
from studies.rounds import Rounds, choose


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


def best_steps_table(records: Sequence[Record], layout: Layout) -> dict[str, Any]:
    """Return the step with the best mean of each score at every setting, the first of equal ones, and that mean.

    `records` are those of studies/steps.py.
    """
    measures = [measure for name, measure in MEASURES.items() if values(records, name)]
    rows = []
    for members in grouped(records, layout.settings).values():
        at_step = grouped(members, [STEP])
        cells = [_best_step(at_step, measure) for measure in measures]
        rows.append({"entries": [entry_of(members[0], axis) for axis in layout.settings], "cells": cells})
    return {"measures": measures, "rows": rows, "axes": layout.settings}


def _best_step(at_step: Mapping[str, Sequence[Record]], measure: Measure) -> str:
    means = {step: spread(found).mean for step, runs in at_step.items() if (found := values(runs, measure.name))}
    if not means:
        return "-"
    best = (max if measure.higher_is_better else min)(means, key=means.__getitem__)
    return f"{best} ({number(means[best], measure.name)})"


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
        "kept": " and ".join(f"{share:.0%} of the base model's {name}" for name, share in rounds.keep.items()),
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
