"""What the metadata of our own files says about their layers, for a file to be checked against."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from kron_formats.errors import KroneckerError
from kron_formats.files import excerpt, integer_pair, parse_json, positive_integer

FORMAT_VERSION = "1"
METADATA_PREFIX = "kronecker."  # of the metadata keys that are ours
LAYOUT_KEYS = ("format_version", "layers", "a1", "a2", "factors", "rows")  # what describes the layers
NOISE_KEYS = ("modelspec.prediction_type", "ss_zero_terminal_snr")  # what tools need to know of the base model's noise
NEEDED_KEYS = (*LAYOUT_KEYS, *NOISE_KEYS, "targets", "word")  # what a file says even without other metadata


@dataclass(frozen=True)
class Layout:
    number: int  # of layers; 0 if unknown
    targets: tuple[str, ...]  # the ends of the names of the layers
    shape: tuple[int, int] | None  # (a1, a2) of all layers
    shapes: Mapping[str, tuple[int, int]]  # (a1, a2) by layer if they differ

    def shape_of(self, name: str) -> tuple[int, int] | None:
        """Return (a1, a2) of a layer; None if unknown."""
        return self.shapes.get(name, self.shape)


def own_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return a file's metadata that we wrote, without our prefix."""
    return {k.removeprefix(METADATA_PREFIX): v for k, v in metadata.items() if k.startswith(METADATA_PREFIX)}


def read_layout(own: Mapping[str, str], source: str) -> Layout:
    """Return the layout in our metadata, its keys without prefix. Raises KroneckerError if it is not one of ours."""

    def refuse(key: str) -> KroneckerError:
        return KroneckerError(f"{source}: the metadata {key} is {excerpt(own[key])}, which is not valid")

    if own.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise KroneckerError(
            f"{source}: the metadata format_version is {excerpt(own['format_version'])}, and this version reads "
            f"{FORMAT_VERSION} only"
        )
    if own.get("rows", "transposed") != "transposed":
        raise refuse("rows")
    for key in ("layers", "a1", "a2"):
        if key in own and positive_integer(own[key]) is None:
            raise refuse(key)
    shapes = parse_json(own.get("factors", "{}"), f"{source}: the metadata factors")
    pairs = {name: pair for name, values in shapes.items() if (pair := integer_pair(values))}
    if len(pairs) < len(shapes):
        raise refuse("factors")
    try:
        targets = json.loads(own.get("targets", "[]"))
    except (ValueError, RecursionError) as error:
        raise refuse("targets") from error
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise refuse("targets")
    shape = integer_pair([own.get("a1"), own.get("a2")])
    return Layout(positive_integer(own.get("layers")) or 0, tuple(targets), shape, pairs)
