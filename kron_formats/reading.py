"""Adapter files of any layout, read into factors.

LoKr        <layer>.lokr_w1, .lokr_w2 (or .lokr_w?_a · .lokr_w?_b), .alpha     kohya, LyCORIS, diffusers, peft, ...
LoRA        <layer>.lora_down.weight, .lora_up.weight, .alpha (or lora_A, lora_B)
reference   <attention>.processor.to_q_lora.down.weight Aᵀ, .up.weight B       the paper's own code
transposed  <layer>.kron_a, .kron_b                                            the same ΔW in our own files

A convolution's kernel (d_out, d_in, k, k) is read as the matrix (d_out, d_in·k·k), and so is its B (b1, b2, k, k): row
by row, A ⊗ B is the same.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kron_formats.names import COMPONENTS, KroneckerError

METADATA_PREFIX = "kronecker."  # of our own metadata keys
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # the metadata key under which diffusers saves peft's configuration
ROLES = {
    "lokr_w1": "w1", "lokr_w1_a": "w1_a", "lokr_w1_b": "w1_b",
    "lokr_w2": "w2", "lokr_w2_a": "w2_a", "lokr_w2_b": "w2_b",
    "alpha": "alpha",
    "kron_a": "kron_a", "kron_b": "kron_b",
    "lora_down.weight": "lora_down", "lora_A.weight": "lora_down", "lora.down.weight": "lora_down",
    "lora_up.weight": "lora_up", "lora_B.weight": "lora_up", "lora.up.weight": "lora_up",
    "down.weight": "reference_down", "up.weight": "reference_up",
}  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """ΔW = A ⊗ B; with `transposed_rows`, its rows in the order of the paper's code.

    That code reads A X Bᵀ column by column: ΔW[b·a1 + a] = (A ⊗ B)[a·b1 + b], which no Kronecker product equals.
    """

    A: Tensor  # (a1, a2) fp32
    B: Tensor  # (b1, b2) fp32
    transposed_rows: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(d_out, d_in)"""
        return self.A.shape[0] * self.B.shape[0], self.A.shape[1] * self.B.shape[1]

    def dense(self) -> Tensor:
        """Return ΔW (d_out, d_in)."""
        product = torch.kron(self.A, self.B)
        return transpose_rows(product, self.A.shape[0]) if self.transposed_rows else product


@dataclass(frozen=True)
class LowRank:
    """ΔW = up · down."""

    up: Tensor  # (d_out, r) fp32
    down: Tensor  # (r, d_in) fp32

    @property
    def size(self) -> tuple[int, int]:
        """(d_out, d_in)"""
        return self.up.shape[0], self.down.shape[1]

    def dense(self) -> Tensor:
        """Return ΔW (d_out, d_in)."""
        return self.up @ self.down


@dataclass(frozen=True)
class AdapterFile:
    path: Path
    layers: dict[str, Factors | LowRank]  # by the file's own layer names
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


def transpose_rows(product: Tensor, a1: int) -> Tensor:
    """Reorder rows a·b1 + b of (a1·b1, ...) to b·a1 + a: the order of the paper's code."""
    return product.unflatten(0, (a1, -1)).transpose(0, 1).flatten(0, 1)


