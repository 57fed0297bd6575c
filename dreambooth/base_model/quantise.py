"""Frozen models in 4 or 8 bits, quantised by bitsandbytes, on CPUs and GPUs."""

from typing import Literal

import torch
from torch import nn


def quantise(model: nn.Module, precision: Literal["nf4", "int8"], device: torch.device) -> None:
    """Replace the linear layers of a frozen model by quantised ones, and move the model to the device.

    nf4 (arXiv 2305.14314) takes 4.5 bits per weight, int8 (arXiv 2208.07339) 8. Other layers keep their dtype.
    """
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for name, linear in linears.items():
        model.set_submodule(name, _quantised(linear, precision))
    model.to(device)  # bitsandbytes quantises weights when they move


def _quantised(linear: nn.Linear, precision: Literal["nf4", "int8"]) -> nn.Linear:
    """Return a layer with the weights of `linear`, which are quantised when it moves to a device."""
    import bitsandbytes as bnb  # takes a second to import, and most runs do not need it

    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    if precision == "nf4":
        layer = bnb.nn.Linear4bit(*sizes, compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta")
        layer.weight = bnb.nn.Params4bit(
            linear.weight.data,
            requires_grad=False,
            quant_type="nf4",  # pyright: ignore[reportCallIssue]  # nn.Parameter's metaclass hides __new__'s parameters
        )
    else:
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        layer.weight = bnb.nn.Int8Params(
            linear.weight.data,
            requires_grad=False,
            has_fp16_weights=False,  # pyright: ignore[reportCallIssue]  # as above
        )
    layer.bias = linear.bias
    return layer.requires_grad_(False)
