"""Kronecker adapters for linear layers: W + scale · (A ⊗ B), with W frozen and A, B trained.

    A: (a1, a2)    B: (b1, b2)    W: (d_out, d_in) = (a1·b1, a2·b2)
    (A ⊗ B) x = A X Bᵀ, read row-major, where X (a2, b2) is x read row-major

    layers = inject_kronecker(unet, a1=4, a2=64)        # freezes unet; only the factors train
    ... train kronecker_parameters(unet) ...
    save_kronecker(unet, "pytorch_kronecker_weights.safetensors")
    load_kronecker(pipeline, "pytorch_kronecker_weights.safetensors")

Source: DiffuseKronA (arXiv 2402.17412), eq. 3 to 5.  Needs torch and safetensors only.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = [
    "KroneckerError",
    "KroneckerLinear",
    "disable_kronecker",
    "inject_kronecker",
    "kron_apply",
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
    "unmerge_kronecker",
]

ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # diffusers' attention projections
FORMAT_VERSION = "1"
METADATA_PREFIX = "kronecker."
Init = Literal["invariant", "reference"]


class KroneckerError(ValueError):
    """A request or a file that does not fit the model. The message is meant for the user."""


# ---------------------------------------------------------------------------------------------------------------------
# Algebra
# ---------------------------------------------------------------------------------------------------------------------


def kron_apply(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return (A ⊗ B) x without forming A ⊗ B.

    With x read row-major as X (a2, b2):  (A ⊗ B) x = A X Bᵀ, read row-major.

    x: (..., a2·b2)    A: (a1, a2)    B: (b1, b2)    ->    (..., a1·b1), all of one dtype
    """
    X = x.reshape(-1, A.shape[1], B.shape[1])
    product, _ = _contract(X, A, B, _a_first(A, B))
    return product.reshape(*x.shape[:-1], A.shape[0] * B.shape[0])


def _a_first(A: Tensor, B: Tensor) -> bool:
    """Whether (A X) Bᵀ takes no more multiplications than A (X Bᵀ)."""
    (a1, a2), (b1, b2) = A.shape, B.shape
    return a1 * b2 * (a2 + b1) <= a2 * b1 * (b2 + a1)


def _contract(X: Tensor, A: Tensor, B: Tensor, a_first: bool) -> tuple[Tensor, Tensor]:
    """Return A X Bᵀ (N, a1, b1) and what lies between the two products: A X (N, a1, b2) or X Bᵀ (N, a2, b1)."""
    if a_first:
        inner = _times_left(A, X)
        return _times_right(inner, B), inner
    inner = _times_right(X, B)
    return _times_left(A, inner), inner


def _times_left(A: Tensor, X: Tensor) -> Tensor:
    # bmm takes the stride-0 batch as it is, where matmul would copy A once per row of the batch.
    return torch.bmm(A.expand(X.shape[0], -1, -1), X)


def _times_right(X: Tensor, B: Tensor) -> Tensor:
    return (X.reshape(-1, B.shape[1]) @ B.t()).view(X.shape[0], X.shape[1], B.shape[0])


