"""The parameter counts that the documentation states, from the public architectures and the real injection."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from kron_adapter import KroneckerLinear
from scripts.count_parameters import (
    ROOT,
    Kronecker,
    Lora,
    adapted_layers,
    load_architecture,
    load_models,
    main,
    parameter_table,
    rank_table,
)

UNET_ROWS = ["SD 1.5 UNet", "SD 2.1 UNet", "SDXL UNet"]


@pytest.fixture(scope="module")
def models():
    return load_models()


def run(*arguments, cwd):
    command = [sys.executable, str(ROOT / "scripts" / "count_parameters.py"), *arguments]
    return subprocess.run(command, check=False, cwd=cwd, capture_output=True, text=True, timeout=120)


def cells(table):
    """{(row, column): cell} of a Markdown table."""
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {(row[0], title): cell for row in rows for title, cell in zip(header[1:], row[1:])}


@pytest.mark.parametrize(
    "file, weights",
    [
        ("sd15", {"unet": 859_520_964, "text_encoder": 123_060_480}),
        ("sd21", {"unet": 865_910_724, "text_encoder": 340_387_840}),
        ("sdxl", {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}),
    ],
)
def test_architectures_have_as_many_weights_as_the_published_models(file, weights):
    components = load_architecture(file)
    assert {name: sum(weight.numel() for weight in model.parameters()) for name, model in components.items()} == weights
    assert all(weight.is_meta for model in components.values() for weight in model.parameters())


@pytest.mark.parametrize(
    "name, layers",
    [
        ("SD 1.5 UNet", 128),
        ("SD 1.5 UNet + text encoder", 128 + 48),
        ("SD 2.1 UNet", 128),
        ("SD 2.1 UNet + text encoder", 128 + 92),
        ("SDXL UNet", 560),
        ("SDXL UNet + text encoders", 560 + 48 + 128),
    ],
)
def test_every_attention_projection_is_adapted(models, name, layers):
    assert len(adapted_layers(models[name])) == layers


@pytest.mark.parametrize(
    "adapter, sd15, sd21, sdxl",
    [
        (Kronecker(4, 64), 398_048, 423_008, 3_874_560),
        (Kronecker(16, 16), 398_048, 423_008, 3_874_560),
        (Kronecker(8, 64), 248_176, 260_656, 2_152_320),
        (Kronecker(64, 8), 248_176, 260_656, 2_152_320),
        (Lora(4), 797_184, 829_952, 5_806_080),
    ],
    ids=str,
)
def test_parameters_of_the_unets(models, adapter, sd15, sd21, sdxl):
    assert [adapter.count(*models[name]) for name in UNET_ROWS] == [sd15, sd21, sdxl]


@pytest.mark.parametrize("adapter, parameters", [(Kronecker(4, 64), 520_928), (Lora(4), 1_092_096)], ids=str)
def test_parameters_of_sd15_with_its_text_encoder(models, adapter, parameters):
    assert sum(adapter.count(model) for model in models["SD 1.5 UNet + text encoder"]) == parameters


def test_the_paper_s_99_947_percent_fewer(models):
    unet, text_encoder = models["SD 1.5 UNet + text encoder"]
    all_weights = sum(weight.numel() for model in (unet, text_encoder) for weight in model.parameters())
    trained = Kronecker(4, 64).count(unet) + Kronecker(4, 64).count(text_encoder)
    assert f"{1 - trained / all_weights:.3%}" == "99.947%"


def test_lora_trains_r_times_both_sizes_of_the_layers_that_kronecker_adapts(models):
    layers = adapted_layers(models["SDXL UNet"])
    formula = sum(4 * (layer.in_features + layer.out_features) for layer in layers)
    assert sum(Lora(4).count(model) for model in models["SDXL UNet"]) == formula


@pytest.mark.parametrize("adapter", [Kronecker(4, 64), Lora(4)], ids=str)
def test_counting_leaves_the_layers_as_they_were(models, adapter):
    (unet,) = models["SD 1.5 UNet"]
    modules = dict(unet.named_modules())
    adapter.count(unet)
    assert dict(unet.named_modules()) == modules
    assert not any(isinstance(module, KroneckerLinear) for module in modules.values())


@pytest.mark.parametrize("a1, a2", [(4, 64), (16, 16), (8, 64), (64, 8)])
@pytest.mark.parametrize("d_in, d_out", [(320, 320), (768, 320)])
def test_largest_rank_is_the_rank_of_a_random_delta(a1, a2, d_in, d_out):
    torch.manual_seed(0)
    layer = KroneckerLinear(nn.Linear(d_in, d_out, bias=False), a1, a2)
    nn.init.normal_(layer.B)
    assert Kronecker(a1, a2).rank(d_in, d_out) == torch.linalg.matrix_rank(layer.delta_weight, rtol=1e-5)


def test_a_pair_that_fits_one_model_only_says_so_in_the_others(models):
    table = cells(parameter_table(models, [Kronecker(4, 128), Kronecker(4, 64)]))
    fits = {name for name in models if table[name, "Kronecker (4, 128)"] != "does not fit"}
    assert fits == {"SDXL UNet", "SDXL UNet + text encoders"}
    assert table["SD 1.5 UNet", "Kronecker (4, 64)"] == "398,048 (1.52 MiB)"
    ranks = cells(rank_table(models, [Kronecker(4, 128)]))
    assert ranks["320 -> 320", "Kronecker (4, 128)"] == "does not fit"
    assert ranks["2048 -> 1280", "Kronecker (4, 128)"] == "64"  # min(4, 128) · min(320, 16)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--kron_a1", "4", "8", "--kron_a2", "64"], "--kron_a1 and --kron_a2 pair up, but have 2 and 1 values"),
        (["--kron_a1", "0", "--kron_a2", "4"], "argument --kron_a1: 0 is not 1 or more"),
        (["--lora_rank", "0"], "argument --lora_rank: 0 is not 1 or more"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert words in capsys.readouterr().err


def test_the_program_prints_both_tables_from_anywhere(tmp_path):
    result = run(cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    parameters, ranks = map(cells, result.stdout.strip().split("\n\n"))
    assert parameters["SDXL UNet", "layers"] == "560"
    assert parameters["SDXL UNet", "Kronecker (4, 64)"] == "3,874,560 (14.78 MiB)"
    assert parameters["SDXL UNet", "LoRA r=4"] == "5,806,080 (22.15 MiB)"
    assert parameters["SD 1.5 UNet + text encoder", "Kronecker (16, 16)"] == "520,928 (1.99 MiB)"
    assert ranks["1280 -> 1280", "Kronecker (4, 64)"] == "80" and ranks["1280 -> 1280", "LoRA r=4"] == "4"
    assert not list(tmp_path.iterdir())


def test_factors_that_fit_no_model_end_in_one_readable_line(tmp_path):
    result = run("--kron_a1", "7", "--kron_a2", "64", cwd=tmp_path)
    assert result.returncode == 2 and not result.stdout
    assert "error: Kronecker (7, 64) fits none of the models; SD 1.5 UNet: layer down_blocks.0" in result.stderr
    assert "a1 = 7 does not divide d_out = 320 (nearest that do: 5 and 8)" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_documented_table_is_this_program_s_output(models):
    adapters = [Kronecker(4, 64), Kronecker(16, 16), Kronecker(8, 64), Kronecker(64, 8), Lora(4)]
    assert parameter_table(models, adapters) in (ROOT / "docs" / "adapter.md").read_text()
