"""Make a small, randomly initialised pipeline of the real diffusers and transformers classes.

    python -m toyworld.tiny_pipeline sd outputs/tiny-sd            # Stable Diffusion 1.x's layout
    python -m toyworld.tiny_pipeline sdxl outputs/tiny-sdxl        # SDXL's layout

It is untrained and draws noise, but exercises every line that a real base model does, in seconds on a CPU. The folder
loads with `from_pretrained`. Every attention projection divides by (4, 64), (64, 4) and the square factors up to 64.
"""

import argparse
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreambooth.errors import readable_errors
from dreambooth.options.paths import path_argument

HIDDEN_SIZE = 64  # of each text encoder
TEXT_LENGTH = 77  # tokens
# Any, here and for schedulers: diffusers' annotations are narrower than what its classes take
WITHOUT_CHECKER: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


def build_pipeline(kind: str, prediction_type: str = "epsilon", seed: int = 0) -> DiffusionPipeline:
    """Return a pipeline of a kind ("sd" or "sdxl") with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    return {"sd": _build_sd, "sdxl": _build_sdxl}[kind](build_scheduler(prediction_type))


def build_scheduler(prediction_type: Any) -> Any:
    """Return a DDIMScheduler with Stable Diffusion's noise levels for "epsilon" or "v_prediction"."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def _build_sd(scheduler: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=_build_vae(scaling_factor=0.18215),
        text_encoder=CLIPTextModel(_text_config()),
        tokenizer=build_tokenizer(),
        unet=_build_unet(cross_attention_dim=HIDDEN_SIZE),
        scheduler=scheduler,
        **WITHOUT_CHECKER,
    )


def _build_sdxl(scheduler: Any) -> StableDiffusionXLPipeline:
    time_embed_dim = 8
    return StableDiffusionXLPipeline(
        vae=_build_vae(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(_text_config()),
        text_encoder_2=CLIPTextModelWithProjection(_text_config()),
        tokenizer=build_tokenizer(),
        tokenizer_2=build_tokenizer(pad_token="!"),
        unet=_build_unet(
            cross_attention_dim=2 * HIDDEN_SIZE,
            addition_embed_type="text_time",
            addition_time_embed_dim=time_embed_dim,
            projection_class_embeddings_input_dim=HIDDEN_SIZE + 6 * time_embed_dim,
            use_linear_projection=True,
        ),
        scheduler=scheduler,
    )


def _build_vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        **vae_blocks(16, 16, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        scaling_factor=scaling_factor,
    )


def vae_blocks(*channels: int) -> dict[str, Any]:
    """Return the arguments of AutoencoderKL for a level of this many channels each."""
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
    }


def _build_unet(**conditioning) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=16,
        **conditioning,
    )


def _text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(byte_vocabulary()),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        projection_dim=HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=len(byte_vocabulary()) - 2,
        eos_token_id=len(byte_vocabulary()) - 1,
        pad_token_id=len(byte_vocabulary()) - 1,
    )


def byte_vocabulary() -> dict[str, int]:
    """Return CLIP's vocabulary without merges: every byte, every byte that ends a word, and the start and end marks."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}


def build_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Return a CLIP tokenizer for any text: one token per byte."""
    return CLIPTokenizer(vocab=byte_vocabulary(), merges=[], pad_token=pad_token, model_max_length=TEXT_LENGTH)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("kind", choices=("sd", "sdxl"))
    parser.add_argument("output_dir", type=path_argument)
    arguments = parser.parse_args()
    build_pipeline(arguments.kind).save_pretrained(arguments.output_dir)
    print(f"Wrote {arguments.output_dir}")


if __name__ == "__main__":
    with readable_errors():
        main()
