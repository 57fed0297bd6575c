"""Stable Diffusion 1.x and 2.x."""

from typing import Any

from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor

from dreambooth.family import Embeddings, Family
from kron_formats.families import ATTENTION_TARGETS, TEXT_ENCODER_TARGETS


def encode_prompts(pipeline: DiffusionPipeline, prompts: list[str]) -> Embeddings:
    """Return prompt_embeds (prompts, 77, 768); 1024 wide for Stable Diffusion 2."""
    prompt_embeds, _ = pipeline.encode_prompt(prompts, pipeline.device, 1, do_classifier_free_guidance=False)
    return {"prompt_embeds": prompt_embeds}


def condition(embeddings: Embeddings, size_conditions: Tensor) -> dict[str, Any]:
    """Return encoder_hidden_states (rows, 77, 768), or 1024 wide. Size conditions are only for SDXL."""
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
