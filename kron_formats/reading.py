"""Files of every method, recognised by the names of their tensors and read into what they change.

factors.py            Kronecker adapters and LoRAs
shifts.py             spectral shifts (SVDiff)
custom_diffusion.py   weights of cross-attention that were trained themselves, with words beside them or without
words.py              words alone (Textual Inversion)
trained_models.py     folders of a pipeline, or of one component, that was trained in full
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from kron_formats import shifts, words
from kron_formats.changes import Change, LowRank, StoredFactors
from kron_formats.custom_diffusion import is_custom_diffusion, read_custom_diffusion
from kron_formats.errors import KroneckerError
from kron_formats.factors import is_factors, other_keys, read_factors
from kron_formats.families import COMPONENTS
from kron_formats.files import excerpt, is_pickle, open_safetensors, read_pickle
from kron_formats.layout import Layout, own_metadata, read_layout
from kron_formats.trained_models import PIPELINE, is_trained_model, read_trained_model
from kron_formats.words import Word

PEFT_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFile:
    """What a file, or a folder, holds."""

    path: Path
    noun: str  # what it is: "a LoRA"
    layers: Mapping[str, Change]  # by the file's own names
    metadata: Mapping[str, str]
    words: tuple[Word, ...] = ()
    has_alphas: bool = False  # whether every layer has one
    is_whole: bool = False  # whether it has to hold every parameter of the components that it changes

    @property
    def is_lora(self) -> bool:
        return any(isinstance(entry, LowRank) for entry in self.layers.values())

    @property
    def is_kronecker(self) -> bool:
        """Whether all that it holds are Kronecker factors."""
        return bool(self.layers) and all(isinstance(entry, StoredFactors) for entry in self.layers.values())

    @property
    def needs_weights(self) -> bool:
        """Whether what it changes depends on the base model's weights."""
        return any(entry.needs_weight for entry in self.layers.values())

    @property
    def from_peft(self) -> bool:
        return not self.is_whole and (self.path.is_dir() or self.path.name == PEFT_WEIGHTS)

    @property
    def own_metadata(self) -> dict[str, str]:
        """What we wrote, without our prefix."""
        return own_metadata(self.metadata)

    @cached_property
    def layout(self) -> Layout:
        """What our metadata says about the layers. Raises KroneckerError if it is not valid."""
        return read_layout(self.own_metadata, str(self.path))


def read_adapter(path: str | os.PathLike, allow_pickle: bool = False) -> AdapterFile:
    """Read a file of any method, or a folder: of a pipeline, of one component, or as peft writes them.

    `allow_pickle` reads archives of torch.save too, tensors alone: the .bin files of the paper's code and of Custom
    Diffusion.

    Raises KroneckerError, saying what the file is instead, if it is of no method.
    """
    path = Path(path)
    if os.path.isdir(path):
        return _read_folder(path)
    if allow_pickle and is_pickle(path):
        tensors, metadata = read_pickle(path), {}
        read = _reader_of(path, list(tensors))
    else:
        with open_safetensors(path) as file:
            keys, metadata = list(file.keys()), file.metadata() or {}
            read = _reader_of(path, keys)  # what is of no method is refused before its tensors are read
            tensors = {key: file.get_tensor(key) for key in keys}
    return read(path, tensors, metadata)


def read_kronecker(path: str | os.PathLike) -> AdapterFile:
    """Return the factors in an adapter file of any layout, by the file's own layer names, and its metadata.

    Raises KroneckerError, saying what the file is instead, if it is not a Kronecker adapter.
    """
    file = read_adapter(path)
    if not file.is_kronecker:
        raise not_kronecker_error(file)
    return file


def not_kronecker_error(file: AdapterFile) -> KroneckerError:
    """Return the error that says what a file of another method is, and where it goes."""
    if file.is_lora:
        where = "load it with pipe.load_lora_weights, or make a Kronecker adapter of it with convert.py --to native"
    else:
        where = "scripts/generate.py, evaluate.py and merge.py take it, and convert.py --inspect says more"
    return KroneckerError(f"{file.path} is not a Kronecker adapter: it is {file.noun}; {where}")


# ---- the kinds of files ----

Tensors = Mapping[str, Tensor]
Metadata = Mapping[str, str]
Read = Callable[[Path, Tensors, Metadata], AdapterFile]


def _reader_of(path: Path, keys: Sequence[str]) -> Read:
    """Return what reads a file with these tensors. Raises KroneckerError, saying what it is, if it is of no method."""
    for is_kind, read in KINDS:
        if is_kind(keys):
            return read
    raise KroneckerError(f"{path} cannot be used as an adapter: {describe(other_keys(keys))}")


