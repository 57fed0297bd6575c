"""Kronecker adapters as peft's LoKr layers inside a diffusers pipeline."""

import os
from typing import Any

import torch
from torch import nn

from kron_formats.errors import KroneckerError
from kron_formats.matching import match_layers
from kron_formats.names import Layer, components
from kron_formats.reading import Factors, read_kronecker
from kron_formats.writing import cast


def attach_to_diffusers(pipeline: Any, path: str | os.PathLike, adapter_name: str = "default") -> None:
    """Add the adapter in a file to a pipeline as peft layers, whatever the shapes of its factors.

    The pipeline's own `set_adapters`, `fuse_lora`, `unfuse_lora`, `delete_adapters`, `unload_lora_weights` then work on
    it, beside LoRAs too, and so does `enable_model_cpu_offload`. `load_kronecker` is faster and leaner: peft multiplies
    out A ⊗ B in every forward pass, and its LoKr layers cannot be offloaded sequentially.

    Raises KroneckerError, with the pipeline untouched, if the file does not fit or the name is taken.
    """
    parts = components(pipeline)
    layers = match_layers(read_kronecker(path), parts).factors
    for name, model in parts.items():
        if adapter_name in getattr(model, "peft_config", {}):
            raise KroneckerError(f'the {name} has an adapter named "{adapter_name}" already; choose another name')
        if hasattr(model, "_hf_hook"):
            raise KroneckerError(f"the {name} is offloaded; attach adapters before offloading is enabled")
    if any(layer.path.endswith(".base") for layer in layers):
        raise KroneckerError("the pipeline has adapters from load_kronecker; call remove_kronecker first")
    if any(type(layer.module) not in (nn.Linear, nn.Conv2d) for layer in layers):
        raise KroneckerError("the pipeline has quantised layers, which peft's LoKr cannot adapt: use load_kronecker")
    if any(factors.transposed_rows for factors in layers.values()):
        raise KroneckerError(
            f"the rows of {path} are in the order of the paper's code, which peft cannot express: use load_kronecker, "
            "or make a LoRA of it with scripts/convert.py --to lora"
        )
    for component in dict.fromkeys(layer.component for layer in layers):
        part = {layer: factors for layer, factors in layers.items() if layer.component == component}
        _inject(parts[component], part, adapter_name)


def _inject(model: nn.Module, layers: dict[Layer, Factors], adapter_name: str) -> None:
    """peft creates only what one number can say, but multiplies whatever its layers hold: create, then replace."""
    from peft import LoKrConfig, inject_adapter_in_model
    from peft.tuners.lokr import LoKrLayer

    paths = {layer: layer.path.removesuffix(".base_layer") for layer in layers}
    while any(path.endswith(".base_layer") for path in paths.values()):  # a LoKr around a LoRA
        paths = {layer: path.removesuffix(".base_layer") for layer, path in paths.items()}
    config = LoKrConfig(r=1, alpha=1, target_modules=list(paths.values()), inference_mode=True)
    inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage=True)  # that is: on the meta device
    model._hf_peft_config_loaded = True  # pyright: ignore[reportArgumentType] diffusers' and transformers' own flag
    for layer, factors in layers.items():
        module, weight = model.get_submodule(paths[layer]), layer.module.weight
        assert isinstance(module, LoKrLayer)
        for holder in (module.lokr_w1, module.lokr_w1_a, module.lokr_w1_b,
                       module.lokr_w2, module.lokr_w2_a, module.lokr_w2_b):  # fmt: skip
            if adapter_name in holder:
                del holder[adapter_name]
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        for holder, factor in zip((module.lokr_w1, module.lokr_w2), cast(layer, factors, dtype)):
            holder[adapter_name] = nn.Parameter(factor.to(weight.device), requires_grad=False)
