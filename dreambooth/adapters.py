"""Where training meets the adapter: which models get factors, how they are switched off, what is saved of them."""

import base64
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from dreambooth.config import AdaptedModelConfig, TrainingConfig, UserError, public_options
from dreambooth.diffusion import build_sampler
from dreambooth.models import DTYPES, empty_models
from dreambooth.order import Stream, seed_of
from kron_adapter import (
    disable_kronecker,
    inject_kronecker,
    kronecker_layers,
    kronecker_parameters,
    kronecker_state_dict,
    load_kronecker,
    load_kronecker_state_dict,
    merge_kronecker,
    remove_kronecker,
    save_kronecker,
)
from kron_formats.matching import match_layers
from kron_formats.names import components
from kron_formats.reading import AdapterFile, read_adapter

WEIGHTS_NAME = "pytorch_kronecker_weights.safetensors"
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def inject_adapters(models: Mapping[str, nn.Module], config: TrainingConfig) -> dict[str, list[nn.Parameter]]:
    """Put factors into the UNet and the text encoders among `models`; return "unet" and "text_encoder" -> factors.

    They depend on the seed alone, and so are the same on every process. Raises KroneckerError where they do not divide
    a layer's sizes.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for number, (name, model) in enumerate(models.items()):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(config.seed, Stream.FACTORS, number))
            _inject(name, model, config)
        groups.setdefault("unet" if name == "unet" else "text_encoder", []).extend(kronecker_parameters(model))
    return groups


def _inject(name: str, model: nn.Module, config: TrainingConfig) -> None:
    if name == "unet":
        inject_kronecker(
            model, config.kron_a1, config.kron_a2, config.kron_targets, config.factors_by_target(), config.kron_init
        )
    else:
        a1, a2 = config.text_encoder_kron_a1 or config.kron_a1, config.text_encoder_kron_a2 or config.kron_a2
        inject_kronecker(model, a1, a2, TEXT_ENCODER_TARGETS, init=config.kron_init)


@contextmanager
def without_adapters(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside this context the models are the base models."""
    with disable_kronecker(models):
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
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
        "config": json.dumps(public_options(config)),
        **_thumbnail(Path(config.output_dir) / "samples"),
    }
    save_kronecker(models, path, metadata, DTYPES[config.save_precision])
    return path


def _thumbnail(samples: Path) -> dict[str, str]:
    """Return the newest sheet of samples, at most 256 px wide, as the metadata that model browsers show."""
    sheets = sorted(samples.glob("step-*.png"))
    if not sheets:
        return {}
    image, buffer = Image.open(sheets[-1]).convert("RGB"), io.BytesIO()
    image.thumbnail((256, 256))
    image.save(buffer, "JPEG")
    return {"modelspec.thumbnail": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"}


def load_adapted_pipeline(config: AdaptedModelConfig) -> DiffusionPipeline:
    """Return the base model with the adapters in it, or the base model alone where none is given.

    Raises UserError or KroneckerError, before any weights are read, where an adapter does not fit the base model.
    """
    files = read_adapters(config)
    pipeline = load_base_pipeline(config)
    add_adapters(pipeline, files, config)
    return pipeline


def read_adapters(config: AdaptedModelConfig) -> list[AdapterFile]:
    """Return the adapter files. Raises UserError or KroneckerError where one does not fit the base model.

    Reads no weights of the base model.
    """
    models = empty_models(config, DiffusionPipeline)
    files = [read_adapter(split_scale(entry)[0]) for entry in config.adapter]
    for file in files:
        match_layers(file, models)
        if file.is_lora and file.from_peft:
            raise UserError(
                f"{file.path} is a LoRA in peft's layout, which pipelines do not load: fuse it with scripts/convert.py "
                "--to fused, or save it with the pipeline's save_lora_weights"
            )
    return files


def load_base_pipeline(config: AdaptedModelConfig) -> DiffusionPipeline:
    """Return the base model without the adapters."""
    return DiffusionPipeline.from_pretrained(
        config.pretrained_model_name_or_path,
        dtype=DTYPES[config.dtype],
        revision=config.revision,
        variant=config.variant,
    )


def add_adapters(pipeline: DiffusionPipeline, files: Sequence[AdapterFile], config: AdaptedModelConfig) -> None:
    """Put the adapters, which `read_adapters` returned, into the base model."""
    # LoRAs first: peft's layers go around plain ones, and ours into peft's
    adapters = [split_scale(entry) for entry in config.adapter]
    numbered = sorted(enumerate(zip(files, adapters)), key=lambda entry: not entry[1][0].is_lora)
    loras = {}
    for number, (file, (path, scale)) in numbered:
        if file.is_lora:
            loras[f"adapter-{number}"] = scale * config.adapter_scale
            folder, file_name = os.path.split(path)
            pipeline.load_lora_weights(folder, weight_name=file_name, adapter_name=f"adapter-{number}")
        else:
            load_kronecker(pipeline, path, scale * config.adapter_scale, f"adapter-{number}")
    if loras:
        pipeline.set_adapters(list(loras), list(loras.values()))


def merge_adapters(pipeline: DiffusionPipeline) -> int:
    """Put all adapters into the base weights for good; return the number of layers that had some."""
    models, layers = components(pipeline), 0
    for model in models.values():
        if adapted := kronecker_layers(model):
            layers += len(adapted)
            merge_kronecker(model)
            remove_kronecker(model)
    if loras := [name for name, model in models.items() if getattr(model, "peft_config", None)]:
        layers += sum(hasattr(module, "lora_A") for name in loras for module in models[name].modules())
        pipeline.fuse_lora(components=loras)
        pipeline.unload_lora_weights()
    return layers


def hasten_drawing(pipeline: DiffusionPipeline, config: AdaptedModelConfig) -> None:
    """Give the pipeline a fast solver, and put its adapters into its weights.

    In bf16 they stay beside them: with 8 bits, a merged weight rounds much of a small delta away.
    """
    pipeline.scheduler = build_sampler(pipeline.scheduler)
    if config.dtype != "bf16":
        merge_adapters(pipeline)


def split_scale(entry: str) -> tuple[str, float]:
    """Return the path and the strength of "FILE:SCALE", 1.0 where none is given."""
    path, _, scale = entry.rpartition(":")
    try:
        return (path, float(scale)) if path else (entry, 1.0)
    except ValueError:
        return entry, 1.0  # the colon belongs to the path
