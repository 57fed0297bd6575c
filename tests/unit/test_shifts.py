"""Spectral shifts in files, ours and others', against their definitions with numpy's SVD."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import kron_formats.decomposition as decomposition
from kron_formats.decomposition import Decomposition, decompose, digest
from kron_formats.errors import KroneckerError
from kron_formats.reading import read_adapter
from kron_formats.shifts import Origin, Shift, change_of, is_shifts, origin_metadata


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    monkeypatch.setattr(decomposition, "cache_folder", lambda: None)


def matrix(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_numpy(weight, delta):
    """Return U diag(relu(σ + δ)) Vᵀ of a matrix, fp64."""
    U, sigma, V = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return torch.from_numpy(U @ np.diag(np.maximum(sigma + delta.double().numpy(), 0)) @ V)


def shift_of(weight, values, elementwise=True):
    """Return the shift of a weight as training writes it."""
    parts = decompose(weight)
    fingerprint = parts.fingerprint(change_of(parts.sigma, values)) if weight.dim() > 1 else torch.zeros(0)
    return Shift(
        values, elementwise, "dog.safetensors: layer", Origin(digest(weight)[:16], tuple(fingerprint.tolist()))
    )


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (4, 3, 3, 3)])
@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0, 0.0])
def test_the_change_is_that_of_the_definition_at_every_strength(shape, strength):
    weight = matrix(*shape)
    values = matrix(min(shape[0], weight[0].numel()), seed=1)
    delta = shift_of(weight, values).scaled(2 * strength).scaled(0.5).delta(weight)
    expected = by_numpy(weight.flatten(1), strength * values) - weight.flatten(1)
    assert delta.dtype == torch.float64
    torch.testing.assert_close(delta, expected, rtol=0, atol=2e-6)


def test_a_norm_s_shift_is_elementwise_in_our_files_and_a_rescale_in_others():
    weight = matrix(6)
    ours, theirs = Shift(matrix(6, seed=1), True, "x"), Shift(torch.tensor([0.7]), False, "x")
    torch.testing.assert_close(ours.scaled(0.5).delta(weight), 0.5 * matrix(6, seed=1).double())
    expected = by_numpy(weight[None], 0.5 * theirs.values)[0] - weight  # mkshing: svd(weight.unsqueeze(0))
    torch.testing.assert_close(theirs.scaled(0.5).delta(weight), expected, rtol=0, atol=1e-6)
    norm = weight.double().norm()
    torch.testing.assert_close(theirs.delta(weight), 0.7 / norm * weight.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        Shift(-2 * norm[None].float(), False, "x").delta(weight), -weight.double(), rtol=0, atol=1e-6
    )  # relu


@pytest.mark.parametrize("size, needed", [((5, 7), 5), ((9, 2), 2), ((6,), 6)])
def test_shifts_that_do_not_fit_say_how_many_are_needed(size, needed):
    shift = Shift(torch.zeros(4), True, "file: layer")
    assert str(needed) in shift.misfit(size)
    assert Shift(torch.zeros(needed), True, "x").misfit(size) is None
    assert Shift(torch.zeros(1), False, "x").misfit((6,)) is None
    with pytest.raises(KroneckerError, match="file: layer.*4 shifts"):
        shift.delta(torch.zeros(size))


# ---- whether they are the vectors that were trained ----


def test_another_weight_is_refused_by_the_layer_s_name_however_near_it_is():
    weight = matrix(8, 8)
    for values, first in ((matrix(8, seed=1), weight), (matrix(8, seed=1), weight[0])):
        shift = replace(shift_of(first, values), base_model="someone/base")
        shift.delta(first)
        other = first.clone()
        other.view(-1)[3] = other.view(-1)[3].nextafter(torch.tensor(9.0))
        with pytest.raises(KroneckerError, match="dog.safetensors: layer.*someone/base.*variant"):
            shift.delta(other)


def test_a_weight_of_the_same_values_in_another_dtype_is_the_same():
    weight = matrix(8, 8).half()
    shift = shift_of(weight.float(), matrix(8, seed=1))
    torch.testing.assert_close(shift.delta(weight), shift.delta(weight.float()))


def turned(parts, i, angle):
    """Return a decomposition with the vectors i and i + 1 turned in their planes, as if their values were equal."""
    c, s = np.cos(angle), np.sin(angle)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float32)
    U, V = parts.U.clone(), parts.V.clone()
    U[:, i : i + 2], V[i : i + 2] = U[:, i : i + 2] @ turn.t(), turn @ V[i : i + 2]
    return Decomposition(U, parts.sigma, V)


def test_turned_vectors_are_refused_flipped_ones_and_turns_that_change_nothing_are_not(monkeypatch):
    weight, values = matrix(64, 64), 0.1 * matrix(64, seed=1)
    shift, parts = shift_of(weight, values), decompose(weight)
    signs = 1 - 2.0 * (torch.arange(64) % 3 == 0).float()
    flipped = Decomposition(parts.U * signs, parts.sigma, parts.V * signs[:, None])
    monkeypatch.setattr(decomposition, "decompose", lambda weight: flipped)
    torch.testing.assert_close(shift.delta(weight), by_numpy(weight, values) - weight, rtol=0, atol=1e-5)
    monkeypatch.setattr(decomposition, "decompose", lambda weight: turned(parts, 10, 0.3))
    with pytest.raises(KroneckerError, match="dog.safetensors: layer.*singular vectors.*--to fused"):
        shift.delta(weight)
    values[10:12] = -0.05  # what both change by is the same in any direction of their planes
    monkeypatch.setattr(decomposition, "decompose", lambda weight: parts)
    shift = shift_of(weight, values)
    monkeypatch.setattr(decomposition, "decompose", lambda weight: turned(parts, 10, 0.3))
    shift.delta(weight)


def test_the_fingerprint_says_how_large_an_error_is():
    """For many small turns, near the error of the change itself: what is measured and what is meant are the same."""
    weight, values = matrix(96, 80), 0.1 * matrix(80, seed=1)
    parts = decompose(weight)
    change = change_of(parts.sigma, values)
    whole = (parts.U.double() * change) @ parts.V.double()
    ratios = []
    for i in range(0, 78, 3):
        other = turned(parts, i, 0.5)
        true = ((other.U.double() * change) @ other.V.double() - whole).norm()
        seen = (other.fingerprint(change) - parts.fingerprint(change)).square().mean().sqrt()
        ratios.append((seen / true).item())
    assert 0.7 < float(np.sqrt(np.mean(np.square(ratios)))) < 1.4 and min(ratios) > 0.02


def test_rounding_to_half_precision_is_seen_and_another_lapack_is_not():
    """numpy's LAPACK is not PyTorch's; the sizes of a layer of SD, a quarter of them for speed."""
    weight = 0.03 * matrix(160, 160)
    values = 0.01 * matrix(160, seed=1)
    shift = shift_of(weight, values)
    expected = torch.tensor(shift.origin.fingerprint, dtype=torch.float64)

    def error(parts):
        change = change_of(parts.sigma, values)
        return ((parts.fingerprint(change) - expected).square().mean().sqrt() / change.norm()).item()

    assert error(decompose(weight.half().float())) > 2e-3
    single = np.linalg.svd(weight.numpy(), full_matrices=False)
    double = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    assert error(Decomposition(*map(torch.from_numpy, single))) < 1e-3
    assert error(Decomposition(*(torch.from_numpy(part).float() for part in double))) < 1e-6


# ---- files ----


def saved(path, tensors, metadata=None):
    save_file(tensors, path, metadata={f"kronecker.{key}": value for key, value in (metadata or {}).items()})
    return path


def test_files_are_read_with_what_they_belong_to(tmp_path):
    weight, norm = matrix(6, 4), matrix(5, seed=3)
    shifts = {"conv_in": shift_of(weight, matrix(4, seed=1)), "text_encoder.norm": shift_of(norm, matrix(5, seed=2))}
    tensors = {f"{name}.delta": shift.values for name, shift in shifts.items()}
    metadata = {**origin_metadata({name: shift.origin for name, shift in shifts.items()}), "base_model": "x/y"}
    assert is_shifts(tensors) and not is_shifts([]) and not is_shifts([*tensors, "conv_in.weight"])
    file = read_adapter(saved(tmp_path / "a.safetensors", tensors, metadata))
    assert file.needs_weights and file.layers.keys() == shifts.keys()
    for name, w in (("conv_in", weight), ("text_encoder.norm", norm)):
        torch.testing.assert_close(file.layers[name].delta(w), shifts[name].delta(w))
        assert file.layers[name].base_model == "x/y"
        with pytest.raises(KroneckerError, match=name):
            file.layers[name].delta(w + 1)
    others = read_adapter(
        saved(tmp_path / "b.safetensors", {"conv_in.delta": torch.zeros(4), "n.delta": torch.ones(1)})
    )
    others.layers["conv_in"].delta(matrix(6, 4, seed=9))  # nothing says whose
    assert others.layers["n"].misfit((320,)) is None


VALID = {"norms": "elementwise", "origin": json.dumps({"a": ["0" * 16, 1.0, 2, 3.0, 4.0]})}


@pytest.mark.parametrize(
    "tensors, metadata, expected",
    [
        ({"a.delta": torch.zeros(2, 2)}, {}, "a"),
        ({"a.delta": torch.zeros(0)}, {}, "a"),
        ({"a.delta": torch.zeros(2, dtype=torch.int32)}, {}, "a"),
        ({"a.delta": torch.tensor([1.0, float("nan")])}, {}, "finite"),
        ({"a.delta": torch.zeros(2)}, VALID | {"norms": "other"}, "norms"),
        ({"a.delta": torch.zeros(2)}, VALID | {"origin": "["}, "origin"),
        ({"a.delta": torch.zeros(2)}, VALID | {"origin": "{}"}, "origin"),
        ({"a.delta": torch.zeros(2)}, VALID | {"origin": '{"a": ["00"]}'}, "origin"),
        ({"a.delta": torch.zeros(2)}, VALID | {"origin": '{"a": ["0000000000000000", 1, 2, 3, "4"]}'}, "origin"),
        ({"a.delta": torch.zeros(2)}, VALID | {"origin": '{"a": 3}'}, "origin"),
    ],
)
def test_files_that_cannot_be_right_are_refused(tmp_path, tensors, metadata, expected):
    with pytest.raises(KroneckerError, match=expected):
        read_adapter(saved(tmp_path / "a.safetensors", tensors, metadata))


def test_a_file_without_the_fingerprint_of_a_matrix_is_refused(tmp_path):
    weight = matrix(6, 4)
    metadata = origin_metadata({"a": Origin(digest(weight), ())})
    shift = read_adapter(saved(tmp_path / "a.safetensors", {"a.delta": matrix(4)}, metadata)).layers["a"]
    with pytest.raises(KroneckerError, match="origin"):
        shift.delta(weight)