class _FrozenLinearPlusKronecker(torch.autograd.Function):
    """y = x Wᵀ + bias + scale · (A ⊗ B) x for a frozen W, rounded once.

    The frozen GEMM accumulates onto the delta, forward and in dx, so a delta far below one unit in the last place of
    the base output still reaches it; and the delta never makes a pass over memory of its own.

    Backward, with G = dy as (N, a1, b1) and a1·b2-sized S = G B (A first) or a2·b1-sized T = Aᵀ G (B first):
        A first: dA = Σ_n S Xᵀ,  dB = Gᵀ (A X)         B first: dA = Σ_n G (X Bᵀ)ᵀ,  dB = Tᵀ X
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        ctx.scale, ctx.a_first = scale, _a_first(A, B)
        A, B = (A * scale).to(x.dtype), B.to(x.dtype)
        X = x.reshape(-1, A.shape[1], B.shape[1])
        product, inner = _contract(X, A, B, ctx.a_first)
        y = product.view(-1, weight.shape[0])
        if bias is not None:
            y += bias  # before the GEMM: with B = 0 this is then exactly what the frozen layer computes
        y.addmm_(X.view(-1, weight.shape[1]), weight.t())
        ctx.save_for_backward(X, inner, weight, A, B)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, dy):
        X, inner, weight, A, B = ctx.saved_tensors
        needs_dx, _, _, needs_dA, needs_dB, _ = ctx.needs_input_grad
        G = dy.contiguous().view(-1, A.shape[0], B.shape[0])  # attention hands over transposed gradients
        dx = dA = dB = None
        if needs_dx:
            product, between = _contract(G, A.t(), B.t(), not ctx.a_first)
            dx = product.view(-1, weight.shape[1])
            dx.addmm_(G.view(-1, weight.shape[0]), weight)
            dx = dx.view(*dy.shape[:-1], weight.shape[1])
        else:
            between = _times_right(G, B.t()) if ctx.a_first else _times_left(A.t(), G)
        if needs_dA:
            left, right = (between, X) if ctx.a_first else (G, inner)
            dA = torch.bmm(left, right.transpose(1, 2)).sum(0, dtype=torch.promote_types(X.dtype, torch.float32))
            dA *= ctx.scale
        if needs_dB:
            left, right = (G, inner) if ctx.a_first else (between, X)
            dB = left.reshape(-1, B.shape[0]).t() @ right.reshape(-1, B.shape[1])
        return dx, None, None, dA, dB, None


# ---------------------------------------------------------------------------------------------------------------------
# The layer
# ---------------------------------------------------------------------------------------------------------------------


class KroneckerLinear(nn.Module):
    """A frozen `nn.Linear` plus scale · gain · (A ⊗ B), with B = 0 at the start: step 0 is exactly the base layer.

    A (a1, a2) and B (b1, b2) are fp32 whatever the base's dtype. `gain` belongs to the parametrisation and is folded
    into A when saved; `scale` is the user's strength, 1.0 as trained.

    init "invariant":  A ~ N(0, 1/a2),   gain 1/√b2.  gain · A then has entries of variance 1/d_in for every (a1, a2),
                       so that one learning rate serves all factor shapes.
    init "reference":  A ~ N(0, 1/a1²),  gain 1, as in the paper's own code.
    init None:         A = 0,  gain 1, for factors that come from a file.

    The base may be any `nn.Linear`, also a quantised one. Raises KroneckerError where a1, a2 do not divide its sizes.
    """

    def __init__(self, base: nn.Linear, a1: int, a2: int, init: Init | None = "invariant", name: str = ""):
        super().__init__()
        b1, b2 = _divide(base, a1, a2, name)
        stds_and_gains = {"invariant": (a2**-0.5, b2**-0.5), "reference": (1 / a1, 1.0), None: (0.0, 1.0)}
        if init not in stds_and_gains:
            raise KroneckerError(f"init is {init!r}; it can be 'invariant' or 'reference'")
        std, self.gain = stds_and_gains[init]
        self.base = base.requires_grad_(False)
        # Drawn on the CPU: one seed gives the same adapter on every device.
        A = torch.randn(a1, a2, dtype=torch.float32) * std if std else torch.zeros(a1, a2, dtype=torch.float32)
        self.A = nn.Parameter(A.to(base.weight.device))
        self.B = nn.Parameter(torch.zeros(b1, b2, dtype=torch.float32, device=base.weight.device))
        self.scale = 1.0
        self.enabled = True
        self.target = name  # what the layer was selected by
        self._unmerged_weight: Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def merged(self) -> bool:
        return self._unmerged_weight is not None

    @property
    def delta_weight(self) -> Tensor:
        """scale · gain · (A ⊗ B), dense (d_out, d_in), fp32. For merging and inspection; training never forms it."""
        return torch.kron(self.A.detach() * (self.gain * self.scale), self.B.detach())

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled or self.merged:
            return self.base(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not self._has_plain_base(x):
            y = self.base(x)
            A, B = (self.A * (self.gain * self.scale)).to(x.dtype), self.B.to(x.dtype)
            return y + kron_apply(x, A, B).to(y.dtype)
        weight = self.base.weight.to(x.dtype) if torch.is_autocast_enabled(x.device.type) else self.base.weight
        return _FrozenLinearPlusKronecker.apply(x, weight, self.base.bias, self.A, self.B, self.gain * self.scale)

    def _has_plain_base(self, x: Tensor) -> bool:
        """Whether the base layer is nothing but x Wᵀ + bias with a frozen W that lies beside x.

        Quantised layers, layers that hooks move, cast or watch (offloading, layerwise casting) and layers that train
        must run their own forward.
        """
        base = self.base
        hooked = "forward" in base.__dict__ or base._forward_hooks or base._forward_pre_hooks
        return (
            type(base) is nn.Linear
            and not hooked
            and base.weight.device == x.device
            and base.weight.is_floating_point()
            and not base.weight.requires_grad
        )

    def merge(self) -> None:
        """Add the delta to the base weight, rounding once. The unmerged weight is kept, for `unmerge`."""
        if self.merged:
            raise KroneckerError("the adapter is merged already; unmerge it first")
        if type(self.base) is not nn.Linear or not self.base.weight.is_floating_point():
            raise KroneckerError(f"a {type(self.base).__name__} of {self.base.weight.dtype} cannot take a merged delta")
        weight = self.base.weight
        self._unmerged_weight = weight.detach().clone()
        weight.data = (weight.detach().double() + self.delta_weight.double()).to(weight.dtype)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        if not self.merged:
            raise KroneckerError("the adapter is not merged")
        self.base.weight.data = self._unmerged_weight.to(self.base.weight.device)
        self._unmerged_weight = None

    def extra_repr(self) -> str:
        return f"a1={self.A.shape[0]}, a2={self.A.shape[1]}, scale={self.scale}, merged={self.merged}"


def _divide(base: nn.Linear, a1: int, a2: int, name: str) -> tuple[int, int]:
    """Return (b1, b2) = (d_out / a1, d_in / a2). Raises KroneckerError, naming the values that would divide."""
    problems = []
    for factor, value, side, size in (
        ("a1", a1, "d_out", base.out_features),
        ("a2", a2, "d_in", base.in_features),
    ):
        if value < 1 or size % value:
            divisors = [d for d in range(1, size + 1) if size % d == 0]
            below = [d for d in divisors if d < value][-1:]
            above = [d for d in divisors if d > value][:1]
            nearest = " and ".join(str(d) for d in below + above)
            problems.append(f"{factor} = {value} does not divide {side} = {size} (nearest that do: {nearest})")
    if problems:
        raise KroneckerError(
            f"layer {name or type(base).__name__} maps {base.in_features} to {base.out_features} features: "
            + "; ".join(problems)
        )
    return base.out_features // a1, base.in_features // a2


# ---------------------------------------------------------------------------------------------------------------------
# A model's adapters
# ---------------------------------------------------------------------------------------------------------------------


def inject_kronecker(
    model: nn.Module,
    a1: int,
    a2: int,
    targets: Sequence[str] = ATTENTION_TARGETS,
    factors: Mapping[str, tuple[int, int]] | None = None,
    init: Init = "invariant",
) -> dict[str, KroneckerLinear]:
    """Freeze `model` and wrap every `nn.Linear` that a target names in a KroneckerLinear. Return name -> layer.

    A target is the end of a module's dotted path: "to_q", "attn2.to_k", "to_out.0", or the whole path.
    `factors` gives some targets an (a1, a2) of their own: {"to_k": (8, 64)}.

    Raises KroneckerError, with no layer replaced, where a target names no linear layer, where a layer is adapted
    already, and where factors do not divide a layer's sizes.
    """
    factors = dict(factors or {})
    if strangers := [name for name in factors if name not in targets]:
        raise KroneckerError(f"factors are given for {', '.join(strangers)}, but the targets are {', '.join(targets)}")
    if kronecker_layers(model):
        raise KroneckerError("the model has Kronecker adapters already; call remove_kronecker first")
    found = _find_targets(model, targets)
    if missing := [target for target in targets if target not in found.values()]:
        endings = sorted({_ending(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)})
        raise KroneckerError(
            f"no linear layer of {type(model).__name__} ends in {', '.join(missing)}; there are: {', '.join(endings)}"
        )
    layers = {}
    for name, target in found.items():
        layer_a1, layer_a2 = factors.get(target, (a1, a2))
        layers[name] = KroneckerLinear(model.get_submodule(name), layer_a1, layer_a2, init, name)
        layers[name].target = target
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def _find_targets(model: nn.Module, targets: Sequence[str]) -> dict[str, str]:
    """Return layer name -> target for the linear layers, in the model's order; the longest target wins."""
    found = {}
    for name, module in model.named_modules():
        matches = [target for target in targets if f".{name}".endswith(f".{target}")]
        if isinstance(module, nn.Linear) and matches:
            found[name] = max(matches, key=len)
    return found


