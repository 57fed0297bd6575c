"""Spectral shifts that train, against weights composed by their definition with numpy's SVD and plain autograd."""

import logging

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import kron_formats.decomposition as decomposition
from dreambooth.loop.optimizers import build_optimizer, evaluating
from dreambooth.method import Group
from dreambooth.options.training import TrainingConfig
from kron_formats.decomposition import decompose, digest, kept_decomposition
from methods.spectral import ElementwiseShift, SpectralShift, add_shifts


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(decomposition, "cache_folder", lambda: tmp_path)
    return tmp_path


def build():
    """A convolution, a norm, a convolution, a linear layer: (2, 3, 6, 6) -> (2, 4, 6, 5)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1), nn.Linear(6, 5))


@pytest.fixture
def model():
    return build()


@pytest.fixture
def x():
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def compositions(monkeypatch):
    """A list that grows by one with every weight that is composed."""
    composed, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args: composed.append(1) or addmm(*args))
    return composed


def perturb(shifts, size=0.5):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for shift in shifts.values():
            shift.delta.add_(size * torch.randn(shift.delta.shape, generator=generator))


def by_definition(model, deltas):
    """Return the model's function with U diag(relu(σ + δ)) Vᵀ in place of its matrices, and w + δ of its norms."""
    weights = {}
    for path, delta in deltas.items():
        weight = model.get_submodule(path).weight.detach()
        if weight.dim() > 1:
            matrix = weight.flatten(1).double().numpy()
            U, sigma, V = (torch.from_numpy(part).float() for part in np.linalg.svd(matrix, full_matrices=False))
            weights[f"{path}.weight"] = (U @ torch.diag((sigma + delta).relu()) @ V).view_as(weight)
        else:
            weights[f"{path}.weight"] = weight + delta
    return lambda x: torch.func.functional_call(model, weights, x)


def test_at_zero_the_weights_are_the_base_s_bit_for_bit(model, x):
    weights, expected = [layer.weight.detach().clone() for layer in model], model(x)
    add_shifts(model)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, weights))
    assert torch.equal(model(x), expected)


def test_outputs_and_gradients_are_those_of_the_definition(model, x):
    deltas = {path: torch.randn(n) * 0.5 for path, n in {"0": 8, "1": 8, "2": 4, "3": 5}.items()}
    assert any((decompose(model[int(path)].weight).sigma + deltas[path] < 0).any() for path in "023")  # relu at work
    leaves = {path: delta.clone().requires_grad_() for path, delta in deltas.items()}
    expected = by_definition(model, leaves)(x)
    expected.square().sum().backward()
    shifts = add_shifts(model)
    with torch.no_grad():
        for path, shift in shifts.items():
            shift.delta.copy_(deltas[path])
    y = model(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected)
    for path, shift in shifts.items():
        torch.testing.assert_close(shift.delta.grad, leaves[path].grad, rtol=1e-5, atol=1e-5, msg=path)


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 2, 3, 3), (4, 4)])
def test_the_gradient_of_every_shape_is_that_of_the_definition(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    shift, dW = SpectralShift(weight), torch.randn(shape)
    perturb({"": shift})
    leaf = shift.delta.detach().clone().requires_grad_()
    (shift.U @ torch.diag((shift.sigma + leaf).relu()) @ shift.V).view(shape).backward(dW)
    shift(weight).backward(dW)
    torch.testing.assert_close(shift.delta.grad, leaf.grad)


def test_every_linear_layer_convolution_and_norm_has_a_shift_and_only_shifts_train(model):
    model.append(nn.Embedding(5, 6)).append(nn.LayerNorm(6, elementwise_affine=False))
    shifts = add_shifts(model)
    kinds = {path: (type(shift), shift.delta.numel()) for path, shift in shifts.items()}
    spectral = SpectralShift
    assert kinds == {"0": (spectral, 8), "1": (ElementwiseShift, 8), "2": (spectral, 4), "3": (spectral, 5)}
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in training} == {id(shift.delta) for shift in shifts.values()}


# ---- composed once ----


def optimizer_of(shifts, name):
    config = TrainingConfig(
        pretrained_model_name_or_path="x", instance_data_dir="y", instance_prompt="z", optimizer=name,
        learning_rate=1.0 if name == "Prodigy" else 0.1,
    )  # fmt: skip
    group = Group("all", [shift.delta for shift in shifts.values()], config.learning_rate, 0.0)
    return build_optimizer([group], config, 1)


