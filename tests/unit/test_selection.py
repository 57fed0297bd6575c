"""Which layers are adapted, with which factors and rates, and how large their changes may become."""

import re

import pytest
import torch

import train_dreambooth_kronecker
from dreambooth.errors import UserError
from dreambooth.families.sd import SD
from dreambooth.kronecker import KRONECKER, limit_norms
from dreambooth.method import Host
from dreambooth.options.checking import check_options
from kron_adapter import KroneckerError, inject_kronecker, kronecker_layers, load_kronecker, save_kronecker
from kron_formats.names import linear_modules, match_selection
from kron_formats.reading import read_adapter
from tests.adapters import dense_weights, perturb, plain_pipeline
from tests.conftest import WEIGHTS, assert_same, factors
from train_dreambooth_kronecker import Config

NAME = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"


@pytest.mark.parametrize(
    "selection, meets",
    [
        ("to_out.0", True),
        ("attn2.to_out.0", True),
        ("attn2", True),
        ("up_blocks.1", True),
        (NAME, True),
        ("attn1", False),
        ("blocks.1", False),  # half a word
        ("up_blocks.11", False),
        ("up_blocks.0", False),
        ("re:up_blocks.*attn[12].*", True),
        ("re:attn2", False),  # not the whole name
    ],
)
def test_a_selection_is_whole_words_or_an_expression_for_the_whole_name(selection, meets):
    assert match_selection(NAME, [selection]) == (selection if meets else None)


def test_of_several_the_longest_counts():
    assert match_selection(NAME, ["to_out.0", "up_blocks.1", "attn2"]) == "up_blocks.1"
    assert match_selection(NAME, []) is None


def test_what_is_no_regular_expression_is_refused():
    with pytest.raises(KroneckerError, match=re.escape("re:up_blocks(")):
        inject_kronecker(plain_pipeline("sd").unet, 2, 8, ["re:up_blocks("])


@pytest.mark.parametrize(
    "targets", [["mid_block"], ["attn2", "ff"], ["re:.*attn1.to_[qk]"], ["up_blocks", "attn1.to_q"]]
)
def test_every_layer_in_a_module_is_adapted_and_the_file_loads(targets, tmp_path):
    pipeline = plain_pipeline("sd")
    names = [name for _, name, _ in linear_modules(pipeline.unet)]
    layers = inject_kronecker(pipeline.unet, 1, 2, targets)
    words = [target for target in targets if not target.startswith("re:")]
    expected = {name for name in names if any(f".{word}." in f".{name}." for word in words)}
    expected |= {name for name in names if targets[0].startswith("re:") and re.fullmatch(r".*attn1\.to_[qk]", name)}
    assert set(layers) == expected and expected
    perturb(layers, 0.05)
    save_kronecker(pipeline, tmp_path / "dog.safetensors")
    assert set(read_adapter(tmp_path / "dog.safetensors").layout.targets) <= {"attn1.to_q"}  # ends of names alone
    fresh = plain_pipeline("sd")
    load_kronecker(fresh, tmp_path / "dog.safetensors")
    ours, theirs = dense_weights(pipeline), dense_weights(fresh)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def attach(**options):
    required = {"pretrained_model_name_or_path": "base", "instance_data_dir": "photos", "instance_prompt": "sks dog"}
    config = Config(**{**required, "kron_a1": 2, "kron_a2": 8, **options})
    check_options(config)
    return KRONECKER.attach(Host(SD, {"unet": plain_pipeline("sd").unet}, {}), config)


def test_factors_by_module():
    layers = attach(kron_factors=["mid_block=1,d_in", "attn2.to_k=4,4"]).layers["unet"]
    for name, layer in layers.items():
        expected = (4, 4) if "attn2.to_k" in name else (1, layer.in_features) if "mid_block" in name else (2, 8)
        assert tuple(layer.A.shape) == expected


