"""Base models with adapters in them, for the scripts that draw and merge. Each file says which method it is of.

What changes depend on the base weights themselves (spectral shifts, weights that were trained in full) is merged when
the base model is loaded, in fp32. What can stay beside them is added by readers, and can be removed again.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dreambooth.base_model.checks import check_parts, empty_models
from dreambooth.base_model.loading import DTYPES
from dreambooth.base_model.process import build_sampler
from dreambooth.base_model.source import base_source, load_scheduler, load_tokenizers, vae_source
from dreambooth.drawing.words import add_words, check_strength_of_words
from dreambooth.options.base_model import AdaptedModelOptions, split_scale
from dreambooth.tokens import subject_words
from kron_formats.errors import KroneckerError, naming
from kron_formats.families import COMPONENTS
from kron_formats.files import printable
from kron_formats.matching import MatchedAdapter, match_layers
from kron_formats.merging import check_strength, check_takes_delta, merge_changes, merged_weight
from kron_formats.names import find_layers
from kron_formats.reading import AdapterFile, read_adapter

logger = logging.getLogger(__name__)

BaseLayer = nn.Linear | nn.Conv2d
HAVE_FP64 = ("cpu", "cuda")  # devices; Apple's GPUs and some of Intel's lack it
Delta = Callable[[], Tensor]  # makes a layer's ΔW (d_out, d_in), large enough to make one at a time


@dataclass(frozen=True)
class Adapter:
    """An adapter, read from its file and matched with the base model."""

    matched: MatchedAdapter
    scale: float
    name: str


class Reader(Protocol):
    """How a method's files are used. methods/readers.py lists the readers, in the order of `add`."""

    def takes(self, file: AdapterFile) -> bool:
        """Whether this reader handles the file, or a part of it."""
        ...

    def add(self, pipeline: DiffusionPipeline, adapters: Sequence[Adapter]) -> None:
        """Put adapters into the base model. Later readers' layers may wrap these or go inside them."""
        ...

    def set_strengths(self, pipeline: DiffusionPipeline, strengths: Mapping[str, float]) -> None:
        """Set the strength of each of this method's adapters, by its name. They must not be merged."""
        ...

    def deltas(self, pipeline: DiffusionPipeline) -> Iterator[tuple[BaseLayer, Delta]]:
        """Yield the base layer and the delta of every layer that this method's adapters change."""
        ...

    def remove(self, pipeline: DiffusionPipeline) -> None:
        """Remove all of this method's adapters."""
        ...


def load_adapted_pipeline(config: AdaptedModelOptions, readers: Sequence[Reader]) -> Any:
    """Return the base model with the adapters in it, or the base model alone if there are none.

    Raises UserError or KroneckerError, before any weights are read, if an adapter does not fit the base model.
    """
    return load_pipeline_with(read_adapters(config, readers), config, readers)


def load_pipeline_with(adapters: Sequence[Adapter], config: AdaptedModelOptions, readers: Sequence[Reader]) -> Any:
    """Return the base model with adapters in it that have been read."""
    if not change_weights(adapters):
        pipeline = load_base_pipeline(config, DTYPES[config.dtype])
    else:  # in fp32: singular vectors of rounded weights are others
        pipeline = load_base_pipeline(config, torch.float32)
        _merge_changes(pipeline, adapters)
        pipeline.to(DTYPES[config.dtype])
    add_adapters(pipeline, adapters, readers)
    return pipeline


def change_weights(adapters: Sequence[Adapter]) -> bool:
    """Whether some of the adapters change the base model's weights for good."""
    return any(adapter.matched.file.needs_weights for adapter in adapters)


def read_adapters(config: AdaptedModelOptions, readers: Sequence[Reader]) -> list[Adapter]:
    """Return the adapters, each matched with the base model's layers. Reads no weights of the base model.

    Raises UserError or KroneckerError if one does not fit.
    """
    check_parts(config)
    models, adapters = empty_models(config, COMPONENTS), []
    for number, entry in enumerate(config.adapter):
        path, scale = split_scale(entry)
        matched = match_layers(read_adapter(path, config.allow_pickle), models)
        what = f"--adapter {entry}: the strength"
        strength = check_strength(scale * config.adapter_scale, what)
        check_strength_of_words(matched.file, strength, what)
        _warn_of_missing_base(matched.file, config)
        adapters.append(Adapter(matched, strength, f"adapter-{number}"))
    if any(adapter.matched.file.words for adapter in adapters):
        adapted_tokenizers(config, adapters)
    return adapters


def _warn_of_missing_base(file: AdapterFile, config: AdaptedModelOptions) -> None:
    """Warn if a file was trained on top of other adapters, and none are part of the base model."""
    if (beneath := file.own_metadata.get("base_adapter")) and not config.base_adapter:
        logger.warning("%s was trained on top of %s: name that with --base_adapter", file.path, printable(beneath))


