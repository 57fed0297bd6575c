"""The tables of a report: scores by setting, and what explains their variance."""

from collections.abc import Sequence
from typing import Any

from studies.analysis import Explained, explained_variance, spread
from studies.plan import Layout
from studies.plots import number
from studies.results import DONE, MEASURES, Record, entry_of, grouped, values

COSTS = ("parameters", "seconds", "peak_memory")


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
