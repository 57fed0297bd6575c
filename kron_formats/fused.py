"""W + A ⊗ B written into a copy of a base model: a pipeline folder, or one file in the layout of Stability's code."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kron_formats.names import Family, KroneckerError, Layer
from kron_formats.reading import Factors, LowRank
from kron_formats.strangers import open_safetensors
from kron_formats.writing import write_file

# Where a text encoder lies in a single file. OpenCLIP's have other names inside, and stack q, k and v.
CLIP = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
OPEN_CLIP = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
STACKED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OPEN_CLIP_NAMES = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def checkpoint_family(path: Path) -> Family:
    """Return which Stable Diffusion a single file holds. Raises KroneckerError where it holds none."""
    with open_safetensors(path) as file:
        keys = set(file.keys())
    for made_for, prefix in (("sdxl", OPEN_CLIP["sdxl"]), ("sd2", OPEN_CLIP["sd2"]), ("sd1", CLIP["sd1"])):
        if any(key.startswith(prefix) for key in keys):
            return made_for
    raise KroneckerError(f"{path} is no Stable Diffusion checkpoint in the original layout")


def original_key(layer: Layer, made_for: Family) -> tuple[str, slice]:
    """Return the name of a layer's weight in a single file, and its rows in that tensor."""
    if layer.component == "unet":
        return f"model.diffusion_model.{layer.sgm}.weight", slice(None)
    if layer.component == "text_encoder" and made_for in CLIP:
        return f"{CLIP[made_for]}{layer.name}.weight", slice(None)
    number, _, projection = layer.name.removeprefix("text_model.encoder.layers.").partition(".")
    block = f"{OPEN_CLIP[made_for]}transformer.resblocks.{number}"
    if projection in STACKED:
        size, place = layer.size[0], STACKED.index(projection)
        return f"{block}.attn.in_proj_weight", slice(place * size, (place + 1) * size)
    if projection in OPEN_CLIP_NAMES:
        return f"{block}.{OPEN_CLIP_NAMES[projection]}.weight", slice(None)
    raise KroneckerError(f"{layer.dotted} has no known place in a single file; fuse into a pipeline folder instead")


def fuse_checkpoint(base: Path, output: Path, layers: Mapping[Layer, Factors | LowRank], made_for: Family) -> None:
    """Write a copy of the single file `base` with every delta added to its weight, rounded once."""
    with open_safetensors(base) as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    places = {layer: original_key(layer, made_for) for layer in layers}
    if missing := [key for key, _ in places.values() if key not in tensors]:
        raise KroneckerError(f"{base} lacks {len(missing)} of the adapted weights, for example {missing[0]}")
    for layer, (key, rows) in places.items():
        tensors[key][rows] = _fused(tensors[key][rows], layers[layer], tensors[key].dtype, layer)
    write_file(output, tensors, metadata)


def fuse_pipeline(base: str, output: Path, layers: Mapping[Layer, Factors | LowRank], dtype: torch.dtype) -> None:
    """Write a pipeline folder with every delta added to its weight, rounded once."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(base)
    for layer, entry in layers.items():
        module = getattr(pipeline, layer.component).get_submodule(layer.path)
        module.weight.data = _fused(module.weight.data, entry, dtype, layer)
    pipeline.to(dtype)
    pipeline.save_pretrained(output)


def _fused(weight: Tensor, entry: Factors | LowRank, dtype: torch.dtype, layer: Layer) -> Tensor:
    fused = (weight.double() + entry.dense().view(weight.shape)).to(dtype)  # some weights are kernels
    if not fused.isfinite().all():
        raise KroneckerError(f"the fused weight of {layer.dotted} is not finite in {dtype}; nothing was written")
    return fused
