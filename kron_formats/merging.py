"""Deltas in the weights themselves: strengths, which layers can take one, and the sum, rounded once."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kron_formats.changes import Change, as_matrix
from kron_formats.errors import KroneckerError, naming
from kron_formats.names import Layer, Models, find_parameters

PLAIN = "torch.nn.modules."  # where PyTorch's own layers are


def check_strength(strength: float, what: str) -> float:
    """Return a strength as a float. Raises KroneckerError, beginning with `what` it is of, if it is not finite."""
    if not math.isfinite(strength):
        raise KroneckerError(f"{what} is {strength}; it must be a finite number")
    return float(strength)


def has_plain_weight(layer: nn.Module, parameter: str = "weight") -> bool:
    """Whether a layer is PyTorch's own with numbers for weights: not quantised, by another class or another tensor."""
    weight = getattr(layer, parameter)
    plain = type(layer).__module__.startswith(PLAIN) and type(weight) in (nn.Parameter, Tensor)
    return plain and weight.is_floating_point()


def check_takes_delta(layer: nn.Module, parameter: str = "weight") -> None:
    """Raise KroneckerError, saying what to do, if a parameter of a layer cannot be changed by a delta."""
    weight = getattr(layer, parameter)
    if weight.is_meta:
        raise KroneckerError("the base weights are offloaded; merge before offloading is enabled")
    if not has_plain_weight(layer, parameter):
        raise KroneckerError(
            f"a {type(layer).__name__} with a weight of {type(weight).__name__}, {weight.dtype}, cannot take a merged "
            "delta; leave the adapters unmerged, or merge into a base model that is not quantised"
        )
    if weight.itemsize == 1:
        raise KroneckerError(
            f"a weight of {weight.dtype} cannot take a merged delta, which its few bits would round away; merge before "
            "layerwise casting is enabled, or leave the adapters unmerged"
        )


def merge_changes(models: Models, changes: Mapping[Layer, Sequence[Change]]) -> None:
    """Add to each parameter of the models all its changes, rounding once. Their layers are found by component and name.

    Raises KroneckerError, before anything is changed, if a weight cannot take one; and as `merged_weight` does.
    """
    here = {parameter: parameter for parameter in find_parameters(models)}  # equal to those that were matched
    for parameter in changes:
        with naming(parameter.dotted):
            check_takes_delta(here[parameter].module, parameter.parameter)
    for parameter, parts in changes.items():
        weight = getattr(here[parameter].module, parameter.parameter)
        with naming(parameter.dotted):
            deltas = (change.delta(weight) for change in parts)
            weight.data = merged_weight(weight, deltas, weight.dtype, "the changed weight")


def merged_weight(weight: Tensor, deltas: Iterable[Tensor], dtype: torch.dtype, what: str) -> Tensor:
    """Return weight + Σ deltas, matrices or vectors, summed in fp64 and rounded once to `dtype`; a kernel stays one.

    Raises KroneckerError, calling the sum `what`, if it is not finite in `dtype`.
    """
    exact = sum((delta.to(weight.device, torch.float64) for delta in deltas), as_matrix(weight.detach().double()))
    merged = exact.view_as(weight).to(dtype)
    if not merged.isfinite().all():
        raise KroneckerError(
            f"{what} is not finite in {dtype}; nothing was changed or written: give the adapter less strength, or use "
            "a dtype of larger range"
        )
    return merged
