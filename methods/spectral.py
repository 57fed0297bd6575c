"""Spectral shifts that train: the weights of a model as functions of δ, composed once for every value of it.

Adding the change to W, where SVDiff's paper composes U diag(relu(σ + δ)) V anew, keeps what an SVD loses: with δ = 0
the weight is W, bit for bit. The arithmetic of shifts is in kron_formats/shifts.py.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kron_formats.decomposition import Decomposition, decompose, digest, kept_decomposition
from kron_formats.shifts import Origin, change_of

MATRICES, NORMS = (nn.Linear, nn.Conv2d), (nn.GroupNorm, nn.LayerNorm)
PROJECTION = "text_projection"  # path of the layer behind a text encoder


class SpectralShift(nn.Module):
    """Parametrisation of a matrix or kernel, fp32: W -> W + U diag(relu(σ + δ) - σ) V.

    δ (r,) is 0 at the start. The changed weight is composed once for every value of δ, however often the layer runs:
    whoever changes δ must do it so that its version counts it, as torch's operations in place do. That copy, U and V
    stay on W's device.
    """

    U: Tensor
    sigma: Tensor
    V: Tensor
    composed: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        self.key = "" if weight.is_meta else digest(weight)
        parts = decompose(weight) if weight.is_meta else kept_decomposition(weight, self.key)
        self.delta = nn.Parameter(torch.zeros_like(parts.sigma))
        for name, tensor in vars(parts).items():
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("composed", torch.empty_like(weight, requires_grad=False), persistent=False)
        self.zero = self.composed_of = self.delta._version  # the versions of δ at which it is 0, and was composed
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        return _Compose.apply(self.delta, weight, self) if self.enabled else weight

    def compose(self, weight: Tensor) -> Tensor:
        """Return the changed weight, composed anew only if δ has changed.

        Before its first change it is W itself: a copy elsewhere in memory has the same bits, but layers may round
        differently with it.
        """
        if (now := self.delta._version) == self.zero:
            return weight.detach()
        if self.composed_of != now:
            change = change_of(self.sigma, self.delta)
            with torch.autocast(weight.device.type, enabled=False):
                exact = torch.addmm(weight.flatten(1), self.U * change, self.V)
            self.composed.copy_(exact.view_as(weight))
            self.composed_of = now
        return self.composed.detach()  # an alias: autograd marks what a Function returns

    def gradient(self, dW: Tensor) -> Tensor:
        """Return the gradient of δ:  dδ_i = u_iᵀ dW v_i where σ_i + δ_i > 0."""
        dW = dW.flatten(1)
        m, n = dW.shape
        with torch.autocast(dW.device.type, enabled=False):  # the smaller product of the two that give the same
            if m > n:
                along = torch.linalg.vecdot(self.U.t() @ dW, self.V)
            else:
                along = torch.linalg.vecdot(self.U.t(), self.V @ dW.t())
        return along * (self.sigma + self.delta > 0)

    def origin(self, values: Tensor) -> Origin:
        """Return what shifts of these values, in place of δ, belong to."""
        parts = Decomposition(self.U, self.sigma, self.V)
        change = change_of(self.sigma, values.to(self.sigma))
        return Origin(self.key, tuple(parts.fingerprint(change).tolist()))


class _Compose(torch.autograd.Function):
    """The changed weight of a SpectralShift as a function of δ."""

    @staticmethod
    def forward(ctx, delta, weight, shift):
        ctx.shift = shift
        ctx.save_for_backward(delta)  # so that a backward pass after δ has changed is an error
        return shift.compose(weight)

    @staticmethod
    def backward(ctx, dW):  # pyright: ignore[reportIncompatibleMethodOverride] one output has one gradient
        assert ctx.saved_tensors
        return ctx.shift.gradient(dW), None, None


class ElementwiseShift(nn.Module):
    """Parametrisation of a norm's weight, fp32: W -> W + δ, with δ (n,) 0 at the start."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.key = "" if weight.is_meta else digest(weight)
        self.delta = nn.Parameter(torch.zeros_like(weight))
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta if self.enabled else weight

    def origin(self, values: Tensor) -> Origin:
        return Origin(self.key, ())


TrainedShift = SpectralShift | ElementwiseShift


def add_shifts(model: nn.Module) -> dict[str, TrainedShift]:
    """Freeze a model, fp32, and shift the weights of its linear layers, convolutions and norms; return path -> shift.

    Biases and embeddings have no shift, nor has what SDXL's second text encoder projects its summary with: it comes
    after the encoder.
    """
    model.requires_grad_(False)
    shifts: dict[str, TrainedShift] = {}
    for path, module in list(model.named_modules()):
        shiftable = isinstance(module, (*MATRICES, *NORMS)) and path != PROJECTION
        if shiftable and isinstance(module.weight, Tensor):
            kind = SpectralShift if isinstance(module, MATRICES) else ElementwiseShift
            shifts[path] = kind(module.weight)
            # unsafe: the weight is never set through the parametrisation, so it needs no inverse
            parametrize.register_parametrization(module, "weight", shifts[path], unsafe=True)
    return shifts
