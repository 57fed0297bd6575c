"""The nearest LoRA of any rank to what a file changes, and what a LoRA cannot hold of it.

ΔW = U Uᵀ ΔW for a complete orthonormal U; with the R first eigenvectors of ΔW ΔWᵀ it is the nearest matrix of rank R.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kron_formats.changes import Change, LowRank
from kron_formats.names import Layer

IN_LORAS = (".resnets.", ".attentions.", "samplers.", ".encoder.layers.")  # parts that every LoRA tool knows


@dataclass(frozen=True)
class Nearest:
    """LoRAs, and how far they are from what they stand for."""

    layers: dict[Layer, LowRank]
    errors: dict[Layer, float]  # of each layer: |ΔW - up · down| / |ΔW|
    error: float  # of all that changes together, with what is left out
    left_out: list[Layer]  # what changes and has no place in a LoRA: norms, biases, embeddings, the model's ends
    share: float  # of the whole change that they are, as a norm


def nearest_lora(delta: Tensor, rank: int) -> tuple[LowRank, float]:
    """Return the LoRA of at most `rank` that is nearest to a matrix (d_out, d_in), and its relative error."""
    wide = delta.shape[0] <= delta.shape[1]
    square = delta if wide else delta.t()
    U = torch.linalg.eigh(square @ square.t()).eigenvectors.flip(1)[:, :rank]
    rest = U.t() @ square
    root = rest.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()  # both sides of one size, for fp16
    left, right = U * root, rest / root[:, None]
    lora = LowRank(left, right) if wide else LowRank(right.t(), left.t())
    return lora, ((delta - lora.dense()).norm() / delta.norm()).item()


def nearest_loras(changes: Mapping[Layer, Change], weight_of: Callable[[Layer], Tensor], rank: int) -> Nearest:
    """Return the nearest LoRAs to all changes that are not zero. `weight_of` gives the base model's weights."""
    layers, errors, left_out = {}, {}, []
    lost = outside = total = 0.0  # squares of norms
    for layer, change in changes.items():
        delta = change.delta(weight_of(layer))
        if (square := delta.square().sum().item()) == 0:
            continue
        total += square
        if layer.is_matrix and any(part in layer.name for part in IN_LORAS):
            layers[layer], errors[layer] = nearest_lora(delta, rank)
            lost += square * errors[layer] ** 2
        else:
            left_out.append(layer)
            outside += square
    whole = total or 1.0
    return Nearest(layers, errors, ((lost + outside) / whole) ** 0.5, left_out, (outside / whole) ** 0.5)
