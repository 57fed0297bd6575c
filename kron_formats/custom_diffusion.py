"""Custom Diffusion in files: weights of the UNet's cross-attention that were trained themselves, and perhaps words.

ours         <layer>.attn2.to_k.weight                                   <new1>, or clip_l and clip_g (see words.py)
diffusers'   <layer>.attn2.processor.to_k_custom_diffusion.weight        words in files of their own
the paper's  unet.<layer>.attn2.to_k.weight, CompVis's names too         modifier_token.<new1>, of SDXL .0 and .1

The files of diffusers and of the paper's own code are mostly pickles, those of the paper with dicts in dicts: names in
them are joined by dots. The weights' names are found in the model at hand; here they are only recognised.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kron_formats import words
from kron_formats.changes import Change, Replacement
from kron_formats.errors import KroneckerError
from kron_formats.files import excerpt, whole_file
from kron_formats.names import Layer
from kron_formats.words import Word

UNET, WORD = "unet.", "modifier_token."  # in the paper's files
PARTS = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")  # of a cross-attention
DIFFUSERS_PARTS = {part: f"processor.{part.replace('.', '_custom_diffusion.', 1)}" for part in PARTS}
ATTENTION = ".attn2."
DIFFUSERS_WEIGHTS = "pytorch_custom_diffusion_weights.bin"
FILE_NAME = re.compile(r"<?[\w-]+>?")  # a word that can be a file's name everywhere
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


def write_diffusers_custom_diffusion(
    folder: Path, layers: Mapping[Layer, Change], found: Collection[Word], attentions: Iterable[str], dtype: torch.dtype
) -> None:
    """Write a folder with pytorch_custom_diffusion_weights.bin and <word>.bin, as diffusers' own training does.

    `attentions` are the paths of all of the UNet's: diffusers wants an entry, though an empty one, for each.

    Raises KroneckerError, with nothing written, if diffusers has no place for a weight or a word.
    """
    weights: dict[str, Any] = {}
    for layer, change in layers.items():
        path, _, part = f"{layer.name}.{layer.parameter}".partition(ATTENTION)
        if layer.component != "unet" or part not in PARTS or not isinstance(change, Replacement):
            raise KroneckerError(
                f"{layer.dotted} is not a weight of cross-attention, which alone Custom Diffusion trains"
            )
        weights[f"{path}{ATTENTION}{DIFFUSERS_PARTS[part]}"] = change.read().to(dtype).contiguous()
    for attention in attentions:
        held = {part for part in PARTS if f"{attention}.{DIFFUSERS_PARTS[part]}" in weights}
        if f".{attention}".endswith(ATTENTION[:-1]) and held not in ({*PARTS}, {"to_k.weight", "to_v.weight"}):
            has = ", ".join(sorted(held)) or "none"
            raise KroneckerError(f"diffusers takes K and V of every cross-attention, or all: {attention} has {has}")
        if not held:
            weights[f"{attention}.processor"] = {}
    for word in found:
        if [*word.vectors] != ["text_encoder"] or not FILE_NAME.fullmatch(word.text):
            raise KroneckerError(
                f"diffusers' files of Custom Diffusion have no place for the word {excerpt(word.text)}: they are for "
                "one text encoder, and the word is the file's name"
            )
    folder.mkdir()
    _save(folder / DIFFUSERS_WEIGHTS, weights)
    for word in found:
        vectors = word.vectors["text_encoder"].to(dtype)
        _save(folder / f"{word.text}.bin", {word.text: vectors[0] if word.count == 1 else vectors})


def _save(path: Path, content: dict[str, Any]) -> None:
    with whole_file(path, durable=True) as unfinished:
        torch.save(content, unfinished)


def custom_diffusion_snippet(folder: Path, found: Collection[Word]) -> str:
    """Return the code that loads what `write_diffusers_custom_diffusion` wrote into a pipeline `pipe`.

    diffusers' documented unet.load_attn_procs returns without an error and changes nothing (0.25 to 0.42).
    """
    lines = [
        f'    weights = torch.load("{folder.absolute() / DIFFUSERS_WEIGHTS}", weights_only=True)',
        "    pipe.unet.set_attn_processor(pipe.unet._process_custom_diffusion(state_dict=weights))",
        "    pipe.unet.to(pipe.device, pipe.dtype)",
    ]
    for word in found:
        lines.append(f'    pipe.load_textual_inversion("{folder.absolute()}", weight_name="{word.text}.bin")')
    return "\n".join(lines)
