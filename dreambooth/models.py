"""The base model: looked at before it is loaded, and let go of piece by piece."""

import gc
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, UNet2DConditionModel

from dreambooth.config import UserError


def empty_unet(
    name: str, revision: str | None = None, pipeline_class: type[DiffusionPipeline] = DiffusionPipeline
) -> UNet2DConditionModel:
    """Return a base model's UNet without weights, from its configuration: for checks that come before loading.

    Raises UserError where the base model is not there, or is none for `pipeline_class`.
    """
    try:
        found = pipeline_class.load_config(name, revision=revision).get("_class_name", "")
        unet_config = UNet2DConditionModel.load_config(name, subfolder="unet", revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--pretrained_model_name_or_path {name} is no base model: {reason}") from error
    if pipeline_class is not DiffusionPipeline:
        _check_family(name, found, pipeline_class)
    with init_empty_weights():
        return UNet2DConditionModel.from_config(unet_config)


def _check_family(name: str, found: str, wanted: type[DiffusionPipeline]) -> None:
    """SD and SDXL differ in what their UNets are conditioned on; other tasks' UNets take other latents."""
    if found != wanted.__name__:
        raise UserError(
            f"--pretrained_model_name_or_path {name} is a {found}, but this script trains a {wanted.__name__}"
        )


def free_text_encoders(pipeline: DiffusionPipeline) -> None:
    """Drop the pipeline's text encoders and tokenizers, once everything is encoded."""
    freed: dict[str, Any] = {
        name: None for name in pipeline.components if name.startswith(("text_encoder", "tokenizer"))
    }
    pipeline.register_modules(**freed)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
