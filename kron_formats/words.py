"""New words in files: what the text encoders read for each, as Textual Inversion learns it.

SD      <word>            (n, width), the word itself is the name; (width,) is one vector
SDXL    clip_l, clip_g    (n, 768) and (n, 1280); the word is in our metadata, else it is the file's name
A1111   emb_params, *     (n, width); the word is the file's name

ComfyUI, A1111 and Forge call an embedding by its file's name; `pipe.load_textual_inversion` takes the SD file as it is.
A word's tensors may lie beside weights: a word has no dot in its name, a weight has.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kron_formats.errors import KroneckerError
from kron_formats.families import FAMILIES
from kron_formats.files import excerpt

WORD_KEY = "word"  # of our metadata
COMPONENT_OF = {encoder.clip: encoder.component for family in FAMILIES for encoder in family.text_encoders}
NAMELESS = ("emb_params", "*")  # what A1111 calls the tensor of a word
LONGEST_WORD = 64  # characters
MOST_VECTORS = 75  # the tokens of a prompt
WIDEST = 2**13  # numbers in a vector


@dataclass(frozen=True)
class Word:
    """A word that a tokenizer does not have, and its embeddings."""

    text: str  # "<dog>"
    vectors: Mapping[str, Tensor]  # text encoder -> (n, width), fp32

    @property
    def count(self) -> int:
        """How many vectors a text encoder has for it."""
        return len(next(iter(self.vectors.values())))

    @property
    def tokens(self) -> tuple[str, ...]:
        """Its n tokens: "<dog>", "<dog>_1", ..., as diffusers names them."""
        return tokens_of(self.text, self.count)


def tokens_of(text: str, count: int) -> tuple[str, ...]:
    """Return the tokens of a word of so many vectors: "<dog>", "<dog>_1", ..., as diffusers names them."""
    return tuple(f"{text}_{number}" if number else text for number in range(count))


def explain_word(text: str) -> str | None:
    """Return why a text cannot be a word, which has to stand alone in prompts and in files; None if it can."""
    if not text:
        return "it is empty"
    if text.split() != [text] or not text.isprintable():
        return "a word has no spaces and no characters that cannot be seen"
    if len(text) > LONGEST_WORD:
        return f"a word has at most {LONGEST_WORD} characters, and this one {len(text)}"
    return None


def explain_name(text: str) -> str | None:
    """Return why a word cannot be the name of a tensor too; None if it can."""
    if "." in text:
        return "a word has no dot, which names of weights have"
    if text in COMPONENT_OF or text in NAMELESS:
        return "files have a tensor of this name, with another meaning"
    return explain_word(text)


# ---- reading ----


def is_word_key(key: str) -> bool:
    """Whether a tensor of this name is a word's: it has no dot."""
    return bool(key) and "." not in key


def is_words(keys: Collection[str]) -> bool:
    """Whether tensors of these names, and no others, are those of a word."""
    return bool(keys) and all(map(is_word_key, keys)) and (len(keys) == 1 or {*keys} <= {*COMPONENT_OF})


def read(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Word:
    """Return the word in the tensors of a file, without those of weights. `metadata` are ours, without prefix.

    Raises KroneckerError if they are not those of one word.
    """
    if not is_words(tensors.keys()):
        raise KroneckerError(f"{path} holds no word: its tensors are {', '.join(map(excerpt, sorted(tensors)))}")
    named = next((key for key in tensors if key not in COMPONENT_OF and key not in NAMELESS), None)
    text = named or metadata.get(WORD_KEY) or path.stem
    if problem := explain_word(text):
        advice = "" if named or WORD_KEY in metadata else "; the word is the file's name: rename it"
        raise KroneckerError(f"{path}: the word '{excerpt(text)}' cannot be used: {problem}{advice}")
    vectors: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        component = COMPONENT_OF.get(key, "text_encoder")
        if component in vectors:
            raise KroneckerError(f"{path}: {', '.join(sorted(tensors))} are all for the {component}")
        vectors[component] = _checked(tensor, f"{path}: {excerpt(key)}")
    counts = {component: len(rows) for component, rows in vectors.items()}
    if len({*counts.values()}) > 1:
        raise KroneckerError(f"{path}: the word {text} has not the same number of vectors in its tensors: {counts}")
    return Word(text, vectors)


def _checked(tensor: Tensor, where: str) -> Tensor:
    """Return a word's vectors (n, width) as fp32. Raises KroneckerError if they cannot be such."""
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point():
        raise KroneckerError(f"{where} is of type {str(tensor.dtype).removeprefix('torch.')}, which no embedding has")
    if len(shape) not in (1, 2) or 0 in shape or shape[-1] > WIDEST:
        raise KroneckerError(f"{where} is of the shape {shape}, which no word has: (vectors, width)")
    rows = tensor.float().reshape(-1, shape[-1]).contiguous()
    if len(rows) > MOST_VECTORS:
        raise KroneckerError(f"{where} has {len(rows)} vectors; a prompt holds {MOST_VECTORS} tokens")
    if not rows.isfinite().all():
        raise KroneckerError(f"{where}: its values are not all finite")
    return rows


# ---- writing ----


def word_tensors(word: Word, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return a word's tensors by their names in files. Raises KroneckerError if `dtype` cannot hold them.

    A file with names of encoders needs `word_metadata` too.
    """
    clips = {component: clip for clip, component in COMPONENT_OF.items() if clip != "clip_h"}
    alone = word.vectors.keys() == {"text_encoder"}
    tensors = {
        word.text if alone else clips[component]: rows.detach().cpu().to(dtype).contiguous()
        for component, rows in word.vectors.items()
    }
    if not all(rows.isfinite().all() for rows in tensors.values()):
        raise KroneckerError(f"the vectors of {word.text} are not all finite in {dtype}; nothing was written")
    return tensors


def word_metadata(word: Word) -> dict[str, str]:
    """Return what a file's metadata, without our prefix, say of the word."""
    return {WORD_KEY: word.text}
