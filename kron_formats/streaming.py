"""Large safetensors files, written tensor by tensor: memory for one of them at a time is enough.

The bytes are those that safetensors' own writer makes, which wants all tensors on the CPU at once.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {  # in the order in which safetensors writes them, wide ones first: so every tensor is aligned
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8  # bytes: where the tensors begin is a multiple of it
CHUNK = 2**24  # bytes that are read or written at once


@dataclass(frozen=True)
class Pending:
    """A tensor of which only shape and dtype are known before it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]  # on any device, in any layout; converted to `dtype`


def pending(tensor: Tensor, dtype: torch.dtype | None = None) -> Pending:
    """Return an existing tensor as one to write, in `dtype` or its own."""
    return Pending(tuple(tensor.shape), dtype or tensor.dtype, lambda: tensor)


def stream_tensors(path: str | os.PathLike, tensors: Mapping[str, Pending], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file, reading one tensor after the other; return its SHA-256, of the bytes as they were sent.

    Raises OSError if the file cannot be written, ValueError if a tensor has another shape than was said; then the file
    is half written.
    """
    order = sorted(tensors, key=lambda name: (list(TYPES).index(tensors[name].dtype), name))
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:

        def send(content: bytes | memoryview) -> None:
            digest.update(content)
            while content:
                content = content[file.write(content[:CHUNK]) :]

        send(_header(order, tensors, metadata))
        for name in order:
            send(_content(name, tensors[name]))
    return digest.hexdigest()


def _header(order: list[str], tensors: Mapping[str, Pending], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        shape, dtype = tensors[name].shape, tensors[name].dtype
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        entries[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // ALIGNMENT) * ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _content(name: str, entry: Pending) -> memoryview:
    tensor = entry.read().detach()
    if tuple(tensor.shape) != entry.shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)} instead of {entry.shape}")
    tensor = tensor.to("cpu", entry.dtype).contiguous()
    content: Any = tensor.view(-1).view(torch.uint8).numpy()  # Any: numpy's annotations lack the buffer that it is
    return memoryview(content)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