def read_adapter(path: str | os.PathLike) -> AdapterFile:
    """Read an adapter file, or a folder with one file per component as peft writes them.

    Raises KroneckerError, saying what the file is instead, where it is neither a Kronecker adapter nor a LoRA.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    tensors, metadata = _read_tensors(path)
    configs = _peft_configs(path, tensors, metadata)
    parts = defaultdict(dict)
    for key, tensor in tensors.items():
        name, role = _split_key(key)
        parts[name][role] = tensor.float()
    reference_is_lora = all(
        part["reference_down"].shape[0] == part["reference_up"].shape[-1]
        for part in parts.values()
        if "reference_down" in part and "reference_up" in part
    )
    layers = {
        name: _layer(part, path, name, _peft_strength(configs, name), reference_is_lora) for name, part in parts.items()
    }
    file = AdapterFile(path, layers, metadata, all("alpha" in part for part in parts.values()))
    _check_factors(file)
    return file


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise KroneckerError(f"there is no adapter file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            strangers = [key for key in keys if _split_key(key)[1] is None]
            if strangers or not keys:
                raise KroneckerError(f"{path} is not a Kronecker adapter: {describe(strangers)}")
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except SafetensorError as error:
        raise KroneckerError(f"{path} is not a readable safetensors file: {error}") from error


def _split_key(key: str) -> tuple[str, str | None]:
    """Return a layer's name and a tensor's role in it, None where the ending is none that adapters have."""
    for suffix, role in ROLES.items():
        if key.endswith(f".{suffix}"):
            name = key.removesuffix(f".{suffix}").removeprefix(PEFT_PREFIX)
            # OneTrainer's first LoKr files left a dot in kohya's names: ..._attn1.to_q.lokr_w1, ..._attn1_to_q.alpha
            return name.replace(".", "_") if name.startswith("lora_") else name, role
    return key, None


def _read_folder(folder: Path) -> AdapterFile:
    if (folder / PEFT_WEIGHTS).is_file():
        return read_adapter(folder / PEFT_WEIGHTS)
    parts = {name: folder / name / PEFT_WEIGHTS for name in COMPONENTS if (folder / name / PEFT_WEIGHTS).is_file()}
    if not parts:
        raise KroneckerError(
            f"there is no adapter in the folder {folder}: name the .safetensors file itself, or a folder with "
            f"{PEFT_WEIGHTS} or {'/, '.join(COMPONENTS)}/ as peft writes them"
        )
    files = {name: read_adapter(path) for name, path in parts.items()}
    layers = {f"{part}.{name}": layer for part, file in files.items() for name, layer in file.layers.items()}
    metadata = {key: value for file in files.values() for key, value in file.metadata.items()}
    return AdapterFile(folder, layers, metadata)


def _peft_configs(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, dict]:
    """Return beginning of layers' names -> what peft keeps beside their tensors, in a file or in diffusers' metadata.

    Raises KroneckerError where the tensors are peft's and their configuration is not there.
    """
    if any(key.startswith(PEFT_PREFIX) for key in tensors):
        try:
            return {"": json.loads((path.parent / PEFT_CONFIG).read_text())}
        except (OSError, json.JSONDecodeError) as error:
            raise KroneckerError(
                f"{path} is peft's, but its strength is unknown: {PEFT_CONFIG} beside it: {error}"
            ) from error
    config = json.loads(metadata.get(DIFFUSERS_CONFIG, "{}"))
    if "r" in config:
        return {"": config}
    parts = defaultdict(dict)
    for key, value in config.items():
        component, _, option = key.partition(".")
        parts[f"{component}."][option] = value
    return parts


def _peft_strength(configs: Mapping[str, dict], name: str) -> float:
    """Return alpha / r of a layer, by which peft multiplies full factors too; 1 where the file is not peft's."""
    prefix = next((prefix for prefix in configs if name.startswith(prefix)), None)
    if prefix is None:
        return 1.0
    config, path = configs[prefix], name.removeprefix(prefix)

    def value(pattern: str, default: float) -> float:
        patterns = config.get(pattern) or {}
        return next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", path)), default)

    try:
        alpha = value("alpha_pattern", config["alpha" if "alpha" in config else "lora_alpha"])
        r = value("rank_pattern", config["r"])
    except KeyError as error:
        raise KroneckerError(f"the strength of {name} is unknown: peft's configuration has no {error}") from error
    return alpha / (r**0.5 if config.get("use_rslora") else r)


