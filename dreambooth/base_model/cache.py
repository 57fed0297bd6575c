"""A folder of encodings for later runs: files that are there as a whole or not at all, named after what is in them."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dreambooth.base_model.loading import hub_arguments
from dreambooth.family import Family
from dreambooth.options.base_model import BaseModelOptions, FrozenModelOptions
from kron_formats.files import whole_file


def load_or_make(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a file, or make and save them where it is missing or damaged."""
    tensors = load_tensors(path)
    if tensors is None:
        tensors = make()
        save_tensors(tensors, path)
    return tensors


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file that is there as a whole or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_bytes(save(dict(tensors), metadata={"sha256": _checksum(tensors)}))


def load_tensors(path: Path) -> dict[str, Tensor] | None:
    """Return what `save_tensors` wrote, or None where the file is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (FileNotFoundError, SafetensorError):
        return None
    return tensors if metadata.get("sha256") == _checksum(tensors) else None


def key_of(*parts: bytes) -> str:
    """Return a name for what is made of these parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


# ---- which model ----


def vae_identity(config: FrozenModelOptions) -> bytes:
    """Return a digest of what the VAE's moments depend on, without reading its weights."""
    if config.pretrained_vae_model_name_or_path:
        state = _state(config.pretrained_vae_model_name_or_path, ["."], {"cache_dir": config.cache_dir}, AutoencoderKL)
    else:
        state = _state(config.pretrained_model_name_or_path, ["vae"], hub_arguments(config), DiffusionPipeline)
    return key_of(b"vae", repr((state, config.variant, config.vae_precision)).encode()).encode()


def text_identity(family: Family, config: BaseModelOptions, dtype: torch.dtype) -> bytes:
    """Return a digest of what the embeddings of prompts depend on, without reading the text encoders' weights."""
    parts = [*family.text_encoders, *family.tokenizers, "model_index.json"]
    state = _state(config.pretrained_model_name_or_path, parts, hub_arguments(config), DiffusionPipeline)
    return key_of(b"text", repr((state, config.variant, dtype)).encode()).encode()


def _state(name: str, parts: Iterable[str], hub: Mapping[str, Any], loader: Any) -> str | list[tuple[str, int, int]]:
    """Return what says whether parts of a model are still the same: a model's commit on the Hub; a folder's files, with
    their sizes in bytes and times of change."""
    folder = Path(name)
    if not folder.is_dir():
        _, commit = loader.load_config(name, **hub, return_commit_hash=True)
        return f"{name}@{commit}"
    paths = (path for part in parts for path in [folder / part, *(folder / part).rglob("*")])
    files = [(str(path.resolve()), path.stat()) for path in sorted(paths) if path.is_file()]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in files]


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of names, dtypes, shapes and values."""
    parts = []
    for name, tensor in sorted(tensors.items()):
        parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), _bytes(tensor)]
    return key_of(*parts)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
