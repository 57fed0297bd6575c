"""The base model: looked at before it is loaded, and let go of piece by piece."""

import gc
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, UNet2DConditionModel

from dreambooth.config import TrainingConfig, UserError


def empty_unet(config: TrainingConfig, pipeline_class: type[DiffusionPipeline]) -> UNet2DConditionModel:
    """Return the base model's UNet without weights, from its configuration: for checks that come before loading.

    Raises UserError where the base model is not there or not of this kind.
    """
    name = config.pretrained_model_name_or_path
    try:
        found = pipeline_class.load_config(name, revision=config.revision).get("_class_name", "")
        unet_config = UNet2DConditionModel.load_config(name, subfolder="unet", revision=config.revision)
    except OSError as error:
        raise UserError(f"--pretrained_model_name_or_path {name}: {str(error).strip().splitlines()[0]}") from error
    if found.startswith("StableDiffusionXL") != pipeline_class.__name__.startswith("StableDiffusionXL"):
        raise UserError(
            f"--pretrained_model_name_or_path {name} is a {found}, but this script trains a {pipeline_class.__name__}"
        )
    with init_empty_weights():
        return UNet2DConditionModel.from_config(unet_config)


def free_text_encoders(pipeline: DiffusionPipeline) -> None:
    """Drop the pipeline's text encoders and tokenizers, once everything is encoded."""
    freed: dict[str, Any] = {
        name: None for name in pipeline.components if name.startswith(("text_encoder", "tokenizer"))
    }
    pipeline.register_modules(**freed)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
