"""From a file of any method to another layout: what can become what, and what the user is told. See scripts/convert.py.

Every format is a function that writes, and prints what the user should know.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dreambooth.base_model.checks import empty_models
from dreambooth.base_model.loading import DTYPES
from dreambooth.base_model.source import base_source
from dreambooth.errors import UserError
from dreambooth.options.base_model import BaseModelOptions
from kron_formats.architectures import load_architecture, match_published
from kron_formats.changes import LowRank
from kron_formats.custom_diffusion import custom_diffusion_snippet, write_diffusers_custom_diffusion
from kron_formats.errors import naming
from kron_formats.export import (
    dense_bytes,
    diffusers_snippet,
    lora_bytes,
    lora_snippet,
    peft_snippet,
    total_error,
    write_diffusers,
    write_equal_alphas,
    write_lora,
    write_peft,
)
from kron_formats.families import COMPONENTS
from kron_formats.fused import checkpoint_family, fuse_checkpoint, fuse_pipeline
from kron_formats.layout import NEEDED_KEYS
from kron_formats.lora import lora_to_kronecker
from kron_formats.matching import MatchedAdapter, match_layers
from kron_formats.names import Layer, find_parameters
from kron_formats.nearest import nearest_loras
from kron_formats.paths import shared_name
from kron_formats.reading import AdapterFile, not_kronecker_error
from kron_formats.sizes import size_in_layer
from kron_formats.words import WORD_KEY
from kron_formats.writing import carried_metadata, is_bare, write_native

DEFAULT_PRECISION = "fp32"


def convert(file: AdapterFile, arguments: argparse.Namespace) -> None:
    """Write a file as the command line says. Raises UserError or KroneckerError, before any work, if it cannot be."""
    check_convertible(file, arguments)
    adapter = match(file, arguments)
    if arguments.to in KRONECKER_FORMATS:
        adapter = as_kronecker(adapter, arguments)
    arguments.output.absolute().parent.mkdir(parents=True, exist_ok=True)
    FORMATS[arguments.to](adapter, arguments)


def check_convertible(file: AdapterFile, arguments: argparse.Namespace) -> None:
    """Raise UserError or KroneckerError if a file of its method cannot be written as --to says. Reads no weights."""
    if not file.layers:
        raise UserError(f"--to {arguments.to}: {file.path} is {file.noun} and changes no weights; --inspect says more")
    if arguments.to in KRONECKER_FORMATS and not (file.is_kronecker or file.is_lora):
        raise not_kronecker_error(file)
    if arguments.to == "lora" and not file.is_kronecker:
        if not arguments.rank:
            raise UserError(
                f"--to lora: {file.path} is {file.noun}, of which no LoRA is exact: give --rank, such as 32"
            )
        if file.needs_weights and not arguments.pretrained_model_name_or_path:
            raise UserError(
                f"--to lora needs --pretrained_model_name_or_path: {file.path} is {file.noun}, whose changes depend on "
                "the base model's weights"
            )


def match(file: AdapterFile, arguments: argparse.Namespace) -> MatchedAdapter:
    """Return the file matched with its base model, of which no weights are read.

    Raises UserError if that is not a base model, KroneckerError if the file does not fit it.
    """
    if arguments.pretrained_model_name_or_path is None:
        return match_published(file)
    return match_layers(file, named_models(base_options(arguments)))


def named_models(config: BaseModelOptions) -> dict[str, nn.Module]:
    """Return the components of a base model that files have names for, without weights.

    Raises UserError if it is not a base model.
    """
    if (family := base_source(config).family) and config.base_config is None:
        return load_architecture(family.architecture)  # a published architecture needs no configuration
    return empty_models(config, COMPONENTS)


def base_options(arguments: argparse.Namespace) -> BaseModelOptions:
    return BaseModelOptions(
        pretrained_model_name_or_path=arguments.pretrained_model_name_or_path, base_config=arguments.base_config
    )


def weights_of(adapter: MatchedAdapter, arguments: argparse.Namespace) -> dict[Layer, torch.Tensor]:
    """Return the base model's weights, fp32, of what a file changes; none if they do not matter."""
    if not adapter.file.needs_weights:
        return {}
    weights = base_source(base_options(arguments)).weights
    models = {part: weights.load(part, torch.float32) for part in {layer.component for layer in adapter.layers}}
    found = find_parameters(models)
    return {x: getattr(x.module, x.parameter).detach() for x in found if x in adapter.layers}


