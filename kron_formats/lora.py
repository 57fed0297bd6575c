"""A ⊗ B as a LoRA and back, in closed form.

    A = U_A S_A V_Aᵀ,  B = U_B S_B V_Bᵀ:   A ⊗ B = (U_A ⊗ U_B)(S_A ⊗ S_B)(V_A ⊗ V_B)ᵀ

so the LoRA of rank(A)·rank(B) is exact, and the largest products of singular values make the best one of any rank.
Back: ΔW (a1·b1, a2·b2) rearranged to (a1·a2, b1·b2) is vec(A) vec(B)ᵀ for a Kronecker product, and its first singular
pair gives the nearest one for any other matrix (Van Loan and Pitsianis 1993).
"""

import torch
from torch import Tensor

from kron_formats.changes import Factors, LowRank, transpose_rows
from kron_formats.errors import KroneckerError


def kronecker_to_lora(factors: Factors, rank: int | None = None) -> tuple[LowRank, float]:
    """Return the best LoRA of at most `rank` (None: the exact one) and its error |ΔW - up·down| / |ΔW|."""
    (U_A, s_A, Vt_A), (U_B, s_B, Vt_B) = (
        torch.linalg.svd(factor.double(), full_matrices=False) for factor in (factors.A, factors.B)
    )
    strengths = torch.outer(s_A, s_B).flatten()  # (min(a1, a2) · min(b1, b2),)
    order = strengths.argsort(descending=True)
    r = max(1, min(rank or len(order), numerical_rank(s_A, factors.A) * numerical_rank(s_B, factors.B)))
    i, j = order[:r] // len(s_B), order[:r] % len(s_B)
    root = strengths[order[:r]].sqrt()
    up = torch.einsum("ar,br->abr", U_A[:, i], U_B[:, j]).flatten(0, 1) * root  # (a1·b1, r)
    down = torch.einsum("ra,rb->rab", Vt_A[i], Vt_B[j]).flatten(1) * root[:, None]  # (r, a2·b2)
    if factors.transposed_rows:
        up = transpose_rows(up, factors.A.shape[0])
    total = strengths.norm()
    error = (strengths[order[r:]].norm() / total).item() if total else 0.0
    return LowRank(up, down), error


def numerical_rank(singular_values: Tensor, factor: Tensor) -> int:
    """Return how many singular values are more than fp32's rounding of the largest."""
    tolerance = singular_values.max() * max(factor.shape) * torch.finfo(torch.float32).eps
    return int((singular_values > tolerance).sum())


def lora_to_kronecker(low_rank: LowRank, a1: int, a2: int, transposed_rows: bool = False) -> tuple[Factors, float]:
    """Return the nearest A ⊗ B with A (a1, a2), and its error |ΔW - A ⊗ B| / |ΔW|.

    Raises KroneckerError if (a1, a2) does not divide ΔW's sizes.
    """
    d_out, d_in = low_rank.size
    if d_out % a1 or d_in % a2:
        raise KroneckerError(f"(a1, a2) = ({a1}, {a2}) does not divide a layer of {d_in} to {d_out} features")
    delta = low_rank.up.double() @ low_rank.down.double()
    if transposed_rows:
        delta = transpose_rows(delta, d_out // a1)  # its own inverse, with the sides exchanged
    M = delta.view(a1, d_out // a1, a2, d_in // a2).transpose(1, 2).reshape(a1 * a2, -1)
    # The first singular pair of M from the smaller of M Mᵀ and Mᵀ M
    left = M.shape[0] <= M.shape[1]
    vector = torch.linalg.eigh(M @ M.t() if left else M.t() @ M).eigenvectors[:, -1]
    u, v = (vector, M.t() @ vector) if left else (M @ vector, vector)
    size = M.norm()
    error = ((M - torch.outer(u, v)).norm() / size).item() if size else 0.0
    balance = (v.norm() / u.norm()).sqrt() if size else 1.0
    A, B = (u * balance).view(a1, a2).float(), (v / balance).view(d_out // a1, d_in // a2).float()
    return Factors(A, B, transposed_rows), error
