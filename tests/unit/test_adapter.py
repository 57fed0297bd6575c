"""The adapter's algebra and layer, against torch.kron, autograd and the plain linear layer."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLayer
from torch import nn

from kron_adapter import (
    KroneckerError,
    KroneckerLinear,
    disable_kronecker,
    inject_kronecker,
    kron_apply,
    kronecker_layers,
    kronecker_parameters,
    kronecker_state_dict,
    load_kronecker_state_dict,
    merge_kronecker,
    remove_kronecker,
    set_kronecker_scale,
    unmerge_kronecker,
)

# (a1, a2, b1, b2): A first is cheaper, B first is cheaper, square, the two degenerate shapes, and LoRA of rank 1 twice
SHAPES = [(2, 8, 6, 3), (8, 2, 3, 6), (4, 4, 5, 5), (1, 6, 8, 4), (12, 1, 2, 16), (1, 12, 8, 1), (8, 1, 1, 12)]


def trained_layer(a1, a2, b1, b2, bias=True, dtype=torch.float32, seed=0):
    """A layer whose B is no longer zero."""
    torch.manual_seed(seed)
    layer = KroneckerLinear(nn.Linear(a2 * b2, a1 * b1, bias=bias, dtype=dtype), a1, a2)
    nn.init.normal_(layer.B, std=0.5)
    return layer


def dense_output(layer, x):
    """What the layer must compute, through torch.kron."""
    return F.linear(x, layer.weight + layer.gain * layer.scale * torch.kron(layer.A, layer.B), layer.bias)


@pytest.mark.parametrize("a1, a2, b1, b2", SHAPES)
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (2, 3, 4)])
def test_kron_apply_is_the_product_with_torch_kron(a1, a2, b1, b2, batch):
    A, B, x = torch.randn(a1, a2).double(), torch.randn(b1, b2).double(), torch.randn(*batch, a2 * b2).double()
    torch.testing.assert_close(kron_apply(x, A, B), x @ torch.kron(A, B).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("a1, a2, b1, b2", SHAPES)
def test_kron_apply_has_the_right_gradients(a1, a2, b1, b2):
    inputs = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, a2 * b2), (a1, a2), (b1, b2))
    ]
    assert torch.autograd.gradcheck(kron_apply, inputs)


@pytest.mark.parametrize("a1, a2, b1, b2", SHAPES)
def test_layer_has_the_right_gradients(a1, a2, b1, b2):
    layer = trained_layer(a1, a2, b1, b2).double()
    x = torch.randn(2, 3, a2 * b2, dtype=torch.float64, requires_grad=True)

    def forward(x, A, B):
        return torch.func.functional_call(layer, {"A": A, "B": B}, (x,))

    assert torch.autograd.gradcheck(forward, (x, layer.A, layer.B))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("a1, a2, b1, b2", SHAPES)
@pytest.mark.parametrize("batch", [(7,), (2, 5), (2, 3, 4)])
def test_layer_equals_the_dense_formula(a1, a2, b1, b2, bias, batch):
    layer = trained_layer(a1, a2, b1, b2, bias)
    layer.scale = 0.7
    x = torch.randn(*batch, a2 * b2, requires_grad=True)
    dy = torch.randn(*batch, a1 * b1)
    parameters = (x, layer.A, layer.B)
    ours = torch.autograd.grad(layer(x), parameters, dy)
    theirs = torch.autograd.grad(dense_output(layer, x), parameters, dy)
    torch.testing.assert_close(layer(x), dense_output(layer, x))
    for our, their in zip(ours, theirs):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


def test_layer_takes_non_contiguous_inputs_and_gradients():
    layer = trained_layer(2, 8, 6, 3)
    x = torch.randn(24, 5, 2).transpose(0, 2).requires_grad_()  # (2, 5, 24)
    dy = torch.randn(5, 2, 12).transpose(0, 1)
    assert not x.is_contiguous() and not dy.is_contiguous()
    ours = torch.autograd.grad(layer(x), (x, layer.A, layer.B), dy)
    theirs = torch.autograd.grad(dense_output(layer, x), (x, layer.A, layer.B), dy)
    for our, their in zip(ours, theirs):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["invariant", "reference"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("d_in, d_out, rows", [(320, 320, 4096), (768, 320, 154), (64, 32, 1), (1280, 1280, 256)])
def test_step_zero_is_the_base_layer_bit_for_bit(init, bias, d_in, d_out, rows):
    base = nn.Linear(d_in, d_out, bias=bias)
    layer = KroneckerLinear(base, 4, 16, init)
    x = torch.randn(2, rows, d_in)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("a1, a2", [(1, 640), (4, 64), (64, 4), (16, 16), (8, 64), (64, 8)])
def test_invariant_init_is_lora_s_times_the_root_of_the_blocks_that_share_b(a1, a2):
    torch.manual_seed(0)
    base = nn.Linear(640, 640)
    layers = [KroneckerLinear(base, a1, a2) for _ in range(8)]
    entries = torch.cat([layer.gain * layer.A.detach().flatten() for layer in layers])
    assert entries.std().item() == pytest.approx((a1 / 640) ** 0.5, rel=0.1)


@pytest.mark.parametrize("a1", [4, 16, 64])
@pytest.mark.parametrize("b2", [1, 5, 20])
def test_a_step_of_b_goes_as_far_for_every_number_of_blocks(a1, b2):
    """Towards a target of rank one, u vᵀ of signs, with the signs of the gradient as the step, as Adam's first is."""
    torch.manual_seed(0)
    base = nn.Linear(640, 640, bias=False)
    progress = []
    for _ in range(40):
        layer = KroneckerLinear(base, a1, 640 // b2)
        u, v = torch.randn(640).sign(), torch.randn(640).sign()
        (-(u @ layer(v))).backward()
        layer.B.data = -layer.B.grad.sign()
        progress.append((u @ layer.delta_weight @ v).item() / 640)
    assert sum(progress) / len(progress) == pytest.approx((2 * b2 / math.pi) ** 0.5, rel=0.1)


def test_initialisations_are_as_documented():
    torch.manual_seed(0)
    base = nn.Linear(1280, 1280)
    invariant, reference = KroneckerLinear(base, 64, 64), KroneckerLinear(base, 64, 32, "reference")
    assert invariant.A.std().item() == pytest.approx(1280**-0.5, rel=0.05) and invariant.gain == 8
    assert reference.A.std().item() == pytest.approx(1 / 64, rel=0.05) and reference.gain == 1
    assert not invariant.B.any() and not reference.B.any()
    with pytest.raises(KroneckerError, match="'xavier'"):
        KroneckerLinear(base, 4, 64, "xavier")


@pytest.mark.parametrize("a1, a2", [(4, 64), (64, 4), (16, 16)])
@pytest.mark.parametrize("rows", [64, 256])
def test_a_small_delta_survives_bf16_in_the_output_and_in_dx(a1, a2, rows):
    """With |ΔW| = 1e-4 |W| most of the delta lies below the base output's rounding; it has to reach it all the same."""
    torch.manual_seed(0)
    layer = KroneckerLinear(nn.Linear(1280, 1280, bias=False, dtype=torch.bfloat16), a1, a2)
    nn.init.normal_(layer.B)
    layer.scale = float(1e-4 * layer.weight.float().norm() / layer.delta_weight.norm())
    delta_weight = layer.delta_weight

    def survival(adapted, base, exact):
        return (((adapted.float() - base.float()) * exact).sum() / exact.square().sum()).item()

    x = torch.randn(rows, 1280).bfloat16().requires_grad_()
    dy = torch.randn(rows, 1280).bfloat16()
    y, y_base = layer(x), layer.base(x)
    (dx,), (dx_base,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(y_base, x, dy)
    naive = survival(y_base + F.linear(x, delta_weight.bfloat16()), y_base, x.detach().float() @ delta_weight.T)
    assert naive < 0.5, "the test no longer tells one rounding from two"
    assert survival(y, y_base, x.detach().float() @ delta_weight.T) > 0.95
    assert survival(dx, dx_base, dy.float() @ delta_weight) > 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_keeps_fp32_gradients(dtype):
    layer = trained_layer(2, 8, 6, 3)
    x = torch.randn(4, 24, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        assert y.dtype == layer.base(x).dtype == dtype
        inside = torch.autograd.grad(y.float().square().sum(), (x, layer.A, layer.B), retain_graph=True)
    outside = torch.autograd.grad(y.float().square().sum(), (x, layer.A, layer.B))
    exact = torch.autograd.grad(dense_output(layer, x).square().sum(), (x, layer.A, layer.B))
    for a, b, reference in zip(inside, outside, exact):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, reference, rtol=0.05, atol=0.05 * reference.abs().max().item())


def test_gradients_of_a_bf16_base_are_fp32_and_the_factors_stay_fp32():
    layer = trained_layer(8, 2, 3, 6, dtype=torch.bfloat16)
    layer(torch.randn(4, 12).bfloat16()).float().sum().backward()
    assert {layer.A.dtype, layer.B.dtype, layer.A.grad.dtype, layer.B.grad.dtype} == {torch.float32}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    layer = trained_layer(2, 8, 6, 3)
    x = torch.randn(4, 24, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), (layer.A, layer.B))
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    assert torch.equal(layer.A.grad, plain[0]) and torch.equal(layer.B.grad, plain[1])


@pytest.mark.parametrize("a1, a2, b1, b2", SHAPES[:2])
def test_compiles_without_graph_breaks(a1, a2, b1, b2):
    layer = trained_layer(a1, a2, b1, b2)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, 5, a2 * b2, requires_grad=True)
    ours = torch.autograd.grad(compiled(x).square().sum(), (x, layer.A, layer.B))
    eager = torch.autograd.grad(layer(x).square().sum(), (x, layer.A, layer.B))
    for our, their in zip(ours, eager):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(x), layer(x), rtol=0.05, atol=0.05)


