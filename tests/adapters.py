"""Pipelines with trained-looking adapters, and the dense weights that every other way has to give too."""

from collections.abc import Mapping

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from kron_adapter import inject_kronecker, kronecker_layers
from kron_formats.families import TEXT_ENCODER_TARGETS
from kron_formats.names import components, find_layers, linear_modules
from kron_formats.sizes import FactorSize
from toyworld.tiny_pipeline import build_pipeline

KEYS_AND_VALUES = {"attn2.to_k": (1, "d_in"), "attn2.to_v": (1, "d_in")}  # of the cross-attention, as LoRA of rank 1


def adapted_pipeline(
    kind: str,
    a1: FactorSize,
    a2: FactorSize,
    text: bool = False,
    strength: float = 0.05,
    factors: Mapping[str, tuple[FactorSize, FactorSize]] | None = None,
) -> DiffusionPipeline:
    """Return a small pipeline ("sd" or "sdxl") with adapters whose deltas have entries of about `strength`.

    `factors` are those of single layers of the UNet.
    """
    pipeline = build_pipeline(kind)
    pipeline.set_progress_bar_config(disable=True)
    for name, model in components(pipeline).items():
        if name == "unet":
            perturb(inject_kronecker(model, a1, a2, factors=factors), strength)
        elif text:
            perturb(inject_kronecker(model, a1, a2, TEXT_ENCODER_TARGETS), strength)
    return pipeline


def perturb(layers: dict, strength: float) -> None:
    for layer in layers.values():
        nn.init.normal_(layer.B, std=strength / (layer.gain * layer.A.std().item()))


def plain_pipeline(kind: str) -> DiffusionPipeline:
    pipeline = build_pipeline(kind)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def dense_weights(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """Return "component.layer" -> W + torch.kron(A, B) in float64, straight from the trained layers."""
    weights = {}
    for component, model in components(pipeline).items():
        for path, layer in kronecker_layers(model).items():
            delta = torch.kron(layer.A.detach().double() * layer.gain, layer.B.detach().double())
            weights[f"{component}.{path}"] = layer.weight.detach().double() + delta
    return weights


def plain_weights(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """Return "component.layer" -> weight of every linear layer, in float64."""
    return {
        f"{component}.{name}": module.weight.detach().double()
        for component, model in components(pipeline).items()
        for _, name, module in linear_modules(model)
    }


def write_reference_file(path) -> dict[str, tuple[Tensor, Tensor]]:
    """Write a file of the paper's own code for the small UNet; return layer -> (down (a2, a1), up (b1, b2))."""
    torch.manual_seed(0)
    layers, tensors = {}, {}
    for layer in find_layers({"unet": plain_pipeline("sd").unet}):
        if ".to_" in layer.name:
            d_out, d_in = layer.size
            down, up = torch.randn(8, 4) * 0.02, torch.randn(d_out // 4, d_in // 8) * 0.02  # a1 = 4, a2 = 8
            attention, projection = layer.name.removesuffix(".0").rsplit(".", 1)
            key = f"unet.{attention}.processor.{projection}_lora"
            tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
            layers[layer.name] = down, up
    save_file(tensors, path)
    return layers


def worst_error(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    return max((ours[name] - weight).abs().max().item() for name, weight in exact.items())


def draw(pipeline: DiffusionPipeline, **options) -> Tensor:
    """Return one image (1, 3, 64, 64) in [0, 1], always from the same noise."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return pipeline(
            "a photo of sks dog", num_inference_steps=2, generator=generator, output_type="pt", **options
        ).images.float()


def quantised(linear: nn.Linear, kind: str) -> nn.Module:
    """Return a layer quantised by bitsandbytes, "4-bit" or "8-bit"."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    if kind == "4-bit":
        base = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
    else:
        base = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    base.load_state_dict(linear.state_dict())
    return base.to("cpu")
