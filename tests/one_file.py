"""Pipelines written as one file in the layout of Stability's code, as users have base models."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from kron_formats.names import sgm_name

VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.": "token_embedding.",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.out_proj.": ".attn.out_proj.",
}


def save_one_file(pipeline: DiffusionPipeline, path: Path, family: str, metadata=None, markers=(), **changes) -> Path:
    """Write a pipeline as one file of a family ("sd1", "sd2", "sdxl"). `markers` are names of tensors without content.

    `changes` replace parts; None leaves one out.
    """
    parts = {**pipeline.components, **changes}
    tensors = {marker: torch.tensor([]) for marker in markers}
    if parts["unet"] is not None:
        tensors |= unet_tensors(parts["unet"])
    if parts["vae"] is not None:
        tensors |= {f"first_stage_model.{key}": tensor for key, tensor in vae_tensors(parts["vae"]).items()}
    if family == "sd1":
        tensors |= clip_tensors(parts["text_encoder"], "cond_stage_model.transformer.text_model.")
    elif family == "sd2":
        tensors |= open_clip_tensors(parts["text_encoder"], "cond_stage_model.model.")
    else:
        tensors |= clip_tensors(parts["text_encoder"], "conditioner.embedders.0.transformer.text_model.")
        tensors |= open_clip_tensors(parts["text_encoder_2"], "conditioner.embedders.1.model.")
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path, metadata)
    return path


def unet_tensors(unet) -> dict[str, Tensor]:
    return {f"model.diffusion_model.{unet_name(name, unet)}": tensor for name, tensor in unet.state_dict().items()}


def unet_name(name: str, unet) -> str:
    module, _, kind = name.rpartition(".")
    return f"{sgm_name(module, unet)}.{kind}"


def vae_tensors(vae) -> dict[str, Tensor]:
    """Attention projections are convolutions there, of 1 pixel."""
    tensors = {}
    for name, tensor in vae.state_dict().items():
        key = vae_name(name, len(vae.config.block_out_channels))
        tensors[key] = tensor[:, :, None, None] if ".to_" in name and name.endswith("weight") else tensor
    return tensors


def vae_name(name: str, levels: int) -> str:
    side, _, rest = name.partition(".")
    words = rest.split(".")
    if words[0] == "mid_block":
        if words[1] == "resnets":
            words[:3] = ["mid", f"block_{int(words[2]) + 1}"]
        else:
            words = ["mid", "attn_1", VAE_ATTENTION[".".join(words[3:-1])], words[-1]]
    elif words[0] in ("down_blocks", "up_blocks"):
        level = int(words[1]) if words[0] == "down_blocks" else levels - 1 - int(words[1])
        kind = {"resnets": f"block.{words[3]}", "downsamplers": "downsample", "upsamplers": "upsample"}[words[2]]
        words[:4] = [words[0].removesuffix("_blocks"), str(level), kind]
    elif words[0] == "conv_norm_out":
        words[0] = "norm_out"
    return f"{side}.{'.'.join(words)}".replace("conv_shortcut", "nin_shortcut")


def clip_tensors(encoder, prefix: str) -> dict[str, Tensor]:
    return {prefix + name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}


def open_clip_tensors(encoder, prefix: str) -> dict[str, Tensor]:
    """q, k and v are one tensor there, and the projection is transposed."""
    own = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    tensors = {}
    for name, tensor in own.items():
        if ".q_proj." in name:
            stacked = torch.cat([own[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"])
            key = name.replace("encoder.layers.", "transformer.resblocks.").replace(
                ".self_attn.q_proj.", ".attn.in_proj_"
            )
            tensors[prefix + key] = stacked
        elif name == "text_projection.weight":
            tensors[f"{prefix}text_projection"] = tensor.T
        elif ".k_proj." not in name and ".v_proj." not in name:
            for ours, theirs in OPEN_CLIP.items():
                name = name.replace(ours, theirs)
            tensors[prefix + name] = tensor
    return tensors
