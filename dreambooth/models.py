"""The base model: looked at before it is loaded, loaded in the precision asked for, let go of piece by piece."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from accelerate import Accelerator, init_empty_weights
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import nn

from dreambooth.config import AdaptedModelConfig, TrainingConfig, UserError
from dreambooth.quantise import quantise
from dreambooth.ranks import split_frozen, splits_models

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


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
            for part in TEXT_ENCODERS
            if index.get(part, (None,))[0]
        }
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--pretrained_model_name_or_path {name} is no base model: {reason}") from error
    if "quantization_config" in unet_config:
        raise UserError(
            f"--pretrained_model_name_or_path {name} was saved quantised; take the base model that it was made of, "
            "with --base_precision nf4 or int8"
        )
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
    names = [name for name in TEXT_ENCODERS if config.train_text_encoder and models.get(name)]
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
    """Return the frozen base model on the device, without what may not be needed: VAE and text encoders are read by
    `ensure_vae` and `ensure_text_encoders` where there is something to encode or to draw."""
    name = config.pretrained_model_name_or_path
    with _readable_loading():
        index = pipeline_class.load_config(name, revision=config.revision)
        components = {part for part, entry in index.items() if isinstance(entry, (list, tuple))}
        absent = dict.fromkeys(components - {"unet", "scheduler", "tokenizer", "tokenizer_2"})
        pipeline = pipeline_class.from_pretrained(
            name,
            dtype=base_dtype(config, accelerator),
            revision=config.revision,
            variant=config.variant,
            **absent | parts,
        )
    pipeline.vae_scale_factor = 2 ** (len(load_vae_config(config)["block_out_channels"]) - 1)  # a pipeline asks its VAE
    if config.base_precision in ("nf4", "int8"):
        quantise(pipeline.unet, config.base_precision, accelerator.device)
    pipeline.to(accelerator.device)
    if config.channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
    if config.enable_xformers_memory_efficient_attention:
        _enable_xformers(pipeline.unet)
    return pipeline


def ensure_vae(pipeline: DiffusionPipeline, config: TrainingConfig, accelerator: Accelerator) -> AutoencoderKL:
    """Return the pipeline's VAE, read in its own precision where it is not there yet."""
    if pipeline.vae is None:
        with _readable_loading():
            vae = AutoencoderKL.from_pretrained(**_vae_source(config), dtype=DTYPES[config.vae_precision])
        if config.channels_last:
            vae.to(memory_format=torch.channels_last)
        pipeline.register_modules(vae=vae.to(accelerator.device))
    return pipeline.vae


def load_vae_config(config: TrainingConfig) -> dict[str, Any]:
    """Return the configuration of the VAE, defaults included, which says how latents are scaled. Reads no weights."""
    with _readable_loading(), init_empty_weights():
        return dict(AutoencoderKL.from_config(AutoencoderKL.load_config(**_vae_source(config))).config)


def _vae_source(config: TrainingConfig) -> dict[str, Any]:
    if config.pretrained_vae_model_name_or_path:
        return {"pretrained_model_name_or_path": config.pretrained_vae_model_name_or_path}
    return {
        "pretrained_model_name_or_path": config.pretrained_model_name_or_path,
        "subfolder": "vae",
        "revision": config.revision,
        "variant": config.variant,
    }


def ensure_text_encoders(pipeline: DiffusionPipeline, config: TrainingConfig, accelerator: Accelerator) -> None:
    """Have the text encoders in the pipeline, read where they are not there yet."""
    name = config.pretrained_model_name_or_path
    absent = [part for part in TEXT_ENCODERS if part in pipeline.components and pipeline.components[part] is None]
    index = pipeline.load_config(name, revision=config.revision) if absent else {}
    for part in absent:
        library, class_name = index[part]
        if library is None:  # the base model has none
            continue
        with _readable_loading():
            text_encoder = getattr(transformers, class_name).from_pretrained(
                name,
                subfolder=part,
                dtype=base_dtype(config, accelerator),
                revision=config.revision,
                variant=config.variant,
            )
        pipeline.register_modules(**{part: text_encoder.to(accelerator.device)})


@contextmanager
def _readable_loading() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"the base model cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def _enable_xformers(unet: UNet2DConditionModel) -> None:
    try:
        unet.enable_xformers_memory_efficient_attention()
    except (ImportError, ModuleNotFoundError, ValueError) as error:
        raise UserError(
            f"--enable_xformers_memory_efficient_attention: {error}; leave it out: PyTorch's own attention is as lean"
        ) from error


def prepare_training(pipeline: DiffusionPipeline, config: TrainingConfig, accelerator: Accelerator) -> None:
    """Switch on checkpointing, compilation and splitting, once the adapters are in."""
    models = trained_models(pipeline.components, config)
    if config.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
        for name, model in models.items():
            if name != "unet":
                model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        pipeline.unet.compile_repeated_blocks(fullgraph=True)
    if splits_models():
        split_frozen(models.values(), accelerator)
    pipeline.unet.train()


# ---- letting go ----


def free_components(pipeline: DiffusionPipeline, names: list[str]) -> None:
    """Drop components of the pipeline, and the memory they held."""
    pipeline.register_modules(**dict.fromkeys(names))
    free_memory()


def free_memory() -> None:
    """Give back the device memory that nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
