"""The prompts of an evaluation: what each model draws, and what CLIP reads in their place."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreambooth.drawing.words import subject_phrase
from dreambooth.options.evaluation import EvaluationOptions
from dreambooth.scoring.embeddings import Evaluators
from dreambooth.scoring.inputs import Asked
from dreambooth.scoring.subject import name_subject
from dreambooth.tokens import warn_of_cut_prompts
from kron_formats.reading import AdapterFile

BASE, ADAPTED = "base", "adapted"  # the models


@dataclass(frozen=True)
class Prompts:
    """The prompts of all models."""

    sources: Sequence[str]  # where each comes from, as messages say it
    drawn: Mapping[str, Sequence[str]]  # model -> the prompts that it draws
    texts: Sequence[str]  # the same prompts with the class alone, which CLIP reads
    subjects: Mapping[str, str]  # model -> what its prompts call the subject
    of_class: str  # the prompt of class images


def name_prompts(asked: Sequence[Asked], files: Sequence[AdapterFile], config: EvaluationOptions) -> Prompts:
    """Return the prompts with the subject as each model knows it. `files` are the adapters'."""
    subject = subject_phrase(files, config.instance_token, config.class_noun)
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
    )


def warn_of_cut_drawings(prompts: Prompts, tokenizers: Collection[Any], config: EvaluationOptions) -> None:
    """Warn of prompts that the base model's tokenizers cut, naming where each comes from."""
    drawn = [*zip(prompts.sources, prompts.drawn[ADAPTED]), ("--class_prompt", prompts.of_class)]
    drawn += [("--negative_prompt", config.negative_prompt)]
    warn_of_cut_prompts(drawn, tokenizers, config.max_token_length, prompts.subjects[ADAPTED])


def warn_of_cut_texts(prompts: Prompts, evaluators: Evaluators) -> None:
    """Warn of prompts that CLIP cannot read whole, naming where each comes from."""
    evaluators.warn_of_cut_texts(zip(prompts.sources, prompts.texts))