def adapted_tokenizers(config: AdaptedModelOptions, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Return text encoder -> its tokenizer, with the words of the adapters. Reads no weights.

    Raises KroneckerError if a word is no new one.
    """
    tokenizers = load_tokenizers(config)
    add_words((adapter.matched.file for adapter in adapters), tokenizers)
    return tokenizers


def subject_of(adapters: Sequence[Adapter]) -> str:
    """Return the words that only the subjects have, as far as the adapters' files say."""
    files = [adapter.matched.file.own_metadata for adapter in adapters]
    return " ".join(subject_words(file.get("instance_prompt", ""), file.get("class_prompt")) for file in files)


def load_base_pipeline(config: AdaptedModelOptions, dtype: torch.dtype) -> Any:
    """Return the base model without adapters. `read_adapters` has checked that its parts are there and fit."""
    source = base_source(config)
    parts = [part for part in COMPONENTS if part in source.configurations.classes]
    components = {"scheduler": load_scheduler(config)}
    if config.pretrained_vae_model_name_or_path:
        components["vae"] = vae_source(config).weights.load("vae", dtype)
    else:
        parts.append("vae")
    return DiffusionPipeline.from_pretrained(
        source.configurations.name,
        dtype=dtype,
        variant=config.variant,
        **source.configurations.hub,
        **{**source.weights.load_for_pipeline(parts, dtype), **components},
    )


def add_adapters(pipeline: Any, adapters: Sequence[Adapter], readers: Sequence[Reader]) -> None:
    """Put the adapters into the base model, the first reader's first."""
    for reader in readers:
        if own := [adapter for adapter in adapters if reader.takes(adapter.matched.file)]:
            reader.add(pipeline, own)


def check_adjustable(adapters: Sequence[Adapter]) -> None:
    """Raise KroneckerError, naming the file, if the strength of an adapter cannot be changed once it is added."""
    for file in (adapter.matched.file for adapter in adapters):
        if file.needs_weights or file.words:
            what = "changes the base model's weights for good" if file.needs_weights else "holds a new word"
            raise KroneckerError(
                f"{file.path} {what}, so its strength cannot be changed afterwards; scripts/generate.py draws with it"
            )


def set_strengths(
    pipeline: Any, adapters: Sequence[Adapter], strengths: Sequence[float], readers: Sequence[Reader]
) -> None:
    """Set the strength of each adapter, which are in the pipeline, not merged; 0 for all is the base model."""
    for reader in readers:
        own = [(adapter.name, s) for adapter, s in zip(adapters, strengths) if reader.takes(adapter.matched.file)]
        if own:
            reader.set_strengths(pipeline, dict(own))


def _merge_changes(pipeline: Any, adapters: Sequence[Adapter]) -> None:
    """Add to each weight all changes that depend on it, rounding once.

    Raises KroneckerError, before anything is changed, if a weight cannot take one.
    """
    changes = defaultdict(list)
    for adapter in adapters:
        for parameter, change in adapter.matched.layers.items():
            if change.needs_weight:
                changes[parameter].append(change.scaled(adapter.scale))
    merge_changes(pipeline, changes)


def merge_adapters(pipeline: Any, readers: Sequence[Reader]) -> int:
    """Merge all adapters into the base weights for good, rounding once; return the number of layers merged.

    Raises KroneckerError, with nothing merged, if a layer cannot take a delta or the sum is not finite.
    """
    names = {id(layer.module): layer.dotted for layer in find_layers(pipeline)}
    merged = {}
    for layer, deltas in _deltas(pipeline, readers).items():
        name = names[id(layer)]
        with naming(name):
            check_takes_delta(layer)
            parts = (delta() for delta in deltas)
            merged[layer] = merged_weight(layer.weight, parts, layer.weight.dtype, "the merged weight")
    for layer, weight in merged.items():
        layer.weight.data = weight
    for reader in reversed(readers):
        reader.remove(pipeline)
    return len(merged)


def can_merge(pipeline: Any, readers: Sequence[Reader]) -> bool:
    """Whether every adapted layer can take a delta; quantised ones and those in 8 bits cannot."""
    try:
        for layer in _deltas(pipeline, readers):
            check_takes_delta(layer)
    except KroneckerError:
        return False
    return True


def _deltas(pipeline: Any, readers: Sequence[Reader]) -> dict[BaseLayer, list[Delta]]:
    deltas = defaultdict(list)
    for reader in readers:
        for layer, delta in reader.deltas(pipeline):
            deltas[layer].append(delta)
    return deltas


def prepare_sampling(pipeline: Any) -> None:
    """Give a pipeline a fast solver and a VAE in fp32, since SDXL's gives NaN in fp16."""
    pipeline.scheduler = build_sampler(pipeline.scheduler)
    pipeline.vae.float()


def prepare_drawing(pipeline: Any, readers: Sequence[Reader], config: AdaptedModelOptions) -> None:
    """Prepare a pipeline as `prepare_sampling` does, and merge its adapters.

    In bf16 adapters stay unmerged: its 8 bits of precision would round away much of a small delta. So they do where a
    base model cannot take them, as a quantised one. Sums are in fp64, so a device that lacks it leaves them to the CPU.
    """
    prepare_sampling(pipeline)
    if config.dtype != "bf16" and can_merge(pipeline, readers):
        device = pipeline.device
        if device.type not in HAVE_FP64:
            pipeline.to("cpu", silence_dtype_warnings=True)  # it does not run there
        merge_adapters(pipeline, readers)
        pipeline.to(device)
