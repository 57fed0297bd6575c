"""New words in tokenizers. Text encoders read a word's n tokens, "<dog>", "<dog>_1", ..., wherever a prompt has it."""

from collections.abc import Mapping
from typing import Any

from kron_formats.files import excerpt
from kron_formats.words import explain_word, tokens_of

Tokenizers = Mapping[str, Any]  # text encoder -> its tokenizer


def explain_new(text: str, count: int, tokenizers: Tokenizers) -> str | None:
    """Return why a word of so many tokens cannot be added to all of the tokenizers; None if it can.

    A tokenizer finds a new word anywhere in a text, also inside words, and whatever the case of its letters. So it must
    not be a word that the tokenizer has, or share letters with another new one.
    """
    if problem := explain_word(text):
        return problem
    for encoder, tokenizer in tokenizers.items():
        known = tokenizer.get_vocab()
        ids = tokenizer(text, add_special_tokens=False).input_ids
        had = tokenizer.convert_ids_to_tokens(ids) if len(ids) == 1 else []
        if had := [*had, *(token for token in tokens_of(text, count) if token in known)]:
            return f"the tokenizer of the {encoder} has it already, as {excerpt(had[0])}"
        for other in tokenizer.added_tokens_encoder:
            if (small := text.casefold()) in other.casefold() or other.casefold() in small:
                return f"it overlaps {excerpt(other)}, which the tokenizer of the {encoder} has already"
    return None


def add_word(text: str, count: int, tokenizers: Tokenizers) -> dict[str, int]:
    """Add a word, which `explain_new` allows, to the tokenizers; return text encoder -> id of its first token.

    The ids of its tokens follow each other.
    """
    first = {}
    for encoder, tokenizer in tokenizers.items():
        tokenizer.add_tokens(list(tokens_of(text, count)))
        first[encoder] = tokenizer.convert_tokens_to_ids(text)
    return first


def has_word(prompt: str, text: str, tokenizers: Tokenizers) -> bool:
    """Whether a prompt has a word that was added, for any of the tokenizers."""
    return any(
        tokenizer.convert_tokens_to_ids(text) in tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        for tokenizer in tokenizers.values()
    )


def only_token(text: str, tokenizer: Any) -> int | None:
    """Return the id of the one token that a text is; None if it is none, several or unknown."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return ids[0] if len(ids) == 1 and ids[0] not in tokenizer.all_special_ids else None
