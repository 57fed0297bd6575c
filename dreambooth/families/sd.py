"""Stable Diffusion 1.x and 2.x."""

from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from dreambooth.family import Embeddings, Family
from dreambooth.options.prompts import CHUNK_LENGTH
from dreambooth.tokens import chunk_tokens
from kron_formats.families import ATTENTION_TARGETS, TEXT_ENCODER_TARGETS


def encode_prompts(pipeline: Any, prompts: list[str], max_token_length: int = CHUNK_LENGTH) -> Embeddings:
    """Return prompt_embeds (prompts, 77 · chunks, 768); 1024 wide for Stable Diffusion 2."""
    encoder = pipeline.text_encoder
    masked = getattr(encoder.config, "use_attention_mask", False)
    embeds = []
    for tokens in chunk_tokens(pipeline.tokenizer, prompts, max_token_length):
        tokens = tokens.to(encoder.device)
        embeds.append(encoder(tokens.input_ids, attention_mask=tokens.attention_mask if masked else None)[0])
    return {"prompt_embeds": torch.cat(embeds, dim=1).to(encoder.dtype)}


def condition(embeddings: Embeddings, size_conditions: Tensor) -> dict[str, Any]:
    """Return encoder_hidden_states (rows, 77 · chunks, 768), or 1024 wide. Size conditions are only for SDXL."""
    return {"encoder_hidden_states": embeddings["prompt_embeds"]}


SD = Family(
    name="sd",
    title="Stable Diffusion 1.x or 2.x",
    tag="stable-diffusion",
    pipeline_class=StableDiffusionPipeline,
    denoiser="unet",
    text_encoders=("text_encoder",),
    tokenizers=("tokenizer",),
    targets={"unet": ATTENTION_TARGETS, "text_encoder": TEXT_ENCODER_TARGETS},
    component_titles={"unet": "UNet", "text_encoder": "text encoder"},
    encode_prompts=encode_prompts,
    condition=condition,
    loading={"safety_checker": None, "requires_safety_checker": False},
)
