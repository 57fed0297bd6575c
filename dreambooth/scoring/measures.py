"""Scores of an adapter: fidelity to the subject and the prompts, diversity, and what happens to the class.

The definitions are those of DreamBooth (Ruiz et al., arXiv 2208.12242, sec. 4), each in its function's docstring.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean

from PIL import Image
from torch import Tensor

from dreambooth.scoring.embeddings import (
    Evaluators,
    distinct_cosine,
    paired_cosine,
    pairwise_cosine,
    pairwise_diversity,
)

Images = Sequence[Image.Image]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Means over images; see `score_images`."""

    clip_i: float
    dino: float
    clip_t: float
    diversity: float | None


@dataclass(frozen=True, kw_only=True)
class PromptScores(Scores):
    """Means over prompts, and the scores of each prompt."""

    by_prompt: tuple[Scores, ...]


@dataclass(frozen=True, kw_only=True)
class PhotoScores:
    """How similar the photos are to each other: what a perfect adapter would score. None if there is only one."""

    clip_i: float | None
    dino: float | None


@dataclass(frozen=True, kw_only=True)
class PriorDrift:
    """How class images of the same seeds differ before and after training; see `score_prior`."""

    similarity_before: float
    similarity_after: float
    diversity_before: float | None
    diversity_after: float | None
    distance: float
    drift: float | None = None  # of predictions; see dreambooth/scoring/denoising.py


@dataclass(frozen=True, kw_only=True)
class OtherScores:
    """How images of the same seeds, for prompts that do not name the subject, differ after training."""

    distance: float
    clip_t_before: float
    clip_t_after: float
    similarity_before: float
    similarity_after: float


@dataclass(frozen=True, kw_only=True)
class OtherDrift(OtherScores):
    """Means over prompts, and the scores of each prompt; see `score_others`."""

    by_prompt: tuple[OtherScores, ...]


def score_images(
    images_by_prompt: Sequence[Images], photos: Images, prompt_texts: Sequence[str], evaluators: Evaluators
) -> PromptScores:
    """Return the scores of images, one row for each prompt, against photos and prompts. All prompts weigh the same.

    clip_i      mean cosine of CLIP's embeddings over all pairs of an image and a photo: CLIP-I
    dino        the same with DINO's [CLS] tokens: DINO
    clip_t      mean cosine of CLIP's embeddings of an image and its prompt: CLIP-T
    diversity   mean of 1 - cosine of DINO's [CLS] tokens over all pairs of images of a prompt: DIV, for which the paper
                uses LPIPS distances; None if prompts have one image

    Source: DreamBooth, sec. 4.1 and, for DIV, 4.3. Values depend on the evaluators; the paper's DINO is ViT-S/16.
    `prompt_texts` name only the class, "a dog in the snow": CLIP does not know what the rare token was trained to mean.
    Textual Inversion (arXiv 2208.01618, sec. 5.1) leaves its token out too.
    """
    sizes = [len(row) for row in images_by_prompt]
    images = [image for row in images_by_prompt for image in row]
    photos_clip, photos_dino = evaluators.clip_images(photos), evaluators.dino_images(photos)
    rows = zip(
        evaluators.clip_images(images).split(sizes),
        evaluators.dino_images(images).split(sizes),
        evaluators.clip_texts(prompt_texts).split(1),
    )
    scores = tuple(
        Scores(
            clip_i=pairwise_cosine(clip, photos_clip).mean().item(),
            dino=pairwise_cosine(dino, photos_dino).mean().item(),
            clip_t=pairwise_cosine(clip, text).mean().item(),
            diversity=pairwise_diversity(dino),
        )
        for clip, dino, text in rows
    )
    varied = [score.diversity for score in scores if score.diversity is not None]
    return PromptScores(
        clip_i=fmean(score.clip_i for score in scores),
        dino=fmean(score.dino for score in scores),
        clip_t=fmean(score.clip_t for score in scores),
        diversity=fmean(varied) if varied else None,
        by_prompt=scores,
    )


