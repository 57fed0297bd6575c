"""What an evaluation reads before it imports anything large: its prompts and photos. Wrong ones are refused at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from dreambooth.data.references import Reference, read_references, refuse_trained
from dreambooth.errors import UserError
from dreambooth.options.evaluation import EvaluationOptions
from dreambooth.scoring.subject import PLACEHOLDER, prompt_lines, read_subject_photos


@dataclass(frozen=True)
class Asked:
    """A prompt as the user wrote it, with {} for the subject if it names it."""

    source: str  # where it comes from, as messages say it
    text: str


def read_asked(config: EvaluationOptions) -> list[Asked]:
    """Return the prompts to draw. Raises UserError if one of them lacks {}."""
    if config.prompts:
        lines = prompt_lines(config.prompts)
        asked = [Asked(f"--prompts {config.prompts}, line {line}", text) for line, text in lines.items()]
    else:
        asked = [Asked(f"--prompt, number {number}", text) for number, text in enumerate(config.prompt, 1)]
    if without := [prompt.text for prompt in asked if PLACEHOLDER not in prompt.text]:
        raise UserError(f"the prompt '{without[0]}' has no {PLACEHOLDER}, which stands for the subject")
    return asked


def read_others(config: EvaluationOptions) -> list[Asked]:
    """Return the prompts that do not name the subject, none without --other_prompts. Raises UserError if one has {}."""
    if config.other_prompts is None:
        return []
    lines = prompt_lines(config.other_prompts, "--other_prompts", "a bowl of fruit on a table")
    others = [Asked(f"--other_prompts {config.other_prompts}, line {line}", text) for line, text in lines.items()]
    if named := [other for other in others if PLACEHOLDER in other.text]:
        raise UserError(
            f"{named[0].source}: '{named[0].text}' has {PLACEHOLDER}, which stands for the subject; these prompts do "
            "not name it. Prompts that do belong in --prompts"
        )
    return others


@dataclass(frozen=True)
class Photos:
    """The photos of an evaluation."""

    subject: Sequence[Image.Image]  # what images are compared with
    untrained: Sequence[Reference]  # the same, if they were not trained on, to be denoised
    of_class: Sequence[Reference]  # class images that the user has


def read_photos(config: EvaluationOptions) -> Photos:
    """Return the photos. Raises UserError if there are none, or if references were trained on."""
    untrained, of_class = _read_untrained(config), _read_class_folder(config)
    subject = [photo.image for photo in untrained] or read_subject_photos(config.instance_data_dir or "")
    return Photos(subject, untrained, of_class)


def all_photos(photos: Iterable[Photos]) -> Photos:
    """Return the photos of several subjects, for images of them together. They are not denoised."""
    return Photos([image for own in photos for image in own.subject], [], [])


def _read_untrained(config: EvaluationOptions) -> list[Reference]:
    """Return the photos that were not trained on, none without --reference_dir and --holdout."""
    if config.reference_dir is not None:
        references = read_references(config.reference_dir, "--reference_dir")
        if config.instance_data_dir is not None:
            refuse_trained(references, read_references(config.instance_data_dir, "--instance_data_dir"))
        return references
    if config.holdout:
        return read_references(config.instance_data_dir or "", "--instance_data_dir", config.holdout)
    return []


def _read_class_folder(config: EvaluationOptions) -> list[Reference]:
    """Return the class images of --class_data_dir, none without it."""
    photos = [] if config.class_data_dir is None else read_references(config.class_data_dir, "--class_data_dir")
    return photos[: config.num_class_images]
