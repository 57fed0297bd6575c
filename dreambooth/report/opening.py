"""The opening line: what is trained on, and how often."""

from collections.abc import Sequence

from dreambooth.data.order import samples_of_step
from dreambooth.data.photos import Photo
from dreambooth.options.training import TrainingConfig
from dreambooth.wording import counted
from kron_formats.files import printable


def opening_line(
    photos: Sequence[Photo],
    class_photos: Sequence[Photo],
    samples: int,
    first_step: int,
    total_steps: int,
    num_ranks: int,
    config: TrainingConfig,
) -> str:
    """Return the line: how many photos, captions, masks and class images were read, and how many passes the steps are.

    `samples` is the number of samples in a pass, which differs from that of the photos with repeats and buckets.
    """
    several = f" of {counted(len(config.all_subjects), 'subject')}" if len(config.all_subjects) > 1 else ""
    read = [counted(len(photos), "photo") + several]
    if captions := sum(photo.captioned for photo in photos):
        read.append(f"{captions:,} with captions")
    if masks := sum(photo.mask is not None for photo in photos):
        read.append(f"{masks:,} with masks")
    passes = f"{total_steps * len(samples_of_step(1, config, num_ranks)) / samples:,.1f}".removesuffix(".0")
    steps = f"{counted(total_steps, 'step')} = {passes} {'pass' if passes == '1' else 'passes'}"
    if samples != len(photos):
        steps += f" of {counted(samples, 'sample')}"
    if first_step:
        steps += f", of which {first_step:,} are done"
    return "; ".join([", ".join(read), *_prior(class_photos, config), steps])


def _prior(class_photos: Sequence[Photo], config: TrainingConfig) -> list[str]:
    if config.uses_base_model_prior:
        classes = ", ".join(f"'{printable(prompt)}'" for prompt in config.class_prompts)
        return [f"prior of the base model for {classes}"]
    return [counted(len(class_photos), "class image")] if config.uses_class_images else []
