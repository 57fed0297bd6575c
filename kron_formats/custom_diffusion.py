"""Custom Diffusion in files: weights of the UNet's cross-attention that were trained themselves, and perhaps words.

ours         <layer>.attn2.to_k.weight                                   <new1>, or clip_l and clip_g (see words.py)
diffusers'   <layer>.attn2.processor.to_k_custom_diffusion.weight        words in files of their own
the paper's  unet.<layer>.attn2.to_k.weight, CompVis's names too         modifier_token.<new1>, of SDXL .0 and .1

The files of diffusers and of the paper's own code are mostly pickles, those of the paper with dicts in dicts: names in
them are joined by dots. The weights' names are found in the model at hand; here they are only recognised.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from kron_formats import words
from kron_formats.changes import Replacement
from kron_formats.errors import KroneckerError
from kron_formats.files import excerpt
from kron_formats.words import Word

UNET, WORD = "unet.", "modifier_token."  # in the paper's files
PARTS = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")  # of a cross-attention
DIFFUSERS_PARTS = {part: f"processor.{part.replace('.', '_custom_diffusion.', 1)}" for part in PARTS}
ATTENTION = ".attn2."
CLIPS = ("clip_l", "clip_g")  # the text encoders of SDXL, in the order of the paper's lists


def is_custom_diffusion(keys: Iterable[str]) -> bool:
    """Whether tensors with these names are weights of cross-attention and, perhaps, words."""
    weights = [key for key in keys if not _is_word(key)]
    known = {*PARTS, *DIFFUSERS_PARTS.values()}
    return bool(weights) and all(key.partition(ATTENTION)[2] in known for key in weights)


def read_custom_diffusion(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Replacement], tuple[Word, ...]]:
    """Return the weights by their names, and the words. `metadata` are ours, without our prefix.

    Raises KroneckerError if a tensor cannot be a weight or a word.
    """
    weights = {}
    for key, tensor in tensors.items():
        if _is_word(key):
            continue
        if not tensor.is_floating_point() or tensor.dim() not in (1, 2, 4):
            raise KroneckerError(f"{path}: {excerpt(key)} is {tensor.dtype}, {tuple(tensor.shape)}: not a weight")
        weights[key.removeprefix(UNET)] = Replacement(lambda tensor=tensor: tensor, tuple(tensor.shape))
    return weights, tuple(words.read(path, parts, said) for parts, said in _words(tensors, metadata))


def _is_word(key: str) -> bool:
    return key.startswith(WORD) or words.is_word_key(key)


def _words(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterable[tuple[dict[str, Tensor], Mapping[str, str]]]:
    """Yield for each word its tensors by the names that words.py knows, and metadata that say what it is called."""
    encoders = {key: tensors[key] for key in CLIPS if key in tensors}
    if encoders:
        yield encoders, metadata
    pairs: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        text, _, number = key.removeprefix(WORD).rpartition(".")
        if key.startswith(WORD) and text and number in ("0", "1"):
            pairs[text][CLIPS[int(number)]] = tensor
        elif _is_word(key) and key not in CLIPS:
            yield {key.removeprefix(WORD): tensor}, metadata
    for text, parts in pairs.items():
        yield parts, {**metadata, words.WORD_KEY: text}
