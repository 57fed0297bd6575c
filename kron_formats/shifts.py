"""Spectral shifts in files, as SVDiff trains them: U diag(σ) V becomes U diag(relu(σ + δ)) V (Han et al., 2303.11305).

ours      <path>.delta, text_encoder.<path>.delta      (r,) of matrices and kernels; (n,) of norms, which add to W
others'   <path>.delta                                 the same, but (1,) of norms: a norm's weight is a matrix (1, n);
                                                       text encoders, with their embeddings, in a file of their own

A shift belongs to the vectors u_i, v_i of one base model's weight. Our metadata say which: `origin`, a JSON object, has
for each layer a digest of the weight and the fingerprint of the change that the shifts make of it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

from kron_formats.changes import Size, size_in_words, size_of
from kron_formats.decomposition import PROBES, Decomposition, digest, kept_decomposition
from kron_formats.errors import KroneckerError
from kron_formats.files import excerpt, parse_json
from kron_formats.layout import own_metadata

SUFFIX = ".delta"
DIGITS = 16  # of a digest in a file: 64 bits
# Largest error of a change, relative to the change. SD-sized weights give 1e-7 with any LAPACK in fp64, 5e-4 in fp32;
# rounded to fp16 first, 8e-3.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Origin:
    """What a shift belongs to."""

    digest: str  # of the weight in fp32
    fingerprint: tuple[float, ...]  # of the change; () of an elementwise one

    def entry(self) -> list[str | float]:
        """Return it as a file's metadata hold it."""
        return [self.digest[:DIGITS], *(float(f"{number:.6g}") for number in self.fingerprint)]


@dataclass(frozen=True)
class Shift:
    """The shift of one layer's weight. A vector of weights gets δ itself if it is elementwise."""

    needs_weight: ClassVar[bool] = True
    size: ClassVar[None] = None  # any weight with as many singular values

    values: Tensor  # δ, fp32
    elementwise: bool  # of a vector of weights
    where: str  # file and layer, in messages
    origin: Origin | None = None
    base_model: str | None = None  # whose weight it is
    strength: float = 1.0

    def isfinite(self) -> Tensor:
        return self.values.isfinite().all()

    def numel(self) -> int:
        """Return how many numbers are stored."""
        return self.values.numel()

    def scaled(self, strength: float) -> Self:
        """Return the shift with δ multiplied, which is before the relu."""
        return replace(self, strength=self.strength * strength)

    def misfit(self, size: Size) -> str | None:
        """Return why a weight of this size cannot be the one: it has more or fewer singular values, or entries."""
        wanted = min(size) if len(size) > 1 else sum(size) if self.elementwise else 1
        if self.numel() == wanted:
            return None
        return f"holds {self.numel()} shifts, the model's layer {size_in_words(size)} and needs {wanted}"

    def delta(self, weight: Tensor) -> Tensor:
        """Return W' - W of the base model's weight, a matrix (m, n) or a vector (n,), fp64.

        Raises KroneckerError if the weight is not the one whose vectors were shifted.
        """
        if words := self.misfit(size_of(weight.shape)):
            raise KroneckerError(f"{self.where} {words}")
        key = digest(weight)
        if self.origin and not key.startswith(self.origin.digest):
            raise KroneckerError(
                f"{self.where}: the base model's weight is not the one that was trained, whose singular vectors the "
                f"shifts belong to; {self._advice()}"
            )
        values = self.values.to(weight.device)
        if weight.dim() == 1 and self.elementwise:
            return self.strength * values.double()
        parts = kept_decomposition(weight, key)
        if self.origin:
            self._check_vectors(parts, change_of(parts.sigma, values))
        change = change_of(parts.sigma, self.strength * values)
        matrix = (parts.U.double() * change.double()) @ parts.V.double()
        return matrix if weight.dim() > 1 else matrix[0]

    def _check_vectors(self, parts: Decomposition, change: Tensor) -> None:
        assert self.origin
        if not self.origin.fingerprint:
            raise KroneckerError(f"{self.where}: the metadata origin has no fingerprint of a matrix")
        expected = torch.tensor(self.origin.fingerprint, dtype=torch.float64, device=change.device)
        error = (parts.fingerprint(change) - expected).square().mean().sqrt()
        if not error <= TOLERANCE * change.norm():
            raise KroneckerError(
                f"{self.where}: the singular vectors found here are not those that were trained: with these, the "
                f"change is off by about {error / change.norm():.0%}. The weight has singular values that are too "
                "close to one another for this computer's LAPACK to find the same vectors: convert the file on the "
                "computer that trained it, with scripts/convert.py --to fused or --to lora"
            )

    def _advice(self) -> str:
        name = f"the base model {excerpt(self.base_model)}" if self.base_model else "the base model of the training"
        return f"use {name}, in the same revision, variant and precision"


def change_of(sigma: Tensor, delta: Tensor) -> Tensor:
    """Return relu(σ + δ) - σ: what the singular values change by. It is 0, exactly, where δ is."""
    return (sigma + delta).relu() - sigma


# ---- files ----


def is_shifts(keys: Iterable[str]) -> bool:
    """Whether a file with these keys holds spectral shifts and nothing else."""
    keys = list(keys)
    return bool(keys) and all(key.endswith(SUFFIX) for key in keys)


def read(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Shift]:
    """Return the shift of each layer, by the file's own names.

    Raises KroneckerError if a tensor cannot be a shift, or if our metadata are not what we write.
    """
    metadata = own_metadata(metadata)
    norms = metadata.get("norms", "spectral")
    if norms not in ("spectral", "elementwise"):
        raise KroneckerError(f"{path}: the metadata norms is {excerpt(norms)}, which this version does not know")
    shifts = {}
    for key, values in tensors.items():
        where = f"{path}: {excerpt(key.removesuffix(SUFFIX))}"
        if values.dim() != 1 or not values.numel() or not values.is_floating_point():
            raise KroneckerError(f"{where} is not a vector of shifts, but {values.dtype}, {tuple(values.shape)}")
        if not values.isfinite().all():
            raise KroneckerError(f"{where}: its shifts are not all finite")
        shifts[key.removesuffix(SUFFIX)] = Shift(
            values.float(), norms == "elementwise", where, None, metadata.get("base_model")
        )
    if "origin" not in metadata:
        return shifts
    origins = _origins(path, metadata["origin"])
    if missing := sorted(shifts.keys() - origins.keys()):
        raise KroneckerError(f"{path}: the metadata origin says nothing of {excerpt(missing[0])}")
    return {name: replace(shift, origin=origins[name]) for name, shift in shifts.items()}


def _origins(path: Path, text: str) -> dict[str, Origin]:
    origins = {}
    for name, entry in parse_json(text, f"{path}: the metadata origin").items():
        match entry:
            case [str(key), *numbers] if (
                len(key) == DIGITS
                and len(numbers) in (0, PROBES)
                and all(isinstance(number, int | float) for number in numbers)
            ):
                origins[name] = Origin(key, tuple(map(float, numbers)))
            case _:
                raise KroneckerError(f"{path}: the metadata origin of {excerpt(name)} is not valid")
    return origins


def origin_metadata(origins: Mapping[str, Origin]) -> dict[str, str]:
    """Return the metadata, without our prefix, of a file of ours with these layers."""
    entries = {name: origin.entry() for name, origin in origins.items()}
    return {"norms": "elementwise", "origin": json.dumps(entries, separators=(",", ":"))}