def _ending(name: str) -> str:
    """The last words of a path that say what a layer is: "attn1.to_out.0" -> "to_out.0"."""
    parts = name.split(".")
    start = len(parts) - 1
    while start > 0 and parts[start].isdigit():
        start -= 1
    return ".".join(parts[start:])


def kronecker_layers(model: nn.Module) -> dict[str, KroneckerLinear]:
    """Return name -> layer for every adapted layer, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, KroneckerLinear)}


def kronecker_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return A and B of every adapted layer, in the model's order: what an optimizer takes."""
    return [parameter for layer in kronecker_layers(model).values() for parameter in (layer.A, layer.B)]


def set_kronecker_scale(model: nn.Module, scale: float) -> None:
    """Set the adapters' strength: 0 is the base model, 1 as trained."""
    for layer in _adapted(model).values():
        if layer.merged:
            raise KroneckerError("the adapters are merged; unmerge them before changing their scale")
        layer.scale = float(scale)


@contextmanager
def disable_kronecker(model: nn.Module) -> Iterator[None]:
    """Inside this context the model is the base model, bit for bit."""
    layers = kronecker_layers(model).values()
    if any(layer.merged for layer in layers):
        raise KroneckerError("the adapters are merged; unmerge them to get the base model")
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


def merge_kronecker(model: nn.Module) -> None:
    """Add every delta to its base weight. `unmerge_kronecker` undoes it; `remove_kronecker` makes it final."""
    for layer in _adapted(model).values():
        layer.merge()