def score_photos(photos: Images, evaluators: Evaluators) -> PhotoScores:
    """Return CLIP-I and DINO over all pairs of different photos: the paper's row "Real Images" (Table 1)."""
    if len(photos) < 2:
        return PhotoScores(clip_i=None, dino=None)
    clip, dino = evaluators.clip_images(photos), evaluators.dino_images(photos)
    return PhotoScores(clip_i=distinct_cosine(clip).mean().item(), dino=distinct_cosine(dino).mean().item())


def score_mixing(
    images: Mapping[str, Images], photos: Mapping[str, Images], evaluators: Evaluators
) -> dict[str, dict[str, PhotoScores]]:
    """Return how like each subject's images are to the photos of every subject: [whose images][whose photos].

    CLIP-I and DINO as in `score_images`, and as in `score_photos` for photos and themselves. Subjects mix if images are
    liker to another's photos than that one's photos are to their own.
    """

    def embed(pictures: Mapping[str, Images]) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (evaluators.clip_images(own), evaluators.dino_images(own)) for name, own in pictures.items()}

    def alike(a: Tensor, b: Tensor) -> float | None:
        cosines = distinct_cosine(a) if a is b else pairwise_cosine(a, b)
        return cosines.mean().item() if cosines.numel() else None

    of_photos = embed(photos)
    of_images = of_photos if images is photos else embed(images)
    return {
        name: {
            other: PhotoScores(clip_i=alike(clip, clip_other), dino=alike(dino, dino_other))
            for other, (clip_other, dino_other) in of_photos.items()
        }
        for name, (clip, dino) in of_images.items()
    }


def score_prior(before: Images, after: Images, photos: Images, evaluators: Evaluators) -> PriorDrift:
    """Return what training did to the class. `before` are class images of the base model, `after` of the adapted one.

    similarity  mean cosine of DINO's [CLS] tokens over all pairs of a class image and a photo: PRES. If it rises, the
                class collapses onto the subject.
    diversity   as in `score_images`: DIV. If it falls, class images become alike.
    distance    mean of 1 - cosine of DINO's [CLS] tokens over the pairs of the same seed; 0 if no image changed

    Source: DreamBooth, sec. 4.3 "Ablation Studies", for PRES and DIV; the distance is this project's own.
    """
    photos_dino, old, new = (evaluators.dino_images(images) for images in (photos, before, after))
    return PriorDrift(
        similarity_before=pairwise_cosine(old, photos_dino).mean().item(),
        similarity_after=pairwise_cosine(new, photos_dino).mean().item(),
        diversity_before=pairwise_diversity(old),
        diversity_after=pairwise_diversity(new),
        distance=1 - paired_cosine(old, new).mean().item(),
    )


def score_others(
    before: Sequence[Images], after: Sequence[Images], photos: Images, texts: Sequence[str], evaluators: Evaluators
) -> OtherDrift:
    """Return what training did to prompts that do not name the subject: one row of images for each, of both models.

    distance    mean of 1 - cosine of DINO's class tokens over the pairs of the same seed; 0 if no image changed
    clip_t      CLIP-T, as in `score_images`. If it falls, these prompts are followed less well.
    similarity  mean cosine of DINO's class tokens over all pairs of an image and a photo. If it rises, the subject
                leaks into images that should not show it.

    These are the project's own.
    """
    photos_dino = evaluators.dino_images(photos)

    def score_prompt(old: Images, new: Images, text: str) -> OtherScores:
        dino_old, dino_new = evaluators.dino_images(old), evaluators.dino_images(new)
        clip = evaluators.clip_texts([text])
        return OtherScores(
            distance=1 - paired_cosine(dino_old, dino_new).mean().item(),
            clip_t_before=pairwise_cosine(evaluators.clip_images(old), clip).mean().item(),
            clip_t_after=pairwise_cosine(evaluators.clip_images(new), clip).mean().item(),
            similarity_before=pairwise_cosine(dino_old, photos_dino).mean().item(),
            similarity_after=pairwise_cosine(dino_new, photos_dino).mean().item(),
        )

    rows = tuple(score_prompt(*row) for row in zip(before, after, texts, strict=True))
    means = {entry.name: fmean(getattr(row, entry.name) for row in rows) for entry in fields(OtherScores)}
    return OtherDrift(**means, by_prompt=rows)
