"""The scores of an evaluation: all measures of what the models drew and denoised."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from dreambooth.scoring.denoising import DenoisingScores, drift
from dreambooth.scoring.embeddings import Evaluators
from dreambooth.scoring.lpips import Lpips, LpipsDiversity
from dreambooth.scoring.measures import (
    OtherDrift,
    PhotoScores,
    PriorDrift,
    PromptScores,
    score_images,
    score_others,
    score_photos,
    score_prior,
)
from dreambooth.scoring.models import Measured
from dreambooth.scoring.prompts import ADAPTED, BASE, Prompts


@dataclass(frozen=True)
class Results:
    """All scores."""

    photos: PhotoScores
    models: dict[str, PromptScores]
    prior: PriorDrift | None
    others: OtherDrift | None
    denoising: dict[str, DenoisingScores]  # of each model; empty if it was not measured
    lpips: dict[str, LpipsDiversity]  # the same


def score(
    measured: Measured,
    photos: Sequence[Image.Image],
    prompts: Prompts,
    evaluators: Evaluators,
    lpips: Lpips | None = None,
) -> Results:
    """Return the scores of what was measured on the models. `photos` are what images are compared with."""
    drawn, denoised = measured.drawn, measured.denoised
    models = {model: score_images(images.rows, photos, prompts.texts, evaluators) for model, images in drawn.items()}
    varied = {model: lpips.diversity_of(images.rows, images.class_images) for model, images in drawn.items() if lpips}
    prior = others = None
    if ADAPTED in drawn:
        before, after = drawn[BASE], drawn[ADAPTED]
        if before.class_images:
            moved = drift(denoised[BASE].of_class, denoised[ADAPTED].of_class) if denoised else None
            prior = score_prior(before.class_images, after.class_images, photos, evaluators)
            prior = replace(prior, drift=moved)
        if before.others:
            texts = [other.text for other in prompts.others]
            others = score_others(before.others, after.others, photos, texts, evaluators)
    losses = {model: of_model.losses for model, of_model in denoised.items()}
    return Results(score_photos(photos, evaluators), models, prior, others, losses, varied)