def unmerge_kronecker(model: nn.Module) -> None:
    """Put the base weights back, bit for bit."""
    for layer in _adapted(model).values():
        layer.unmerge()


def remove_kronecker(model: nn.Module) -> None:
    """Put the plain linear layers back in place of the adapted ones; merged deltas stay in their weights."""
    for name, layer in kronecker_layers(model).items():
        model.set_submodule(name, layer.base)


def _adapted(model: nn.Module) -> dict[str, KroneckerLinear]:
    layers = kronecker_layers(model)
    if not layers:
        raise KroneckerError(f"{type(model).__name__} has no Kronecker adapters")
    return layers


def kronecker_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return {"<layer>.A": (a1, a2), "<layer>.B": (b1, b2)} as trained, the gain not folded in."""
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
    problems = _differences(own.keys(), state_dict.keys())
    problems += [
        f"{name} is {tuple(state_dict[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own.keys() & state_dict.keys()
        if own[name].shape != state_dict[name].shape
    ]
    if problems:
        raise KroneckerError("the state dict does not fit the model's adapters: " + "; ".join(problems))
    for name, tensor in own.items():
        tensor.copy_(state_dict[name])


def _differences(expected: Iterable[str], given: Iterable[str]) -> list[str]:
    """Say in words which names are missing and which are not expected; a few of each, and how many."""
    expected, given = set(expected), set(given)
    problems = []
    for label, names in (("missing", expected - given), ("not in the model", given - expected)):
        if names:
            problems.append(f"{len(names)} {label} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Files: full-factor LoKr under kohya's names, the one layout for Kronecker factors that other tools read
#
#     lora_unet_<path, dots as underscores>.lokr_w1    gain · A  (a1, a2)
#     lora_unet_<path, dots as underscores>.lokr_w2    B         (b1, b2)
#     lora_unet_<path, dots as underscores>.alpha      1.0
# ---------------------------------------------------------------------------------------------------------------------

Models = nn.Module | Mapping[str, nn.Module]  # a UNet, {"unet": ..., "text_encoder": ...}, or a diffusers pipeline


def save_kronecker(models: Models, path: str | os.PathLike, metadata: Mapping[str, str] | None = None) -> None:
    """Write the factors of every adapted layer to a safetensors file, the gain folded into A.

    `metadata` entries are stored under "kronecker."; the format version, a1 and a2 (or, where layers differ, the
    factors of each) and the targets are added here. The file appears whole or not at all.
    """
    tensors, factors, targets = {}, {}, set()
    for prefix, model in _prefixed(models).items():
        for name, layer in kronecker_layers(model).items():
            key = _file_key(prefix, name)
            tensors[f"{key}.lokr_w1"] = (layer.A.detach() * layer.gain).cpu().contiguous()
            tensors[f"{key}.lokr_w2"] = layer.B.detach().cpu().contiguous()
            tensors[f"{key}.alpha"] = torch.tensor(1.0)  # LyCORIS wants one; for full factors it scales nothing
            factors[key] = tuple(layer.A.shape)
            targets.add(layer.target)
    if not tensors:
        raise KroneckerError("there are no Kronecker adapters to save")
    own = {"format_version": FORMAT_VERSION, "targets": json.dumps(sorted(targets))}
    if len(set(factors.values())) == 1:
        own["a1"], own["a2"] = map(str, next(iter(factors.values())))
    else:
        own["factors"] = json.dumps(factors)
    entries = {METADATA_PREFIX + key: value for key, value in {**(metadata or {}), **own}.items()}
    unfinished = f"{os.fspath(path)}.tmp"
    save_file(tensors, unfinished, metadata=entries)
    os.replace(unfinished, path)


def load_kronecker(models: Models, path: str | os.PathLike, scale: float = 1.0) -> dict[str, str]:
    """Inject the adapters of a file into a UNet, a mapping of models or a diffusers pipeline; return its metadata.

    Raises KroneckerError, with the models untouched, where the file is not a whole Kronecker adapter for them.
    """
    factors, metadata = read_kronecker(path)
    models = _prefixed(models)
    if any(kronecker_layers(model) for model in models.values()):
        raise KroneckerError("the model has Kronecker adapters already; call remove_kronecker first")
    linears = {
        _file_key(prefix, name): (prefix, name, module)
        for prefix, model in models.items()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    targets = json.loads(metadata.get("targets", "[]"))
    selected = {
        _file_key(prefix, name): target
        for prefix, model in models.items()
        if any(key.startswith(f"{prefix}_") for key in factors)
        for name, target in _find_targets(model, targets).items()
    }
    problems = _differences({*selected, *(factors.keys() & linears.keys())}, factors)
    problems += [
        f"{key} holds factors for {A.shape[1] * B.shape[1]} to {A.shape[0] * B.shape[0]} features, "
        f"the model's layer maps {linears[key][2].in_features} to {linears[key][2].out_features}"
        for key, (A, B) in factors.items()
        if key in linears
        and (A.shape[0] * B.shape[0], A.shape[1] * B.shape[1])
        != (linears[key][2].out_features, linears[key][2].in_features)
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise KroneckerError(f"{path} does not fit this model: " + "; ".join(problems[:3]) + more)
    for key, (A, B) in factors.items():
        prefix, name, base = linears[key]
        layer = KroneckerLinear(base, *A.shape, init=None, name=name)
        layer.A.data.copy_(A)
        layer.B.data.copy_(B)
        layer.scale, layer.target = float(scale), selected.get(key, _ending(name))
        models[prefix].set_submodule(name, layer)
    return metadata


def _prefixed(models: Models) -> dict[str, nn.Module]:
    """Return kohya's key prefix -> model."""
    if isinstance(models, nn.Module):
        return {"lora_unet": models}
    parts = models if isinstance(models, Mapping) else models.components
    text_encoder = "lora_te1" if parts.get("text_encoder_2") is not None else "lora_te"
    prefixes = {"unet": "lora_unet", "text_encoder": text_encoder, "text_encoder_2": "lora_te2"}
    return {prefix: parts[name] for name, prefix in prefixes.items() if parts.get(name) is not None}