def test_rates_by_module():
    attached = attach(kron_lr=["attn2=0.02", "attn2.to_k=0.03"], learning_rate=0.01)
    rate_of = {id(factor): group.learning_rate for group in attached.groups for factor in group.parameters}
    assert len(rate_of) == sum(len(group.parameters) for group in attached.groups)
    for name, layer in attached.layers["unet"].items():
        expected = 0.03 if "attn2.to_k" in name else 0.02 if "attn2" in name else 0.01
        assert rate_of[id(layer.A)] == rate_of[id(layer.B)] == expected
    assert [group.title for group in attached.groups] == ["UNet", "UNet, attn2", "UNet, attn2.to_k"]
    (only,) = attach(kron_lr=["attn2=0.5"], kron_targets=["attn2"]).groups  # none is left at the default
    assert only.learning_rate == 0.5


@pytest.mark.parametrize(
    "options, words",
    [
        ({"kron_lr": ["attn3=0.1"]}, "--kron_lr attn3"),
        ({"kron_lr": ["attn2"]}, "--kron_lr attn2: write"),
        ({"kron_lr": ["attn2=fast"]}, "--kron_lr attn2=fast"),
        ({"kron_lr": ["attn2=-1"]}, "--kron_lr attn2=-1"),
        ({"kron_lr": ["attn2=1", "attn2=2"]}, "attn2 has a value already"),
        ({"kron_lr": ["attn2=1"], "optimizer": "prodigy"}, "--kron_lr"),
        ({"scale_weight_norms": 1.0, "optimizer": "ScheduleFreeAdamW"}, "--scale_weight_norms"),
        ({"scale_weight_norms": 0.0}, "--scale_weight_norms"),
    ],
)
def test_what_has_no_meaning_is_refused_by_its_flag(options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        attach(**options)


def test_only_changes_that_are_too_large_are_scaled_down_and_both_factors_alike():
    unet = plain_pipeline("sd").unet
    layers = list(inject_kronecker(unet, 4, 8, ["to_q", "to_k"]).values())
    torch.manual_seed(0)
    for number, layer in enumerate(layers):
        torch.nn.init.normal_(layer.B, std=0.001 * (number + 1))
    layers[0].B.data.zero_()
    before = [(layer.delta_weight.norm(), layer.A.detach().clone(), layer.B.detach().clone()) for layer in layers]
    largest = sorted(norm.item() for norm, _, _ in before)[len(layers) // 2]
    limit_norms(layers, largest)
    for layer, (norm, A, B) in zip(layers, before):
        if norm <= largest:
            assert torch.equal(layer.A, A) and torch.equal(layer.B, B)
        else:
            torch.testing.assert_close(layer.delta_weight.norm().item(), largest)
            torch.testing.assert_close(layer.A / A, (largest / norm).sqrt().expand_as(A))
    assert any(norm > largest for norm, _, _ in before)


def test_a_run_with_rates_and_a_limit_resumes_exactly(options, run_main, tmp_path):
    given = {**options, "kron_a1": 2, "kron_a2": 8, "learning_rate": 0.5, "checkpointing_steps": 2}
    given |= {"kron_lr": ["attn1=0"], "scale_weight_norms": 0.01}
    run_main(train_dreambooth_kronecker, **given)
    cut = {**given, "output_dir": tmp_path / "cut"}
    run_main(train_dreambooth_kronecker, **{**cut, "max_train_steps": 2})
    run_main(train_dreambooth_kronecker, **{**cut, "resume_from_checkpoint": "latest"})
    whole = factors(options["output_dir"])
    assert_same(whole, factors(tmp_path / "cut"))
    pipeline = plain_pipeline("sd")
    load_kronecker(pipeline, options["output_dir"] / WEIGHTS)
    norms = {path: layer.delta_weight.norm().item() for path, layer in kronecker_layers(pipeline.unet).items()}
    assert max(norms.values()) <= 0.01 * (1 + 1e-5)
    assert all(norm == 0 for path, norm in norms.items() if "attn1" in path)
    assert all(norm > 0 for path, norm in norms.items() if "attn2" in path)
