"""The prompts of an evaluation: what each model draws, and what CLIP reads in their place."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreambooth.drawing.words import subject_phrase
from dreambooth.errors import UserError
from dreambooth.options.evaluation import EvaluationOptions
from dreambooth.scoring.embeddings import Evaluators
from dreambooth.scoring.inputs import Asked
from dreambooth.scoring.subject import name_subject
from dreambooth.tokens import subject_words, warn_of_cut_prompts, words_in
from kron_formats.reading import AdapterFile

logger = logging.getLogger(__name__)

BASE, ADAPTED = "base", "adapted"  # the models


@dataclass(frozen=True)
class Prompts:
    """The prompts of all models."""

    sources: Sequence[str]  # where each comes from, as messages say it
    drawn: Mapping[str, Sequence[str]]  # model -> the prompts that it draws
    texts: Sequence[str]  # the same prompts with the class alone, which CLIP reads
    subjects: Mapping[str, str]  # model -> what its prompts call the subject
    of_class: str  # the prompt of class images
    others: Sequence[Asked]  # that do not name the subject


def name_prompts(
    asked: Sequence[Asked], others: Sequence[Asked], files: Sequence[AdapterFile], config: EvaluationOptions
) -> Prompts:
    """Return the prompts with the subject as each model knows it. `files` are the adapters'.

    Raises UserError if one of the others names the subject.
    """
    subject = subject_phrase(files, config.instance_token, config.class_noun)
    _check_others(others, subject, config.class_noun)
    subjects = {BASE: subject, ADAPTED: subject}
    if any(file.words for file in files):
        subjects[BASE] = config.class_noun  # the base model does not have the words
    texts = [prompt.text for prompt in asked]
    return Prompts(
        sources=[prompt.source for prompt in asked],
        drawn={model: name_subject(texts, subject) for model, subject in subjects.items()},
        texts=name_subject(texts, config.class_noun),
        subjects=subjects,
        of_class=config.prompt_of_class,
        others=others,
    )


def name_together(config: EvaluationOptions) -> Prompts:
    """Return the prompts with several subjects, each in place of its folder's name."""
    phrases = config.phrases()

    def named(text: str, place: int) -> str:
        for folder, phrase in phrases.items():
            text = text.replace(f"{{{folder}}}", phrase[place])
        return text

    drawn, texts = ([named(text, place) for text in config.together] for place in (0, 1))
    subjects = " ".join(phrase for phrase, _ in phrases.values())
    return Prompts(
        sources=[f"--together, number {number}" for number in range(1, len(drawn) + 1)],
        drawn={BASE: drawn, ADAPTED: drawn},
        texts=texts,
        subjects={BASE: subjects, ADAPTED: subjects},
        of_class="",
        others=[],
    )


def _check_others(others: Sequence[Asked], subject: str, noun: str) -> None:
    """Raise UserError if a prompt has the subject's own words; warn of those that have its class."""
    own = subject_words(subject, noun)
    for other in others:
        if own and set(words_in(own)) <= set(words_in(other.text)):
            raise UserError(f"{other.source}: '{other.text}' names the subject, {own}; leave such prompts out")
    of_class = [other.source for other in others if set(words_in(noun)) <= set(words_in(other.text))]
    if of_class:
        logger.warning("Prompts with the class, %s, which the class images tell about: %s", noun, "; ".join(of_class))


def warn_of_cut_drawings(prompts: Prompts, tokenizers: Collection[Any], config: EvaluationOptions) -> None:
    """Warn of prompts that the base model's tokenizers cut, naming where each comes from."""
    drawn = [*zip(prompts.sources, prompts.drawn[ADAPTED]), ("--class_prompt", prompts.of_class)]
    drawn += [(other.source, other.text) for other in prompts.others]
    drawn += [("--negative_prompt", config.negative_prompt)]
    warn_of_cut_prompts(drawn, tokenizers, config.max_token_length, prompts.subjects[ADAPTED])


def warn_of_cut_texts(prompts: Prompts, evaluators: Evaluators) -> None:
    """Warn of prompts that CLIP cannot read whole, naming where each comes from."""
    others = [(other.source, other.text) for other in prompts.others]
    evaluators.warn_of_cut_texts([*zip(prompts.sources, prompts.texts), *others])
