"""W + A ⊗ B written into a copy of a base model: a pipeline folder, or one file in the layout of Stability's code."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from kron_formats.names import Family, KroneckerError, Layer, sgm_name
from kron_formats.reading import Factors, LowRank
from kron_formats.writing import write_file

# Where a text encoder lies in a single file. OpenCLIP's have other names inside, and stack q, k and v.
CLIP = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
OPEN_CLIP = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
STACKED = ("q_proj", "k_proj", "v_proj")


def checkpoint_family(path: Path) -> Family:
    """Return which Stable Diffusion a single file holds. Raises KroneckerError where it holds none."""
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
    for made_for, prefix in (("sdxl", OPEN_CLIP["sdxl"]), ("sd2", OPEN_CLIP["sd2"]), ("sd1", CLIP["sd1"])):
        if any(key.startswith(prefix) for key in keys):
            return made_for
    raise KroneckerError(f"{path} is no Stable Diffusion checkpoint in the original layout")


def original_key(layer: Layer, made_for: Family, unet: nn.Module) -> tuple[str, slice]:
    """Return the name of a layer's weight in a single file, and its rows in that tensor."""
    if layer.component == "unet":
        return f"model.diffusion_model.{sgm_name(layer.name, unet)}.weight", slice(None)
    if layer.component == "text_encoder" and made_for in CLIP:
        return f"{CLIP[made_for]}{layer.name}.weight", slice(None)
    words = layer.name.split(".")  # text_model.encoder.layers.3.self_attn.q_proj
    block = f"{OPEN_CLIP[made_for]}transformer.resblocks.{words[3]}"
    if words[4:] == ["self_attn", "out_proj"]:
        return f"{block}.attn.out_proj.weight", slice(None)
    if words[4] == "self_attn" and words[5] in STACKED:
        size, place = layer.module.out_features, STACKED.index(words[5])
        return f"{block}.attn.in_proj_weight", slice(place * size, (place + 1) * size)
    if words[4] == "mlp":
        return f"{block}.mlp.{ {'fc1': 'c_fc', 'fc2': 'c_proj'}[words[5]] }.weight", slice(None)
    raise KroneckerError(f"{layer.dotted} has no known place in a single file; fuse into a pipeline folder instead")


def fuse_checkpoint(
    base: Path, output: Path, layers: Mapping[Layer, Factors | LowRank], made_for: Family, unet: nn.Module
) -> None:
    """Write a copy of the single file `base` with every delta added to its weight, rounded once."""
    with safe_open(base, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    places = {layer: original_key(layer, made_for, unet) for layer in layers}
    if missing := [key for key, _ in places.values() if key not in tensors]:
        raise KroneckerError(f"{base} lacks {len(missing)} of the adapted weights, for example {missing[0]}")
    for layer, (key, rows) in places.items():
        weight = tensors[key][rows]
        delta = layers[layer].dense().double()
        tensors[key][rows] = (weight.double() + delta.view(weight.shape)).to(weight.dtype)  # some are 1x1 kernels
    write_file(output, tensors, metadata)


def fuse_pipeline(base: str, output: Path, layers: Mapping[Layer, Factors | LowRank], dtype: torch.dtype) -> None:
    """Write a pipeline folder with every delta added to its weight, rounded once."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(base)
    for layer, entry in layers.items():
        module = getattr(pipeline, layer.component).get_submodule(layer.path)
        module.weight.data = module.weight.data.double() + entry.dense().double()
    pipeline.to(dtype)
    pipeline.save_pretrained(output)