@pytest.mark.parametrize("optimizer", ["AdamW", "Prodigy", "Adafactor", "ScheduleFreeAdamW"])
def test_a_weight_is_composed_once_for_every_step_of_the_optimizer(model, x, optimizer, compositions):
    if optimizer == "ScheduleFreeAdamW":
        pytest.importorskip("schedulefree")
    shifts = add_shifts(model)
    trainer = optimizer_of(shifts, optimizer)
    for step in (1, 2, 3):
        for _ in range(2):  # accumulation
            with torch.no_grad():  # the prior's pass
                for shift in shifts.values():
                    shift.enabled = False
                model(x)
                for shift in shifts.values():
                    shift.enabled = True
            checkpoint(model, x, use_reentrant=False).square().mean().backward()
        assert len(compositions) == 3 * (step - 1)  # none before the first step
        deltas = {path: shift.delta.detach().clone() for path, shift in shifts.items()}
        trainer.step()
        trainer.zero_grad()
        assert not any(torch.equal(shift.delta, deltas[path]) for path, shift in shifts.items())
    expected = {path: shift.delta.detach() for path, shift in shifts.items()}
    torch.testing.assert_close(by_definition(build(), expected)(x), model(x))


def test_the_average_of_a_schedule_free_optimizer_is_composed_and_then_the_trained_point_again(model, x):
    pytest.importorskip("schedulefree")
    shifts = add_shifts(model)
    trainer = optimizer_of(shifts, "ScheduleFreeAdamW")
    for _ in range(3):
        model(x).square().mean().backward()
        trainer.step()
        trainer.zero_grad()
    trained = model(x)
    for optimizer in (trainer, Accelerator(cpu=True).prepare_optimizer(trainer)):
        with evaluating(optimizer):
            average = {path: shift.delta.detach().clone() for path, shift in shifts.items()}
            torch.testing.assert_close(by_definition(build(), average)(x), model(x))
            assert not torch.equal(model(x), trained)
        assert torch.equal(model(x), trained)


def test_what_is_composed_while_drawing_trains_on(model, x):
    shifts = add_shifts(model)
    perturb(shifts)
    with torch.inference_mode():
        drawn = model(x)
    y = model(x)
    y.square().mean().backward()
    assert torch.equal(y, drawn) and all(shift.delta.grad.any() for shift in shifts.values())


def test_shifts_that_changed_before_the_backward_pass_are_an_error(model, x):
    shifts = add_shifts(model)
    y = model(x)
    perturb(shifts)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.square().mean().backward()


def test_under_autocast_weights_are_composed_in_fp32(model, x):
    shifts = add_shifts(model)
    perturb(shifts, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        composed = model[3].weight
        y = model(x)
    y.float().square().mean().backward()
    U, sigma, V = (shifts["3"].U, shifts["3"].sigma, shifts["3"].V)
    expected = U @ torch.diag((sigma + shifts["3"].delta.detach()).relu()) @ V
    torch.testing.assert_close(composed, expected)
    assert y.dtype == torch.bfloat16
    assert all(shift.delta.grad.dtype == torch.float32 and shift.delta.grad.any() for shift in shifts.values())


def test_channels_last_kernels_keep_their_format(model, x):
    expected = add_shifts(model)
    perturb(expected)
    other = build().to(memory_format=torch.channels_last)
    shifts = add_shifts(other)
    perturb(shifts)
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(other(x), model(x))


# ---- decompositions ----


def test_a_decomposition_is_kept_by_the_weight_s_bits_and_made_again_if_its_file_is_damaged(folder, monkeypatch):
    weight, made = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), []
    monkeypatch.setattr(decomposition, "decompose", lambda weight: made.append(1) or decompose(weight))

    def kept(weight):
        return kept_decomposition(weight, digest(weight))

    first, again = kept(weight), kept(weight.clone())
    assert made == [1] and all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(again).values()))
    kept(weight.nextafter(torch.tensor(1e9)))  # another base model, however near
    kept(weight.t())
    assert made == [1, 1, 1]
    for path in folder.iterdir():
        save_file({name: tensor + 1e-3 for name, tensor in load_file(path).items()}, path)
    assert torch.equal(kept(weight).U, first.U) and made == [1, 1, 1, 1]
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    assert torch.equal(kept(weight).U, first.U) and made == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("failing", ["disk_usage", "save_tensors"])
def test_what_cannot_be_kept_is_used_all_the_same_and_said_once(folder, monkeypatch, caplog, failing):
    def refuse(*args):
        raise OSError("No space left on device")

    if failing == "disk_usage":
        usage = decomposition.shutil.disk_usage(folder)._replace(free=2**30)
        monkeypatch.setattr(decomposition.shutil, "disk_usage", lambda folder: usage)
    else:
        monkeypatch.setattr(decomposition, "save_tensors", refuse)
    decomposition._warn.cache_clear()
    with caplog.at_level(logging.WARNING):
        for seed in (0, 1):
            weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(kept_decomposition(weight, digest(weight)).U, decompose(weight).U)
    assert not list(folder.iterdir())
    assert len(caplog.messages) == 1 and "not kept" in caplog.messages[0]
