"""What a file does to one parameter of a model: ΔW in W + ΔW.

    Factors, StoredFactors    A ⊗ B                             Kronecker adapters
    LowRank                   up · down                         LoRAs
    Replacement               W' - W                            weights that were trained themselves

Whatever matches, merges, converts or inspects goes through the protocol `Change` alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

Size = tuple[int, ...]  # (d_out, d_in) of a weight or kernel as a matrix, (n,) of a vector


class Change(Protocol):
    """ΔW of one parameter."""

    needs_weight: ClassVar[bool]  # whether ΔW depends on W, so that it cannot stay beside it

    @property
    def size(self) -> Size | None:
        """The size of W, as far as it is known without W."""
        ...

    def misfit(self, size: Size) -> str | None:
        """Return, as the end of a sentence, why this cannot be a change of a W of this size; None if it can."""
        ...

    def numel(self) -> int:
        """Return how many numbers are stored."""
        ...

    def isfinite(self) -> Tensor | bool:
        """Whether all of them are finite."""
        ...

    def delta(self, weight: Tensor) -> Tensor:
        """Return ΔW, a matrix (a kernel's too) or a vector, fp64, for the base model's W."""
        ...

    def scaled(self, strength: float) -> Self:
        """Return the change at this strength: 0 is the base model, 1 as trained."""
        ...


def as_matrix(weight: Tensor) -> Tensor:
    """Return a weight as a matrix: a kernel (c_out, c_in, k, k) is (c_out, c_in·k·k), and a vector stays one."""
    return weight.flatten(1) if weight.dim() > 1 else weight


def size_of(shape: Size) -> Size:
    """Return the size of a parameter of this shape."""
    return (shape[0], prod(shape[1:])) if len(shape) > 1 else tuple(shape)


def size_in_words(size: Size) -> str:
    """Return what a layer of this size does, as the end of a sentence."""
    return f"has {size[0]} numbers" if len(size) == 1 else f"maps {size[1]} to {size[0]}"


@dataclass(frozen=True)
class LowRank:
    """ΔW, or a factor of it, as up · down."""

    needs_weight: ClassVar[bool] = False

    up: Tensor  # (d_out, r) fp32
    down: Tensor  # (r, d_in) fp32

    @property
    def size(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def misfit(self, size: Size) -> str | None:
        return _misfit(self.size, size)

    def numel(self) -> int:
        return self.up.numel() + self.down.numel()

    def isfinite(self) -> Tensor:
        return self.up.isfinite().all() & self.down.isfinite().all()

    def dense(self) -> Tensor:
        """Return the product (d_out, d_in), fp64."""
        return self.up.double() @ self.down.double()

    def delta(self, weight: Tensor) -> Tensor:
        return self.dense()

    def scaled(self, strength: float) -> Self:
        return replace(self, up=self.up * strength)


@dataclass(frozen=True)
class StoredFactors:
    """ΔW = A ⊗ B as a file holds it: each factor whole, or as a product of low rank, which can be far larger.

    They are multiplied out once their size is known to be that of a layer: `match_layers` returns Factors.
    """

    needs_weight: ClassVar[bool] = False

    A: Tensor | LowRank  # (a1, a2) fp32
    B: Tensor | LowRank  # (b1, b2) fp32
    transposed_rows: bool = False

    @property
    def size(self) -> tuple[int, int]:
        return self.A.shape[0] * self.B.shape[0], self.A.shape[1] * self.B.shape[1]

    def misfit(self, size: Size) -> str | None:
        return _misfit(self.size, size)

    def numel(self) -> int:
        return self.A.numel() + self.B.numel()

    def isfinite(self) -> Tensor:
        return self.A.isfinite().all() & self.B.isfinite().all()

    def multiplied(self) -> "Factors":
        A, B = (factor.dense().float() if isinstance(factor, LowRank) else factor for factor in (self.A, self.B))
        return Factors(A, B, self.transposed_rows)

    def delta(self, weight: Tensor) -> Tensor:
        return self.multiplied().dense()

    def scaled(self, strength: float) -> Self:
        return replace(self, A=self.A.scaled(strength) if isinstance(self.A, LowRank) else self.A * strength)


@dataclass(frozen=True)
class Factors(StoredFactors):
    """ΔW = A ⊗ B; with `transposed_rows`, its rows in the order of the paper's code.

    That code reads A X Bᵀ column by column: ΔW[b·a1 + a] = (A ⊗ B)[a·b1 + b], which no Kronecker product equals.
    """

    A: Tensor  # (a1, a2)
    B: Tensor  # (b1, b2)

    def multiplied(self) -> "Factors":
        return self

    def dense(self) -> Tensor:
        """Return ΔW (d_out, d_in), fp64: exact."""
        A, B = (factor.double().contiguous() for factor in (self.A, self.B))  # torch.kron takes no other view of one
        product = torch.kron(A, B)
        return transpose_rows(product, self.A.shape[0]) if self.transposed_rows else product


@dataclass(frozen=True)
class Replacement:
    """ΔW = W' - W: a weight that was trained itself. It stays in its file until it is needed, for a model is large."""

    needs_weight: ClassVar[bool] = True

    read: Callable[[], Tensor]  # returns W'
    shape: Size
    strength: float = 1.0

    @property
    def size(self) -> Size:
        return size_of(self.shape)

    def misfit(self, size: Size) -> str | None:
        if self.size == size:
            return None
        return f"holds a weight that {size_in_words(self.size)}, the model's {size_in_words(size)}"

    def numel(self) -> int:
        return prod(self.shape)

    def isfinite(self) -> Tensor:
        return self.read().isfinite().all()

    def delta(self, weight: Tensor) -> Tensor:
        trained = as_matrix(self.read()).to(weight.device, torch.float64)
        return self.strength * (trained - as_matrix(weight.detach()).double())

    def scaled(self, strength: float) -> Self:
        return replace(self, strength=self.strength * strength)


def transpose_rows(product: Tensor, a1: int) -> Tensor:
    """Reorder rows a·b1 + b of (a1·b1, ...) to b·a1 + a: the order of the paper's code."""
    return product.unflatten(0, (a1, -1)).transpose(0, 1).flatten(0, 1)


def _misfit(own: Size, size: Size) -> str | None:
    if own == size:
        return None
    return f"holds factors for {own[1]} to {own[0]} features, the model's layer {size_in_words(size)}"
