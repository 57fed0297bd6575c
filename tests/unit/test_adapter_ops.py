"""What the adapter adds to a frozen layer's step, counted with PyTorch's profiler.

Counted are operators that start work on the device: products, sums, fills and copies. Views and allocations are free,
and so is what an operator calls inside itself, which differs from device to device.
"""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from kron_adapter import KroneckerLinear

FREE = {
    *("alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty", "promote_types"),
    *("reshape", "resolve_conj", "result_type", "slice", "squeeze", "t", "transpose", "unsqueeze", "view"),
    *("_has_compatible_shallow_copy_type", "_reshape_alias", "_unsafe_view"),
}
# Operators that are made of others, which are counted instead; `contiguous` and `to` copy only where they have to.
COMPOSED = {"_to_copy", "clone", "contiguous", "linear", "matmul", "to"}

ORDERS = {"A first": (4, 64), "B first": (64, 8)}
STEPS = [
    (order, dtype, bias, input_gradient)
    for order in ORDERS
    for dtype in (torch.float32, torch.bfloat16)
    for bias in (True, False)
    for input_gradient in (True, False)
]


def device_operations(action) -> Counter:
    """Return the operators in `action` that start work on the device, with their number."""
    with profile(activities=[ProfilerActivity.CPU]) as recording:
        action()
    return Counter(event.name for event in recording.events() if is_outermost(event))


def is_outermost(event) -> bool:
    if not starts_work(event.name):
        return False
    parent = event.cpu_parent
    while parent is not None and not starts_work(parent.name):
        parent = parent.cpu_parent
    return parent is None


def starts_work(name: str) -> bool:
    return name.startswith("aten::") and name.removeprefix("aten::") not in FREE | COMPOSED


def operations_of_a_step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> tuple[Counter, Counter]:
    """Return those of the forward and of the backward pass; the latter into everything that needs a gradient."""
    y = layer(x)
    inputs = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
    forward = device_operations(lambda: layer(x))
    backward = device_operations(lambda: torch.autograd.grad(y, inputs, dy)) if inputs else Counter()
    return forward, backward


def layer_and_step(order, dtype, bias, input_gradient):
    base = nn.Linear(512, 256, bias=bias, dtype=dtype).requires_grad_(False)
    layer = KroneckerLinear(copy.deepcopy(base), *ORDERS[order])
    layer.scale = 0.7
    nn.init.normal_(layer.B)
    x = torch.randn(2, 16, 512, dtype=dtype, requires_grad=input_gradient)
    return base, layer, x, torch.randn(2, 16, 256, dtype=dtype)


@pytest.mark.parametrize("order, dtype, bias, input_gradient", STEPS)
def test_a_step_adds_at_most_three_operations_forward_and_five_backward(order, dtype, bias, input_gradient):
    base, layer, x, dy = layer_and_step(order, dtype, bias, input_gradient)
    base_forward, base_backward = operations_of_a_step(base, x, dy)
    forward, backward = operations_of_a_step(layer, x, dy)
    # The factors stay fp32: a lower precision copies both, a few thousand values, and the gradient of B back.
    conversions = Counter({"aten::copy_": 0 if dtype == torch.float32 else 2})
    gradient_conversions = Counter({"aten::copy_": 0 if dtype == torch.float32 else 1})
    assert base_forward.total() == 1 and base_backward.total() == input_gradient  # the frozen layer's GEMMs
    assert (forward - conversions).total() == 1 + 2 + bias, forward
    assert (backward - gradient_conversions).total() == (1 + 5 if input_gradient else 4), backward


@pytest.mark.parametrize("order", ORDERS)
def test_no_operation_of_the_frozen_weight_s_size_without_a_gradient_to_the_input(order):
    _, layer, x, dy = layer_and_step(order, torch.float32, True, False)
    y = layer(x)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recording:
        torch.autograd.grad(y, (layer.A, layer.B), dy)
    shapes = [shape for event in recording.events() if starts_work(event.name) for shape in event.input_shapes]
    assert shapes and list(layer.weight.shape) not in shapes and list(layer.weight.t().shape) not in shapes


@pytest.mark.parametrize("shape", [(1, "d_in"), ("d_out", 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_rank_one_multiplies_no_vectors_one_by_one(shape, dtype):
    """As a LoRA of rank 1, it needs products of matrices alone; batches of vectors are several times slower."""
    layer = KroneckerLinear(nn.Linear(512, 256, dtype=dtype), *shape)
    x, dy = torch.randn(32, 512, dtype=dtype, requires_grad=True), torch.randn(32, 256, dtype=dtype)
    forward, backward = operations_of_a_step(layer, x, dy)
    assert not [name for name in forward + backward if "bmm" in name]
    assert "aten::sum" not in forward + backward
    layer(x).backward(dy)
    assert layer.A.grad.dtype == layer.B.grad.dtype == torch.float32


@pytest.mark.parametrize("autocast", [True, False])
def test_autocast_is_entered_only_where_it_is_on(autocast, monkeypatch):
    """Entering it costs host time, 1,120 times in each step of SDXL."""
    entered = []
    enter = torch.autocast.__enter__
    monkeypatch.setattr(torch.autocast, "__enter__", lambda self: entered.append(self) or enter(self))
    _, layer, x, dy = layer_and_step("A first", torch.float32, True, True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        entered.clear()
        y = layer(x)
    y.backward(dy.to(y.dtype))
    assert not entered and y.dtype == (torch.bfloat16 if autocast else torch.float32)
