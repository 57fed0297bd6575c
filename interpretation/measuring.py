"""Every number of an adapter that its file tells, and with a base model how large its changes are beside it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median
from typing import Any, TypeVar

import torch
from torch import Tensor

from dreambooth.base_model.source import base_source
from dreambooth.options.base_model import BaseModelOptions
from interpretation.adapters import Interpreted
from interpretation.places import Place, Site, places_of, sites_of
from interpretation.spectra import Spectrum, base_norm, spectrum_of
from kron_formats.changes import Change, Factors, LowRank, Size
from kron_formats.errors import naming
from kron_formats.names import Layer, find_parameters

RANKS = (1, 2, 4, 8, 16, 32)  # of the nearest LoRA
HELD = 0.9  # share of ‖ΔW‖_F², for which the rank of a LoRA is told
K = TypeVar("K")
Weights = Mapping[Layer, Tensor]  # of the base model, fp32


@dataclass(frozen=True)
class Measured:
    """A layer of an adapter."""

    layer: Layer
    place: Place
    change: Change
    size: Size
    spectrum: Spectrum
    base: float | None  # ‖W‖_F

    @property
    def relative(self) -> float | None:
        """‖ΔW‖_F / ‖W‖_F"""
        return self.spectrum.frobenius / self.base if self.base else None

    def numbers(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        spectrum, place = self.spectrum, self.place
        return {
            "layer": self.layer.dotted,
            "site": str(place.site),
            "kind": place.kind,
            "projection": place.projection,
            "depth": place.depth,
            "size": [*self.size],
            "parameters": self.change.numel(),
            **_shape(self.change),
            "frobenius": spectrum.frobenius,
            "spectral": spectrum.spectral,
            "base_frobenius": self.base,
            "relative": self.relative,
            "effective_rank": spectrum.effective_rank,
            "largest_rank": spectrum.bound,
            "rank_for_90_percent": spectrum.rank_for(HELD),
            "share_of_nearest_lora": {str(rank): spectrum.share(rank) for rank in RANKS},
            "singular_values": _singular_values(spectrum),
        }


def _shape(change: Change) -> dict[str, Any]:
    match change:
        case Factors():
            return {"A": [*change.A.shape], "B": [*change.B.shape], "transposed_rows": change.transposed_rows}
        case LowRank():
            return {"rank": change.down.shape[0]}
        case _:
            return {}


def _singular_values(spectrum: Spectrum) -> dict[str, list[float]] | list[float]:
    """Return the singular values; of A ⊗ B those of A and B, whose products they are: far fewer numbers."""
    if spectrum.of_factors:
        return {side: _short(found) for side, found in spectrum.of_factors.items()}
    return _short(spectrum.values)


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


@dataclass(frozen=True)
class Portrait:
    """An adapter with its numbers."""

    label: str
    noun: str  # what it is: "a LoRA"
    family: str  # of its model
    scale: float
    layers: Sequence[Measured]
    sites: Sequence[Site]  # all attention sites of the model's parts that it changes
    steps: Mapping[int, "Portrait"]  # of its run's checkpoints

    @property
    def parameters(self) -> int:
        return sum(entry.change.numel() for entry in self.layers)

    @cached_property
    def by_cell(self) -> dict[tuple[Site, str], list[Measured]]:
        """The layers by site and column: "down 1.0", "cross k"."""
        return grouped(self.layers, lambda entry: (entry.place.site, entry.place.column))

    def size_at(self, site: Site, column: str) -> float | None:
        """Return ‖ΔW‖_F of all layers at a place, over their ‖W‖_F if it is known; None if the file has none there."""
        entries = self.by_cell.get((site, column), [])
        if not entries:
            return None
        size = norm(entry.spectrum.frobenius for entry in entries)
        bases = [entry.base for entry in entries if entry.base is not None]
        return size / norm(bases) if len(bases) == len(entries) and any(bases) else size

    def numbers(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {
            "adapter": self.label,
            "method": self.noun,
            "family": self.family,
            "strength": self.scale,
            "parameters": self.parameters,
            "frobenius": norm(entry.spectrum.frobenius for entry in self.layers),
            "by_column": self.by_column(),
            "layers": [entry.numbers() for entry in self.layers],
            "steps": {str(step): portrait.numbers() for step, portrait in self.steps.items()},
        }

    def by_column(self) -> dict[str, dict[str, Any]]:
        """Return the means of each column: share of the whole ‖ΔW‖_F², relative size, ranks."""
        total = norm(entry.spectrum.frobenius for entry in self.layers) ** 2
        columns = grouped(sorted(self.layers, key=lambda entry: entry.place.order), lambda entry: entry.place.column)
        return {column: _summary(entries, total) for column, entries in columns.items()}


def _summary(entries: Sequence[Measured], total: float) -> dict[str, Any]:
    squared = norm(entry.spectrum.frobenius for entry in entries) ** 2
    relative = [entry.relative for entry in entries if entry.relative is not None]
    return {
        "layers": len(entries),
        "parameters": sum(entry.change.numel() for entry in entries),
        "share": squared / total if total else 0.0,
        "relative": fmean(relative) if relative else None,
        "effective_rank": median(entry.spectrum.effective_rank for entry in entries),
        "largest_rank": max(entry.spectrum.bound for entry in entries),
        "rank_for_90_percent": median(entry.spectrum.rank_for(HELD) for entry in entries),
        "share_of_rank_1": fmean(entry.spectrum.share(1) for entry in entries),
    }


def norm(values: Iterable[float]) -> float:
    """Return the root of the sum of squares."""
    return sum(value * value for value in values) ** 0.5


def grouped(entries: Iterable[Measured], key: Callable[[Measured], K]) -> dict[K, list[Measured]]:
    """Return the entries by a key, in the order of their first."""
    groups: dict[K, list[Measured]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return groups


# ---- measuring ----


def measure(adapter: Interpreted, weights: Weights) -> Portrait:
    """Return the numbers of an adapter and of its run's checkpoints. `weights` are the base model's, or empty.

    Raises KroneckerError, naming the layer, if a number needs a weight that is not there.
    """
    layers = adapter.matched.layers
    places = places_of(adapter.models, layers)
    found = [_measure_layer(adapter, layer, places[layer], weights) for layer in layers]
    file, family = adapter.matched.file, adapter.matched.family
    return Portrait(
        adapter.label,
        file.noun,
        family.title if family else "an unknown model",
        adapter.scale,
        found,
        sites_of({name: model for name, model in adapter.models.items() if name in {x.component for x in layers}}),
        {step: measure(checkpoint, weights) for step, checkpoint in adapter.steps.items()},
    )


def _measure_layer(adapter: Interpreted, layer: Layer, place: Place, weights: Weights) -> Measured:
    change, weight = adapter.matched.layers[layer].scaled(adapter.scale), weights.get(layer)
    with naming(f"{adapter.matched.file.path}: {layer.dotted}"):
        spectrum = spectrum_of(change, layer.size, None if weight is None else lambda: weight)
    return Measured(layer, place, change, layer.size, spectrum, None if weight is None else base_norm(weight))


def read_weights(config: BaseModelOptions | None, adapters: Iterable[Interpreted]) -> dict[Layer, Tensor]:
    """Return the base model's weights, fp32, of all layers that adapters change; none without a base model."""
    if config is None:
        return {}
    wanted = {layer for adapter in adapters for layer in adapter.matched.layers}
    source = base_source(config).weights
    models = {part: source.load(part, torch.float32) for part in dict.fromkeys(layer.component for layer in wanted)}
    return {x: getattr(x.module, x.parameter).detach() for x in find_parameters(models) if x in wanted}
