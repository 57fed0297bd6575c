"""Adapter files of any layout, read into factors.

LoKr        <layer>.lokr_w1, .lokr_w2 (or .lokr_w?_a · .lokr_w?_b), .alpha     kohya, LyCORIS, diffusers, peft, ...
LoRA        <layer>.lora_down.weight, .lora_up.weight, .alpha (or lora_A, lora_B)
reference   <attention>.processor.to_q_lora.down.weight Aᵀ, .up.weight B       the paper's own code
transposed  <layer>.kron_a, .kron_b                                            the same ΔW in our own files

A convolution's kernel (d_out, d_in, k, k) is read as the matrix (d_out, d_in·k·k), and so is its B (b1, b2, k, k): row
by row, A ⊗ B is the same.
"""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from kron_formats.errors import KroneckerError
from kron_formats.families import COMPONENTS
from kron_formats.files import excerpt, is_pickle, open_safetensors, read_pickle
from kron_formats.layout import Layout, read_layout
from kron_formats.strength import PEFT_PREFIX, peft_configs, peft_strength

METADATA_PREFIX = "kronecker."  # of the metadata keys that are ours
PEFT_WEIGHTS = "adapter_model.safetensors"
ROLES = {
    "lokr_w1": "w1", "lokr_w1_a": "w1_a", "lokr_w1_b": "w1_b",
    "lokr_w2": "w2", "lokr_w2_a": "w2_a", "lokr_w2_b": "w2_b",
    "alpha": "alpha",
    "kron_a": "kron_a", "kron_b": "kron_b",
    "lora_down.weight": "lora_down", "lora_A.weight": "lora_down", "lora.down.weight": "lora_down",
    "lora_up.weight": "lora_up", "lora_B.weight": "lora_up", "lora.up.weight": "lora_up",
    "down.weight": "reference_down", "up.weight": "reference_up",
}  # fmt: skip
KERNELS = ("w2", "kron_b", "lora_down", "lora_up")  # what may have 4 sides
LOKR = tuple(  # what makes a layer of LoKr
    {*first.split(), *second.split()} for first in ("w1", "w1_a w1_b") for second in ("w2", "w2_a w2_b")
)
NAME = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)  # of a layer
LONGEST_NAME = 256  # characters
LARGEST_LAYER = 2**26  # entries of ΔW: twice the largest of SDXL, 1280 x 2560·3·3
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)  # some tools save an alpha as one
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class LowRank:
    """ΔW, or a factor of it, as up · down."""

    up: Tensor  # (d_out, r) fp32
    down: Tensor  # (r, d_in) fp32

    @property
    def size(self) -> tuple[int, int]:
        """(d_out, d_in)"""
        return self.up.shape[0], self.down.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def numel(self) -> int:
        """Return how many numbers are stored."""
        return self.up.numel() + self.down.numel()

    def isfinite(self) -> Tensor:
        return self.up.isfinite().all() & self.down.isfinite().all()

    def dense(self) -> Tensor:
        """Return the product (d_out, d_in), fp64."""
        return self.up.double() @ self.down.double()


@dataclass(frozen=True)
class Factors:
    """ΔW = A ⊗ B; with `transposed_rows`, its rows in the order of the paper's code.

    That code reads A X Bᵀ column by column: ΔW[b·a1 + a] = (A ⊗ B)[a·b1 + b], which no Kronecker product equals.
    """

    A: Tensor  # (a1, a2)
    B: Tensor  # (b1, b2)
    transposed_rows: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(d_out, d_in)"""
        return self.A.shape[0] * self.B.shape[0], self.A.shape[1] * self.B.shape[1]

    def isfinite(self) -> Tensor:
        return self.A.isfinite().all() & self.B.isfinite().all()

    def dense(self) -> Tensor:
        """Return ΔW (d_out, d_in), fp64: exact."""
        product = torch.kron(self.A.double(), self.B.double())
        return transpose_rows(product, self.A.shape[0]) if self.transposed_rows else product


@dataclass(frozen=True)
class StoredFactors:
    """Factors as a file holds them: each whole, or as a product of low rank, which can be far larger than the file.

    They are multiplied out once their size is known to be that of a layer: `match_layers` returns Factors.
    """

    A: Tensor | LowRank  # (a1, a2) fp32
    B: Tensor | LowRank  # (b1, b2) fp32
    transposed_rows: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(d_out, d_in)"""
        return self.A.shape[0] * self.B.shape[0], self.A.shape[1] * self.B.shape[1]

    def numel(self) -> int:
        """Return how many numbers are stored."""
        return self.A.numel() + self.B.numel()

    def isfinite(self) -> Tensor:
        return self.A.isfinite().all() & self.B.isfinite().all()

    def multiplied(self) -> Factors:
        A, B = (factor.dense().float() if isinstance(factor, LowRank) else factor for factor in (self.A, self.B))
        return Factors(A, B, self.transposed_rows)


