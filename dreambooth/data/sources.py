"""Where the prompts of a run come from, for messages about them."""

from collections.abc import Collection, Iterator, Sequence

from dreambooth.data.photos import Photo
from dreambooth.options.training import TrainingConfig
from kron_formats.files import printable


def prompt_sources(photos: Sequence[Photo], config: TrainingConfig) -> Iterator[tuple[str, str]]:
    """Yield (a flag or the name of a photo, its prompt) for all prompts of a run but the captions of class images."""
    for subject in config.all_subjects:
        own = [photo for photo in photos if photo.folder == subject.folder]
        if any(photo.prompt == subject.instance_prompt for photo in own):
            yield subject.source("instance_prompt"), subject.instance_prompt
        yield from own_captions(own, [subject.instance_prompt])
        if subject.class_prompt is not None:
            yield subject.source("class_prompt"), subject.class_prompt
    if config.uses_class_images:
        yield "--prior_negative_prompt", config.prior_negative_prompt
    if config.uses_base_model_prior:
        for photo in photos:
            if photo.class_prompt and photo.class_prompt not in config.class_prompts:
                yield f"class prompt of {printable(photo.name)}", photo.class_prompt
    for number, prompt in enumerate(config.validation_prompt, 1):
        yield f"--validation_prompt, number {number}", prompt


def own_captions(photos: Sequence[Photo], prompts: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, caption) of the photos whose caption is none of `prompts`."""
    return ((printable(photo.name), photo.prompt) for photo in photos if photo.prompt not in prompts)
