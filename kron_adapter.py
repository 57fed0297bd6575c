"""Kronecker adapters for linear layers: W + scale · (A ⊗ B), with W frozen and A, B trained.

    A: (a1, a2)    B: (b1, b2)    W: (d_out, d_in) = (a1·b1, a2·b2)
    (A ⊗ B) x = A X Bᵀ, read row-major, where X (a2, b2) is x read row-major

    layers = inject_kronecker(unet, a1=4, a2=64)        # freezes unet; only the factors train; or a2="d_in/8"
    ... train kronecker_parameters(unet) ...
    save_kronecker(unet, "pytorch_kronecker_weights.safetensors")

    load_kronecker(pipeline, "dog.safetensors", name="dog")         # several at once, each with its strength
    load_kronecker(pipeline, "style.safetensors", name="style")
    set_kronecker_scale(pipeline, {"dog": 0.8, "style": 0.5})

Where a function takes `models`, that is one model, {"unet": ..., "text_encoder": ...} or a diffusers pipeline. Any
model can be adapted; files have names only for the UNet and text encoders of SD 1.x, SD 2.x and SDXL.

Source: DiffuseKronA (arXiv 2402.17412), eq. 3 to 5. Needs torch and safetensors only. It installs together with
kron_formats, which holds the file formats: `pip install .`
"""

import inspect
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kron_formats.attach import attach_to_diffusers, check_not_fused
from kron_formats.changes import Factors
from kron_formats.errors import KroneckerError, naming
from kron_formats.families import ATTENTION_TARGETS
from kron_formats.matching import MatchedAdapter, differences, match_layers
from kron_formats.merging import check_strength, check_takes_delta, has_plain_weight, merged_weight
from kron_formats.names import (
    Models,
    components,
    ending,
    family,
    find_layers,
    given_modules,
    linear_modules,
    match_selection,
    match_target,
    matrix_size,
    unwrapped,
)
from kron_formats.reading import read_kronecker
from kron_formats.sizes import FactorSize, size_in_layer
from kron_formats.writing import write_native

__all__ = [
    "ATTENTION_TARGETS",
    "KroneckerError",
    "KroneckerLinear",
    "add_kronecker",
    "attach_to_diffusers",
    "contrast_rows",
    "disable_kronecker",
    "inject_kronecker",
    "kron_apply",
    "kronecker_adapters",
    "kronecker_layers",
    "kronecker_parameters",
    "kronecker_state_dict",
    "load_kronecker",
    "load_kronecker_state_dict",
    "merge_kronecker",
    "read_kronecker",
    "remove_kronecker",
    "save_kronecker",
    "set_kronecker_scale",
    "start_from_contrast",
    "unmerge_kronecker",
]

Init = Literal["invariant", "reference"]


# ---------------------------------------------------------------------------------------------------------------------
# Algebra
# ---------------------------------------------------------------------------------------------------------------------


