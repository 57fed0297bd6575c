"""SDXL: two text encoders, and a UNet that is conditioned on the sizes of its images."""

from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from dreambooth.family import Embeddings, Family
from kron_formats.families import ATTENTION_TARGETS, TEXT_ENCODER_TARGETS


def encode_prompts(pipeline: DiffusionPipeline, prompts: list[str]) -> Embeddings:
    """Return prompt_embeds (prompts, 77, 2048) of both encoders and pooled_prompt_embeds (prompts, 1280) of the second.

    Embeddings of the empty prompt are zero if the base model was trained that way.
    """
    prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
        prompts, device=pipeline.device, do_classifier_free_guidance=False
    )
    keep = torch.tensor([bool(prompt) or not pipeline.config["force_zeros_for_empty_prompt"] for prompt in prompts])
    keep = keep.to(prompt_embeds)[:, None]
    return {
        "prompt_embeds": prompt_embeds * keep[:, :, None],
        "pooled_prompt_embeds": pooled_prompt_embeds * keep,
    }


def condition(embeddings: Embeddings, size_conditions: Tensor) -> dict[str, Any]:
    """Return encoder_hidden_states (rows, 77, 2048) and, in added_cond_kwargs, text_embeds (rows, 1280) and time_ids.

    time_ids (rows, 6) are each row's original size, crop and target size, px.
    """
    text_embeds = embeddings["pooled_prompt_embeds"]
    return {
        "encoder_hidden_states": embeddings["prompt_embeds"],
        "added_cond_kwargs": {"text_embeds": text_embeds, "time_ids": size_conditions.to(text_embeds)},
    }


SDXL = Family(
    name="sdxl",
    title="SDXL",
    tag="stable-diffusion-xl",
    pipeline_class=StableDiffusionXLPipeline,
    denoiser="unet",
    text_encoders=("text_encoder", "text_encoder_2"),
    tokenizers=("tokenizer", "tokenizer_2"),
    targets={
        "unet": ATTENTION_TARGETS,
        "text_encoder": TEXT_ENCODER_TARGETS,
        "text_encoder_2": TEXT_ENCODER_TARGETS,
    },
    component_titles={"unet": "UNet", "text_encoder": "text encoder 1", "text_encoder_2": "text encoder 2"},
    encode_prompts=encode_prompts,
    condition=condition,
    loading={"add_watermarker": False},
)
