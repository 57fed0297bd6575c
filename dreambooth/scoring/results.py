"""The results of an evaluation, and what is written of them: scores.json, scores.csv, and the table that is printed."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from PIL import Image

from dreambooth.options.evaluation import EvaluationOptions
from dreambooth.scoring.denoising import DenoisingScores, drift
from dreambooth.scoring.embeddings import Evaluators
from dreambooth.scoring.measures import PhotoScores, PriorDrift, PromptScores, score_images, score_photos, score_prior
from dreambooth.scoring.models import Measured
from dreambooth.scoring.prompts import ADAPTED, BASE, Prompts
from kron_formats.files import whole_file, write_text

SCORES = ("clip_i", "dino", "clip_t", "diversity")
DENOISING_SCORES = ("whole", "masked")


@dataclass(frozen=True)
class Results:
    """What scores.json has besides the settings."""

    photos: PhotoScores
    models: dict[str, PromptScores]
    prior: PriorDrift | None
    denoising: dict[str, DenoisingScores]  # of each model; empty if it was not measured


def score(measured: Measured, photos: Sequence[Image.Image], prompts: Prompts, evaluators: Evaluators) -> Results:
    """Return the scores of what was measured on the models. `photos` are what images are compared with."""
    models = {
        model: score_images(images.rows, photos, prompts.texts, evaluators) for model, images in measured.drawn.items()
    }
    prior, denoised = None, measured.denoised
    if ADAPTED in measured.drawn and measured.drawn[BASE].class_images:
        before, after = (measured.drawn[model].class_images for model in (BASE, ADAPTED))
        moved = drift(denoised[BASE].of_class, denoised[ADAPTED].of_class) if denoised else None
        prior = replace(score_prior(before, after, photos, evaluators), drift=moved)
    losses = {model: of_model.losses for model, of_model in denoised.items()}
    return Results(score_photos(photos, evaluators), models, prior, losses)


# ---- files ----


def write_json(path: Path, prompts: Prompts, results: Results, config: EvaluationOptions) -> None:
    """Write scores.json, whole or not at all: settings, means, and every prompt."""
    models = {}
    for model, scores in results.models.items():
        means = asdict(scores)
        rows = zip(prompts.drawn[model], prompts.texts, means.pop("by_prompt"))
        by_prompt = [{"prompt": prompt, "text": text} | row for prompt, text, row in rows]
        denoising = {"denoising": asdict(losses)} if (losses := results.denoising.get(model)) else {}
        models[model] = means | denoising | {"by_prompt": by_prompt}
    report = asdict(results) | {"models": models}
    del report["denoising"]  # it is with the models
    text = json.dumps({"settings": asdict(config)} | report, indent=2, ensure_ascii=False)
    with whole_file(path) as unfinished:
        write_text(unfinished, text + "\n")


def write_csv(path: Path, prompts: Prompts, results: Results) -> None:
    """Write scores.csv: a row for each model and prompt."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        columns = [f"denoising_{name}" for name in DENOISING_SCORES] if results.denoising else []
        writer.writerow(["model", "prompt", "text", *SCORES, *columns])
        for model, scores in results.models.items():
            for prompt, text, row in zip(prompts.drawn[model], prompts.texts, scores.by_prompt):
                values = [getattr(row, name) for name in SCORES]
                if results.denoising:  # of the model, whatever the prompt
                    values += [getattr(results.denoising[model], name) for name in DENOISING_SCORES]
                writer.writerow([model, prompt, text, *values])


# ---- the table ----


def table(results: Results, config: EvaluationOptions) -> str:
    """Return the means as a table in plain text. The row of the photos says if they were not trained on."""
    columns = ["CLIP-I", "DINO", "CLIP-T", "diversity"] + ["held-out", "in masks"] * bool(results.denoising)
    lines = [f"{'':8}" + "".join(f"{name:>11}" for name in columns)]
    photos = "held out" if config.has_references else "photos"
    for name, scores in {photos: results.photos, **results.models}.items():
        cells = [_number(getattr(scores, score, None)) for score in SCORES]
        if (losses := results.denoising.get(name)) is not None:
            cells += [_number(getattr(losses, score), 4) for score in DENOISING_SCORES]
        lines.append(f"{name:8}" + "".join(f"{cell:>11}" for cell in cells))
    if prior := results.prior:
        lines += [
            "prior, base -> adapted: "
            f"DINO to the photos {_number(prior.similarity_before)} -> {_number(prior.similarity_after)}, "
            f"diversity {_number(prior.diversity_before)} -> {_number(prior.diversity_after)}, "
            f"distance at one seed {_number(prior.distance)}"
            + (f", drift {_number(prior.drift, 4)}" if prior.drift is not None else "")
        ]
    return "\n".join(lines)


def _number(score: float | None, digits: int = 3) -> str:
    return "-" if score is None else f"{score:.{digits}f}"
