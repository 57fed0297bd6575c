"""What the metadata of our own files says of their layers, so that a file can be held against it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from kron_formats.names import KroneckerError
from kron_formats.strangers import integers, parse_json, positive_integer, printable


@dataclass(frozen=True)
class Layout:
    number: int  # of layers; 0 where nothing is said
    targets: tuple[str, ...]  # the ends of the names of the layers
    shape: tuple[int, int] | None  # (a1, a2) of all layers
    shapes: Mapping[str, tuple[int, int]]  # (a1, a2) by layer where they differ

    def shape_of(self, name: str) -> tuple[int, int] | None:
        """Return (a1, a2) of a layer, None where nothing is said."""
        return self.shapes.get(name, self.shape)


def read_layout(own: Mapping[str, str], source: str) -> Layout:
    """Return the layout in our metadata, its keys without prefix. Raises KroneckerError where it does not read."""

    def refuse(key: str) -> KroneckerError:
        return KroneckerError(f"{source}: the metadata {key} is {printable(own[key])}, which cannot be")

    for key in ("layers", "a1", "a2"):
        if key in own and positive_integer(own[key]) is None:
            raise refuse(key)
    shapes = parse_json(own.get("factors", "{}"), f"{source}: the metadata factors")
    pairs = {name: integers(pair, 2) for name, pair in shapes.items()}
    if None in pairs.values():
        raise refuse("factors")
    try:
        targets = json.loads(own.get("targets", "[]"))
    except (ValueError, RecursionError) as error:
        raise refuse("targets") from error
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise refuse("targets")
    shape = integers([own.get("a1"), own.get("a2")], 2)
    return Layout(positive_integer(own.get("layers")) or 0, tuple(targets), shape, pairs)
