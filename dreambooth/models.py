"""The base model: looked at before it is loaded, loaded in the precision asked for, let go of piece by piece."""

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from accelerate import Accelerator, init_empty_weights
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from dreambooth.config import DTYPES, AdaptedModelConfig, TrainingConfig, UserError
from dreambooth.quantise import quantise

Encode = Callable[[Tensor], dict[str, Tensor]]


# ---- before loading ----


def empty_models(
    config: TrainingConfig | AdaptedModelConfig, pipeline_class: type[DiffusionPipeline]
) -> dict[str, nn.Module]:
    """Return a base model's UNet and text encoders without weights, for checks that come before loading.

    Raises UserError where the base model is not there, or is none for `pipeline_class`.
    """
    name, revision = config.pretrained_model_name_or_path, config.revision
    try:
        index = pipeline_class.load_config(name, revision=revision)
        unet_config = UNet2DConditionModel.load_config(name, subfolder="unet", revision=revision)
        text_configs = {
            part: transformers.AutoConfig.from_pretrained(name, subfolder=part, revision=revision)
            for part in ("text_encoder", "text_encoder_2")
            if index.get(part, (None,))[0]
        }
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--pretrained_model_name_or_path {name} is no base model: {reason}") from error
    if pipeline_class is not DiffusionPipeline and index.get("_class_name") != pipeline_class.__name__:
        # SD and SDXL differ in what their UNets are conditioned on; other tasks' UNets take other latents.
        raise UserError(
            f"--pretrained_model_name_or_path {name} is a {index.get('_class_name')}, "
            f"but this script trains a {pipeline_class.__name__}"
        )
    with init_empty_weights():
        models: dict[str, nn.Module] = {"unet": UNet2DConditionModel.from_config(unet_config)}
        for part, text_config in text_configs.items():
            models[part] = getattr(transformers, index[part][1])(text_config)
    return models


def trained_models(models: Mapping[str, Any], config: TrainingConfig) -> dict[str, nn.Module]:
    """Return those of a pipeline's components that get adapters: the UNet, and the text encoders if they train."""
    names = [name for name in ("text_encoder", "text_encoder_2") if config.train_text_encoder and models.get(name)]
    return {name: models[name] for name in ["unet", *names]}


# ---- loading ----


def base_dtype(config: TrainingConfig, accelerator: Accelerator) -> torch.dtype:
    """Return the dtype of the frozen weights, of those that are not quantised."""
    if config.base_precision in DTYPES:
        return DTYPES[config.base_precision]
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def load_pipeline(
    pipeline_class: type[DiffusionPipeline], config: TrainingConfig, accelerator: Accelerator, **parts
) -> DiffusionPipeline:
    """Return the frozen base model on the device, the VAE in its own precision."""
    name, dtype = config.pretrained_model_name_or_path, base_dtype(config, accelerator)
    other_vae = config.pretrained_vae_model_name_or_path
    try:
        parts["vae"] = AutoencoderKL.from_pretrained(
            other_vae or name,
            subfolder=None if other_vae else "vae",
            dtype=DTYPES[config.vae_precision],
            **({} if other_vae else {"revision": config.revision, "variant": config.variant}),
        )
        pipeline = pipeline_class.from_pretrained(
            name, dtype=dtype, revision=config.revision, variant=config.variant, **parts
        )
    except OSError as error:
        raise UserError(f"the base model cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if config.base_precision in ("nf4", "int8"):
        quantise(pipeline.unet, config.base_precision, accelerator.device)
    pipeline.to(accelerator.device)
    if config.channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if config.enable_xformers_memory_efficient_attention:
        _enable_xformers(pipeline.unet)
    return pipeline


def _enable_xformers(unet: UNet2DConditionModel) -> None:
    try:
        unet.enable_xformers_memory_efficient_attention()
    except (ImportError, ModuleNotFoundError, ValueError) as error:
        raise UserError(
            f"--enable_xformers_memory_efficient_attention: {error}; leave it out: PyTorch's own attention is as lean"
        ) from error


def prepare_training(pipeline: DiffusionPipeline, config: TrainingConfig) -> None:
    """Switch on checkpointing and compilation, once the adapters are in."""
    if config.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
        for name, model in trained_models(pipeline.components, config).items():
            if name != "unet":
                model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        pipeline.unet.compile_repeated_blocks(fullgraph=True)
    pipeline.unet.train()


# ---- text ----


def prompt_encoder(
    encode: Callable[[DiffusionPipeline, list[str]], dict[str, Tensor]],
    pipeline: DiffusionPipeline,
    prompts: list[str],
    config: TrainingConfig,
) -> Encode:
    """Return a function from rows of `prompts` (rows,) to their embeddings.

    Text encoders that train encode at every call, each distinct prompt once. Frozen ones encode here, once for the
    whole run, and are freed.
    """
    if config.train_text_encoder:

        def encode_rows(rows: Tensor) -> dict[str, Tensor]:
            distinct, inverse = rows.unique(return_inverse=True)
            embeddings = encode(pipeline, [prompts[row] for row in distinct.tolist()])
            return {name: tensor[inverse] for name, tensor in embeddings.items()}

        return encode_rows
    with torch.no_grad():
        embeddings = encode(pipeline, prompts)
    free_components(pipeline, _text_parts(pipeline))
    return lambda rows: {name: tensor[rows] for name, tensor in embeddings.items()}


def _text_parts(pipeline: DiffusionPipeline) -> list[str]:
    return [name for name in pipeline.components if name.startswith(("text_encoder", "tokenizer"))]


def free_components(pipeline: DiffusionPipeline, names: list[str]) -> None:
    """Drop components of the pipeline, and the memory they held."""
    pipeline.register_modules(**dict.fromkeys(names))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