def _read_factors(path: Path, tensors: Tensors, metadata: Metadata) -> AdapterFile:
    layers, has_alphas = read_factors(path, tensors, metadata)
    is_lora = any(isinstance(entry, LowRank) for entry in layers.values())
    noun = "a LoRA" if is_lora else "a Kronecker adapter"
    file = AdapterFile(path, noun, layers, metadata, has_alphas=has_alphas)
    _check_factors(file)
    return file


def _read_shifts(path: Path, tensors: Tensors, metadata: Metadata) -> AdapterFile:
    return AdapterFile(path, "an SVDiff file", shifts.read(path, tensors, metadata), metadata)


def _read_custom_diffusion(path: Path, tensors: Tensors, metadata: Metadata) -> AdapterFile:
    weights, found = read_custom_diffusion(path, tensors, own_metadata(metadata))
    return AdapterFile(path, "a Custom Diffusion file", weights, metadata, found)


def _read_word(path: Path, tensors: Tensors, metadata: Metadata) -> AdapterFile:
    word = words.read(path, tensors, own_metadata(metadata))
    return AdapterFile(path, "a word (Textual Inversion)", {}, metadata, (word,))


KINDS: tuple[tuple[Callable[[Sequence[str]], bool], Read], ...] = (
    (is_factors, _read_factors),
    (shifts.is_shifts, _read_shifts),
    (is_custom_diffusion, _read_custom_diffusion),
    (words.is_words, _read_word),
)


def _read_folder(folder: Path) -> AdapterFile:
    if os.path.isfile(folder / PEFT_WEIGHTS):
        return read_adapter(folder / PEFT_WEIGHTS)
    if is_trained_model(folder):
        return AdapterFile(folder, "a model that was trained in full", read_trained_model(folder), {}, is_whole=True)
    found = {path.parent.name: path for path in sorted(folder.glob(f"*/{PEFT_WEIGHTS}")) if path.is_file()}
    if unknown := found.keys() - {*COMPONENTS}:
        raise KroneckerError(
            f"{folder} has adapters for {', '.join(map(excerpt, sorted(unknown)))}, which is not among the components "
            f"that adapters are known for: {', '.join(COMPONENTS)}. Name the folder of one component"
        )
    parts = {name: found[name] for name in COMPONENTS if name in found}
    if not parts:
        if models := [path.parent for path in sorted(folder.glob(f"*/{PIPELINE}"))]:
            raise KroneckerError(f"there is no adapter in the folder {folder}, but a model in it: name {models[0]}")
        raise KroneckerError(
            f"there is no adapter in the folder {folder}: name the .safetensors file itself, a folder with "
            f"{PEFT_WEIGHTS} or {'/, '.join(COMPONENTS)}/ as peft writes them, or one with model_index.json"
        )
    files = {name: read_adapter(path) for name, path in parts.items()}
    layers = {f"{part}.{name}": layer for part, file in files.items() for name, layer in file.layers.items()}
    metadata = {key: value for file in files.values() for key, value in file.metadata.items()}
    return AdapterFile(folder, next(iter(files.values())).noun, layers, metadata)


def _check_factors(file: AdapterFile) -> None:
    """Raise KroneckerError if the shapes of A are not what the metadata says: swapped or transposed factors."""
    for name, layer in file.layers.items():
        expected = file.layout.shape_of(name)
        if isinstance(layer, StoredFactors) and expected and tuple(layer.A.shape) != expected:
            (a1, a2), (b1, b2) = layer.A.shape, layer.B.shape
            swapped = "; A and B seem to be swapped" if (b1, b2) == expected else ""
            transposed = "; A seems to be transposed" if (a2, a1) == expected else ""
            raise KroneckerError(
                f"{file.path}: {name} holds factors for {a2 * b2} to {a1 * b1} features with A {(a1, a2)}, "
                f"the file's metadata says {expected}{swapped}{transposed}"
            )


def describe(keys: Sequence[str]) -> str:
    """Return in words what a safetensors file with these keys seems to be."""
    signs = (
        (("hada_w1",), "it is a LoHa file"),
        (("lokr_t2",), "it is a LoKr file with Tucker-decomposed factors of convolutions, which are not supported"),
        (("dora_scale", "lora_magnitude_vector"), "it is a DoRA file"),
        (("bundle_emb.",), "it holds embeddings too (bundle_emb); save the adapter without them"),
        (("model.diffusion_model.", "first_stage_model."), "it is a whole Stable Diffusion checkpoint"),
        ((".weight.u",), "it is a compressed Custom Diffusion file; use the one that it was made from"),
        (("down_blocks.", "up_blocks."), "it holds a UNet's own weights; name the folder that it is in"),
        (("encoder.layers.",), "it holds a text encoder's own weights; name the folder that it is in"),
    )
    for parts, description in signs:
        if any(part in key for key in keys for part in parts):
            return description
    examples = ", ".join(map(excerpt, keys[:3]))
    return f"its {len(keys)} tensors have other names, for example {examples}" if keys else "it is empty"