def kron_apply(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return (A ⊗ B) x without forming A ⊗ B.

    With x read row-major as X (a2, b2):  (A ⊗ B) x = A X Bᵀ, read row-major.

    x: (..., a2·b2)    A: (a1, a2)    B: (b1, b2)    ->    (..., a1·b1), all of one dtype
    """
    X = x.reshape(-1, A.shape[1], B.shape[1])
    product, _ = _contract(X, A, B, 1.0, _a_first(A, B))
    return product.reshape(*x.shape[:-1], A.shape[0] * B.shape[0])


def _a_first(A: Tensor, B: Tensor) -> bool:
    """Whether (A X) Bᵀ takes no more multiplications than A (X Bᵀ)."""
    (a1, a2), (b1, b2) = A.shape, B.shape
    return a1 * b2 * (a2 + b1) <= a2 * b1 * (b2 + a1)


def _contract(X: Tensor, A: Tensor, B: Tensor, scale: float, a_first: bool) -> tuple[Tensor, Tensor]:
    """Return scale · A X Bᵀ (N, a1, b1) and what lies between: scale · A X (N, a1, b2) or scale · X Bᵀ (N, a2, b1)."""
    if a_first:
        inner = _times_left(A, X, scale)
        return _times_right(inner, B), inner
    inner = _times_right(X, B, scale)
    return _times_left(A, inner), inner


def _times_left(A: Tensor, X: Tensor, scale: float = 1.0) -> Tensor:
    if X.shape[2] == 1:  # one product of matrices, where bmm would multiply N vectors
        return _times_right(X.transpose(1, 2), A, scale).transpose(1, 2)
    # bmm takes the stride-0 batch as it is, where matmul would copy A once per row of the batch. The scale goes into
    # the product itself; with beta = 0 the first argument is not read.
    return torch.baddbmm(X.new_empty(()), A.expand(X.shape[0], -1, -1), X, beta=0, alpha=scale)


def _times_right(X: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    rows = X.reshape(-1, B.shape[1])
    return torch.addmm(X.new_empty(()), rows, B.t(), beta=0, alpha=scale).view(X.shape[0], X.shape[1], B.shape[0])


def _sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Return Σ_n left_n right_nᵀ (p, q) of left (N, p, k) and right (N, q, k)."""
    if left.shape[2] == 1:  # one product of matrices; the N terms of the sum are each as large as A
        return left.squeeze(2).t() @ right.squeeze(2)
    return torch.bmm(left, right.transpose(1, 2)).sum(0, dtype=torch.promote_types(left.dtype, torch.float32))


def contrast_rows(instance: Tensor, class_: Tensor, rows: int = 1, ridge: float = 0.01) -> Tensor:
    """Return the directions along which the instance's inputs are large and the class's are small.

    With the instance's inputs X (n, d) and the class's Y (m, d), row k is the k-th best a of

        ‖X a‖²/n  /  (‖Y a‖²/m + ridge · mean |y|²/d · ‖a‖²)

    orthogonal in the denominator's inner product: a generalised eigenproblem. Its length is that at which the rms of
    X a is the rms of X's entries, as it is on average for a ~ N(0, 1/d), but at most 4. Its largest entry is positive.

    (min(rows, rank of X), d) in fp64 on the CPU. Raises KroneckerError if inputs are not finite, if the class's are
    zero, and if no direction is larger in the instance's than in the class's, as with equal inputs.

    Source: measured by this project; see docs/adapter.md, which also compares it with Perfusion (arXiv 2305.01644).
    """
    X, Y = (inputs.detach().to("cpu", torch.float64) for inputs in (instance, class_))
    if not (X.isfinite().all() and Y.isfinite().all()):
        raise KroneckerError("inputs of the instance or the class are not finite")
    if not Y.any():
        raise KroneckerError("the inputs of the class are all zero")
    C = Y.T @ Y / len(Y)
    C += ridge * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    L = torch.linalg.cholesky(C)  # with a = L⁻ᵀ v, the ratio is ‖X L⁻ᵀ v‖² / n / ‖v‖²
    _, sigma, V = torch.linalg.svd(torch.linalg.solve_triangular(L, X.T, upper=False).T, full_matrices=False)
    if sigma[0] ** 2 <= len(X):
        raise KroneckerError("no direction is larger in the inputs of the instance than in those of the class")
    rank = int((sigma > sigma[0] * max(X.shape) * torch.finfo(X.dtype).eps).sum())
    a = torch.linalg.solve_triangular(L.T, V[: min(rows, rank)].T, upper=True).T
    a /= a.norm(dim=1, keepdim=True)
    a *= a.gather(1, a.abs().argmax(dim=1, keepdim=True)).sign()
    lengths = X.square().mean().sqrt() / (X @ a.T).square().mean(dim=0).sqrt()
    return a * lengths.clamp(max=4)[:, None]


class _FrozenLinearPlusKronecker(torch.autograd.Function):
    """y = x Wᵀ + bias + scale · (A ⊗ B) x for a frozen W, rounded once.

    The frozen GEMM accumulates onto the delta, forward and in dx, so a delta far below one unit in the last place of
    the base output still reaches it; and the delta never makes a pass over memory of its own.

    Backward, with G = dy as (N, a1, b1) and a1·b2-sized S = scale · G B (A first) or a2·b1-sized T = scale · Aᵀ G
    (B first). The products that forward and backward share carry the scale, so that nothing else need be multiplied:
        A first: dA = Σ_n S Xᵀ,  dB = Gᵀ (scale · A X)         B first: dA = Σ_n G (scale · X Bᵀ)ᵀ,  dB = Tᵀ X
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        ctx.scale, ctx.a_first = scale, _a_first(A, B)
        A, B = A.to(x.dtype), B.to(x.dtype)
        X = x.reshape(-1, A.shape[1], B.shape[1])
        product, inner = _contract(X, A, B, scale, ctx.a_first)
        y = product.view(-1, weight.shape[0])
        if bias is not None:
            y += bias  # before the GEMM: with B = 0 this is then exactly what the frozen layer computes
        y.addmm_(X.view(-1, weight.shape[1]), weight.t())
        ctx.save_for_backward(X, inner, weight, A, B)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride] one output has one gradient
        X, inner, weight, A, B = ctx.saved_tensors
        needs_dx, _, _, needs_dA, needs_dB, _ = ctx.needs_input_grad
        G = dy.contiguous().view(-1, A.shape[0], B.shape[0])  # attention hands over transposed gradients
        dx = dA = dB = None
        if needs_dx:
            product, between = _contract(G, A.t(), B.t(), ctx.scale, not ctx.a_first)
            dx = product.view(-1, weight.shape[1])
            dx.addmm_(G.view(-1, weight.shape[0]), weight)
            dx = dx.view(*dy.shape[:-1], weight.shape[1])
        else:
            between = _times_right(G, B.t(), ctx.scale) if ctx.a_first else _times_left(A.t(), G, ctx.scale)
        if needs_dA:
            dA = _sum_of_products(*((between, X) if ctx.a_first else (G, inner)))
        if needs_dB:
            left, right = (G, inner) if ctx.a_first else (between, X)
            dB = left.reshape(-1, B.shape[0]).t() @ right.reshape(-1, B.shape[1])
        return dx, None, None, dA, dB, None


# ---------------------------------------------------------------------------------------------------------------------
# The layer
# ---------------------------------------------------------------------------------------------------------------------


class KroneckerLinear(nn.Module):
    """A frozen `nn.Linear` plus scale · gain · (A ⊗ B), with B = 0 at the start: step 0 is exactly the base layer.

    A (a1, a2) and B (b1, b2) are fp32 whatever the base's dtype. `gain` is part of the parametrisation and is folded
    into A when saved; `scale` is the strength that the user sets, 1.0 as trained.

    init "invariant":  gain · A ~ N(0, a1/d_in), with gain the power of two nearest to √a1: one learning rate then suits
                       every shape of factors, as toyworld/README.md measures. With a1 = 1 it starts as LoRA does. In
                       general a1 blocks of the output share B, and only about 1/√a1 of a step suits each of them, so A
                       starts √a1 larger; the gain makes A's own steps larger too. A power of two rounds nothing: a
                       trained layer, and the same layer from its file with the gain in A, compute the same bits.
    init "reference":  gain 1, A ~ N(0, 1/a1²), as in the paper's own code.
    init None:         gain 1, A = 0, for factors that come from a file.

    The base may be any `nn.Linear`, quantised or not, or a KroneckerLinear: several adapters are layers around layers.
    It may also be a convolution, which other tools' files adapt too: A ⊗ B is then its kernel (d_out, d_in) =
    (c_out, c_in·k·k). `a1` and `a2` are numbers, or fractions of its sizes: "d_out", "d_in/8". Raises KroneckerError if
    they do not divide its sizes.
    """

    def __init__(
        self,
        base: "nn.Linear | nn.Conv2d | KroneckerLinear",
        a1: FactorSize,
        a2: FactorSize,
        init: Init | None = "invariant",
        name: str = "",
        adapter: str = "default",
    ):
        super().__init__()
        (a1, a2), (b1, b2) = _shapes(base, a1, a2, name)
        gain = 2.0 ** round(math.log2(a1) / 2)
        stds_and_gains = {
            "invariant": ((a1 / (a2 * b2)) ** 0.5 / gain, gain),
            "reference": (1 / a1, 1.0),
            None: (0.0, 1.0),
        }
        if init not in stds_and_gains:
            raise KroneckerError(f"init is {init!r}; it can be 'invariant' or 'reference'")
        std, self.gain = stds_and_gains[init]
        self.base = base if isinstance(base, KroneckerLinear) else base.requires_grad_(False)
        # Drawn on the CPU: one seed gives the same adapter on every device.
        A = torch.randn(a1, a2, dtype=torch.float32) * std if std else torch.zeros(a1, a2, dtype=torch.float32)
        # Offloading keeps weights on the meta device between calls; factors added to such a layer stay on the CPU.
        beside = base.A if isinstance(base, KroneckerLinear) else base.weight
        device = "cpu" if hasattr(base, "_hf_hook") else beside.device
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(b1, b2, dtype=torch.float32, device=device))
        self.scale = 1.0
        self.enabled = True
        self.adapter = adapter  # tells this adapter from others on the same model
        self.target = name  # what of its name it was selected by, or given its factors
        self.transposed_rows = False  # whether the factors have the row order of the paper's code
        self.merged = False
        self._unmerged_weight: Tensor | None = None

    @property
    def in_features(self) -> int:
        return matrix_size(self.base)[1]

    @property
    def out_features(self) -> int:
        return matrix_size(self.base)[0]

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def innermost(self) -> nn.Linear | nn.Conv2d:
        """The layer beneath all adapters."""
        layer = self._with_those_beneath()[-1].base
        assert not isinstance(layer, KroneckerLinear)
        return layer

    @property
    def factors(self) -> Factors:
        """gain · A and B, as saved."""
        return Factors(self.A.detach() * self.gain, self.B.detach(), self.transposed_rows)

    @property
    def delta_weight(self) -> Tensor:
        """scale · gain · (A ⊗ B), dense (d_out, d_in), fp32. For inspection; training never forms it."""
        return self._exact_delta.float()

    @property
    def _exact_delta(self) -> Tensor:
        A = self.A.detach().double() * (self.gain * self.scale)
        return Factors(A, self.B.detach(), self.transposed_rows).dense()

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_active or self.merged:
            return self.base(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not self._has_plain_base(x):
            y = self.base(x)
            return y + self._delta(x).to(y.dtype)
        weight = self.base.weight.to(x.dtype) if torch.is_autocast_enabled(x.device.type) else self.base.weight
        return _FrozenLinearPlusKronecker.apply(x, weight, self.base.bias, self.A, self.B, self.gain * self.scale)

    def _delta(self, x: Tensor) -> Tensor:
        layer = self.innermost
        if isinstance(layer, nn.Conv2d):  # adapters from files, which do not train: the dense kernel is good enough
            kernel = self.delta_weight.to(x.device, x.dtype).view(layer.out_channels, -1, *layer.kernel_size)
            return F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        A, B = (self.A * (self.gain * self.scale)).to(x.device, x.dtype), self.B.to(x.device, x.dtype)
        delta = kron_apply(x, A, B)
        if self.transposed_rows:
            delta = delta.unflatten(-1, (A.shape[0], B.shape[0])).transpose(-1, -2).flatten(-2)
        return delta

    def _apply(self, fn, recurse=True):
        """Move and cast the base; the factors move but lose no bits, since `model.to(dtype)` means the base."""
        exact = self.A.data, self.B.data
        super()._apply(fn, recurse)
        for factor, data in zip((self.A, self.B), exact):
            if factor.dtype.itemsize < data.dtype.itemsize:
                factor.data = data.to(factor.device)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Load what `state_dict` returned; or the state dict of a plain model, which goes to the base alone."""
        keys = [key for key in state_dict if key.startswith(prefix)]
        own = [key for key in keys if key in (f"{prefix}A", f"{prefix}B") or key.startswith(f"{prefix}base.")]
        for key in set(keys) - set(own):
            state_dict[f"{prefix}base.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        if self.merged and keys:
            error_msgs.append(f"{prefix.rstrip('.')}: its adapter is merged; call unmerge_kronecker before loading")
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += missing if own or not keys else []

    def _has_plain_base(self, x: Tensor) -> bool:
        """Whether the layer is just x Wᵀ + bias + (A ⊗ B) x with a frozen W on x's device.

        Quantised layers, layers with hooks (offloading, layerwise casting), layers that train and layers with another
        adapter must run their own forward.
        """
        base = self.base
        hooked = "forward" in base.__dict__ or base._forward_hooks or base._forward_pre_hooks
        return (
            isinstance(base, nn.Linear)
            and has_plain_weight(base)
            and not hooked
            and base.weight.device == x.device
            and not base.weight.requires_grad
            and not self.transposed_rows
        )

    def merge(self) -> None:
        """Add this delta and those of the adapters beneath it to the base weight, rounding once.

        The unmerged weight is kept for `unmerge`. Raises KroneckerError, with nothing changed, if the adapter is merged
        already, if the base is offloaded, quantised or in 8 bits, and if the sum is not finite.
        """
        base = self.innermost
        layers = self._with_those_beneath()
        if any(layer.merged for layer in layers):
            raise KroneckerError("the adapter is merged already; unmerge it first")
        check_takes_delta(base)
        deltas = (layer._exact_delta for layer in layers if layer.is_active)
        merged = merged_weight(base.weight, deltas, base.weight.dtype, "the merged weight")
        self._unmerged_weight, base.weight.data = base.weight.data, merged
        for layer in layers:
            layer.merged = True

    def unmerge(self) -> None:
        """Restore the base weight, bit for bit. Raises KroneckerError, with nothing changed, if it cannot be done."""
        self.check_unmerges()
        assert self._unmerged_weight is not None
        weight = self.innermost.weight
        weight.data = self._unmerged_weight.to(weight.device, weight.dtype)
        self._unmerged_weight = None
        for layer in self._with_those_beneath():
            layer.merged = False

    def check_unmerges(self) -> None:
        """Raise KroneckerError if the adapter is not merged, or the base has been offloaded or quantised since."""
        if self._unmerged_weight is None:
            raise KroneckerError("the adapter is not merged")
        with naming("the unmerged weight cannot be put back"):
            check_takes_delta(self.innermost)

    def _with_those_beneath(self) -> "list[KroneckerLinear]":
        layers: list[KroneckerLinear] = [self]
        while isinstance(base := layers[-1].base, KroneckerLinear):
            layers.append(base)
        return layers

    @property
    def is_active(self) -> bool:
        """Whether the adapter changes what the base layer computes; its delta may be in the weight by now."""
        return self.enabled and self.scale != 0

    def extra_repr(self) -> str:
        return f"{self.adapter}, a1={self.A.shape[0]}, a2={self.A.shape[1]}, scale={self.scale}, merged={self.merged}"


def _shapes(
    base: nn.Linear | nn.Conv2d | KroneckerLinear, a1: FactorSize, a2: FactorSize, name: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (a1, a2) and (b1, b2) in numbers. Raises KroneckerError, naming values that do, if they do not divide."""
    d_out, d_in = matrix_size(base)
    sizes, problems = [], []
    for factor, size, features in (("a1", a1, d_out), ("a2", a2, d_in)):
        try:
            sizes.append(size_in_layer(factor, size, features))
        except KroneckerError as error:
            problems.append(str(error))
    if problems:
        raise KroneckerError(
            f"layer {name or type(base).__name__} maps {d_in} to {d_out} features: " + "; ".join(problems)
        )
    rows, columns = sizes
    return (rows, columns), (d_out // rows, d_in // columns)


# ---------------------------------------------------------------------------------------------------------------------
# A model's adapters
# ---------------------------------------------------------------------------------------------------------------------


def inject_kronecker(
    model: nn.Module,
    a1: FactorSize,
    a2: FactorSize,
    targets: Sequence[str] = ATTENTION_TARGETS,
    factors: Mapping[str, tuple[FactorSize, FactorSize]] | None = None,
    init: Init = "invariant",
) -> dict[str, KroneckerLinear]:
    """Freeze `model` and wrap every `nn.Linear` that a target names in a KroneckerLinear. Return name -> layer.

    A target is some consecutive words of a layer's dotted path: "to_q", "attn2.to_k", "attn2", "up_blocks.1"; or "re:"
    and a regular expression for the whole path. `factors` gives some of these layers an (a1, a2) of their own, by such
    words too; the longest count: {"to_k": (8, 64), "attn2.to_k": (1, "d_in")}. A size is a number, or a fraction of
    the layer's: "d_out", "d_in/8".

    Raises KroneckerError, with no layer replaced, if a target selects no linear layer, if factors are for none of them
    or do not divide a layer's sizes, and if the model has adapters already.
    """
    factors = dict(factors or {})
    if kronecker_layers(model):
        raise KroneckerError("the model has Kronecker adapters already; call remove_kronecker first")
    check_not_fused([model])
    linears = linear_modules(model)
    found = {name: (path, target) for path, name, _ in linears if (target := match_selection(name, targets))}
    if missing := [target for target in targets if target not in {selected for _, selected in found.values()}]:
        endings = sorted({ending(name) for _, name, _ in linears})
        raise KroneckerError(
            f"no linear layer of {type(model).__name__} has {', '.join(missing)} in its path; paths end in: "
            f"{', '.join(endings)}"
        )
    own_factors = {name: match_selection(name, list(factors)) for name in found}
    if idle := [name for name in factors if name not in own_factors.values()]:
        raise KroneckerError(
            f"factors are given for {', '.join(idle)}, but the targets are {', '.join(targets)}, and no layer of these "
            "takes them: of the names that are in a layer's path, the longest counts"
        )
    layers, linear_at = {}, {path: linear for path, _, linear in linears}
    for name, (path, target) in found.items():
        own = own_factors[name]
        layers[name] = KroneckerLinear(linear_at[path], *(factors[own] if own else (a1, a2)), init, name)
        ends_alike = own is not None and f".{own}".endswith(f".{target}")
        layers[name].target = own if ends_alike else target  # files and cards tell layers apart by it
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(found[name][0], layer)
    _guard_methods(model)
    return layers


@torch.no_grad()
def start_from_contrast(layers: Iterable[KroneckerLinear], instance: Tensor | Sequence[Tensor], class_: Tensor) -> None:
    """Set A of untrained layers to what tells the instance's inputs (n, d_in) from the class's (m, d_in).

    The layers are those that read these inputs and whose A sees them whole, a2 = d_in: for token states of prompts,
    keys and values of cross-attention, injected with init "invariant". Then gain · A = √a1 · `contrast_rows`, which
    answers to the instance as strongly as the random A does. Rows of A beyond the rank of the inputs stay random.

    Of several subjects, `instance` has the inputs of each. Their rows take turns, and each tells its subject from the
    class and from the other subjects.

    Raises KroneckerError, with no layer changed, if a layer is trained or does not see such inputs whole, and where
    `contrast_rows` does.
    """
    layers, subjects = list(layers), [instance] if isinstance(instance, Tensor) else list(instance)
    for layer in layers:
        a2, d_in, width = layer.A.shape[1], layer.in_features, subjects[0].shape[1]
        if not a2 == d_in == width:
            raise KroneckerError(
                f"layer {layer.target} has a2 = {a2} and {d_in} input features; a start from contrast needs both to be "
                f"{width}, the width of the inputs"
            )
        if layer.B.any():
            raise KroneckerError(f"layer {layer.target} is trained already: its B is not 0")
    count = -(-max((len(layer.A) for layer in layers), default=1) // len(subjects))  # rows of each, rounded up
    of_each = [
        contrast_rows(own, torch.cat([class_, *subjects[:number], *subjects[number + 1 :]]), count)
        for number, own in enumerate(subjects)
    ]
    rows = torch.stack([own[turn] for turn in range(count) for own in of_each if turn < len(own)])
    for layer in layers:
        a1 = len(layer.A)
        layer.A[: len(rows)] = rows[:a1] * (a1**0.5 / layer.gain)


def kronecker_layers(model: nn.Module, adapter: str | None = None) -> dict[str, KroneckerLinear]:
    """Return path -> layer for every adapted layer, or for those of one adapter, in the model's order.

    If a layer has several adapters, the paths of the inner ones continue with ".base".
    """
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, KroneckerLinear) and adapter in (None, module.adapter)
    }


def kronecker_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return A and B of every adapted layer, in the model's order: what an optimizer takes."""
    return [parameter for layer in kronecker_layers(model).values() for parameter in (layer.A, layer.B)]


def kronecker_adapters(models: Models) -> list[str]:
    """Return the names of the adapters in the order in which they were added."""
    found = [list(kronecker_layers(model).values()) for model in given_modules(models).values()]
    return list(dict.fromkeys(layer.adapter for layers in found for layer in reversed(layers)))


def set_kronecker_scale(models: Models, scale: float | Mapping[str, float]) -> None:
    """Set the adapters' strength: 0 is the base model, 1 as trained.

    {"dog": 0.8, "style": 0.5} gives each adapter its own strength and turns off those that it does not name.

    Raises KroneckerError, with nothing changed, if there is no such adapter, if a strength is not a finite number and
    if the adapters are merged or fused.
    """
    layers = _adapted(models)
    names = kronecker_adapters(models)
    if any(layer.merged for layer in layers):
        raise KroneckerError("the adapters are merged; unmerge them before changing their scale")
    check_not_fused(given_modules(models).values())
    given = scale if isinstance(scale, Mapping) else dict.fromkeys(names, scale)
    scales = {name: check_strength(strength, f'the adapter "{name}"') for name, strength in given.items()}
    if unknown := [name for name in scales if name not in names]:
        raise KroneckerError(f"there is no adapter named {', '.join(unknown)}; there are: {', '.join(names)}")
    for layer in layers:
        layer.scale = float(scales.get(layer.adapter, 0))


@contextmanager
def disable_kronecker(models: Models) -> Iterator[None]:
    """Inside this context the models are the base models, bit for bit."""
    layers = _layers(models)
    if any(layer.merged for layer in layers):
        raise KroneckerError("the adapters are merged; unmerge them to get the base model")
    check_not_fused(given_modules(models).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


def merge_kronecker(models: Models) -> None:
    """Add every delta to its base weight. `unmerge_kronecker` undoes it; `remove_kronecker` makes it final.

    Raises KroneckerError, with no layer merged, if one cannot be: see `KroneckerLinear.merge`.
    """
    merged: list[KroneckerLinear] = []
    try:
        for path, layer in _outermost(models).items():
            with naming(path):
                layer.merge()
            merged.append(layer)
    except BaseException:
        for layer in merged:
            layer.unmerge()
        raise


def unmerge_kronecker(models: Models) -> None:
    """Restore the base weights, bit for bit. Raises KroneckerError, with nothing changed, if one cannot be."""
    layers = _outermost(models)
    for path, layer in layers.items():
        with naming(path):
            layer.check_unmerges()
    for layer in layers.values():
        layer.unmerge()


def remove_kronecker(models: Models, adapter: str | None = None) -> None:
    """Remove all adapters, or one by name; merged deltas stay in the weights."""
    layers = _adapted(models) if adapter else []
    if adapter and adapter not in kronecker_adapters(models):
        raise KroneckerError(f"there is no adapter named {adapter}; there are: {', '.join(kronecker_adapters(models))}")
    if any(layer.merged for layer in layers):
        raise KroneckerError("the adapters are merged; unmerge them before removing one")
    if any(not layer.merged for layer in _layers(models)):
        check_not_fused(given_modules(models).values())
    for model in given_modules(models).values():
        for path, layer in reversed(kronecker_layers(model, adapter).items()):  # inner ones first
            model.set_submodule(path, layer.base)
        _guard_methods(model)


def _layers(models: Models) -> list[KroneckerLinear]:
    return [layer for model in given_modules(models).values() for layer in kronecker_layers(model).values()]


def _adapted(models: Models) -> list[KroneckerLinear]:
    layers = _layers(models)
    if not layers:
        raise KroneckerError(f"{type(models).__name__} has no Kronecker adapters")
    return layers


def _outermost(models: Models) -> dict[str, KroneckerLinear]:
    """Return "component.path" -> layer for those that no other adapter is around. Raises KroneckerError if none is."""
    wrapped = {id(layer.base) for layer in _adapted(models)}
    return {
        f"{component}.{path}": layer
        for component, model in given_modules(models).items()
        for path, layer in kronecker_layers(model).items()
        if id(layer) not in wrapped
    }


def kronecker_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return {"<layer>.A": (a1, a2), "<layer>.B": (b1, b2)} as trained, without the gain folded in."""
    return {
        f"{name}.{letter}": getattr(layer, letter).detach()
        for name, layer in kronecker_layers(model).items()
        for letter in "AB"
    }


def load_kronecker_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy factors from `kronecker_state_dict` into the model's adapters.

    Raises KroneckerError, with the model untouched, unless names and shapes are exactly the model's.
    """
    own = kronecker_state_dict(model)
    problems = differences(own.keys(), state_dict.keys())
    problems += [
        f"{name} is {tuple(state_dict[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own.keys() & state_dict.keys()
        if own[name].shape != state_dict[name].shape
    ]
    if problems:
        raise KroneckerError("the state dict does not fit the model's adapters: " + "; ".join(problems))
    for name, tensor in own.items():
        tensor.copy_(state_dict[name])


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def save_kronecker(
    models: Models,
    path: str | os.PathLike,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "default",
) -> None:
    """Write an adapter of a UNet, a mapping of models or a pipeline, in the layout of kron_formats/writing.py.

    The file is written whole or not at all, and an earlier one stays until then. `metadata` is kept with our prefix.

    Raises KroneckerError, with nothing written, if there is no adapter of that name, if files have no names for one of
    the models (see `kron_formats.names.components`), and if a factor is not finite in `dtype`.
    """
    names = kronecker_adapters(models)
    if names and name not in names:
        raise KroneckerError(f"there is no adapter named {name} to save; there are: {', '.join(names)}")
    parts = components(models)
    adapters = {
        layer: adapter
        for layer in find_layers(parts)
        for adapter in _around(parts[layer.component], layer.path).values()
        if adapter.adapter == name
    }
    saved = {id(adapter) for adapter in adapters.values()}
    left_out = [
        f"{part}.{path}"
        for part, model in given_modules(models).items()
        for path, adapter in kronecker_layers(model, name).items()
        if id(adapter) not in saved
    ]
    if left_out:
        raise KroneckerError(
            f"adapter files have no name for {len(left_out)} adapted layers, for example {left_out[0]}; nothing was "
            "written"
        )
    ends = {adapter.target for layer, adapter in adapters.items() if match_target(layer.name, [adapter.target])}
    targets = json.dumps(sorted(ends))  # a file has every layer that one of them is the end of
    layers = {layer: adapter.factors for layer, adapter in adapters.items()}
    write_native(path, layers, family(parts), {**(metadata or {}), "targets": targets}, dtype)


def load_kronecker(
    models: Models, path: str | os.PathLike, scale: float = 1.0, name: str = "default"
) -> dict[str, str]:
    """Add the adapter in a file to a UNet, a mapping of models or a pipeline, beside those it has; return its metadata.

    Raises KroneckerError, with the models untouched, if the file is not a whole Kronecker adapter for them.
    """
    adapter = match_layers(read_kronecker(path), models)
    add_kronecker(models, adapter, scale, name)
    return adapter.file.own_metadata


def add_kronecker(models: Models, adapter: MatchedAdapter, scale: float = 1.0, name: str = "default") -> None:
    """Add an adapter that `match_layers` returned to a UNet, a mapping of models or a pipeline, beside those it has.

    It may have been matched with other models of the same architecture, for example without weights; layers are found
    by component and name, wherever wrappers have moved them since.

    Raises KroneckerError, with the models untouched, if the adapter is a LoRA, if the models lack one of its layers or
    have it in another size, if the name is taken, if the scale is not a finite number, if other adapters are merged and
    if q, k and v are fused.
    """
    parts, path = components(models), adapter.file.path
    if name in kronecker_adapters(models):
        raise KroneckerError(
            f'the model has an adapter named "{name}" already: load {path} under another name, or call '
            "remove_kronecker first"
        )
    if any(layer.merged for layer in _layers(models)):
        raise KroneckerError("the model's adapters are merged; unmerge them before another one is added")
    layers = {layer: layer for layer in find_layers(parts)}  # equal to those of the adapter, but with a module of ours
    misfits = [layer.dotted for layer in adapter.factors if layer not in layers or layers[layer].size != layer.size]
    if misfits:
        raise KroneckerError(
            f"{path} was matched with another model: {len(misfits)} of its layers are missing here or have another "
            f"size ({', '.join(misfits[:3])}{', ...' if len(misfits) > 3 else ''})"
        )
    check_not_fused(parts.values())
    scale = check_strength(scale, f"{path}: the scale")
    added: dict[tuple[str, str], KroneckerLinear] = {}  # by component and path
    for matched, factors in adapter.factors.items():
        layer = layers[matched]
        around = _around(parts[layer.component], layer.path)
        position, base = next(iter(around.items()), (layer.path, layer.module))
        wrapper = KroneckerLinear(base, *factors.A.shape, init=None, adapter=name)
        wrapper.A.data.copy_(factors.A)
        wrapper.B.data.copy_(factors.B)
        wrapper.transposed_rows = factors.transposed_rows
        wrapper.scale, wrapper.target = scale, adapter.target(layer)
        added[layer.component, position] = wrapper
    for (component, position), wrapper in added.items():
        parts[component].set_submodule(position, wrapper)
    for model in parts.values():
        _guard_methods(model)


def _around(model: nn.Module, path: str) -> dict[str, KroneckerLinear]:
    """Return path -> adapter for those around the layer at `path`, the outermost first."""
    found = {}
    while path.endswith(".base"):
        path = path.removesuffix(".base")
        module = model.get_submodule(path)
        if isinstance(module, KroneckerLinear):
            found[path] = module
    return dict(reversed(found.items()))


# ---------------------------------------------------------------------------------------------------------------------
# Ways of diffusers around the layers
# ---------------------------------------------------------------------------------------------------------------------


class _Guarded:
    """A method of one object that goes through `around(object, method, ...)`; a deep copy of it is the copy's own."""

    def __init__(self, owner: nn.Module, name: str, around: Callable[..., Any]):
        self.owner, self.name, self.around = owner, name, around

    @property
    def _method(self) -> Callable[..., Any]:
        return getattr(type(self.owner), self.name).__get__(self.owner)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._method)  # diffusers asks which arguments save_pretrained takes

    def __call__(self, *args, **kwargs):
        return self.around(self.owner, self._method, *args, **kwargs)


def _guard_methods(model: nn.Module) -> None:
    """Guard the methods of diffusers that know nothing of the adapters in `model`; leave them alone if it has none."""
    model = unwrapped(model)
    adapted = bool(kronecker_layers(model))
    _guard(model, "save_pretrained", _save_plain, adapted)
    for module in model.modules():
        _guard(module, "fuse_projections", _fuse_merged, adapted)
    hooks = [number for number, hook in model._forward_pre_hooks.items() if hook is _refuse_scale_of_call]
    if adapted and not hooks:
        model.register_forward_pre_hook(_refuse_scale_of_call, with_kwargs=True)
    elif not adapted:
        for number in hooks:
            del model._forward_pre_hooks[number], model._forward_pre_hooks_with_kwargs[number]


def _guard(owner: nn.Module, name: str, around: Callable[..., Any], adapted: bool) -> None:
    if adapted and hasattr(type(owner), name):
        vars(owner)[name] = _Guarded(owner, name, around)
    elif isinstance(vars(owner).get(name), _Guarded):
        del vars(owner)[name]


def _save_plain(model: nn.Module, save: Callable[..., Any], /, *args, **kwargs) -> Any:
    """Save the model as one without adapters, which loads anywhere: the weights, with what is merged into them."""
    layers = kronecker_layers(model)
    if left_out := sorted({layer.adapter for layer in layers.values() if layer.is_active and not layer.merged}):
        warnings.warn(
            f"the saved {type(model).__name__} is the base model, without its adapters ({', '.join(left_out)}): "
            "call merge_kronecker first to have them in its weights, or save_kronecker to have them in a file",
            stacklevel=3,
        )
    for path, layer in reversed(layers.items()):  # inner ones first
        model.set_submodule(path, layer.base)
    try:
        return save(*args, **kwargs)
    finally:
        for path, layer in layers.items():
            model.set_submodule(path, layer)


def _fuse_merged(attention: nn.Module, fuse: Callable[..., Any], /, *args, **kwargs) -> Any:
    """Fuse the weights of q, k and v, which is all that diffusers looks at, with the deltas in them."""
    if all(layer.merged for layer in kronecker_layers(attention).values()):
        return fuse(*args, **kwargs)
    merge_kronecker(attention)
    try:
        return fuse(*args, **kwargs)
    finally:
        unmerge_kronecker(attention)


def _refuse_scale_of_call(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise KroneckerError if diffusers' scale of LoRAs in one call is given, which the adapters do not follow."""
    scale = (kwargs.get("cross_attention_kwargs") or {}).get("scale", 1.0)
    if scale != 1.0:
        raise KroneckerError(
            f'cross_attention_kwargs={{"scale": {scale}}} has no effect on adapters from load_kronecker: use '
            "set_kronecker_scale, or add them with attach_to_diffusers"
        )