def _layer(parts: dict[str, Tensor], path: Path, name: str, scale: float, reference_is_lora: bool) -> Factors | LowRank:
    """Return ΔW of one layer from its tensors. Raises KroneckerError where they make none."""
    where, roles = f"{path}: {name}", set(parts) - {"alpha"}
    alpha = parts["alpha"].item() if "alpha" in parts else None
    if any(role.startswith("w") for role in roles):
        (A, rank_a), (B, rank_b) = _lokr_factor(parts, "w1", where), _lokr_factor(parts, "w2", where)
        rank = rank_b or rank_a
        if rank and alpha is not None:
            scale *= alpha / rank  # where both factors are full, LyCORIS and ComfyUI ignore alpha
        layer = Factors(A * scale, B)
    elif roles == {"kron_a", "kron_b"}:
        layer = Factors(parts["kron_a"], parts["kron_b"].flatten(1), transposed_rows=True)
    elif roles == {"reference_down", "reference_up"} and not reference_is_lora:
        layer = Factors(parts["reference_down"].t(), parts["reference_up"], transposed_rows=True)
    elif roles in ({"lora_down", "lora_up"}, {"reference_down", "reference_up"}):
        down, up = (parts[role] for role in sorted(roles))
        down, up = down.flatten(1), up.flatten(1)
        if up.shape[1] != down.shape[0]:
            raise KroneckerError(f"{where}: {tuple(up.shape)} times {tuple(down.shape)} is no LoRA")
        layer = LowRank(up * (scale if alpha is None else scale * alpha / down.shape[0]), down)
    elif roles & {"lora_down", "lora_up"}:
        raise KroneckerError(
            f"{path} is not a Kronecker adapter: it is a LoRA file; {name} has only {', '.join(sorted(roles))}"
        )
    else:
        raise KroneckerError(f"{where} does not hold two factors, but {', '.join(sorted(roles)) or 'an alpha alone'}")
    if not all(torch.isfinite(tensor).all() for tensor in parts.values()):
        raise KroneckerError(f"{path}: the factors of {name} are not all finite")
    return layer


def _lokr_factor(parts: dict[str, Tensor], role: str, where: str) -> tuple[Tensor, int | None]:
    """Return a factor, multiplied out where it is stored as a product, and that product's rank."""
    full, left, right = (parts.get(f"{role}{ending}") for ending in ("", "_a", "_b"))
    if full is not None and (full.dim() == 2 or (full.dim() == 4 and role == "w2")):
        return full.flatten(1), None
    if left is not None and right is not None and left.dim() == right.dim() == 2:
        return left @ right, right.shape[0]
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(parts.items()) if name != "alpha")
    raise KroneckerError(f"{where} does not hold two full factors lokr_w1 and lokr_w2, but {shapes}")


def _check_factors(file: AdapterFile) -> None:
    """Raise KroneckerError where the shapes of A are not what the metadata says: swapped or transposed factors."""
    own = file.own_metadata
    everywhere = [int(own[key]) for key in ("a1", "a2") if own.get(key, "").isdigit()]
    said = json.loads(own.get("factors", "{}"))
    for name, layer in file.layers.items():
        expected = said.get(name, everywhere)
        if isinstance(layer, Factors) and len(expected) == 2 and tuple(layer.A.shape) != tuple(expected):
            (a1, a2), (b1, b2) = layer.A.shape, layer.B.shape
            swapped = "; A and B seem to be swapped" if (b1, b2) == tuple(expected) else ""
            transposed = "; A seems to be transposed" if (a2, a1) == tuple(expected) else ""
            raise KroneckerError(
                f"{file.path}: {name} holds factors for {a2 * b2} to {a1 * b1} features with A {(a1, a2)}, "
                f"the file's metadata says {tuple(expected)}{swapped}{transposed}"
            )


def describe(keys: Sequence[str]) -> str:
    """Say in words what a safetensors file with these keys seems to be."""
    signs = (
        (("hada_w1",), "it is a LoHa file"),
        (("lokr_t2",), "it is a LoKr file with Tucker-decomposed factors of convolutions, which are not supported"),
        (("dora_scale", "lora_magnitude_vector"), "it is a DoRA file"),
        (("bundle_emb.",), "it has embeddings in it (bundle_emb); save the adapter without them"),
        (("model.diffusion_model.", "first_stage_model."), "it is a whole Stable Diffusion checkpoint"),
        (("down_blocks.", "up_blocks."), "it holds a UNet's own weights"),
        (("encoder.layers.",), "it holds a text encoder's own weights"),
    )
    for parts, words in signs:
        if any(part in key for key in keys for part in parts):
            return words
    return f"its {len(keys)} tensors have other names, for example {', '.join(keys[:3])}" if keys else "it is empty"