def test_nothing_of_the_dense_delta_s_size_is_made_in_training():
    layer = trained_layer(4, 64, 64, 4)  # 256 x 256
    x = torch.randn(3, 256, requires_grad=True)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != layer.weight.data_ptr():
                largest.append(result.untyped_storage().nbytes() // result.element_size())
            return result

    with Watch():
        layer(x).sum().backward()
    assert max(largest) < 256 * 256 / 10


def test_no_dx_is_computed_where_the_input_needs_none():
    layer = trained_layer(2, 8, 6, 3)
    x = torch.randn(4, 24)
    layer(x).square().sum().backward()
    exact = torch.autograd.grad(dense_output(layer, x).square().sum(), (layer.A, layer.B))
    torch.testing.assert_close((layer.A.grad, layer.B.grad), exact, rtol=1e-4, atol=1e-5)


def test_a_layer_that_runs_its_own_forward_is_added_to():
    """Quantised, hooked and training bases cannot be bypassed."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = trained_layer(2, 8, 6, 3)
    doubled = Doubled(24, 12)
    doubled.load_state_dict(layer.base.state_dict())
    x = torch.randn(4, 24, requires_grad=True)
    delta = F.linear(x, layer.delta_weight)
    hooked = trained_layer(2, 8, 6, 3)
    hooked.base.register_forward_hook(lambda module, args, output: 2 * output)
    layer.base = doubled.requires_grad_(False)
    torch.testing.assert_close(layer(x), doubled(x) + delta)
    torch.testing.assert_close(hooked(x), doubled(x) + delta)


def test_a_base_that_trains_gets_its_gradient():
    layer = trained_layer(2, 8, 6, 3)
    layer.base.requires_grad_(True)
    layer(torch.randn(4, 24)).sum().backward()
    assert layer.base.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("r", [1, 3])
def test_a_lora_of_rank_r_is_the_sum_of_r_products_of_a_column_and_a_row(r):
    torch.manual_seed(0)
    base, x = nn.Linear(12, 20), torch.randn(4, 12)
    lora = LoraLayer(base, "default", LoraConfig(r=r, lora_alpha=r, init_lora_weights="gaussian"), r=r, lora_alpha=r)
    nn.init.normal_(lora.lora_B["default"].weight)
    up, down = lora.lora_B["default"].weight.detach(), lora.lora_A["default"].weight.detach()
    terms = []
    for column, row in zip(up.T, down):
        terms.append(KroneckerLinear(terms[-1] if terms else base, 1, "d_in"))
        terms[-1].A.data.copy_(row[None] / terms[-1].gain)
        terms[-1].B.data.copy_(column[:, None])
    torch.testing.assert_close(terms[-1](x), lora(x), rtol=1e-5, atol=1e-5)
    total = sum(term.delta_weight for term in terms)
    torch.testing.assert_close(total, lora.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
    swapped = KroneckerLinear(base, "d_out", 1)  # the same product with the factors exchanged
    swapped.A.data.copy_(up[:, :1] / swapped.gain)
    swapped.B.data.copy_(down[:1])
    torch.testing.assert_close(swapped.delta_weight, terms[0].delta_weight, rtol=1e-5, atol=1e-6)


# ---- a model's adapters ----


class Attention(nn.Module):
    def __init__(self, size=24, context=16):
        super().__init__()
        self.to_q = nn.Linear(size, size, bias=False)
        self.to_k = nn.Linear(context, size, bias=False)
        self.to_v = nn.Linear(context, size, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(size, size), nn.Dropout(0.0)])
        self.norm = nn.LayerNorm(size)

    def forward(self, x, context):
        weights = torch.softmax(self.to_q(x) @ self.to_k(context).transpose(1, 2), -1)
        return self.norm(x + self.to_out[0](weights @ self.to_v(context)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1 = Attention()
        self.attn2 = Attention()
        self.proj = nn.Linear(24, 10)

    def forward(self, x, context):
        return self.proj(self.attn2(self.attn1(x, context), context))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 5, 24), torch.randn(2, 7, 16)


def train_a_little(model, inputs):
    optimizer = torch.optim.AdamW(kronecker_parameters(model), lr=0.05)
    for _ in range(3):
        model(*inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_inject_adapts_every_target_and_freezes_the_rest(model, inputs):
    before = model(*inputs)
    layers = inject_kronecker(model, 4, 8)
    assert list(layers) == [f"attn{i}.{p}" for i in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out.0")]
    assert layers == kronecker_layers(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.{letter}" for name in layers for letter in "AB"}
    assert torch.equal(model(*inputs), before)


def test_factors_per_projection_and_longest_target_wins(model):
    layers = inject_kronecker(
        model,
        4,
        8,
        targets=("to_q", "to_k", "attn2.to_k", "proj"),
        factors={"to_k": (6, 2), "attn2.to_k": (3, 4), "proj": (5, 3)},
    )
    shapes = {name: tuple(layer.A.shape) for name, layer in layers.items()}
    assert shapes == {
        "attn1.to_q": (4, 8),
        "attn1.to_k": (6, 2),
        "attn2.to_q": (4, 8),
        "attn2.to_k": (3, 4),
        "proj": (5, 3),
    }


def test_factors_go_to_the_longest_name_that_ends_a_path_be_it_a_target_or_not(model):
    factors = {"to_k": (6, 2), "attn2.to_k": (1, "d_in"), "attn1.to_out.0": ("d_out/3", 8)}
    layers = inject_kronecker(model, 4, 8, factors=factors)
    shapes = {name: (tuple(layer.A.shape), tuple(layer.B.shape)) for name, layer in layers.items()}
    assert shapes == {
        "attn1.to_q": ((4, 8), (6, 3)),
        "attn1.to_k": ((6, 2), (4, 8)),
        "attn1.to_v": ((4, 8), (6, 2)),
        "attn1.to_out.0": ((8, 8), (3, 3)),
        "attn2.to_q": ((4, 8), (6, 3)),
        "attn2.to_k": ((1, 16), (24, 1)),
        "attn2.to_v": ((4, 8), (6, 2)),
        "attn2.to_out.0": ((4, 8), (6, 3)),
    }
    labels = {name: layer.target for name, layer in layers.items()}
    assert labels["attn1.to_k"] == "to_k" and labels["attn2.to_k"] == "attn2.to_k" and labels["attn2.to_q"] == "to_q"


def test_factors_by_a_name_above_that_of_the_target_leave_the_target_its_name(model):
    layers = inject_kronecker(model, 4, 8, targets=("attn2.to_k",), factors={"to_k": (6, 2)})
    assert {name: (layer.target, tuple(layer.A.shape)) for name, layer in layers.items()} == {
        "attn2.to_k": ("attn2.to_k", (6, 2))
    }


@pytest.mark.parametrize(
    "a1, a2, numbers",
    [
        ("d_out", "d_in", (24, 16)),
        ("d_out/8", "d_in/1", (3, 16)),
        ("d_out / 24", "d_in/4", (1, 4)),
        ("4", " 8", (4, 8)),
        (torch.tensor(4).item(), 8, (4, 8)),
    ],
)
def test_sizes_are_numbers_or_fractions_of_the_layer_s(a1, a2, numbers):
    torch.manual_seed(0)
    layer = KroneckerLinear(nn.Linear(16, 24), a1, a2)
    torch.manual_seed(0)
    same = KroneckerLinear(nn.Linear(16, 24), *numbers)
    assert tuple(layer.A.shape) == numbers and tuple(layer.B.shape) == (24 // numbers[0], 16 // numbers[1])
    assert torch.equal(layer.A, same.A) and layer.gain == same.gain


def test_a_fraction_is_of_each_layer_and_gives_the_size_of_b(model):
    layers = inject_kronecker(model, "d_out/3", "d_in/4", targets=("to_q", "to_k", "proj"), factors={"proj": (1, 1)})
    assert {tuple(layer.B.shape) for name, layer in layers.items() if name != "proj"} == {(3, 4)}
    assert {name: tuple(layer.A.shape) for name, layer in layers.items()} == {
        "attn1.to_q": (8, 6), "attn1.to_k": (8, 4), "attn2.to_q": (8, 6), "attn2.to_k": (8, 4), "proj": (1, 1),
    }  # fmt: skip


def test_a_target_is_whole_words_of_a_path(model):
    with pytest.raises(KroneckerError, match="o_q in its path; paths end in: proj, to_k, to_out.0, to_q, to_v"):
        inject_kronecker(model, 4, 8, targets=("o_q",))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            {"a1": 5, "a2": 8},
            r"attn1.to_q maps 24 to 24 .*a1 = 5 does not divide d_out = 24 \(nearest that do: 4 and 6\)",
        ),
        ({"a1": 4, "a2": 9}, r"a2 = 9 does not divide d_in = 24 \(nearest that do: 8 and 12\)"),
        ({"a1": 4, "a2": 24}, r"attn1.to_k maps 16 .*nearest that do: 16\)"),
        ({"a1": 0, "a2": 8}, "a1 = 0 does not divide"),
        ({"a1": 4, "a2": 8, "factors": {"to_z": (1, 1)}}, "given for to_z, but the targets are to_q"),
        ({"a1": 4, "a2": 8, "factors": {"to_q": (1, 1), "attn3.to_q": (1, 1)}}, "given for attn3.to_q, but"),
        ({"a1": 4, "a2": 8, "factors": {"proj": (1, 1)}}, "given for proj, but"),  # a layer, but not an adapted one
        (
            {"a1": 4, "a2": 8, "factors": {"to_q": (4, 4), "attn1.to_q": (1, 1), "attn2.to_q": (1, 1)}},
            "given for to_q, but .* longest",
        ),
        (
            {"a1": "d_out/7", "a2": "d_in/5"},
            r"attn1.to_q maps 24 to 24 .*b1 = 7 \(a1 = d_out/7\) does not divide d_out = 24 \(nearest.* 6 and 8\); "
            r"b2 = 5 \(a2 = d_in/5\) does not divide d_in = 24 \(nearest that do: 4 and 6\)",
        ),
        (
            {"a1": 4, "a2": 8, "factors": {"attn2.to_v": (1, "d_in/9")}},
            r"attn2.to_v .* b2 = 9 \(a2 = d_in/9\) .* 8 and",
        ),
        ({"a1": "d_in", "a2": 8}, "attn1.to_q .* d_in is not a size for a1.* d_out/8"),
        ({"a1": 4, "a2": "d_out/2"}, "attn1.to_q .* d_out/2 is not a size for a2.* d_in/8"),
        *(
            ({"a1": size, "a2": 8}, f"{size} is not a size for a1.* d_out/8")
            for size in ("d_out/0", "d_out/-2", "d_out/2.0", "half")
        ),
    ],
)
def test_a_request_that_does_not_fit_leaves_the_model_untouched(model, arguments, words):
    with pytest.raises(KroneckerError, match=words):
        inject_kronecker(model, **arguments)
    assert not kronecker_layers(model)


def test_injecting_twice_is_refused(model):
    inject_kronecker(model, 4, 8)
    with pytest.raises(KroneckerError, match="remove_kronecker"):
        inject_kronecker(model, 4, 8)


def test_disable_gives_the_base_model_bit_for_bit_also_after_an_exception(model, inputs):
    before = model(*inputs)
    inject_kronecker(model, 4, 8)
    train_a_little(model, inputs)
    after = model(*inputs)
    assert not torch.equal(after, before)
    with pytest.raises(RuntimeError), disable_kronecker(model):
        assert torch.equal(model(*inputs), before)
        raise RuntimeError
    assert torch.equal(model(*inputs), after)


def test_scale_goes_from_the_base_model_to_the_trained_one(model, inputs):
    before = model(*inputs)
    inject_kronecker(model, 4, 8)
    train_a_little(model, inputs)
    full = model.attn1.to_q.delta_weight
    set_kronecker_scale(model, 0)
    torch.testing.assert_close(model(*inputs), before)
    set_kronecker_scale(model, 0.5)
    torch.testing.assert_close(model.attn1.to_q.delta_weight, full / 2)


def test_merging_equals_not_merging_and_unmerging_restores_every_bit(model, inputs):
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject_kronecker(model, 4, 8)
    train_a_little(model, inputs)
    adapted = model(*inputs)
    merge_kronecker(model)
    torch.testing.assert_close(model(*inputs), adapted)
    for call in (merge_kronecker, lambda m: set_kronecker_scale(m, 2)):
        with pytest.raises(KroneckerError, match="merged"):
            call(model)
    with pytest.raises(KroneckerError, match="merged"), disable_kronecker(model):
        pass
    unmerge_kronecker(model)
    assert torch.equal(model(*inputs), adapted)
    remove_kronecker(model)
    assert model.state_dict().keys() == base.keys()
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())


def test_merge_then_remove_leaves_a_plain_model(model, inputs):
    inject_kronecker(model, 4, 8)
    train_a_little(model, inputs)
    adapted = model(*inputs)
    merge_kronecker(model)
    remove_kronecker(model)
    assert not kronecker_layers(model) and type(model.attn1.to_q) is nn.Linear
    torch.testing.assert_close(model(*inputs), adapted)


def test_state_dict_goes_around_bit_for_bit(model, inputs):
    inject_kronecker(model, 4, 8)
    train_a_little(model, inputs)
    state, output = {k: v.clone() for k, v in kronecker_state_dict(model).items()}, model(*inputs)
    remove_kronecker(model)
    inject_kronecker(model, 4, 8)
    load_kronecker_state_dict(model, state)
    assert torch.equal(model(*inputs), output)


def test_state_dict_is_strict_in_both_directions(model):
    inject_kronecker(model, 4, 8)
    state = {name: tensor.clone() + 1 for name, tensor in kronecker_state_dict(model).items()}
    before = {name: tensor.clone() for name, tensor in kronecker_state_dict(model).items()}
    missing = {name: tensor for name, tensor in state.items() if name != "attn1.to_q.A"}
    with pytest.raises(KroneckerError, match=r"1 missing \(attn1.to_q.A\)"):
        load_kronecker_state_dict(model, missing)
    with pytest.raises(KroneckerError, match=r"1 not in the model \(attn9.to_q.A\)"):
        load_kronecker_state_dict(model, {**state, "attn9.to_q.A": torch.zeros(4, 8)})
    with pytest.raises(KroneckerError, match=r"attn1.to_q.A is \(8, 4\), the model has \(4, 8\)"):
        load_kronecker_state_dict(model, {**state, "attn1.to_q.A": torch.zeros(8, 4)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in kronecker_state_dict(model).items())


# ---- all or nothing ----


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_merge_that_is_refused_half_way_merges_nothing(model, inputs):
    layers = inject_kronecker(model, 4, 8)
    train_a_little(model, inputs)
    model.attn2.to_v.base.to(torch.float8_e4m3fn)
    before = weights_of(model)
    with pytest.raises(KroneckerError, match="attn2.to_v: a weight of torch.float8_e4m3fn cannot take a merged delta"):
        merge_kronecker(model)
    assert unchanged(model, before) and not any(layer.merged for layer in layers.values())


@pytest.mark.parametrize("change", [lambda base: base.to("meta"), lambda base: base.to(torch.float8_e5m2)])
def test_unmerging_what_was_offloaded_or_cast_since_is_refused_and_changes_nothing(model, inputs, change):
    layers = inject_kronecker(model, 4, 8)
    train_a_little(model, inputs)
    merge_kronecker(model)
    change(model.attn2.to_q.base)
    before = weights_of(model.attn1)
    with pytest.raises(KroneckerError, match="attn2.to_q: "):
        unmerge_kronecker(model)
    assert unchanged(model.attn1, before) and all(layer.merged for layer in layers.values())


def test_a_merge_that_overflows_is_refused(model, inputs):
    inject_kronecker(model, 4, 8)
    train_a_little(model, inputs)
    model.half()
    before = weights_of(model)
    set_kronecker_scale(model, 1e9)
    with pytest.raises(KroneckerError, match="attn1.to_q: the merged weight is not finite in torch.float16"):
        merge_kronecker(model)
    assert unchanged(model, before)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), {"default": -float("inf")}])
def test_a_scale_that_is_not_finite_is_refused_and_changes_nothing(model, scale):
    layers = inject_kronecker(model, 4, 8)
    with pytest.raises(KroneckerError, match='"default" is (nan|inf|-inf)'):
        set_kronecker_scale(model, scale)
    assert {layer.scale for layer in layers.values()} == {1.0}


def test_casting_the_model_leaves_the_factors_every_bit_also_around_merging(model, inputs):
    inject_kronecker(model, 4, 8)
    train_a_little(model, inputs)
    factors = {name: tensor.clone() for name, tensor in kronecker_state_dict(model).items()}
    merge_kronecker(model)
    model.to(torch.bfloat16)
    unmerge_kronecker(model)
    assert {layer.weight.dtype for layer in kronecker_layers(model).values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, factors[name]) for name, tensor in kronecker_state_dict(model).items())


# ---- state dicts, copies ----


@pytest.mark.parametrize("whole", [True, False])
def test_a_plain_state_dict_loads_into_an_adapted_model(model, inputs, whole):
    torch.manual_seed(5)
    plain = Model()
    inject_kronecker(model, 4, 8)
    train_a_little(model, inputs)
    factors = {name: tensor.clone() for name, tensor in kronecker_state_dict(model).items()}
    target, source = (model, plain) if whole else (model.attn1, plain.attn1)
    target.load_state_dict(source.state_dict())  # strict
    for name, layer in kronecker_layers(target).items():
        assert torch.equal(layer.base.weight, source.get_submodule(name).weight)
    assert all(torch.equal(tensor, factors[name]) for name, tensor in kronecker_state_dict(model).items())
    broken = {name: tensor for name, tensor in plain.state_dict().items() if name != "attn1.to_q.weight"}
    with pytest.raises(RuntimeError, match="attn1.to_q.base.weight"):
        model.load_state_dict(broken)


def test_an_adapted_model_loads_its_own_state_dict_and_a_merged_one_loads_none(model, inputs):
    inject_kronecker(model, 4, 8)
    train_a_little(model, inputs)
    output, state = model(*inputs), weights_of(model)
    torch.manual_seed(5)
    other = Model()
    inject_kronecker(other, 4, 8)
    other.load_state_dict(state)
    assert torch.equal(other(*inputs), output)
    merge_kronecker(other)
    with pytest.raises(RuntimeError, match="attn1.to_q: its adapter is merged; call unmerge_kronecker"):
        other.load_state_dict(Model().state_dict())


# ---- weights that are not plain tensors ----


class Packed(torch.Tensor):
    """A weight as torchao quantises it: it looks like floats, but only F.linear can multiply by it."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype, requires_grad=False)

    def __init__(self, data):
        self.packed = data.clone()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return F.linear(args[0], args[1].packed, *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].packed)
        raise NotImplementedError(func)


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_of_another_tensor_class_run_their_own_forward_and_are_not_merged(model, inputs, when):
    base = model(*inputs)
    if when == "before":
        model.attn1.to_q.weight = nn.Parameter(Packed(model.attn1.to_q.weight.data), requires_grad=False)
    inject_kronecker(model, 4, 8)
    torch.testing.assert_close(model(*inputs), base)
    train_a_little(model, inputs)
    expected = copy.deepcopy(model)(*inputs) if when == "after" else None
    if when == "after":
        model.attn1.to_q.base.weight = nn.Parameter(Packed(model.attn1.to_q.weight.data), requires_grad=False)
        torch.testing.assert_close(model(*inputs), expected)
    assert (model(*inputs) - base).abs().max() > 1e-3
    before = weights_of(model.attn2)
    with pytest.raises(
        KroneckerError, match="attn1.to_q: a Linear with a weight of Packed.* cannot take a merged delta"
    ):
        merge_kronecker(model)
    assert unchanged(model.attn2, before)
