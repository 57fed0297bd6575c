"""Prompts as tokens: in which chunks text encoders read them, and what is cut."""

import logging
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import BatchEncoding

from dreambooth.options.prompts import CHUNK_LENGTH
from dreambooth.options.subjects import Subject
from kron_formats.files import printable

logger = logging.getLogger(__name__)

MOST_NAMED = 20  # texts that one warning lists
SHOWN = 120  # characters of what is cut


# ---- chunks ----


@dataclass(frozen=True)
class SplitPrompt:
    """A prompt in chunks, and what does not fit into them."""

    chunks: list[list[int]]  # token ids, without the marks of start and end; at least one chunk
    length: int  # tokens of the whole prompt
    rest: str  # the text that is cut, from the first word that is not read whole; "" if nothing is


def split_prompt(prompt: str, tokenizer: Any, max_token_length: int) -> SplitPrompt:
    """Return a prompt in at most max_token_length / 75 chunks.

    A word, which ends at white space, moves to the next chunk whole if only that one has room for it. The last chunk is
    filled to its last token. A word of several tokens that was added to the tokenizer, as textual inversions are, is
    read as all of them.
    """
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = _with_all_tokens(encoded["input_ids"], encoded["offset_mapping"], tokenizer)
    room, most_chunks = _room(tokenizer), max_token_length // CHUNK_LENGTH
    chunks: list[list[int]] = [[]]
    for word in _words(offsets):
        left = room - len(chunks[-1])
        if left < len(word) <= room and len(chunks) < most_chunks:
            chunks.append([])
        for place in word:
            if len(chunks[-1]) == room:
                if len(chunks) == most_chunks:
                    return SplitPrompt(chunks, len(ids), prompt[offsets[word[0]][0] :])
                chunks.append([])
            chunks[-1].append(ids[place])
    return SplitPrompt(chunks, len(ids), "")


def tokens_read(prompt: str, tokenizers: Collection[Any], max_token_length: int) -> tuple:
    """Return what text encoders get of a prompt: equal if two prompts are the same to all of them."""
    splits = (split_prompt(prompt, tokenizer, max_token_length) for tokenizer in tokenizers)
    return tuple(tuple(map(tuple, split.chunks)) for split in splits)


def _with_all_tokens(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]], tokenizer: Any
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the tokens of a text with "<dog>", "<dog>_1", ... where the text has "<dog>", as diffusers reads it.

    A token's place in the text is that of the word.
    """
    names = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    numbers = {name: number for number, name in names.items()}
    all_ids, all_offsets = [], []
    for number, place in zip(ids, offsets):
        tokens, name = [number], names.get(number)
        while name and (more := numbers.get(f"{name}_{len(tokens)}")) is not None:
            tokens.append(more)
        all_ids += tokens
        all_offsets += [place] * len(tokens)
    return all_ids, all_offsets


def _room(tokenizer: Any) -> int:
    """Return how many tokens a chunk holds between its marks of start and end."""
    return min(tokenizer.model_max_length - 2, CHUNK_LENGTH)


def _words(offsets: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return the places of each word's tokens. The tokenizer leaves a gap in the text only for white space."""
    words: list[list[int]] = []
    end = -1
    for place, (start, stop) in enumerate(offsets):
        if start > end or not words:
            words.append([])
        words[-1].append(place)
        end = stop
    return words


def chunk_tokens(tokenizer: Any, prompts: Sequence[str], max_token_length: int) -> list[BatchEncoding]:
    """Return, for each chunk, its input_ids and attention_mask, (prompts, 77).

    A chunk is padded as the tokenizer pads a prompt. Every prompt has max_token_length / 75 chunks, maybe empty ones.
    """
    splits = [split_prompt(prompt, tokenizer, max_token_length) for prompt in prompts]
    batches = []
    for number in range(max_token_length // CHUNK_LENGTH):
        contents = [split.chunks[number] if number < len(split.chunks) else [] for split in splits]
        rows = [[tokenizer.bos_token_id, *content, tokenizer.eos_token_id] for content in contents]
        length = _room(tokenizer) + 2
        batches.append(tokenizer.pad({"input_ids": rows}, padding="max_length", max_length=length, return_tensors="pt"))
    return batches


# ---- what is cut ----


def warn_of_cut_prompts(
    texts: Iterable[tuple[str, str]], tokenizers: Collection[Any], max_token_length: int, subject: str = ""
) -> None:
    """Log one warning that names the texts that are cut, with their length in tokens and the words that are lost.

    `texts` are (where a text comes from, the text). Words of `subject` that a text loses altogether are pointed out.
    """
    cut: dict[str, tuple[list[str], SplitPrompt]] = {}  # by text
    for source, text in texts:
        if text in cut:
            cut[text][0].append(source)
        elif split := cut_prompt(text, tokenizers, max_token_length):
            cut[text] = [source], split
    if not cut:
        return
    lost = {text: _lost(subject, text, split.rest) for text, (_, split) in cut.items()}
    lines = [
        f"    {', '.join(sources)}: {split.length} tokens, without '{printable(split.rest, SHOWN)}'"
        + (f"; this loses the subject's own {' '.join(map(repr, lost[text]))}" if lost[text] else "")
        for text, (sources, split) in sorted(cut.items(), key=lambda entry: not lost[entry[0]])
    ]
    if len(lines) > MOST_NAMED:
        lines[MOST_NAMED:] = [f"    and {len(lines) - MOST_NAMED} more"]
    if any(lost.values()):
        lines.append("    The subject's own words count only where they are read: put them first.")
    logger.warning(
        "Prompts are cut to --max_token_length %d tokens; use %d, or shorten them:\n%s",
        max_token_length,
        _enough(cut, tokenizers, max_token_length),
        "\n".join(lines),
    )


def subject_words(instance_prompt: str, class_prompt: str | None) -> str:
    """Return the words that only the subject has: those of the instance prompt that the class prompt lacks."""
    others = words_in(class_prompt or "")
    return " ".join(word for word in words_in(instance_prompt) if word not in others)


def words_of_subjects(subjects: Iterable[Subject]) -> str:
    """Return the words that only the subjects have, those of one after the other."""
    return " ".join(subject_words(subject.instance_prompt, subject.class_prompt) for subject in subjects)


def cut_prompt(text: str, tokenizers: Collection[Any], max_token_length: int) -> SplitPrompt | None:
    """Return the text as the tokenizer sees it that cuts most of it, or None if none cuts anything."""
    splits = [split_prompt(text, tokenizer, max_token_length) for tokenizer in tokenizers]
    return max((split for split in splits if split.rest), key=lambda split: len(split.rest), default=None)


def _lost(subject: str, text: str, rest: str) -> list[str]:
    """Return the words of `subject` that are in the rest of a text and not before it."""
    read, cut = words_in(text.removesuffix(rest)), words_in(rest)
    return [word for word in dict.fromkeys(words_in(subject)) if word in cut and word not in read]


def words_in(text: str) -> list[str]:
    """Return the words of a text without punctuation, in lower case. New ones, as "<dog>", keep their brackets."""
    return re.findall(r"<\w[\w-]*>|\w+", text.casefold())


def _enough(texts: Iterable[str], tokenizers: Collection[Any], max_token_length: int) -> int:
    """Return the lowest --max_token_length that cuts none of the texts."""
    while any(cut_prompt(text, tokenizers, max_token_length) for text in texts):
        max_token_length += CHUNK_LENGTH
    return max_token_length
