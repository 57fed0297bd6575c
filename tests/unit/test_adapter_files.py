"""Adapter files: what is written, that it comes back bit for bit, and that nothing else is taken for one."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from kron_adapter import (
    KroneckerError,
    inject_kronecker,
    kronecker_layers,
    kronecker_parameters,
    load_kronecker,
    merge_kronecker,
    remove_kronecker,
    save_kronecker,
)


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.to_q = nn.Linear(size, size, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(size, size)])

    def forward(self, x):
        return self.to_out[0](torch.tanh(self.to_q(x)))


class Model(nn.Module):
    def __init__(self, size=24, blocks=2):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(size) for _ in range(blocks)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


TARGETS = ("to_q", "to_out.0")


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(3, 24)


@pytest.fixture
def trained():
    """A model with adapters that have moved, and have a gain."""
    model = Model()
    inject_kronecker(model, 4, 8, TARGETS, factors={"to_out.0": (2, 4)})
    for parameter in kronecker_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def path(trained, tmp_path):
    save_kronecker(trained, tmp_path / "adapter.safetensors", {"step": "7"})
    return tmp_path / "adapter.safetensors"


def test_the_file_holds_two_factors_and_an_alpha_per_layer(trained, path):
    tensors = load_file(path)
    names = [f"lora_unet_blocks_{i}_{layer}" for i in (0, 1) for layer in ("to_q", "to_out_0")]
    assert set(tensors) == {f"{name}.{part}" for name in names for part in ("lokr_w1", "lokr_w2", "alpha")}
    layer = trained.blocks[0].to_q
    product = torch.kron(tensors["lora_unet_blocks_0_to_q.lokr_w1"], tensors["lora_unet_blocks_0_to_q.lokr_w2"])
    assert torch.equal(product, layer.delta_weight)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert all(tensor.item() == 1 for name, tensor in tensors.items() if name.endswith("alpha"))


def test_the_metadata_says_what_the_file_is(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["kronecker.format_version"] == "1" and metadata["kronecker.step"] == "7"
    assert json.loads(metadata["kronecker.targets"]) == ["to_out.0", "to_q"]
    assert json.loads(metadata["kronecker.factors"])["lora_unet_blocks_1_to_out_0"] == [2, 4]
    assert "kronecker.a1" not in metadata


def test_one_pair_of_factors_is_told_once(tmp_path):
    model = Model()
    inject_kronecker(model, 4, 8, TARGETS)
    save_kronecker(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["kronecker.a1"], metadata["kronecker.a2"]) == ("4", "8") and "kronecker.factors" not in metadata


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_file_to_model_gives_the_same_output_bit_for_bit(trained, path, x, dtype):
    model = Model().to(dtype)
    trained = trained.to(dtype)
    for parameter in kronecker_parameters(trained):
        parameter.data = parameter.data.float()
    save_kronecker(trained, path)
    state = torch.get_rng_state()
    load_kronecker(model, path)
    assert torch.equal(torch.get_rng_state(), state), "loading draws no random numbers"
    assert torch.equal(model(x.to(dtype)), trained(x.to(dtype)))


def test_loading_returns_our_metadata_and_takes_a_scale(trained, path, x):
    base, model = Model(), Model()
    metadata = load_kronecker(model, path, scale=0.0)
    assert metadata["step"] == "7"
    torch.testing.assert_close(model(x), base(x))


def test_saving_again_what_was_loaded_gives_the_same_tensors_and_targets(path, tmp_path):
    model = Model()
    load_kronecker(model, path)
    save_kronecker(model, tmp_path / "again.safetensors")
    first, second = load_file(path), load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    with safe_open(tmp_path / "again.safetensors", "pt") as file:
        assert json.loads(file.metadata()["kronecker.targets"]) == ["to_out.0", "to_q"]


def test_several_models_share_a_file(tmp_path, x):
    models = {"unet": Model(), "text_encoder": Model(blocks=1)}
    for model in models.values():
        inject_kronecker(model, 4, 8, TARGETS)
        nn.init.normal_(model.blocks[0].to_q.B)
    save_kronecker(models, tmp_path / "both.safetensors")
    again = {"unet": Model(), "text_encoder": Model(blocks=1)}
    load_kronecker(again, tmp_path / "both.safetensors")
    for name in models:
        assert torch.equal(again[name](x), models[name](x))
    with pytest.raises(KroneckerError, match=r"2 not in the model \(lora_te_blocks_0_to_out_0"):
        load_kronecker(Model(), tmp_path / "both.safetensors")


def test_a_failed_save_leaves_the_earlier_file(trained, path, monkeypatch):
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("kron_formats.writing.save_file", fail)
    with pytest.raises(OSError):
        save_kronecker(trained, path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_there_must_be_something_to_save(tmp_path):
    with pytest.raises(KroneckerError, match="no Kronecker adapters to save"):
        save_kronecker(Model(), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


# ---- what does not fit ----


def refused(path, words, model=None):
    model = model or Model()
    with pytest.raises(KroneckerError, match=words):
        load_kronecker(model, path)
    assert not kronecker_layers(model)


def test_a_file_for_another_model_is_refused(path):
    refused(path, r"lora_unet_blocks_0_to_q holds factors for 24 to 24 features, the model's layer maps 48", Model(48))
    refused(path, r"2 not in the model \(lora_unet_blocks_1_to_out_0", Model(blocks=1))
    refused(path, r"2 missing \(lora_unet_blocks_2_to_out_0", Model(blocks=3))


@pytest.mark.parametrize(
    "keys, words",
    [
        (["lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"], "it is a LoRA; .*load_lora_weights"),
        (["unet.blocks.0.to_q.lora_A.weight"], "it is a LoRA file"),
        (["lora_unet_x.hada_w1_a"], "it is a LoHa file"),
        (["lora_unet_x.lokr_t2", "lora_unet_x.lokr_w2"], "factors of convolutions"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a whole Stable Diffusion checkpoint"),
        (["down_blocks.0.attentions.0.norm.weight"], "a UNet's own weights"),
        (["something.else"], "its 1 tensors have other names, for example something.else"),
    ],
)
def test_a_file_that_is_no_kronecker_adapter_is_called_by_its_name(keys, words, tmp_path):
    save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", f"(is not a Kronecker|cannot be used as an) adapter: .*{words}")


def test_damaged_and_absent_files_are_refused(path, tmp_path):
    refused(tmp_path / "nowhere.safetensors", "there is no adapter file")
    for content in (b"", b"not safetensors at all", path.read_bytes()[:200], path.read_bytes()[:-10]):
        (tmp_path / "damaged.safetensors").write_bytes(content)
        refused(tmp_path / "damaged.safetensors", "is not a readable safetensors file")


@pytest.mark.parametrize(
    "name, tensor, words",
    [
        ("lokr_w1", torch.full((4, 8), float("nan")), "lora_unet_blocks_0_to_q.lokr_w1: its values are not all finite"),
        ("lokr_w1", torch.zeros(4, 8, 1, 1), r"lokr_w1 is of the shape \(4, 8, 1, 1\)"),
        ("lokr_w1", torch.zeros(8, 4), "holds factors for 12 to 48 features"),
        ("lokr_w2", None, "does not hold two full factors"),
    ],
)
def test_factors_that_cannot_be_right_are_refused(path, name, tensor, words):
    tensors = load_file(path)
    tensors[f"lora_unet_blocks_0_to_q.{name}"] = tensor
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    refused(path, words)


def test_a_model_with_adapters_takes_no_second_ones(trained, path):
    with pytest.raises(KroneckerError, match="remove_kronecker first"):
        load_kronecker(trained, path)


def test_loaded_adapters_merge_as_trained_ones_do(trained, path, x):
    model = Model()
    load_kronecker(model, path)
    merge_kronecker(model)
    remove_kronecker(model)
    torch.testing.assert_close(model(x), trained(x))
