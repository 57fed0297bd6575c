"""Base models with adapters in them, for the scripts that draw and merge. Each file says which method it is of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from diffusers import DiffusionPipeline

from dreambooth.base_model.loading import DTYPES, empty_models, hub_arguments
from dreambooth.base_model.process import build_sampler
from dreambooth.options.base_model import AdaptedModelOptions
from dreambooth.tokens import subject_words
from kron_formats.families import COMPONENTS
from kron_formats.matching import MatchedAdapter, match_layers
from kron_formats.reading import AdapterFile, read_adapter


@dataclass(frozen=True)
class Adapter:
    """An adapter, read from its file and matched with the base model."""

    matched: MatchedAdapter
    scale: float
    name: str


class Reader(Protocol):
    """How a method's files are used. methods/readers.py lists the readers, in the order of `add`."""

    def takes(self, file: AdapterFile) -> bool:
        """Whether this reader handles the file."""
        ...

    def check(self, file: AdapterFile) -> None:
        """Raise UserError if a file that this reader handles cannot be used. Called before weights are read."""
        ...

    def add(self, pipeline: DiffusionPipeline, adapters: Sequence[Adapter]) -> None:
        """Put adapters into the base model. Later readers' layers may wrap these or go inside them."""
        ...

    def merge(self, pipeline: DiffusionPipeline) -> int:
        """Merge all of this method's adapters into the base weights for good; return the number of layers."""
        ...


def load_adapted_pipeline(config: AdaptedModelOptions, readers: Sequence[Reader]) -> Any:
    """Return the base model with the adapters in it, or the base model alone if there are none.

    Raises UserError or KroneckerError, before any weights are read, if an adapter does not fit the base model.
    """
    adapters = read_adapters(config, readers)
    pipeline = load_base_pipeline(config)
    add_adapters(pipeline, adapters, readers)
    return pipeline


def read_adapters(config: AdaptedModelOptions, readers: Sequence[Reader]) -> list[Adapter]:
    """Return the adapters, each matched with the base model's layers. Reads no weights of the base model.

    Raises UserError or KroneckerError if one does not fit.
    """
    models, adapters = empty_models(config, COMPONENTS), []
    for number, entry in enumerate(config.adapter):
        path, scale = split_scale(entry)
        file = read_adapter(path)
        matched = match_layers(file, models)
        _reader_of(file, readers).check(file)
        adapters.append(Adapter(matched, scale * config.adapter_scale, f"adapter-{number}"))
    return adapters


def subject_of(adapters: Sequence[Adapter]) -> str:
    """Return the words that only the subjects have, as far as the adapters' files say."""
    files = [adapter.matched.file.own_metadata for adapter in adapters]
    return " ".join(subject_words(file.get("instance_prompt", ""), file.get("class_prompt")) for file in files)


def load_base_pipeline(config: AdaptedModelOptions) -> Any:
    """Return the base model without adapters."""
    return DiffusionPipeline.from_pretrained(
        config.pretrained_model_name_or_path,
        dtype=DTYPES[config.dtype],
        variant=config.variant,
        **hub_arguments(config),
    )


def add_adapters(pipeline: Any, adapters: Sequence[Adapter], readers: Sequence[Reader]) -> None:
    """Put the adapters into the base model, the first reader's first."""
    for reader in readers:
        if own := [adapter for adapter in adapters if _reader_of(adapter.matched.file, readers) is reader]:
            reader.add(pipeline, own)


def merge_adapters(pipeline: Any, readers: Sequence[Reader]) -> int:
    """Merge all adapters into the base weights for good; return the number of layers merged."""
    return sum(reader.merge(pipeline) for reader in reversed(readers))


def prepare_drawing(pipeline: Any, readers: Sequence[Reader], config: AdaptedModelOptions) -> None:
    """Give the pipeline a fast solver and a VAE in fp32, since SDXL's gives NaN in fp16, and merge its adapters.

    In bf16 adapters stay unmerged: its 8 bits of precision would round away much of a small delta.
    """
    pipeline.scheduler = build_sampler(pipeline.scheduler)
    pipeline.vae.float()
    if config.dtype != "bf16":
        merge_adapters(pipeline, readers)


def split_scale(entry: str) -> tuple[str, float]:
    """Return the path and the strength of "FILE:SCALE", 1.0 if none is given."""
    path, _, scale = entry.rpartition(":")
    try:
        return (path, float(scale)) if path else (entry, 1.0)
    except ValueError:
        return entry, 1.0  # the colon belongs to the path


def _reader_of(file: AdapterFile, readers: Sequence[Reader]) -> Reader:
    return next(reader for reader in readers if reader.takes(file))