@dataclass(frozen=True)
class AdapterFile:
    path: Path
    layers: dict[str, StoredFactors | LowRank]  # by the file's own layer names
    metadata: dict[str, str]
    has_alphas: bool = False  # whether every layer has one

    @property
    def is_lora(self) -> bool:
        return any(isinstance(entry, LowRank) for entry in self.layers.values())

    @property
    def from_peft(self) -> bool:
        return self.path.is_dir() or self.path.name == PEFT_WEIGHTS

    @property
    def own_metadata(self) -> dict[str, str]:
        """What we wrote, without our prefix."""
        return {k.removeprefix(METADATA_PREFIX): v for k, v in self.metadata.items() if k.startswith(METADATA_PREFIX)}

    @cached_property
    def layout(self) -> Layout:
        """What our metadata says about the layers. Raises KroneckerError if it is not valid."""
        return read_layout(self.own_metadata, str(self.path))


def transpose_rows(product: Tensor, a1: int) -> Tensor:
    """Reorder rows a·b1 + b of (a1·b1, ...) to b·a1 + a: the order of the paper's code."""
    return product.unflatten(0, (a1, -1)).transpose(0, 1).flatten(0, 1)


def read_adapter(path: str | os.PathLike, allow_pickle: bool = False) -> AdapterFile:
    """Read an adapter file, or a folder with one file per component as peft writes them.

    `allow_pickle` reads archives of torch.save too, tensors alone, for the .bin files of the paper's code.

    Raises KroneckerError, saying what the file is instead, if it is neither a Kronecker adapter nor a LoRA.
    """
    path = Path(path)
    if os.path.isdir(path):
        return _read_folder(path)
    tensors, metadata = _read_tensors(path, allow_pickle)
    names_and_roles = _split_keys(path, list(tensors))
    configs = peft_configs(path, tensors, metadata)
    parts = defaultdict(dict)
    for (name, role), (key, tensor) in zip(names_and_roles, tensors.items()):
        if role in parts[name]:
            raise KroneckerError(f"{path}: {name} is in it twice, under different names, for example {key}")
        parts[name][role] = _checked(tensor, role, f"{path}: {key}")
    reference_is_lora = all(
        part["reference_down"].shape[0] == part["reference_up"].shape[-1]
        for part in parts.values()
        if "reference_down" in part and "reference_up" in part
    )
    layers = {
        name: _layer(part, path, name, peft_strength(configs, name, path), reference_is_lora)
        for name, part in parts.items()
    }
    file = AdapterFile(path, layers, metadata, all("alpha" in part for part in parts.values()))
    _check_factors(file)
    return file


def read_kronecker(path: str | os.PathLike) -> AdapterFile:
    """Return the factors in an adapter file of any layout, by the file's own layer names, and its metadata.

    Raises KroneckerError, saying what the file is instead, if it is not a Kronecker adapter.
    """
    file = read_adapter(path)
    if file.is_lora:
        raise is_lora_error(file.path)
    return file


def is_lora_error(path: Path) -> KroneckerError:
    return KroneckerError(
        f"{path} is not a Kronecker adapter: it is a LoRA file; load it with pipe.load_lora_weights, or make a "
        "Kronecker adapter of it with scripts/convert.py --to native"
    )


def _read_tensors(path: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    if allow_pickle and is_pickle(path):
        return read_pickle(path), {}
    with open_safetensors(path) as file:
        keys = list(file.keys())
        _split_keys(path, keys)  # what is not an adapter is refused before its tensors are read
        return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}


def _split_keys(path: Path, keys: Sequence[str]) -> list[tuple[str, str]]:
    """Return (layer's name, tensor's role in it) for each key. Raises KroneckerError if one is not an adapter's."""
    names = {key: _split_key(key) for key in keys}
    unknown = [key for key, split in names.items() if split is None]
    if unknown or not keys:
        raise KroneckerError(f"{path} is not a Kronecker adapter: {describe(unknown)}")
    split_keys = [split for split in names.values() if split is not None]
    for name, _ in split_keys:
        if len(name) > LONGEST_NAME or not NAME.fullmatch(name):
            raise KroneckerError(f"{path} is not a Kronecker adapter: no layer is called {excerpt(name)}")
    return split_keys


def _split_key(key: str) -> tuple[str, str] | None:
    """Return a layer's name and a tensor's role in it; None if no adapter's tensor ends so."""
    for suffix, role in ROLES.items():
        if key.endswith(f".{suffix}"):
            name = key.removesuffix(f".{suffix}").removeprefix(PEFT_PREFIX)
            # OneTrainer's first LoKr files left a dot in kohya's names: ..._attn1.to_q.lokr_w1, ..._attn1_to_q.alpha
            return name.replace(".", "_") if name.startswith("lora_") else name, role
    return None


