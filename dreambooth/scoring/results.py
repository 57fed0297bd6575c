"""The scores of an evaluation: all measures of what the models drew and denoised."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from dreambooth.scoring.denoising import DenoisingScores, drift
from dreambooth.scoring.embeddings import Evaluators
from dreambooth.scoring.lpips import Lpips, LpipsDiversity
from dreambooth.scoring.measures import PhotoScores, PriorDrift, PromptScores, score_images, score_photos, score_prior
from dreambooth.scoring.models import Measured
from dreambooth.scoring.prompts import ADAPTED, BASE, Prompts


@dataclass(frozen=True)
class Results:
    """All scores."""

    photos: PhotoScores
    models: dict[str, PromptScores]
    prior: PriorDrift | None
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
    models = {
        model: score_images(images.rows, photos, prompts.texts, evaluators) for model, images in measured.drawn.items()
    }
    prior, denoised = None, measured.denoised
    if ADAPTED in measured.drawn and measured.drawn[BASE].class_images:
        before, after = (measured.drawn[model].class_images for model in (BASE, ADAPTED))
        moved = drift(denoised[BASE].of_class, denoised[ADAPTED].of_class) if denoised else None
        prior = replace(score_prior(before, after, photos, evaluators), drift=moved)
    losses = {model: of_model.losses for model, of_model in denoised.items()}
    drawn = measured.drawn if lpips else {}
    varied = {model: lpips.diversity_of(images.rows, images.class_images) for model, images in drawn.items() if lpips}
    return Results(score_photos(photos, evaluators), models, prior, losses, varied)
