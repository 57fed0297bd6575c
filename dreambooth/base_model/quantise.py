"""A frozen model in 4 or 8 bits: its linear layers as bitsandbytes keeps them, on the CPU as on a GPU."""

from typing import Literal

import torch
from torch import nn


def quantise(model: nn.Module, precision: Literal["nf4", "int8"], device: torch.device) -> None:
    """Replace the linear layers of a frozen model by quantised ones and move the model to the device.

    nf4 (arXiv 2305.14314) takes 4.5 bits a weight, int8 (arXiv 2208.07339) 8. Other layers keep their dtype.
    """
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for name, linear in linears.items():
        model.set_submodule(name, _quantised(linear, precision))
    model.to(device)  # bitsandbytes quantises a layer's weight as it arrives


def _quantised(linear: nn.Linear, precision: Literal["nf4", "int8"]) -> nn.Linear:
    import bitsandbytes as bnb  # imported here: it takes a second and most runs do not need it

    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    if precision == "nf4":
        layer = bnb.nn.Linear4bit(*sizes, compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta")
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    return layer.requires_grad_(False)
