"""The benchmarks' own arithmetic: contenders are what their names say, and ratios are taken round by round."""

import importlib.util

import pytest
import torch
from torch import nn

from benchmarks import unet_step
from benchmarks.layer import Layer
from benchmarks.peers import FROZEN, PEERS, adapt, choose_peers
from benchmarks.timing import interleave, ratios, spread

NO_LYCORIS = not importlib.util.find_spec("lycoris")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Layer(256, torch.device("cpu"), torch.float32)


def test_rounds_are_whole_and_warm_up_does_not_count():
    calls = []
    ways = {name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}
    found = interleave(ways, rounds=4, warm_up=2)
    assert all(sorted(calls[i : i + 3]) == ["a", "b", "c"] for i in range(0, 18, 3))
    assert sorted(sum(found.values(), [])) == list(range(7, 19))


def test_a_ratio_is_taken_round_by_round():
    assert spread(ratios([1, 30, 2], [1, 10, 100])) == "1.00 (0.51 to 2.00)"  # the medians' ratio would be 0.2


def without(names, prefix):
    return [name for name in names if not name.startswith(prefix)]


@pytest.mark.parametrize("peer", without(PEERS, FROZEN))
def test_every_peer_changes_the_output_and_trains_what_it_says(layer, peer):
    if peer.startswith("LyCORIS") and NO_LYCORIS:
        pytest.skip("LyCORIS is not installed")
    x = torch.randn(2, 5, 256)
    before = layer(x)
    parameters = adapt(layer, peer)
    layer(x).sum().backward()
    assert not torch.allclose(layer(x), before)
    assert all(parameter.grad.abs().sum() > 0 for parameter in parameters)
    square = 16 * 16 + 16 * 16  # what (16, 16) trains of a 256 x 256 layer
    expected = {"PEFT LoRA r=4": 2 * 4 * 256, "Kronecker (4, 64)": 256 + 256, "Kronecker (8, 64)": 512 + 128}
    numbers = [parameter.numel() for parameter in parameters if parameter.numel() > 1]  # LyCORIS' scalar apart
    if "LoKr" in peer or peer in expected:
        assert sum(numbers) == expected.get(peer, square)


def test_the_reference_formula_is_the_kronecker_product_with_rows_in_the_paper_s_order(layer):
    weight = layer.to_q.weight
    A, B = adapt(layer, "reference formula (64, 8)")  # A (8, 64), B (4, 32)
    x = torch.randn(3, 256)
    delta = torch.kron(A.T.contiguous(), B).reshape(64, 4, 256).transpose(0, 1).reshape(256, 256)
    torch.testing.assert_close(layer(x), x @ (weight + delta).T, rtol=1e-4, atol=1e-4)


def test_the_bound_trains_one_number_and_reaches_the_first_projection():
    model = nn.Sequential(*(Layer(8, torch.device("cpu"), torch.float32) for _ in range(3)))
    (shift,) = adapt(model, FROZEN)
    model(torch.randn(2, 8)).sum().backward()
    assert shift.numel() == 1 and shift.grad and shift is model[0].to_q.shift


def test_peers_whose_package_is_missing_are_left_out_and_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_peers(list(PEERS)) == without(PEERS, "LyCORIS")
    assert "LyCORIS is not installed" in capsys.readouterr().out


def test_saved_bytes_count_each_storage_once_and_no_parameter(layer):
    layer.requires_grad_(False)
    scale = nn.Parameter(torch.ones(()))

    def step():
        x = torch.randn(4, 256) * scale  # kept: the first 4 x 256 values, for the scale's gradient
        y = layer(x)  # keeps the weight alone
        (y.view(2, -1) * y.view(2, -1)).sum().backward()  # keeps y, twice

    assert unet_step.saved_bytes(step, layer) == 2 * 4 * 256 * 4
