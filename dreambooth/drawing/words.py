"""The new words of files: whether tokenizers can learn them, and how prompts call a subject that has one."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dreambooth.wording import shortlist
from dreambooth.words import add_word, explain_new, has_word
from kron_formats.errors import KroneckerError
from kron_formats.reading import AdapterFile
from kron_formats.words import Word

logger = logging.getLogger(__name__)


def check_strength_of_words(file: AdapterFile, strength: float, what: str) -> None:
    """Raise KroneckerError, beginning with `what` it is, if a file has nothing but words and a strength is given."""
    if file.words and not file.layers and strength != 1:
        raise KroneckerError(
            f"{what} is {strength:g}, but a word has none: {file.path} holds {_named(file.words)} alone"
        )


def add_words(files: Iterable[AdapterFile], tokenizers: Mapping[str, Any]) -> None:
    """Add the words of files to tokenizers. Raises KroneckerError if a word is there already, or overlaps another."""
    for file in files:
        for word in file.words:
            if problem := explain_new(word.text, word.count, tokenizers):
                raise KroneckerError(f"{file.path}: the word {word.text} cannot be added: {problem}")
            add_word(word.text, word.count, tokenizers)


def subject_phrase(files: Sequence[AdapterFile], token: str | None, noun: str) -> str:
    """Return what prompts call the subject: "sks dog", or what the words of the files say if no token is given.

    A word alone stands for the noun, "<dog>"; one beside weights stands before it, "<new1> dog".
    """
    alone = [word.text for file in files if not file.layers for word in file.words]
    beside = [word.text for file in files if file.layers for word in file.words]
    if token is not None or not (alone or beside):
        return f"{token or 'sks'} {noun}"
    return " ".join([*beside, *(alone or [noun])])


def warn_of_prompts_without_words(
    prompts: Sequence[str], files: Iterable[AdapterFile], tokenizers: Mapping[str, Any]
) -> None:
    """Warn of prompts that have none of the words of the files, of which they then draw nothing."""
    words = [word for file in files for word in file.words]
    without = [prompt for prompt in prompts if not any(has_word(prompt, word.text, tokenizers) for word in words)]
    if words and without:
        logger.warning("Prompts without %s, the word of the subject: %s", _named(words), shortlist(without))


def _named(words: Sequence[Word]) -> str:
    return " or ".join(word.text for word in words)
