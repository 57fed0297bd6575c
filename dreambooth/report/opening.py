"""The line with which training begins: what was read, and how long the run is."""

from collections.abc import Sequence

from dreambooth.data.order import samples_of_step
from dreambooth.data.photos import Photo
from dreambooth.options.training import TrainingConfig


def opening_line(
    photos: Sequence[Photo],
    class_photos: Sequence[Photo],
    samples_per_pass: int,
    total_steps: int,
    num_ranks: int,
    config: TrainingConfig,
) -> str:
    """Return "6 photos, 4 with captions; 100 class images; 800 steps = 133.3 passes over the photos"."""
    parts = [_photos(photos)]
    if config.uses_class_images:
        parts.append(_counted(len(class_photos), "class image"))
    elif config.uses_base_model_prior:
        parts.append("the base model as prior")
    passes = total_steps * len(samples_of_step(1, config, num_ranks)) / samples_per_pass
    parts.append(f"{_counted(total_steps, 'step')} = {f'{passes:.1f}'.removesuffix('.0')} passes over the photos")
    return "; ".join(parts)


def _photos(photos: Sequence[Photo]) -> str:
    captions, masks = (
        sum(photo.has_caption for photo in photos),
        sum(photo.mask is not None for photo in photos),
    )
    words = [_counted(len(photos), "photo")]
    words += [f"{captions or 'none'} with {'a caption' if captions == 1 else 'captions'}"]
    words += [f"{masks} with {'a mask' if masks == 1 else 'masks'}"] if masks else []
    return ", ".join(words)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
