"""Kronecker adapters and LoRAs of any tool: their tensors, put together into the change of each layer.

LoKr        <layer>.lokr_w1, .lokr_w2 (or .lokr_w?_a · .lokr_w?_b), .alpha     kohya, LyCORIS, diffusers, peft, ...
LoRA        <layer>.lora_down.weight, .lora_up.weight, .alpha (or lora_A, lora_B)
reference   <attention>.processor.to_q_lora.down.weight Aᵀ, .up.weight B       the paper's own code
transposed  <layer>.kron_a, .kron_b                                            the same ΔW in our own files

A convolution's kernel (d_out, d_in, k, k) is read as the matrix (d_out, d_in·k·k), and so is its B (b1, b2, k, k): row
by row, A ⊗ B is the same.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from kron_formats.changes import LowRank, StoredFactors
from kron_formats.errors import KroneckerError
from kron_formats.files import excerpt
from kron_formats.strength import PEFT_PREFIX, peft_configs, peft_strength

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


def is_factors(keys: Collection[str]) -> bool:
    """Whether tensors with these names are those of a Kronecker adapter or a LoRA."""
    return bool(keys) and not other_keys(keys)


def other_keys(keys: Iterable[str]) -> list[str]:
    """Return the names that no tensor of a Kronecker adapter or a LoRA has."""
    return [key for key in keys if _split_key(key) is None]


def read_factors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, StoredFactors | LowRank], bool]:
    """Return the change of each layer, by the file's own names, and whether every layer has an alpha.

    Raises KroneckerError if the tensors are not those of whole layers.
    """
    configs = peft_configs(path, tensors, metadata)
    parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        name, role = _split_key(key) or ("", "")
        if len(name) > LONGEST_NAME or not NAME.fullmatch(name):
            raise KroneckerError(f"{path} cannot be used as an adapter: no layer is called {excerpt(name)}")
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
    return layers, all("alpha" in part for part in parts.values())


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
            f"{path} cannot be used as an adapter: it is a LoRA file; {name} has only {', '.join(sorted(roles))}"
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
