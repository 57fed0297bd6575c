"""W + A ⊗ B in a copy of a base model: a pipeline folder, or a single file in the layout of Stability's code."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kron_formats.changes import Change
from kron_formats.errors import KroneckerError
from kron_formats.families import Family
from kron_formats.files import open_safetensors, write_text
from kron_formats.merging import merged_weight
from kron_formats.names import Layer
from kron_formats.paths import shared_name
from kron_formats.single_file import family_of_file, read_header
from kron_formats.writing import write_tensors

STACKED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # in one tensor of OpenCLIP
OPEN_CLIP_NAMES = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def checkpoint_family(path: Path) -> Family:
    """Return the family of a base model in one file, by its header. Raises KroneckerError if it is something else."""
    return family_of_file(read_header(path))


def original_key(layer: Layer, family: Family) -> tuple[str, slice]:
    """Return the name of a layer's weight in a single-file checkpoint, and its rows in that tensor."""
    if layer.component == "unet":
        return f"model.diffusion_model.{layer.sgm}.weight", slice(None)
    text_encoder = family.text_encoder(layer.component)
    if not text_encoder.open_clip:
        return f"{text_encoder.checkpoint}{layer.name}.weight", slice(None)
    number, _, projection = layer.name.removeprefix("text_model.encoder.layers.").partition(".")
    block = f"{text_encoder.checkpoint}transformer.resblocks.{number}"
    if projection in STACKED:
        size, place = layer.size[0], STACKED.index(projection)
        return f"{block}.attn.in_proj_weight", slice(place * size, (place + 1) * size)
    if projection in OPEN_CLIP_NAMES:
        return f"{block}.{OPEN_CLIP_NAMES[projection]}.weight", slice(None)
    raise KroneckerError(
        f"{layer.dotted} has no known place in a single-file checkpoint; fuse into a pipeline folder instead"
    )


def fuse_checkpoint(base: Path, output: Path, layers: Mapping[Layer, Change], family: Family) -> None:
    """Write a copy of the checkpoint `base`, a single file, with every delta added to its weight and rounded once."""
    with open_safetensors(base) as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    places = {layer: original_key(layer, family) for layer in layers}
    if missing := [key for key, _ in places.values() if key not in tensors]:
        raise KroneckerError(f"{base} lacks {len(missing)} of the adapted weights, for example {missing[0]}")
    for layer, (key, rows) in places.items():
        if tensors[key][rows].numel() != math.prod(layer.size):
            raise KroneckerError(
                f"{base} has {key} {tuple(tensors[key].shape)}, the adapted layer maps {layer.size[1]} to "
                f"{layer.size[0]} features; nothing was written"
            )
        tensors[key][rows] = _fused(tensors[key][rows], layers[layer], tensors[key].dtype, layer)
    write_tensors(output, tensors, metadata)


def fuse_pipeline(base: str, output: Path, layers: Mapping[Layer, Change], dtype: torch.dtype) -> None:
    """Write a pipeline folder with every delta added to its weight and rounded once."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(base)
    for layer, entry in layers.items():
        weight = getattr(getattr(pipeline, layer.component).get_submodule(layer.path), layer.parameter)
        weight.data = _fused(weight.data, entry, dtype, layer)
    pipeline.to(dtype)
    save_pipeline(pipeline, output)


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Write a pipeline folder. Its configurations do not say in which folder of this computer the base model is."""
    pipeline.save_pretrained(folder)
    hide_folders(folder)


def hide_folders(folder: Path) -> None:
    """Rewrite the configurations in a pipeline's folder that name a folder of this computer: its last part stays."""
    for path in (*folder.glob("*.json"), *folder.glob("*/*config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and isinstance(name := config.get("_name_or_path"), str):
            write_text(path, json.dumps(config | {"_name_or_path": shared_name(name)}, indent=2) + "\n")


def _fused(weight: Tensor, entry: Change, dtype: torch.dtype, layer: Layer) -> Tensor:
    return merged_weight(weight, [entry.delta(weight)], dtype, f"the fused weight of {layer.dotted}")
