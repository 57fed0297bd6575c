"""Files of tensors that can be computed again: complete or absent, with a checksum, and made anew if damaged."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kron_formats.files import whole_file


def load_or_make(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a file. If it is missing or damaged, make and save them."""
    tensors = load_tensors(path)
    if tensors is None:
        tensors = make()
        save_tensors(tensors, path)
    return tensors


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file, completely or not at all, with a checksum of the tensors."""
    with whole_file(path) as unfinished:
        unfinished.write_bytes(save(dict(tensors), metadata={"sha256": _checksum(tensors)}))


def load_tensors(path: Path) -> dict[str, Tensor] | None:
    """Return what `save_tensors` wrote, or None if the file is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (FileNotFoundError, SafetensorError):
        return None
    return tensors if metadata.get("sha256") == _checksum(tensors) else None


def key_of(*parts: bytes) -> str:
    """Return the SHA-256 of parts, in hexadecimal. The lengths of the parts count too."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the values of a tensor of any dtype as they are in memory."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of names, dtypes, shapes and values."""
    parts = []
    for name, tensor in sorted(tensors.items()):
        parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), tensor_bytes(tensor)]
    return key_of(*parts)
