"""SDXL: two text encoders, and a UNet that is conditioned on the sizes of its images."""

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from dreambooth.family import Embeddings, Family
from dreambooth.options.prompts import CHUNK_LENGTH
from dreambooth.tokens import chunk_tokens
from kron_formats.families import ATTENTION_TARGETS, TEXT_ENCODER_TARGETS


def encode_prompts(pipeline: Any, prompts: list[str], max_token_length: int = CHUNK_LENGTH) -> Embeddings:
    """Return prompt_embeds (prompts, 77 · chunks, 2048) of both encoders' last layers but one, and pooled_prompt_embeds
    (prompts, 1280) of the second encoder, which are those of the first chunk."""
    embeds, outputs = [], []
    for part, tokenizer in zip(SDXL.text_encoders, SDXL.tokenizers):
        encoder = getattr(pipeline, part)
        if encoder is None:  # a refiner has only the second
            continue
        chunks = chunk_tokens(getattr(pipeline, tokenizer), prompts, max_token_length)
        outputs = [encoder(tokens.input_ids.to(encoder.device), output_hidden_states=True) for tokens in chunks]
        embeds.append(torch.cat([output.hidden_states[-2] for output in outputs], dim=1))
    prompt_embeds = torch.cat(embeds, dim=-1).to(pipeline.text_encoder_2.dtype)
    return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": outputs[0].text_embeds}


def condition(embeddings: Embeddings, size_conditions: Tensor) -> dict[str, Any]:
    """Return encoder_hidden_states (rows, 77 · chunks, 2048) and added_cond_kwargs: text_embeds (rows, 1280), time_ids.

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
