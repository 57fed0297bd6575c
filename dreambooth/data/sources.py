"""Where the prompts of a run come from, for messages about them."""

from collections.abc import Iterator, Sequence

from dreambooth.data.photos import Photo
from dreambooth.options.training import TrainingConfig
from kron_formats.files import printable


def prompt_sources(photos: Sequence[Photo], config: TrainingConfig) -> Iterator[tuple[str, str]]:
    """Yield (a flag or the name of a photo, its prompt) for all prompts of a run but the captions of class images."""
    if any(photo.prompt == config.instance_prompt for photo in photos):
        yield "--instance_prompt", config.instance_prompt
    yield from own_captions(photos, config.instance_prompt)
    if config.class_prompt is not None:
        yield "--class_prompt", config.class_prompt
    if config.uses_class_images:
        yield "--prior_negative_prompt", config.prior_negative_prompt
    if config.uses_base_model_prior:
        for photo in photos:
            if photo.class_prompt and photo.class_prompt != config.class_prompt:
                yield f"class prompt of {printable(photo.path.name)}", photo.class_prompt
    for number, prompt in enumerate(config.validation_prompt, 1):
        yield f"--validation_prompt, number {number}", prompt


def own_captions(photos: Sequence[Photo], prompt: str | None) -> Iterator[tuple[str, str]]:
    """Yield (name, caption) of the photos that have another caption than `prompt`."""
    return ((printable(photo.path.name), photo.prompt) for photo in photos if photo.prompt != prompt)
