"""Adapters of several libraries on the attention projections of a model, for benchmarks to compare."""

import importlib.util
from collections.abc import Callable, Sequence

import torch
from peft import LoKrConfig, LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from kron_adapter import ATTENTION_TARGETS, inject_kronecker

Adapt = Callable[[nn.Module], object]  # puts adapters into a model

FACTORS = ((4, 64), (8, 64), (64, 8), (16, 16))
FROZEN = "frozen"
SQUARE = 16  # the LoKrs' factor: A is (16, 16) where 16² divides the layer's sizes, as in our (16, 16)
FULL = 100_000  # a rank that no layer reaches: the LoKrs then train full factors, as we do


class ReferenceFormula(nn.Module):
    """base(x) + B (Xᵀ A), as the paper's own code computes it: A first for every shape, operand for operand.

    X (a2, b2) is x read row-major, A is kept as (a2, a1). Source: IBM/DiffuseKronA, diffusekrona/krona.py.
    """

    def __init__(self, base: nn.Linear, a1: int, a2: int):
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.zeros(a2, a1, device=base.weight.device))
        self.B = nn.Parameter(torch.zeros(base.out_features // a1, base.in_features // a2, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        X = x.reshape(-1, self.A.shape[0], self.B.shape[1]).transpose(1, 2)  # (N, b2, a2)
        delta = self.B @ (X.to(self.A.dtype) @ self.A)  # (N, b1, a1): the rows in the paper's code's order
        return self.base(x) + delta.reshape(*x.shape[:-1], -1).to(x.dtype)


class Shifted(nn.Module):
    """base(x) + s: the least that makes gradients flow back as far as an adapter of this layer does."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.shift = nn.Parameter(torch.zeros((), device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.shift.to(y.dtype)


def _replace(model: nn.Module, wrap: Callable[[nn.Linear], nn.Module], count: int | None = None) -> None:
    """Put `wrap(layer)` in the place of every attention projection, or of the first `count`."""
    for path in _projections(model)[:count]:
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(path, wrap(layer))


def _projections(model: nn.Module) -> list[str]:
    return [path for path, _ in model.named_modules() if path.endswith(ATTENTION_TARGETS)]


def _lycoris(bypass: bool) -> Adapt:
    def adapt(model: nn.Module) -> None:
        from lycoris.modules.lokr import LokrModule

        def wrap(base: nn.Linear) -> nn.Module:
            layer = LokrModule("", base, lora_dim=FULL, factor=SQUARE, full_matrix=True, bypass_mode=bypass)
            return layer.to(base.weight.device)  # its own forward calls base's

        _replace(model, wrap)

    return adapt


def _peft(config: LoraConfig | LoKrConfig) -> Adapt:
    return lambda model: inject_adapter_in_model(config, model)


def _ours(a1: int, a2: int) -> Adapt:
    return lambda model: inject_kronecker(model, a1, a2, _projections(model))


def _reference(a1: int, a2: int) -> Adapt:
    return lambda model: _replace(model, lambda base: ReferenceFormula(base, a1, a2))


PEERS: dict[str, Adapt] = {
    FROZEN: lambda model: _replace(model, Shifted, count=1),
    **{f"Kronecker {factors}": _ours(*factors) for factors in FACTORS},
    "PEFT LoRA r=4": _peft(LoraConfig(r=4, lora_alpha=4, target_modules=list(ATTENTION_TARGETS))),
    "PEFT LoKr": _peft(LoKrConfig(r=FULL, decompose_factor=SQUARE, target_modules=list(ATTENTION_TARGETS))),
    "LyCORIS LoKr": _lycoris(bypass=False),
    "LyCORIS LoKr, bypass": _lycoris(bypass=True),
    **{f"reference formula {factors}": _reference(*factors) for factors in FACTORS},
}


def choose_peers(wanted: Sequence[str]) -> list[str]:
    """Return FROZEN and those of `wanted` whose package is installed; print which are left out."""
    if not importlib.util.find_spec("lycoris"):
        print("LyCORIS is not installed and is left out: tests/requirements.txt names its version")
        wanted = [name for name in wanted if not name.startswith("LyCORIS")]
    return [FROZEN, *(name for name in wanted if name != FROZEN)]


def adapt(model: nn.Module, peer: str) -> Sequence[nn.Parameter]:
    """Freeze the model, put the peer's adapters into it, and return what trains: fp32, no factor zero."""
    model.requires_grad_(False)
    PEERS[peer](model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = 0.02 * torch.randn(parameter.shape, device=parameter.device)
    return parameters