def _file_key(prefix: str, name: str) -> str:
    return f"{prefix}_{name.replace('.', '_')}"


def read_kronecker(path: str | os.PathLike) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, str]]:
    """Return layer key -> (A, B) in fp32, and the metadata that `save_kronecker` wrote, of an adapter file.

    Raises KroneckerError, saying what the file is instead, where it is not a Kronecker adapter.
    """
    if not os.path.isfile(path):
        raise KroneckerError(f"there is no adapter file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if not any(key.endswith(".lokr_w1") for key in keys):
                raise KroneckerError(f"{path} is not a Kronecker adapter: {_describe(keys)}")
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in keys if not key.endswith(".alpha")}
    except SafetensorError as error:
        raise KroneckerError(f"{path} is not a readable safetensors file: {error}") from error
    factors = {}
    for key in tensors:
        layer, _, kind = key.rpartition(".")
        pair = tensors.get(f"{layer}.lokr_w1"), tensors.get(f"{layer}.lokr_w2")
        if kind not in ("lokr_w1", "lokr_w2") or any(factor is None or factor.dim() != 2 for factor in pair):
            raise KroneckerError(f"{path}: {layer} does not hold two full factors lokr_w1 and lokr_w2, but {kind}")
        if not all(torch.isfinite(factor).all() for factor in pair):
            raise KroneckerError(f"{path}: the factors of {layer} are not all finite")
        factors[layer] = tuple(factor.float() for factor in pair)
    own = {k.removeprefix(METADATA_PREFIX): v for k, v in metadata.items() if k.startswith(METADATA_PREFIX)}
    return factors, own


def _describe(keys: Sequence[str]) -> str:
    """Say in words what a safetensors file with these keys seems to be."""
    signs = (
        (("lora_down", "lora_A", ".lora.down"), "it is a LoRA file; load it with pipe.load_lora_weights"),
        (("hada_w1",), "it is a LoHa file"),
        (("lokr_w1_a",), "it is a LoKr file with low-rank factors"),
        (("model.diffusion_model.", "first_stage_model."), "it is a whole Stable Diffusion checkpoint"),
        (("down_blocks.", "up_blocks."), "it holds a UNet's own weights"),
    )
    for parts, words in signs:
        if any(part in key for key in keys for part in parts):
            return words
    return f"its {len(keys)} tensors have other names, for example {', '.join(keys[:3])}" if keys else "it is empty"
