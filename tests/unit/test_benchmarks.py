"""The benchmarks' own arithmetic: contenders are what their names say, and ratios are taken round by round."""

import argparse
import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks import methods_step, prior, public_scripts, unet_step
from benchmarks.layer import Layer
from benchmarks.peers import FROZEN, PEERS, adapt, choose_peers
from benchmarks.runs import RunFailed
from benchmarks.timing import interleave, ratios, spread
from dreambooth.errors import UserError
from dreambooth.options.parsing import parse_options
from scripts.count_parameters import kronecker, lora, others
from tests.conftest import ROOT
from tests.unit.test_recipes import options_of
from toyworld.tiny_pipeline import build_pipeline, build_tokenizer

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


# ---- methods ----


def arguments_for(architecture, **given):
    defaults = {"architecture": architecture, "device": "cpu", "dtype": "fp32", "latents": 8, "batch": 1}
    return argparse.Namespace(**defaults, train_text_encoder=False, **given)


def tiny_models(kind):
    pipeline = build_pipeline(kind)
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipeline, name).requires_grad_(False) for name in names if hasattr(pipeline, name)}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_step_of_every_method_changes_what_trains_and_nothing_frozen(kind):
    base = tiny_models(kind)
    for contender in (kronecker(2, 32), lora(4), *others()):
        step, parameters = methods_step.method_step(
            contender, base, arguments_for("sdxl" if kind == "sdxl" else "tiny")
        )
        frozen = base["unet"].conv_in.bias.clone()
        step()
        assert parameters > 0
        assert not any(parameter.requires_grad for model in base.values() for parameter in model.parameters())
        assert contender.method == "dreambooth" or torch.equal(base["unet"].conv_in.bias, frozen)


def test_copies_have_their_own_parameters_on_the_same_memory():
    base = tiny_models("sd")
    copies = methods_step.shared(base)
    own, other = copies["unet"].conv_in.weight, base["unet"].conv_in.weight
    assert own is not other and own.data_ptr() == other.data_ptr()
    own.requires_grad_(True)
    assert not other.requires_grad


# ---- public implementations ----


def test_a_step_s_time_is_what_more_steps_take_longer(monkeypatch, tmp_path):
    costs = {10: (8.0, 7.0, 500.0), 110: (18.0, 12.0, 600.0)}  # wall s, processor s, MiB
    monkeypatch.setattr(public_scripts, "run", lambda command, steps, folder: costs[steps])
    for clock, expected in {"wall": 100.0, "cpu": 50.0}.items():
        arguments = argparse.Namespace(steps=[10, 110], clock=clock)
        assert public_scripts.step_cost(public_scripts.Command([]), arguments, tmp_path) == (expected, 600.0)


def test_the_error_of_a_script_that_does_not_run_is_told(tmp_path, monkeypatch):
    def run(command, steps, folder):
        if command.words == ["theirs"]:
            raise RunFailed("theirs failed:\n  File x\nImportError: needs 0.14.0,\nCalledProcessError: Command x")
        return float(steps), float(steps), 1.0

    monkeypatch.setattr(public_scripts, "run", run)
    sides = {side: public_scripts.Command([side]) for side in ("ours", "theirs")}
    arguments = argparse.Namespace(steps=[1, 2], clock="wall", rounds=2)
    found, failed = public_scripts.compare(sides, arguments, tmp_path)
    assert found == {"ours": [(1000.0, 1.0)] * 2} and failed == {"theirs": "ImportError: needs 0.14.0,"}
    row = public_scripts.row("lora", found, failed)
    assert row == ["lora", "1000.0 (1000.0 to 1000.0)", "does not run", "", "1 (1 to 1)", ""]


def test_a_checkout_that_is_missing_is_named(tmp_path):
    arguments = argparse.Namespace(peers_dir=tmp_path, resolution=64, instance_data_dir=tmp_path)
    with pytest.raises(UserError, match="--peers_dir .*svdiff-pytorch/train_svdiff.py"):
        public_scripts.their_command(public_scripts.PAIRS["svdiff"], tmp_path, arguments)


def test_both_copies_of_the_base_model_are_fp32_and_one_has_the_old_layout(tiny_sd, tmp_path):
    today, old = public_scripts.prepare_base_models(tiny_sd, tmp_path)
    for folder, name in {today: "to_q", old: "query"}.items():
        weights = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
        assert f"decoder.mid_block.attentions.0.{name}.weight" in weights
        assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert json.loads((old / "tokenizer" / "vocab.json").read_text()) == build_tokenizer().get_vocab()
    assert (old / "tokenizer" / "merges.txt").read_text() == "#version: 0.2\n"


@pytest.mark.parametrize("adapter, source", prior.WAYS)
def test_each_prior_is_an_ordinary_training(adapter, source, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["prior.py", "--mixed_precision", "bf16"])
    words = prior.command(adapter, source, tmp_path, prior.parse()).words
    at = words.index("bf16") + 1
    options, flags = options_of(words[at].removeprefix(f"{ROOT}/"), words[at + 1 :])
    config = parse_options(options, "", [*flags, "--output_dir", str(tmp_path / "result")])
    assert config.with_prior_preservation is (source != "nothing")
    assert config.uses_class_images is (source == "class images")
    assert (getattr(config, "kron_init", None) == "contrast") is adapter.startswith("contrast")
