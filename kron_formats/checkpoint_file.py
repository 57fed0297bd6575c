"""A whole model in one file in the layout of Stability's code, as ComfyUI, AUTOMATIC1111 and Forge load it.

UNet            model.diffusion_model.                                 blocks as one tree
VAE             first_stage_model.                                     up blocks in reverse, projections as convolutions
text encoders   cond_stage_model., SDXL conditioner.embedders.         CLIP's own names, or OpenCLIP's

The names of UNet and text encoders are in names.py and fused.py, where they are also read; those of the VAE are here.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kron_formats.families import SDXL, Family
from kron_formats.files import whole_file
from kron_formats.fused import Place, original_place
from kron_formats.names import find_parameters
from kron_formats.single_file import VAE
from kron_formats.streaming import Pending, stream_tensors
from kron_formats.writing import VELOCITY, is_bare, prefixed

Weights = Mapping[str, Mapping[str, Pending]]  # component -> diffusers' name -> weight

VAE_OUTSIDE = {"conv_norm_out": "norm_out"}
VAE_SAMPLERS = {"downsamplers": "downsample", "upsamplers": "upsample"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
NOTHING = Pending((0,), torch.float32, lambda: torch.empty(0))  # the content of a tensor whose name says all


def write_checkpoint_file(
    path: str | os.PathLike,
    models: Mapping[str, nn.Module],
    weights: Weights,
    family: Family,
    metadata: Mapping[str, str],
) -> None:
    """Write UNet, text encoders and VAE, whole or not at all, reading the weights one by one.

    `models` are only asked for their structure. Raises KroneckerError if a parameter has no place in such a file.
    """
    tensors = dict(_denoiser_and_text(models, weights, family)) | dict(_autoencoder(models["vae"], weights["vae"]))
    if family is SDXL and metadata.get("modelspec.prediction_type") == VELOCITY:
        tensors["v_pred"] = NOTHING  # ComfyUI takes every other SDXL to predict the noise
        if metadata.get("ss_zero_terminal_snr") == "True":
            tensors["ztsnr"] = NOTHING
    with whole_file(path, durable=True) as unfinished:
        stream_tensors(unfinished, tensors, _metadata(family, metadata))


def _denoiser_and_text(
    models: Mapping[str, nn.Module], weights: Weights, family: Family
) -> Iterator[tuple[str, Pending]]:
    stacks: dict[str, list[tuple[Place, Pending]]] = defaultdict(list)
    for layer in find_parameters({name: model for name, model in models.items() if name != "vae"}):
        place = original_place(layer, family)
        stacks[place.key].append((place, weights[layer.component][f"{layer.name}.{layer.parameter}"]))
    for key, parts in stacks.items():
        yield key, _stacked(parts)


def _stacked(parts: list[tuple[Place, Pending]]) -> Pending:
    """Return the tensor of which these are the rows, or which is one of them, perhaps transposed."""
    parts = sorted(parts, key=lambda part: part[0].rows.start if part[0].rows else 0)
    (place, first), number = parts[0], len(parts)
    shape = first.shape[::-1] if place.transposed else (first.shape[0] * number, *first.shape[1:])

    def read() -> Tensor:
        tensors = [weight.read() for _, weight in parts]
        return tensors[0].t() if place.transposed else torch.cat(tensors) if number > 1 else tensors[0]

    return Pending(shape, first.dtype, read)


def _autoencoder(vae: nn.Module, weights: Mapping[str, Pending]) -> Iterator[tuple[str, Pending]]:
    config: Any = vae.config
    levels = len(config["block_out_channels"])
    for name, weight in weights.items():
        key = f"{VAE}{vae_name(name, levels)}"
        if ".attentions." in name and len(weight.shape) == 2:  # a convolution of 1 pixel there
            yield key, Pending((*weight.shape, 1, 1), weight.dtype, partial(_as_kernel, weight))
        else:
            yield key, weight


def _as_kernel(weight: Pending) -> Tensor:
    return weight.read()[:, :, None, None]


def vae_name(name: str, levels: int) -> str:
    """Return what Stability's code calls a parameter of diffusers' AutoencoderKL with `levels` resolutions.

    encoder.down_blocks.i.resnets.j     -> encoder.down.i.block.j
    decoder.up_blocks.i.resnets.j       -> decoder.up.(levels - 1 - i).block.j
    mid_block.resnets.j, attentions.0   -> mid.block_(j+1), mid.attn_1
    """
    side, _, rest = name.partition(".")
    words = rest.split(".")
    match words:
        case ["mid_block", "resnets", number, *within]:
            words = ["mid", f"block_{int(number) + 1}", *within]
        case ["mid_block", "attentions", number, *within, kind]:
            words = ["mid", f"attn_{int(number) + 1}", VAE_ATTENTION[".".join(within)], kind]
        case ["down_blocks" | "up_blocks" as tree, level, kind, number, *within]:
            level = level if tree == "down_blocks" else str(levels - 1 - int(level))
            place = [VAE_SAMPLERS[kind]] if kind in VAE_SAMPLERS else ["block", number]
            words = [tree.removesuffix("_blocks"), level, *place, *within]
        case [outside, *within]:
            words = [VAE_OUTSIDE.get(outside, outside), *within]
    return ".".join([side, *words]).replace("conv_shortcut", "nin_shortcut")


def _metadata(family: Family, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what model browsers read, and ours under our prefix; ours alone if `metadata` say only what tools need."""
    if is_bare(metadata):
        return prefixed(metadata)
    velocity, prompt = metadata.get("modelspec.prediction_type") == VELOCITY, metadata.get("instance_prompt", "")
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": family.model_spec_v if velocity else family.model_spec,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": prompt or "DreamBooth",
        "modelspec.description": "All weights fine-tuned (DreamBooth)",
        "modelspec.trigger_phrase": prompt,
        **prefixed(metadata),
    }