def as_kronecker(adapter: MatchedAdapter, arguments: argparse.Namespace) -> MatchedAdapter:
    """Return the adapter with the nearest Kronecker factors for the layers of a LoRA, whose error is printed."""
    file = adapter.file
    if not file.is_lora:
        if arguments.kron_a1:
            raise UserError(f"--kron_a1, --kron_a2: {file.path} is not a LoRA; its factors keep their shape")
        return adapter
    if arguments.to != "native":
        raise UserError(f"--to {arguments.to}: {file.path} is a LoRA; it can be converted --to native, lora or fused")
    layers, transposed_rows, worst = dict(adapter.layers), file.own_metadata.get("rows") == "transposed", 0.0
    for layer, entry in layers.items():
        if isinstance(entry, LowRank):
            layers[layer], error = lora_to_kronecker(entry, *factor_shape(layer, file, arguments), transposed_rows)
            worst = max(worst, error)
    print(f"Nearest Kronecker product of every layer: largest relative error {worst:.2g}")
    return replace(adapter, layers=layers)


def factor_shape(layer: Layer, file: AdapterFile, arguments: argparse.Namespace) -> tuple[int, int]:
    """Return (a1, a2) from the command line, or from the metadata of a LoRA that was converted from factors."""
    if arguments.kron_a1:
        d_out, d_in = layer.size
        with naming(f"{layer.dotted} maps {d_in} to {d_out} features"):
            return size_in_layer("a1", arguments.kron_a1, d_out), size_in_layer("a2", arguments.kron_a2, d_in)
    if shape := file.layout.shape_of(layer.native) or file.layout.shape_of(layer.kohya):
        return shape
    raise UserError(f"{file.path} is a LoRA: give the shape (a1, a2) of the factors with --kron_a1 and --kron_a2")


# ---- the formats: each writes, and prints what the user should know ----


def to_native(adapter: MatchedAdapter, arguments: argparse.Namespace) -> None:
    metadata, kohya_names = metadata_for(adapter, arguments), arguments.sdxl_names == "diffusers"
    write_native(arguments.output, adapter.factors, adapter.family, metadata, dtype_of(arguments), kohya_names)
    announce(adapter, arguments)
    if any(factors.transposed_rows for factors in adapter.factors.values()):
        print("Its rows are in the order of the paper's code, which load_kronecker reads; for other tools: --to lora")


def to_diffusers(adapter: MatchedAdapter, arguments: argparse.Namespace) -> None:
    write_diffusers(arguments.output, adapter.factors, metadata_for(adapter, arguments), dtype_of(arguments))
    announce(adapter, arguments)
    print(f"\nIn diffusers 0.42 and later:\n\n{diffusers_snippet(arguments.output, adapter.factors)}")


def to_peft(adapter: MatchedAdapter, arguments: argparse.Namespace) -> None:
    base = arguments.pretrained_model_name_or_path or adapter.file.own_metadata.get("base_model")
    name = shared_name(base) if base and not arguments.no_metadata else None
    write_peft(arguments.output, adapter.factors, name, dtype_of(arguments))
    announce(adapter, arguments)
    print(f"\nIn peft:\n\n{peft_snippet(arguments.output, adapter.factors)}")


def to_lora(adapter: MatchedAdapter, arguments: argparse.Namespace) -> None:
    if not adapter.file.is_kronecker:
        return to_nearest_lora(adapter, arguments)
    layers, dtype, rank = adapter.factors, dtype_of(arguments), arguments.rank
    size, changed = lora_bytes(layers, rank, dtype), dense_bytes(layers, dtype)
    print(f"The LoRA takes {size / 2**20:,.1f} MiB in {arguments.save_precision or DEFAULT_PRECISION}", end="")
    if size >= changed:
        print(f", the weights that it changes {changed / 2**20:,.1f}: use a small --rank, or --to fused", end="")
    print(flush=True)
    metadata, kohya_names = metadata_for(adapter, arguments), arguments.sdxl_names == "diffusers"
    report = write_lora(arguments.output, layers, adapter.family, metadata, dtype, rank, kohya_names)
    if rank:
        print_errors(report)
    print(f"Relative error of all layers together: {total_error(layers, report):.2e}")
    announce(adapter, arguments)
    print(f"\nIn diffusers:\n\n{lora_snippet(arguments.output)}")