def _checked(tensor: Tensor, role: str, where: str) -> Tensor:
    """Return a tensor as fp32. Raises KroneckerError if it cannot be part of an adapter."""
    shape = tuple(tensor.shape)
    sides = {0, 1} if role == "alpha" else {2, 4} if role in KERNELS else {2}
    if tensor.dtype not in FLOATS and not (role == "alpha" and tensor.dtype in INTEGERS):
        raise KroneckerError(f"{where} is of type {str(tensor.dtype).removeprefix('torch.')}, which no factor has")
    if len(shape) not in sides or 0 in shape or (role == "alpha" and tensor.numel() != 1):
        raise KroneckerError(f"{where} is of the shape {shape}, which cannot be right")
    tensor = tensor.float()
    if not tensor.isfinite().all():
        raise KroneckerError(f"{where}: its values are not all finite")
    return tensor


def _read_folder(folder: Path) -> AdapterFile:
    if os.path.isfile(folder / PEFT_WEIGHTS):
        return read_adapter(folder / PEFT_WEIGHTS)
    found = {path.parent.name: path for path in sorted(folder.glob(f"*/{PEFT_WEIGHTS}")) if path.is_file()}
    if unknown := found.keys() - {*COMPONENTS}:
        raise KroneckerError(
            f"{folder} has adapters for {', '.join(map(excerpt, sorted(unknown)))}, which is not among the components "
            f"that adapters are known for: {', '.join(COMPONENTS)}. Name the folder of one component"
        )
    parts = {name: found[name] for name in COMPONENTS if name in found}
    if not parts:
        raise KroneckerError(
            f"there is no adapter in the folder {folder}: name the .safetensors file itself, or a folder with "
            f"{PEFT_WEIGHTS} or {'/, '.join(COMPONENTS)}/ as peft writes them"
        )
    files = {name: read_adapter(path) for name, path in parts.items()}
    layers = {f"{part}.{name}": layer for part, file in files.items() for name, layer in file.layers.items()}
    metadata = {key: value for file in files.values() for key, value in file.metadata.items()}
    return AdapterFile(folder, layers, metadata)


def _layer(
    parts: dict[str, Tensor], path: Path, name: str, scale: float, reference_is_lora: bool
) -> StoredFactors | LowRank:
    """Return ΔW of one layer from its tensors. Raises KroneckerError if they are not those of one."""
    where, roles = f"{path}: {name}", set(parts) - {"alpha"}
    alpha = parts["alpha"].item() if "alpha" in parts else None
    if roles in LOKR:
        (A, rank_a), (B, rank_b) = _lokr_factor(parts, "w1", where), _lokr_factor(parts, "w2", where)
        rank = rank_b or rank_a
        if rank and alpha is not None:
            scale *= alpha / rank  # if both factors are whole, LyCORIS and ComfyUI ignore alpha
        layer = StoredFactors(LowRank(A.up * scale, A.down) if isinstance(A, LowRank) else A * scale, B)
    elif roles == {"kron_a", "kron_b"}:
        layer = StoredFactors(parts["kron_a"], parts["kron_b"].flatten(1), transposed_rows=True)
    elif roles == {"reference_down", "reference_up"} and not reference_is_lora:
        layer = StoredFactors(parts["reference_down"].t(), parts["reference_up"], transposed_rows=True)
    elif roles in ({"lora_down", "lora_up"}, {"reference_down", "reference_up"}):
        down, up = (parts[role].flatten(1) for role in sorted(roles))
        layer = _product(up * (scale if alpha is None else scale * alpha / down.shape[0]), down, where)
    elif roles & {"lora_down", "lora_up"}:
        raise KroneckerError(
            f"{path} is not a Kronecker adapter: it is a LoRA file; {name} has only {', '.join(sorted(roles))}"
        )
    else:
        held = ", ".join(f"{role} {tuple(parts[role].shape)}" for role in sorted(roles)) or "an alpha alone"
        raise KroneckerError(f"{where} does not hold two full factors lokr_w1 and lokr_w2, but {held}")
    if prod(layer.size) > LARGEST_LAYER:
        raise KroneckerError(f"{where} maps {layer.size[1]} to {layer.size[0]} features: no layer is that large")
    if not layer.isfinite():
        raise KroneckerError(f"{where}: its factors are not all finite at the strength of {scale:.3g}")
    return layer


def _lokr_factor(parts: dict[str, Tensor], role: str, where: str) -> tuple[Tensor | LowRank, int | None]:
    """Return a factor, and its rank if it is stored as a product."""
    if role in parts:
        return parts[role].flatten(1), None
    product = _product(parts[f"{role}_a"], parts[f"{role}_b"], where)
    return product, product.down.shape[0]


def _product(up: Tensor, down: Tensor, where: str) -> LowRank:
    if up.shape[1] != down.shape[0]:
        raise KroneckerError(f"{where}: {tuple(up.shape)} times {tuple(down.shape)} is not a product")
    return LowRank(up, down)


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
        (("down_blocks.", "up_blocks."), "it holds a UNet's own weights"),
        (("encoder.layers.",), "it holds a text encoder's own weights"),
    )
    for parts, words in signs:
        if any(part in key for key in keys for part in parts):
            return words
    examples = ", ".join(map(excerpt, keys[:3]))
    return f"its {len(keys)} tensors have other names, for example {examples}" if keys else "it is empty"
