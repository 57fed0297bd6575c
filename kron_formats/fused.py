"""W + ΔW in a copy of a base model: a pipeline folder, or a single file in the layout of Stability's code."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kron_formats.changes import Change, size_in_words
from kron_formats.errors import KroneckerError
from kron_formats.families import Family
from kron_formats.files import open_safetensors, write_text
from kron_formats.merging import merged_weight
from kron_formats.names import Layer
from kron_formats.paths import shared_name
from kron_formats.single_file import family_of_file, read_header
from kron_formats.writing import write_tensors

STACKED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # in one tensor of OpenCLIP
OPEN_CLIP_BLOCK = {  # within a block of the text encoder
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
}
OPEN_CLIP_OUTSIDE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
TRANSPOSED = ("text_projection",)  # in OpenCLIP


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in a checkpoint that is one file."""

    key: str  # of a tensor
    rows: slice | None = None  # of it; None is all
    transposed: bool = False

    def within(self, tensor: Tensor) -> Tensor:
        """Return the parameter in the tensor of that key: a view of it."""
        part = tensor if self.rows is None else tensor[self.rows]
        return part.t() if self.transposed else part


def checkpoint_family(path: Path) -> Family:
    """Return the family of a base model in one file, by its header. Raises KroneckerError if it is something else."""
    return family_of_file(read_header(path))


def original_place(layer: Layer, family: Family) -> Place:
    """Return where a parameter lies in a single-file checkpoint. Raises KroneckerError if it has no place there."""
    own = f"{layer.name}.{layer.parameter}"
    if layer.component == "unet":
        return Place(f"model.diffusion_model.{layer.sgm}.{layer.parameter}")
    text_encoder = family.text_encoder(layer.component)
    if not text_encoder.open_clip:
        return Place(f"{text_encoder.checkpoint}{own}")
    if outside := OPEN_CLIP_OUTSIDE.get(own):
        return Place(f"{text_encoder.checkpoint}{outside}", transposed=outside in TRANSPOSED)
    number, _, module = layer.name.removeprefix("text_model.encoder.layers.").partition(".")
    block = f"{text_encoder.checkpoint}transformer.resblocks.{number}"
    if module in STACKED:
        size, place = layer.size[0], STACKED.index(module)
        return Place(f"{block}.attn.in_proj_{layer.parameter}", slice(place * size, (place + 1) * size))
    if module in OPEN_CLIP_BLOCK:
        return Place(f"{block}.{OPEN_CLIP_BLOCK[module]}.{layer.parameter}")
    raise KroneckerError(
        f"{layer.dotted} has no known place in a single-file checkpoint; fuse into a pipeline folder instead"
    )


def fuse_checkpoint(base: Path, output: Path, layers: Mapping[Layer, Change], family: Family) -> None:
    """Write a copy of the checkpoint `base`, a single file, with every delta added to its weight and rounded once."""
    places = {layer: original_place(layer, family) for layer in layers}
    with open_safetensors(base) as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    if missing := [place.key for place in places.values() if place.key not in tensors]:
        raise KroneckerError(f"{base} lacks {len(missing)} of the changed weights, for example {missing[0]}")
    for layer, place in places.items():
        stored = tensors[place.key]
        if place.within(stored).numel() != prod(layer.size):
            raise KroneckerError(
                f"{base} has {place.key} {tuple(stored.shape)}, the changed weight {size_in_words(layer.size)}; "
                "nothing was written"
            )
        place.within(stored).copy_(_fused(place.within(stored), layers[layer], stored.dtype, layer))
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
