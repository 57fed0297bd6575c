"""A complete diffusers pipeline folder of which some components have been trained.

The other components are read from the base model and written, one at a time, when the folder is: training holds none of
them. Safety checkers are left out, as training leaves them out.
"""

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from safetensors import safe_open
from torch import Tensor, nn

from dreambooth.base_model.configurations import Configurations
from dreambooth.base_model.source import Source, base_source, load_scheduler, vae_source
from dreambooth.family import Family
from dreambooth.layout import TRAINING_NAME
from dreambooth.options.base_model import BaseModelOptions
from kron_formats.checkpoint_file import write_checkpoint_file
from kron_formats.errors import KroneckerError
from kron_formats.families import TOKENIZERS, family_of_config
from kron_formats.files import write_text
from kron_formats.fused import hide_folders
from kron_formats.streaming import Pending, pending, stream_tensors

FORMAT = {"format": "pt"}  # metadata that transformers and diffusers want
WITHOUT_LEVEL = ("text_projection.", "logit_scale")  # what is beside text_model in a text encoder


# ---- components that have been trained ----


def write_component(folder: Path, model: Any, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write a model's configuration and its weights, in `dtype`, tensor by tensor, as `from_pretrained` reads them.

    A text encoder's names are those of published files. Raises KroneckerError if `dtype` cannot hold a weight.
    """
    folder.mkdir()
    if isinstance(model, ModelMixin):
        model.save_config(folder)
        name = "diffusion_pytorch_model.safetensors"
    else:
        config = copy.deepcopy(model.config)
        config.dtype, config.architectures = str(dtype).removeprefix("torch."), [type(model).__name__]
        config.save_pretrained(folder)
        name = "model.safetensors"
        weights = {_published(key): weight for key, weight in weights.items()}
    tensors = {key: _converted(f"{folder.name}.{key}", weight, dtype) for key, weight in weights.items()}
    stream_tensors(folder / name, tensors, FORMAT)
    hide_folders(folder)


def _published(name: str) -> str:
    """Return a text encoder's weight as published files call it: transformers 5 dropped a level, files keep it."""
    return name if name.startswith(("text_model.", *WITHOUT_LEVEL)) else f"text_model.{name}"


def _converted(name: str, weight: Tensor, dtype: torch.dtype) -> Pending:
    def read() -> Tensor:
        converted = weight.detach().to(dtype)
        if not converted.isfinite().all():
            raise KroneckerError(
                f"{name} is not finite in {dtype} (--save_precision): it reaches {weight.abs().max():g}; nothing "
                "was written"
            )
        return converted

    return Pending(tuple(weight.shape), dtype, read)


# ---- those of the base model ----


def write_base_parts(
    folder: Path, family: Family, trained: Collection[str], dtype: torch.dtype, config: BaseModelOptions
) -> dict[str, type]:
    """Write the components that were not trained, weights in `dtype`, one at a time; return component -> its class."""
    classes = {}
    for part, source in _base_parts(family, trained, config):
        component = source.weights.load(part, dtype)
        write_component(folder / part, component, dict(component.named_parameters()), dtype)
        classes[part] = type(component)
    configurations = base_source(config).configurations
    present = [part for part in family.tokenizers if part in configurations.classes]
    small = {part: configurations.load(part) for part in present} | {"scheduler": load_scheduler(config)}
    for part, component in small.items():
        component.save_pretrained(folder / part)
        classes[part] = type(component)
    hide_folders(folder)
    return classes


def base_numbers(family: Family, trained: Collection[str], config: BaseModelOptions) -> int:
    """Return how many numbers the weights have that `write_base_parts` writes. Reads none of them."""
    parts = _base_parts(family, trained, config)
    models: Iterator[nn.Module] = (source.configurations.empty(part) for part, source in parts)
    return sum(parameter.numel() for model in models for parameter in model.parameters())


def _base_parts(family: Family, trained: Collection[str], config: BaseModelOptions) -> Iterator[tuple[str, Source]]:
    """Yield the components with weights that were not trained, and where they are."""
    source = base_source(config)
    for part in (family.denoiser, *family.text_encoders):
        if part in source.configurations.classes and part not in trained:
            yield part, source
    yield "vae", vae_source(config)


# ---- the same in one file ----


def write_single_file(folder: Path, path: Path, metadata: Mapping[str, str], config: BaseModelOptions) -> None:
    """Write the pipeline in `folder` as one file in the layout of Stability's code, tensor by tensor."""
    saved = Configurations(str(folder), str(folder), {})
    parts = [part for part in ("unet", *TOKENIZERS, "vae") if part in saved.classes]
    models = {part: saved.empty(part) for part in parts}
    weights = {part: _weights_in(next((folder / part).glob("*.safetensors"))) for part in parts}
    family = base_source(config).family or family_of_config(models["unet"].config)
    write_checkpoint_file(path, models, weights, family, metadata)


def _weights_in(path: Path) -> dict[str, Pending]:
    """Return the weights of a file that was just written, read when they are needed."""
    with safe_open(path, framework="pt") as file:
        views = {name: file.get_tensor(name) for name in file.keys()}  # of the file, mapped into memory
    return {name: pending(view) for name, view in views.items()}


# ---- what the folder says of itself ----


def write_index(folder: Path, classes: Mapping[str, type], config: BaseModelOptions) -> None:
    """Write model_index.json, like the base model's, with these components and no others."""
    index: dict[str, Any] = {}
    for name, entry in base_source(config).configurations.index.items():
        if isinstance(entry, (list, tuple)):
            own = classes.get(name)
            index[name] = [own.__module__.partition(".")[0], own.__name__] if own else [None, None]
        elif not name.startswith("_"):
            index[name] = False if name == "requires_safety_checker" else entry
    pipeline = base_source(config).pipeline_class
    index = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__, **dict(sorted(index.items()))}
    write_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")


def write_metadata(folder: Path, metadata: Mapping[str, str]) -> None:
    """Write training.json: how the result was trained, as files have it in their metadata."""
    write_text(folder / TRAINING_NAME, json.dumps(dict(metadata), indent=2, ensure_ascii=False) + "\n")
