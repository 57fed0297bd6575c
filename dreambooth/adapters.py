"""Where training meets the adapter: which models get factors, how they are switched off, what is saved of them."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dreambooth.config import DTYPES, AdaptedModelConfig, TrainingConfig, public_options
from dreambooth.models import empty_models
from kron_adapter import (
    disable_kronecker,
    inject_kronecker,
    kronecker_layers,
    kronecker_parameters,
    kronecker_state_dict,
    load_kronecker,
    load_kronecker_state_dict,
    save_kronecker,
)

WEIGHTS_NAME = "pytorch_kronecker_weights.safetensors"
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def inject_adapters(models: Mapping[str, nn.Module], config: TrainingConfig) -> dict[str, list[nn.Parameter]]:
    """Put factors into the UNet and the text encoders among `models`; return "unet" and "text_encoder" -> factors.

    Raises KroneckerError where the factors do not divide a layer's sizes.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, model in models.items():
        if name == "unet":
            inject_kronecker(
                model, config.kron_a1, config.kron_a2, config.kron_targets, config.factors_by_target(), config.kron_init
            )
        else:
            a1, a2 = config.text_encoder_kron_a1 or config.kron_a1, config.text_encoder_kron_a2 or config.kron_a2
            inject_kronecker(model, a1, a2, TEXT_ENCODER_TARGETS, init=config.kron_init)
        groups.setdefault("unet" if name == "unet" else "text_encoder", []).extend(kronecker_parameters(model))
    return groups


@contextmanager
def without_adapters(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside this context the models are the base models."""
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(disable_kronecker(model))
        yield


def adapter_state(models: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Return the factors of every model as they are trained, the gain not folded in."""
    return {name: kronecker_state_dict(model) for name, model in models.items()}


def load_adapter_state(models: Mapping[str, nn.Module], state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put factors back that `adapter_state` returned. Raises KroneckerError where they do not fit."""
    for name, model in models.items():
        load_kronecker_state_dict(model, state.get(name, {}))


def save_weights(models: Mapping[str, nn.Module], folder: str | Path, step: int, config: TrainingConfig) -> Path:
    """Write the adapter with the metadata that a reader of the file wants to know; return its path."""
    path = Path(folder) / WEIGHTS_NAME
    metadata = {
        "base_model": config.pretrained_model_name_or_path,
        "instance_prompt": config.instance_prompt,
        "class_prompt": config.class_prompt or "",
        "step": str(step),
        "config": json.dumps(public_options(config)),
    }
    save_kronecker(models, path, metadata)
    return path


def count_adapted(models: Mapping[str, nn.Module]) -> int:
    """Return the number of adapted layers."""
    return sum(len(kronecker_layers(model)) for model in models.values())


def load_adapted_pipeline(config: AdaptedModelConfig) -> DiffusionPipeline:
    """Return the base model with the adapter in it, or the base model alone where no adapter is given.

    Raises UserError or KroneckerError, before any weights are read, where the adapter does not fit the base model.
    """
    models = empty_models(config, DiffusionPipeline)
    if config.adapter:
        load_kronecker(models, config.adapter)
    pipeline = DiffusionPipeline.from_pretrained(
        config.pretrained_model_name_or_path,
        dtype=DTYPES[config.dtype],
        revision=config.revision,
        variant=config.variant,
    )
    if config.adapter:
        load_kronecker(pipeline, config.adapter, config.adapter_scale)
    return pipeline
