"""The parts of an adapter that can be left out: blocks, kinds of attention, projections, and singular pairs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from interpretation.adapters import Interpreted
from interpretation.places import OTHER, PROJECTIONS, Place, places_of
from interpretation.spectra import without_singular_pair
from kron_formats.changes import Change, Factors, LowRank
from kron_formats.names import Layer

Layers = Mapping[Layer, Change]


@dataclass(frozen=True)
class Part:
    """A part of an adapter."""

    name: str  # in words: "cross", "up 1", "q"
    rest: Layers  # the adapter without it


def parts_of(adapter: Interpreted, pairs: int) -> list[Part]:
    """Return the parts of an adapter, with up to `pairs` singular pairs. What would leave nothing is no part."""
    layers = adapter.matched.layers
    places = places_of(adapter.models, layers)
    names = [*dict.fromkeys(_block(place) for place in places.values())]
    parts = [_part(layers, places, name, lambda place, name=name: _block(place) == name) for name in names]
    kinds = [*dict.fromkeys(place.kind for place in places.values())]
    words = {OTHER: "outside attentions"}
    parts += [_part(layers, places, words.get(kind, kind), lambda p, kind=kind: p.kind == kind) for kind in kinds]
    parts += [_part(layers, places, name, lambda p, name=name: p.projection == name) for name in PROJECTIONS]
    found = {tuple(part.rest): part for part in reversed(parts) if 0 < len(part.rest) < len(layers)}
    return [*reversed(found.values()), *_pairs(layers, pairs)]


def _block(place: Place) -> str:
    site = place.site
    if site.stage in ("down", "up"):
        return f"{site.stage} {site.block}"
    return site.stage if site.stage == "mid" else site.component


def _part(layers: Layers, places: Mapping[Layer, Place], name: str, belongs: Callable[[Place], bool]) -> Part:
    return Part(name, {layer: change for layer, change in layers.items() if not belongs(places[layer])})


def _pairs(layers: Layers, pairs: int) -> list[Part]:
    """Return the singular pairs of A, or of a LoRA's ΔW, the largest of every layer first."""
    most = max((_rank(change) for change in layers.values()), default=0)
    of = "A" if all(isinstance(change, Factors) for change in layers.values()) else "ΔW"
    return [
        Part(
            f"singular pair {number + 1} of {of}",
            {layer: without_singular_pair(change, number) for layer, change in layers.items()},
        )
        for number in range(min(pairs, most) if most > 1 else 0)
    ]


def _rank(change: Change) -> int:
    match change:
        case Factors():
            return min(change.A.shape)
        case LowRank():
            return change.down.shape[0]
        case _:
            return 0
