"""What is written: interpretation.json with every number, plots, and interpretation.html with all of it to look at."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.report.figures import tick_label
from interpretation.ablation import Ablation
from interpretation.curves import draw_shares, draw_when
from interpretation.factors import draw_factors, head_words, strongest
from interpretation.maps import draw_film, draw_map, scale_of
from interpretation.measuring import RANKS, Portrait
from interpretation.pruning import Pruned
from kron_formats.files import whole_file, write_text
from studies.rendering import render
from studies.report import write_plots
from studies.sections import Plot

TITLE = "What the adapter did"
LARGEST_TABLE = 24  # layers of each adapter in the page; JSON has all


@dataclass(frozen=True)
class Findings:
    """All that is known of some adapters."""

    portraits: Sequence[Portrait]
    ablations: Sequence[Ablation] = ()
    pruned: Pruned | None = None
    compared_with: str = ""  # the photos, in words
    settings: Mapping[str, Any] | None = None  # of trials


def write_interpretation(output: Path, findings: Findings) -> list[Path]:
    """Write interpretation.json, interpretation.html and plots to a folder; return the paths of the first two."""
    output.mkdir(parents=True, exist_ok=True)
    plots = plots_of(findings)
    write_plots(output / "plots", list(plots.values()))
    texts = {
        "interpretation.json": json.dumps(numbers(findings), indent=1, ensure_ascii=False) + "\n",
        "interpretation.html": render("page.html.j2", contents(findings, plots), Path(__file__).parent),
    }
    for name, text in texts.items():
        with whole_file(output / name) as unfinished:
            write_text(unfinished, text)
    return [output / name for name in texts]


def numbers(findings: Findings) -> dict[str, Any]:
    """Return every number."""
    found: dict[str, Any] = {"adapters": [portrait.numbers() for portrait in findings.portraits]}
    if findings.ablations:
        found |= {"settings": findings.settings, "photos": findings.compared_with}
        found["ablations"] = [ablation.numbers() for ablation in findings.ablations]
    if findings.pruned:
        found["pruned"] = pruned_numbers(findings.pruned)
    return found


def pruned_numbers(pruned: Pruned) -> dict[str, Any]:
    return {
        "file": pruned.path.name,
        "bytes": pruned.bytes,
        "parameters": pruned.trial.parameters,
        "share_of_likeness": pruned.share,
        **pruned.trial.scores,
        "kept": [*pruned.kept],
        "dropped": [*pruned.dropped],
    }


def plots_of(findings: Findings) -> dict[str, Plot]:
    """Return all plots by their names."""
    scale = scale_of(findings.portraits)
    plots = []
    for number, portrait in enumerate(findings.portraits, 1):
        plots.append(Plot(f"map-{number}", f"where {portrait.label} changes the model", draw_map(portrait, scale)))
        if portrait.steps:
            film = draw_film(portrait, scale)
            plots.append(Plot(f"film-{number}", f"{portrait.label} over its training steps", film))
        if entries := strongest(portrait):
            plots.append(Plot(f"factors-{number}", f"factors of {portrait.label}", draw_factors(entries)))
    plots.append(Plot("shares", "share of ΔW that the nearest LoRA holds", draw_shares(findings.portraits)))
    for number, ablation in enumerate(findings.ablations, 1):
        pruned = findings.pruned.trial if findings.pruned and number == 1 else None
        plots.append(Plot(f"without-{number}", f"what {ablation.label} draws without parts", ablation.sheet(pruned)))
    if findings.ablations:
        plots.append(Plot("when", "share of the loss explained, over timesteps", draw_when(when(findings.ablations))))
    return {plot.name: plot for plot in plots}


def when(ablations: Sequence[Ablation]) -> dict[str, list[tuple[int, float]]]:
    """Return the lines of the plot over timesteps: each adapter; of a single one also without a kind of attention."""
    lines = {ablation.label: ablation.whole.explained() for ablation in ablations}
    if len(ablations) == 1:
        lines |= {f"without {x.name}": x.explained() for x in ablations[0].parts if x.name in ("self", "cross")}
    return lines


# ---- the page ----


def contents(findings: Findings, plots: Mapping[str, Plot]) -> dict[str, Any]:
    """Return what the template shows."""
    return {
        "title": TITLE,
        "adapters": [
            {
                "portrait": portrait,
                "map": plots[f"map-{number}"],
                "film": plots.get(f"film-{number}"),
                "factors": plots.get(f"factors-{number}"),
                "heads": heads(portrait),
                "columns": [column_row(name, entry) for name, entry in portrait.by_column().items()],
                "layers": layer_rows(portrait),
                "left_out": max(0, len(portrait.layers) - LARGEST_TABLE),
            }
            for number, portrait in enumerate(findings.portraits, 1)
        ],
        "ranks": [rank for rank in RANKS if rank <= 8],
        "shares": plots["shares"],
        "ablations": [
            {"ablation": ablation, "sheet": plots[f"without-{number}"], "rows": ablation_rows(ablation)}
            for number, ablation in enumerate(findings.ablations, 1)
        ],
        "when": plots.get("when"),
        "compared_with": findings.compared_with,
        "pruned": findings.pruned,
    }


def heads(portrait: Portrait) -> dict[str, list[str]]:
    """Return how blocks of A and heads fit each other -> the layers of the heat maps in which they do so."""
    found: dict[str, list[str]] = {}
    for entry in strongest(portrait):
        if words := head_words(entry):
            found.setdefault(words, []).append(entry.place.title)
    return found


def column_row(name: str, entry: Mapping[str, Any]) -> list[str]:
    return [
        name,
        f"{entry['layers']}",
        f"{entry['share']:.1%}",
        "-" if entry["relative"] is None else f"{entry['relative']:.3f}",
        f"{entry['effective_rank']:.1f}",
        f"{entry['largest_rank']}",
        f"{entry['rank_for_90_percent']:g}",
        f"{entry['share_of_rank_1']:.0%}",
    ]


def layer_rows(portrait: Portrait) -> list[list[str]]:
    """Return the layers that change most, relative to their weights if these are known."""
    layers = sorted(portrait.layers, key=lambda entry: -(entry.relative or entry.spectrum.frobenius))
    return [
        [
            entry.place.title,
            " × ".join(map(str, entry.size)),
            tick_label(float(f"{entry.spectrum.frobenius:.3g}")),
            tick_label(float(f"{entry.spectrum.spectral:.3g}")),
            "-" if entry.relative is None else f"{entry.relative:.3f}",
            f"{entry.spectrum.effective_rank:.1f} of {entry.spectrum.bound}",
            *(f"{entry.spectrum.share(rank):.0%}" for rank in RANKS if rank <= 8),
        ]
        for entry in layers[:LARGEST_TABLE]
    ]


def ablation_rows(ablation: Ablation) -> list[dict[str, Any]]:
    """Return a row for the base model, the whole adapter, and each part that is left out."""
    base = ablation.numbers()["base"]
    blank = {"class_distance": 0.0, "drift": 0.0}
    rows = [{"name": "base model", "cells": _cells({**base, **blank}, 0), "fall": ""}]
    rows.append(
        {"name": "whole adapter", "cells": _cells(ablation.whole.scores, ablation.whole.parameters), "fall": ""}
    )
    for trial in ablation.parts:
        fall, error = trial.below(ablation.whole)
        doubt = "" if error is None else f" ± {error:.2f}"
        cells = _cells(trial.scores, trial.parameters)
        marks = {"holds": trial is ablation.holder, "costs": trial is ablation.costliest}
        rows.append({"name": f"without {trial.name}", "cells": cells, "fall": f"{fall:+.2f}{doubt}", **marks})
    return rows


def _cells(scores: Mapping[str, float | None], parameters: int) -> list[str]:
    names = (("dino", 2), ("clip_i", 2), ("clip_t", 2), ("loss", 4), ("class_similarity", 2), ("class_distance", 3))
    texts = ["-" if (score := scores[name]) is None else f"{score:.{digits}f}" for name, digits in names]
    drift = scores["drift"]
    return [f"{parameters:,}", *texts, "-" if drift is None else f"{drift:.4f}"]
