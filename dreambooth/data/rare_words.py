"""Warnings of prompts that teach something else than was meant: photos without the subject's word, classes with it."""

import logging
from collections.abc import Mapping

from dreambooth.options.data import ImageOptions
from dreambooth.options.subjects import Subject
from dreambooth.tokens import subject_words, words_in
from dreambooth.wording import shortlist
from kron_formats.files import printable

logger = logging.getLogger(__name__)

# Words that say nothing about a subject, which prompts may have or lack
COMMON = frozenset("a an the of in on at with by and or photo photograph picture image style".split())

Prompts = Mapping[str, tuple[str, str | None]]  # name of a photo with a caption -> its prompt and class prompt


def warn_of_prompts(captioned: Prompts, subject: Subject, config: ImageOptions) -> None:
    """Warn of captions without the instance prompt's rare word, and of class prompts that are about the subject."""
    rare = rare_words([prompt for prompt, _ in captioned.values()], subject)
    lacking = [name for name, (prompt, _) in captioned.items() if not rare & words_of(prompt)]
    if rare and lacking:
        logger.warning(
            "Captions without %s, which stands for the subject in %s: %s",
            printable(" or ".join(sorted(rare))),
            subject.source("instance_prompt"),
            shortlist(lacking),
        )
    if config.with_prior_preservation and subject.class_prompt:
        _warn_of_class_prompts(captioned, rare, subject, subject.class_prompt, config)


def warn_of_class_captions(captioned: Mapping[str, str], subject: Subject) -> None:
    """Warn of class images whose captions have the subject's rare word; `captioned` maps their names to captions."""
    rare = rare_words([], subject)
    names = [name for name, caption in captioned.items() if rare and rare <= words_of(caption)]
    if names:
        logger.warning("Captions of class images that are about the subject, not its class: %s", shortlist(names))


def words_of(prompt: str) -> set[str]:
    """Return the words of a prompt that say something, in lower case."""
    return set(words_in(prompt)) - COMMON


def rare_words(captions: list[str], subject: Subject) -> set[str]:
    """Return the words that stand for the subject: those of the instance prompt that the class prompt lacks.

    Without a class prompt, the last word is taken for the class, as in "sks dog". Of the words before it, those that no
    caption has are returned, or else the first.
    """
    if subject.class_prompt:
        return words_of(subject_words(subject.instance_prompt, subject.class_prompt))
    words = list(dict.fromkeys(words_in(subject.instance_prompt)))
    words = [word for word in words if word not in COMMON]
    before_class = words[:-1] or words
    return {*before_class}.difference(*map(words_of, captions)) or {*before_class[:1]}


def _warn_of_class_prompts(
    captioned: Prompts, rare: set[str], subject: Subject, class_prompt: str, config: ImageOptions
) -> None:
    if not rare:
        logger.warning(
            "%s %s has every word of %s %s, so the prior keeps the subject from being learnt: leave the subject's rare "
            "word out of it",
            *(subject.source("class_prompt"), printable(class_prompt)),
            *(subject.source("instance_prompt"), printable(subject.instance_prompt)),
        )
        return

    def is_about_subject(prompt: str, own: str | None) -> bool:
        used = own or class_prompt if config.uses_base_model_prior else class_prompt
        return _plain(prompt) == _plain(used) or rare <= words_of(used)

    names = [name for name, prompts in captioned.items() if is_about_subject(*prompts)]
    if names:
        logger.warning("Class prompts that are the same as the caption, or about the subject: %s", shortlist(names))


def _plain(prompt: str) -> str:
    return " ".join(prompt.casefold().split())
