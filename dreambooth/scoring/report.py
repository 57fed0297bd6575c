"""What is written of an evaluation: scores.json, scores.csv, and the table that is printed."""

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dreambooth.options.evaluation import EvaluationOptions
from dreambooth.scoring.lpips import LpipsDiversity
from dreambooth.scoring.measures import OtherDrift, PriorDrift
from dreambooth.scoring.prompts import ADAPTED, BASE, Prompts
from dreambooth.scoring.results import Results
from kron_formats.files import whole_file, write_text

SCORES = ("clip_i", "dino", "clip_t", "diversity")
DENOISING_SCORES = ("whole", "masked")
LPIPS = "lpips_diversity"


# ---- files ----


def write_json(path: Path, prompts: Prompts, results: Results, config: EvaluationOptions) -> None:
    """Write scores.json, whole or not at all: settings, means, and every prompt."""
    models = {model: _model_report(model, prompts, results) for model in results.models}
    report = {"settings": asdict(config), "photos": asdict(results.photos), "models": models}
    report |= {"prior": _prior_report(results)} | _others_report(prompts, results)
    with whole_file(path) as unfinished:
        write_text(unfinished, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def _model_report(model: str, prompts: Prompts, results: Results) -> dict[str, Any]:
    scores = results.models[model]
    means = {name: getattr(scores, name) for name in SCORES}
    rows = [asdict(row) for row in scores.by_prompt]
    if lpips := results.lpips.get(model):
        means[LPIPS] = lpips.prompts
        rows = [row | {LPIPS: distance} for row, distance in zip(rows, lpips.by_prompt)]
    if losses := results.denoising.get(model):
        means["denoising"] = asdict(losses)
    texts = zip(prompts.drawn[model], prompts.texts)
    return means | {"by_prompt": [{"prompt": prompt, "text": text} | row for (prompt, text), row in zip(texts, rows)]}


def _prior_report(results: Results) -> dict[str, Any] | None:
    if results.prior is None:
        return None
    lpips = {"before": results.lpips.get(BASE), "after": results.lpips.get(ADAPTED)}
    varied = {f"{LPIPS}_{when}": of_model.class_images for when, of_model in lpips.items() if of_model}
    return asdict(results.prior) | varied


def _others_report(prompts: Prompts, results: Results) -> dict[str, Any]:
    if results.others is None:
        return {}
    means = asdict(results.others)
    rows = zip(prompts.others, means.pop("by_prompt"))
    return {"other_prompts": means | {"by_prompt": [{"prompt": other.text} | row for other, row in rows]}}


def write_csv(path: Path, prompts: Prompts, results: Results) -> None:
    """Write scores.csv: a row for each model and prompt that names the subject."""
    lpips = [LPIPS] if results.lpips else []
    denoising = [f"denoising_{name}" for name in DENOISING_SCORES] if results.denoising else []
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "prompt", "text", *SCORES, *lpips, *denoising])
        for model in results.models:
            report = _model_report(model, prompts, results)
            losses = report.get("denoising", {}).values()  # of the model, whatever the prompt
            for row in report["by_prompt"]:
                writer.writerow([model, *row.values(), *losses])


# ---- the table ----


def table(results: Results, config: EvaluationOptions) -> str:
    """Return the means as a table in plain text. The row of the photos says if they were not trained on."""
    columns = ["CLIP-I", "DINO", "CLIP-T", "diversity"] + ["LPIPS"] * bool(results.lpips)
    columns += ["held-out", "in masks"] * bool(results.denoising)
    lines = [f"{'':8}" + "".join(f"{name:>11}" for name in columns)]
    photos = "held out" if config.has_references else "photos"
    for name, scores in {photos: results.photos, **results.models}.items():
        cells = [_number(getattr(scores, score, None)) for score in SCORES]
        if (lpips := results.lpips.get(name)) is not None:
            cells.append(_number(lpips.prompts))
        if (losses := results.denoising.get(name)) is not None:
            cells += [_number(getattr(losses, score), 4) for score in DENOISING_SCORES]
        lines.append(f"{name:8}" + "".join(f"{cell:>11}" for cell in cells))
    lines += [_prior_line(results.prior, results.lpips)] if results.prior else []
    lines += [_others_line(results.others)] if results.others else []
    return "\n".join(lines)


def _prior_line(prior: PriorDrift, lpips: Mapping[str, LpipsDiversity]) -> str:
    parts = [
        f"DINO to the photos {_change(prior.similarity_before, prior.similarity_after)}",
        f"diversity {_change(prior.diversity_before, prior.diversity_after)}",
    ]
    if lpips:
        parts.append(f"LPIPS {_change(lpips[BASE].class_images, lpips[ADAPTED].class_images)}")
    parts.append(f"distance at one seed {_number(prior.distance)}")
    if prior.drift is not None:
        parts.append(f"drift {_number(prior.drift, 4)}")
    return f"prior, base -> adapted: {', '.join(parts)}"


def _others_line(others: OtherDrift) -> str:
    return (
        f"other prompts, base -> adapted: CLIP-T {_change(others.clip_t_before, others.clip_t_after)}, "
        f"DINO to the photos {_change(others.similarity_before, others.similarity_after)}, "
        f"distance at one seed {_number(others.distance)}"
    )


def _change(before: float | None, after: float | None) -> str:
    return f"{_number(before)} -> {_number(after)}"


def _number(score: float | None, digits: int = 3) -> str:
    return "-" if score is None else f"{score:.{digits}f}"