def to_nearest_lora(adapter: MatchedAdapter, arguments: argparse.Namespace) -> None:
    weights, nothing = weights_of(adapter, arguments), torch.empty(0)
    nearest = nearest_loras(adapter.layers, lambda layer: weights.get(layer, nothing), arguments.rank)
    if not nearest.layers:
        raise UserError(f"--to lora: {adapter.file.path} changes nothing that a LoRA can hold")
    metadata, kohya_names = metadata_for(adapter, arguments), arguments.sdxl_names == "diffusers"
    metadata.pop(WORD_KEY, None)
    if not is_bare(metadata):
        metadata["modelspec.description"] = f"LoRA, the nearest to {adapter.file.noun}"
    write_equal_alphas(
        arguments.output, nearest.layers, adapter.family, metadata, dtype_of(arguments), kohya_names=kohya_names
    )
    print_errors({layer: (lora.down.shape[0], nearest.errors[layer]) for layer, lora in nearest.layers.items()})
    if nearest.left_out:
        print(
            f"A LoRA cannot hold {len(nearest.left_out)} of the parameters that change, {nearest.share:.1%} of the "
            f"change: norms, biases, embeddings and the like, such as {nearest.left_out[0].dotted}"
        )
    print(f"Relative error of all that changes together: {nearest.error:.2e}")
    announce(replace(adapter, layers={layer: adapter.layers[layer] for layer in nearest.layers}), arguments)
    print(f"\nIn diffusers:\n\n{lora_snippet(arguments.output)}")


def print_errors(report: Mapping[Layer, tuple[int, float]]) -> None:
    for layer, (r, error) in report.items():
        print(f"    rank {r:4d}  relative error {error:.2e}  {layer.dotted}")


def to_custom_diffusion(adapter: MatchedAdapter, arguments: argparse.Namespace) -> None:
    base = arguments.pretrained_model_name_or_path
    if base is None and adapter.family:
        unet: Any = load_architecture(adapter.family.architecture)["unet"]
    else:
        unet = empty_models(base_options(arguments), ("unet",))["unet"]
    attentions = [name.removesuffix(".processor") for name in unet.attn_processors]
    write_diffusers_custom_diffusion(
        arguments.output, adapter.layers, adapter.file.words, attentions, dtype_of(arguments)
    )
    print(f"Wrote {len(adapter.layers)} weights to {arguments.output}")
    print(f"\nIn diffusers:\n\n{custom_diffusion_snippet(arguments.output, adapter.file.words)}")


def to_fused(adapter: MatchedAdapter, arguments: argparse.Namespace) -> None:
    base, output = arguments.pretrained_model_name_or_path, arguments.output
    if Path(base).is_file():
        fuse_checkpoint(Path(base), output, adapter.layers, checkpoint_family(Path(base)))
    else:
        fuse_pipeline(base, output, adapter.layers, dtype_of(arguments))
    announce(adapter, arguments)


KRONECKER_FORMATS = ("native", "diffusers", "peft")
FORMATS: dict[str, Callable[[MatchedAdapter, argparse.Namespace], None]] = {
    "native": to_native,
    "diffusers": to_diffusers,
    "peft": to_peft,
    "lora": to_lora,
    "fused": to_fused,
    "custom_diffusion": to_custom_diffusion,
}


def dtype_of(arguments: argparse.Namespace) -> torch.dtype:
    return DTYPES[arguments.save_precision or DEFAULT_PRECISION]


def metadata_for(adapter: MatchedAdapter, arguments: argparse.Namespace) -> dict[str, str]:
    carried = carried_metadata(adapter.file)
    return {key: carried[key] for key in NEEDED_KEYS if key in carried} if arguments.no_metadata else carried


def announce(adapter: MatchedAdapter, arguments: argparse.Namespace) -> None:
    made_for = adapter.family.title if adapter.family else "this model"
    print(f"Wrote {len(adapter.layers)} layers for {made_for} to {arguments.output}")
    for word in adapter.file.words:
        print(f"The word {word.text} is not in it: {adapter.file.path} has its embedding, which is loaded besides")
