"""Several subjects of one adapter: whether what is drawn of one is like the photos of another."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from PIL import Image

from dreambooth.options.evaluation import EvaluationOptions
from dreambooth.scoring.embeddings import Evaluators
from dreambooth.scoring.measures import PhotoScores, score_mixing
from dreambooth.scoring.models import Measured
from kron_formats.files import whole_file, write_text

PHOTOS = "photos"  # the photos themselves, beside the models

Mixing = Mapping[str, Mapping[str, Mapping[str, PhotoScores]]]  # model or PHOTOS -> whose images -> whose photos


def mixing_of(
    measured: Mapping[str, Measured], photos: Mapping[str, Sequence[Image.Image]], evaluators: Evaluators
) -> Mixing:
    """Return how like what each model drew of each subject is to the photos of every subject, and photos to photos.

    `measured` has what was drawn of each subject, by its folder, and of several TOGETHER; `photos` those of each.
    """
    models = next(iter(measured.values())).drawn
    drawn = {
        model: {name: [*chain.from_iterable(own.drawn[model].rows)] for name, own in measured.items()}
        for model in models
    }
    return {kind: score_mixing(images, photos, evaluators) for kind, images in {PHOTOS: photos, **drawn}.items()}


def write_mixing(path: Path, mixing: Mixing, config: EvaluationOptions) -> None:
    """Write scores.json of all subjects, whole or not at all: settings, and the likeness of every pair."""
    likeness = {
        kind: {name: {other: asdict(scores) for other, scores in row.items()} for name, row in rows.items()}
        for kind, rows in mixing.items()
    }
    report = {"settings": asdict(config), "likeness": likeness}
    with whole_file(path) as unfinished:
        write_text(unfinished, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def mixing_table(mixing: Mixing) -> str:
    """Return the likeness by DINO as a table in plain text: whose images by rows, whose photos by columns."""
    rows = {f"{kind}: {name}": row for kind, of_kind in mixing.items() for name, row in of_kind.items()}
    title = "DINO to the photos of"
    width = max(map(len, [title, *rows]))
    widths = {folder: max(11, len(folder) + 2) for folder in mixing[PHOTOS]}
    lines = [f"{title:{width}}" + "".join(f"{folder:>{wide}}" for folder, wide in widths.items())]
    for name, row in rows.items():
        cells = {folder: "-" if (dino := row[folder].dino) is None else f"{dino:.3f}" for folder in widths}
        lines.append(f"{name:{width}}" + "".join(f"{cells[folder]:>{wide}}" for folder, wide in widths.items()))
    return "\n".join(lines)
