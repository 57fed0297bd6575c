"""Adapters as peft's layers inside a diffusers pipeline: Kronecker factors as LoKr, and LoRAs."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kron_formats.changes import Change, Factors, LowRank
from kron_formats.errors import KroneckerError
from kron_formats.lora import kronecker_to_lora
from kron_formats.matching import match_layers
from kron_formats.names import Layer, Models, components, find_layers
from kron_formats.reading import read_kronecker
from kron_formats.writing import cast


def attach_to_diffusers(pipeline: Any, path: str | os.PathLike, adapter_name: str = "default") -> None:
    """Add the adapter in a file to a pipeline as peft layers, whatever the shapes of its factors.

    The pipeline's own `set_adapters`, `fuse_lora`, `unfuse_lora`, `delete_adapters`, `unload_lora_weights` then work on
    it, beside LoRAs too, and so does `enable_model_cpu_offload`. `load_kronecker` is faster and leaner: peft multiplies
    out A ⊗ B in every forward pass, and its LoKr layers cannot be offloaded sequentially.

    Raises KroneckerError, with the pipeline untouched, if the file does not fit, if its factors overflow the model's
    dtype, if the name is taken and if q, k and v are fused.
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
    check_not_fused(parts.values())
    cast_layers = {layer: _cast_beside(layer, factors) for layer, factors in layers.items()}
    for component in dict.fromkeys(layer.component for layer in layers):
        part = {layer: factors for layer, factors in cast_layers.items() if layer.component == component}
        _inject_kronecker(parts[component], part, adapter_name)


def attach_lora(models: Models, layers: Mapping[Layer, Change], adapter_name: str) -> None:
    """Add a LoRA that was read and matched to a pipeline's models as peft layers, its strengths in its factors.

    Ranks and strengths may differ between layers, which diffusers' own loader gets wrong; a layer that the file holds
    as Kronecker factors becomes the LoRA that is equal to it. The factors are fp32 beside a model of any dtype.

    The layers may have been matched with other models of the same architecture, for example without weights.
    """
    parts = components(models)
    check_not_fused(parts.values())
    here = {layer: layer for layer in find_layers(parts)}  # equal to those that were matched, but of these models
    loras = {here[layer]: low_rank(entry) for layer, entry in layers.items()}
    for component in dict.fromkeys(layer.component for layer in loras):
        part = {layer: entry for layer, entry in loras.items() if layer.component == component}
        _inject_lora(parts[component], part, adapter_name)


def low_rank(entry: Change) -> LowRank:
    """Return what a LoRA's file holds for a layer as up · down: Kronecker factors as the LoRA that is equal to them."""
    if isinstance(entry, Factors):
        return kronecker_to_lora(entry)[0]
    assert isinstance(entry, LowRank), "a LoRA's file holds nothing else"
    return entry


def _cast_beside(layer: Layer, factors: Factors) -> tuple[Tensor, Tensor]:
    """Return A and B in the dtype and on the device of the layer's weight."""
    weight = layer.module.weight
    A, B = cast(layer, factors, weight.dtype if weight.is_floating_point() else torch.float32)
    return A.to(weight.device), B.to(weight.device)


def _inject_kronecker(model: nn.Module, layers: Mapping[Layer, tuple[Tensor, Tensor]], adapter_name: str) -> None:
    from peft import LoKrConfig

    config = LoKrConfig(r=1, alpha=1, target_modules=_targets(layers), inference_mode=True)
    for layer, module in _inject(model, config, layers, adapter_name).items():
        for holder in (module.lokr_w1, module.lokr_w1_a, module.lokr_w1_b,
                       module.lokr_w2, module.lokr_w2_a, module.lokr_w2_b):  # fmt: skip
            if adapter_name in holder:
                del holder[adapter_name]
        for holder, factor in zip((module.lokr_w1, module.lokr_w2), layers[layer]):
            holder[adapter_name] = nn.Parameter(factor, requires_grad=False)


def _inject_lora(model: nn.Module, layers: Mapping[Layer, LowRank], adapter_name: str) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=1, lora_alpha=1, target_modules=_targets(layers), inference_mode=True)
    for layer, module in _inject(model, config, layers, adapter_name).items():
        up, down = (side.float().to(layer.module.weight.device) for side in (layers[layer].up, layers[layer].down))
        module.r[adapter_name] = module.lora_alpha[adapter_name] = down.shape[0]  # whose quotient stays 1
        kernels = {"lora_A": down.unflatten(1, (-1, *layer.kernel)), "lora_B": up[(..., *[None] * len(layer.kernel))]}
        for side, kernel in kernels.items():
            getattr(module, side)[adapter_name].weight = nn.Parameter(kernel.contiguous(), requires_grad=False)


def _targets(layers: Iterable[Layer]) -> list[str]:
    """Return the paths of layers in their component, as peft looks for them: outside its own wrappers."""
    return [re.sub(r"(\.base_layer)+$", "", layer.path) for layer in layers]


def _inject(model: nn.Module, config: Any, layers: Iterable[Layer], adapter_name: str) -> dict[Layer, Any]:
    """Return layer -> peft's layer around it, with the adapter's tensors still of a wrong size and without values.

    peft creates only what one number can say, but multiplies whatever its layers hold: create, then replace.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage=True)  # that is: on the meta device
    model._hf_peft_config_loaded = True  # pyright: ignore[reportArgumentType] diffusers' and transformers' own flag
    wrappers = {layer: model.get_submodule(path) for layer, path in zip(layers, _targets(layers))}
    assert all(isinstance(wrapper, BaseTunerLayer) for wrapper in wrappers.values())
    return wrappers


def check_not_fused(models: Iterable[nn.Module]) -> None:
    """Raise KroneckerError if an attention computes q, k and v from one fused weight, where adapters have no effect."""
    for model in models:
        if any(_is_fused(module) for module in model.modules()):
            raise KroneckerError(
                f"the {type(model).__name__} computes q, k and v from one fused weight, which adapters cannot reach: "
                "call unfuse_qkv_projections before, and fuse_qkv_projections again after"
            )


def _is_fused(module: nn.Module) -> bool:
    if not getattr(module, "fused_projections", False):
        return False
    # The UNet's own unfusing leaves that flag set, and changes the processor back
    resets_flag, processor = hasattr(module, "unfuse_projections"), type(getattr(module, "processor", None)).__name__
    return resets_flag or processor.startswith("Fused")
