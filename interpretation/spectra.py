"""The singular values of ΔW, exactly and without forming ΔW, and the measures that follow from them.

    A ⊗ B         σ(A) ⊗ σ(B): each singular value of A times each of B, whatever the order of the rows
    up · down     those of R_up R_downᵀ (r, r), where up = Q_up R_up and downᵀ = Q_down R_down
    shifts        |relu(σ + δ) - σ|, with the σ of the base model's weight
    all others    those of ΔW itself, which the base model's weight is needed for

All are fp64, for the strength that a change has.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kron_formats.changes import Change, Factors, LowRank, Size, as_matrix
from kron_formats.decomposition import digest, kept_decomposition, kept_sigma
from kron_formats.errors import KroneckerError
from kron_formats.shifts import Shift, change_of

ReadWeight = Callable[[], Tensor]  # returns the base model's W


@dataclass(frozen=True)
class Spectrum:
    """The singular values of ΔW (d_out, d_in), of which those that a file cannot have, min(d_out, d_in) - n, are 0."""

    values: Tensor  # (n,) fp64, descending
    bound: int  # the largest rank that ΔW can have
    of_factors: Mapping[str, Tensor] | None = None  # "A" and "B" -> its singular values, of A ⊗ B

    @property
    def frobenius(self) -> float:
        """‖ΔW‖_F"""
        return self.values.norm().item()

    @property
    def spectral(self) -> float:
        """‖ΔW‖₂"""
        return self.values[0].item()

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of σ / Σσ (Roy and Vetterli 2007): n for n equal values, 1 for a single one, 0 for ΔW = 0.

        It is multiplicative: that of A ⊗ B is that of A times that of B.
        """
        total = self.values.sum()
        if total == 0:
            return 0.0
        return torch.special.entr(self.values / total).sum().exp().item()

    def share(self, rank: int) -> float:
        """Return the share of ‖ΔW‖_F² that the nearest LoRA of a rank holds (Eckart and Young 1936); 1 for ΔW = 0."""
        squares = self.values.square()
        return (squares[:rank].sum() / squares.sum()).item() if squares.any() else 1.0

    def rank_for(self, share: float) -> int:
        """Return the smallest rank of a LoRA that holds this share of ‖ΔW‖_F²; 0 for ΔW = 0."""
        sums = self.values.square().cumsum(0)
        return int((sums < share * sums[-1]).sum()) + 1 if sums[-1] > 0 else 0


def spectrum_of(change: Change, size: Size, weight: ReadWeight | None = None) -> Spectrum:
    """Return the singular values of a change of a W of this size. A vector has one, its norm.

    `weight` reads the base model's W, which some changes need.

    Raises KroneckerError, saying what is needed, if it is not there.
    """
    match change:
        case Factors():
            return factors_spectrum(change)
        case LowRank():
            return Spectrum(low_rank_values(change), min(change.down.shape[0], *change.size))
        case Shift():
            return _descending(_shifted(change, size, weight))
        case _:
            if weight is None:
                raise KroneckerError("it depends on the base model's weight: name --pretrained_model_name_or_path")
            delta = change.delta(weight())
            return _descending(torch.linalg.svdvals(delta) if delta.dim() > 1 else delta.norm()[None])


def factors_spectrum(factors: Factors) -> Spectrum:
    """Return σ(A) ⊗ σ(B)."""
    sigma = {side: torch.linalg.svdvals(factor.double()) for side, factor in (("A", factors.A), ("B", factors.B))}
    return replace(_descending(torch.outer(*sigma.values()).flatten()), of_factors=sigma)


def low_rank_values(lora: LowRank) -> Tensor:
    """Return the singular values of up · down, (min(r, d_out, d_in),), fp64, descending."""
    roots = [torch.linalg.qr(side.double(), mode="r").R for side in (lora.up, lora.down.t())]
    return torch.linalg.svdvals(roots[0] @ roots[1].t())


def _descending(values: Tensor) -> Spectrum:
    return Spectrum(values.double().abs().sort(descending=True).values, len(values))


def _shifted(shift: Shift, size: Size, weight: ReadWeight | None) -> Tensor:
    """Return what the singular values of a weight change by; of an elementwise shift of W the norm of δ."""
    if shift.elementwise and len(size) == 1:
        return shift.strength * shift.values.double().norm()[None]
    return change_of(_sigma(shift, weight).double(), shift.strength * shift.values.double())


def _sigma(shift: Shift, weight: ReadWeight | None) -> Tensor:
    """Return the singular values of a shift's weight: kept ones, or those of the base model's weight."""
    if shift.origin and (sigma := kept_sigma(shift.origin.digest)) is not None:
        return sigma
    if weight is None:
        raise KroneckerError(
            "shifts change singular values from what they are in the base model, which the file does not hold and no "
            "training here has kept: name --pretrained_model_name_or_path"
        )
    read = weight()
    if shift.origin and not digest(read).startswith(shift.origin.digest):
        shift.delta(read)  # raises the error that says so
    return kept_decomposition(read, digest(read)).sigma


def without_singular_pair(change: Change, number: int) -> Change:
    """Return a change without one of its singular pairs, counted from 0; the change itself if it has no such pair.

    Of A ⊗ B, it is a pair of A, with everything in B that goes with it. Of up · down, one of ΔW.
    """
    match change:
        case Factors() if number < min(change.A.shape):
            U, sigma, Vt = torch.linalg.svd(change.A.double(), full_matrices=False)
            sigma[number] = 0
            return Factors(((U * sigma) @ Vt).float(), change.B, change.transposed_rows)
        case LowRank() if number < min(change.down.shape[0], *change.size):
            (Q_up, R_up), (Q_down, R_down) = (torch.linalg.qr(x.double()) for x in (change.up, change.down.t()))
            U, sigma, Vt = torch.linalg.svd(R_up @ R_down.t(), full_matrices=False)
            sigma[number] = 0
            return LowRank((Q_up @ (U * sigma)).float(), (Vt @ Q_down.t()).float())
        case _:
            return change


def base_norm(weight: Tensor) -> float:
    """Return ‖W‖_F."""
    return as_matrix(weight.detach()).double().norm().item()
