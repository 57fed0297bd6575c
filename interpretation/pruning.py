"""The smallest adapter that holds a share of the likeness that the whole one adds to the base model.

Groups of layers are left out: of a UNet the layers that are the same projection of a transformer's self- or
cross-attention, of a text encoder a layer's q, k, v and out. Which go first is asked of denoising, which is cheap and
has no chance in it: by how much the loss on the photos rises without a group, for each number that the group stores.
How many go is asked of the drawn images, by bisection. So the result holds the share by its own images, but another
choice of groups might hold it with fewer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from dreambooth.errors import UserError
from interpretation.adapters import Interpreted
from interpretation.parts import Layers
from interpretation.places import TEXT, Site, places_of
from interpretation.trials import Bench, Trial
from kron_formats.attach import low_rank
from kron_formats.changes import Change, Factors
from kron_formats.export import write_equal_alphas
from kron_formats.names import Layer
from kron_formats.writing import carried_metadata, write_native

NAME = "pruned.safetensors"
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)  # that are kept


@dataclass(frozen=True)
class Pruned:
    """A smaller adapter."""

    trial: Trial
    layers: Layers
    kept: Sequence[str]  # groups
    dropped: Sequence[str]
    share: float  # of the likeness that the whole adapter adds
    path: Path

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size


def prune(bench: Bench, adapter: Interpreted, whole: Trial, keep: float, path: Path) -> Pruned:
    """Write the smallest adapter found that holds the share `keep` of what `whole`, the whole one, adds to DINO."""
    added = check_prunable(whole, keep)
    groups = groups_of(adapter)
    order = _order(bench, adapter, whole, groups)
    tried = {0: whole}

    def holds(count: int) -> bool:
        """Whether the adapter without the first groups holds the share."""
        tried[count] = bench.try_out(f"without {count} of {len(order)} groups", adapter, without(groups, order[:count]))
        return tried[count].added_likeness >= keep * added

    least, most = 0, len(order) - 1  # that can go; at least one group stays
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if holds(middle) else (least, middle - 1)
    trial, layers = tried[least], without(groups, order[:least])
    write_part(path, adapter, layers)
    return Pruned(trial, layers, order[least:], order[:least], trial.added_likeness / added, path)


def check_prunable(whole: Trial, keep: float) -> float:
    """Return how much DINO a whole adapter adds to the base model. Raises UserError if it is nothing."""
    if (added := whole.added_likeness) <= 0:
        raise UserError(
            f"--keep {keep}: the adapter does not raise the likeness (DINO {added:+.3f}), so there is nothing to hold; "
            "leave --keep out to see what it does instead"
        )
    return added


def groups_of(adapter: Interpreted) -> dict[str, dict[Layer, Change]]:
    """Return name -> layers of each group."""
    groups: dict[tuple[Site, str], dict[Layer, Change]] = {}
    for layer, place in places_of(adapter.models, adapter.matched.layers).items():
        column = "" if place.kind == TEXT else place.column
        groups.setdefault((place.site, column), {})[layer] = adapter.matched.layers[layer]
    return {f"{site} {column}".rstrip(): layers for (site, column), layers in groups.items()}


def without(groups: Mapping[str, Layers], dropped: Iterable[str]) -> dict[Layer, Change]:
    """Return the layers of all other groups."""
    left_out = set(dropped)
    return {x: change for name, layers in groups.items() if name not in left_out for x, change in layers.items()}


def _order(bench: Bench, adapter: Interpreted, whole: Trial, groups: Mapping[str, Layers]) -> list[str]:
    """Return the groups, those first whose numbers explain the least of the loss on the photos."""
    loss = whole.losses.scores().of_subject

    def worth(name: str) -> float:
        lost = bench.losses_with(adapter, without(groups, [name])).scores().of_subject - loss
        return lost / sum(change.numel() for change in groups[name].values())

    return sorted(groups, key=worth)


def write_part(path: Path, adapter: Interpreted, layers: Layers) -> None:
    """Write layers of an adapter in this project's layout for its method, in the precision of its file."""
    matched = adapter.matched
    metadata, dtype = carried_metadata(matched.file), _precision(matched.file.path)
    metadata.pop("targets", None)  # of which every layer would have to be there
    if factors := {layer: change for layer, change in layers.items() if isinstance(change, Factors)}:
        if len(factors) == len(layers):
            write_native(path, factors, matched.family, metadata, dtype)
            return
    low = {layer: low_rank(change) for layer, change in layers.items()}
    write_equal_alphas(path, low, matched.family, metadata, dtype)


def _precision(path: Path) -> torch.dtype:
    """Return the precision of a file's tensors, fp32 if they have several or it is no safetensors file."""
    if not path.is_file() or path.suffix != ".safetensors":
        return torch.float32
    with safe_open(path, "pt") as file:
        found = {file.get_tensor(key).dtype for key in file.keys()}
    return found.pop() if len(found) == 1 and found <= {*PRECISIONS} else torch.float32
