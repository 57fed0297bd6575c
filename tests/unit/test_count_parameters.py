"""The parameter counts that the documentation states, from the public architectures and the real injection."""

import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from kron_adapter import KroneckerError, KroneckerLinear
from methods.train import METHODS
from scripts.count_parameters import (
    CROSSATTN,
    CUSTOM_DIFFUSION,
    DREAMBOOTH,
    KV_ALONE,
    KV_APART,
    ROOT,
    SVDIFF,
    TEXTUAL_INVERSION,
    adapted_layers,
    all_places,
    count,
    count_table,
    kronecker,
    load_architecture,
    lora,
    main,
    others,
    rank_table,
)

PLACES = {place.title: place for place in all_places()}
SD15, SDXL = "SD 1.5 UNet + text encoder", "SDXL UNet"


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
def test_every_attention_projection_is_adapted(name, layers):
    assert len(adapted_layers(PLACES[name].models())) == layers


@pytest.mark.parametrize(
    "adapter, sd15, sd21, sdxl",
    [
        (kronecker(4, 64), 398_048, 423_008, 3_874_560),
        (kronecker(16, 16), 398_048, 423_008, 3_874_560),
        (kronecker(8, 64), 248_176, 260_656, 2_152_320),
        (kronecker(64, 8), 248_176, 260_656, 2_152_320),
        (kronecker(1, "d_in"), 199_296, 207_488, 1_451_520),
        (KV_APART, 364_512, 372_704, 2_960_640),
        (KV_ALONE, 49_536, 57_728, 453_120),
        (lora(4), 797_184, 829_952, 5_806_080),
    ],
    ids=str,
)
def test_parameters_of_the_unets(adapter, sd15, sd21, sdxl):
    unets = [PLACES[name] for name in ("SD 1.5 UNet", "SD 2.1 UNet", "SDXL UNet")]
    assert [count(adapter, place) for place in unets] == [sd15, sd21, sdxl]


@pytest.mark.parametrize(
    "contender, unet, with_text",
    [
        (kronecker(4, 64), 398_048, 520_928),
        (lora(4), 797_184, 1_092_096),
        (SVDIFF, 322_856, 397_352),
        (CUSTOM_DIFFUSION, 19_169_280, 19_170_048),
        (CROSSATTN, 43_962_560, 43_963_328),
        (TEXTUAL_INVERSION, 0, 768),
        (DREAMBOOTH, 859_520_964, 982_581_444),
    ],
    ids=str,
)
def test_parameters_of_sd15_alone_and_with_its_text_encoder(contender, unet, with_text):
    if contender.method not in ("kronecker", *METHODS):
        pytest.skip("is not in METHODS")
    assert (count(contender, PLACES["SD 1.5 UNet"]), count(contender, PLACES[SD15])) == (unet, with_text)


def test_the_paper_s_99_947_percent_fewer():
    all_weights = sum(weight.numel() for model in PLACES[SD15].models() for weight in model.parameters())
    assert f"{1 - count(kronecker(4, 64), PLACES[SD15]) / all_weights:.3%}" == "99.947%"


def test_lora_trains_r_times_both_sizes_of_the_layers_that_kronecker_adapts():
    layers = adapted_layers(PLACES[SDXL].models())
    assert count(lora(4), PLACES[SDXL]) == sum(4 * (layer.in_features + layer.out_features) for layer in layers)


def test_every_method_is_counted_once_for_each_way_to_train_it():
    assert {contender.method for contender in others()} == METHODS.keys() - {"lora"}
    assert len({str(contender) for contender in others()}) == len(others())


@pytest.mark.parametrize("a1, a2", [(4, 64), (16, 16), (8, 64), (64, 8), (1, "d_in"), ("d_out/8", "d_in/4")])
@pytest.mark.parametrize("d_in, d_out", [(320, 320), (768, 320)])
def test_largest_rank_is_the_rank_of_a_random_delta(a1, a2, d_in, d_out):
    torch.manual_seed(0)
    layer = KroneckerLinear(nn.Linear(d_in, d_out, bias=False), a1, a2)
    nn.init.normal_(layer.B)
    assert kronecker(a1, a2).rank(d_in, d_out) == torch.linalg.matrix_rank(layer.delta_weight, rtol=1e-5)


def test_a_pair_that_fits_one_model_only_says_so_in_the_others():
    table = cells(count_table("trained parameters", "{:,}".format, [kronecker(4, 128), kronecker(4, 64)]))
    fits = {name for name in PLACES if table["Kronecker (4, 128)", name] != "does not fit"}
    assert fits == {"SDXL UNet", "SDXL UNet + text encoders"}
    assert table["Kronecker (4, 64)", "SD 1.5 UNet"] == "398,048"
    ranks = cells(rank_table([kronecker(4, 128)]))
    assert ranks["320 -> 320", "Kronecker (4, 128)"] == "does not fit"
    assert ranks["2048 -> 1280", "Kronecker (4, 128)"] == "64"  # min(4, 128) · min(320, 16)


def test_a_pair_that_fits_the_unet_alone_is_counted_there():
    assert count(kronecker(5, 64), PLACES["SD 1.5 UNet"]) > 0
    with pytest.raises(KroneckerError, match="d_out = 768"):
        count(kronecker(5, 64), PLACES[SD15])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--kron_a1", "4", "8", "--kron_a2", "64"], "--kron_a1 and --kron_a2 pair up, but have 2 and 1 values"),
        (["--kron_a1", "4"], "--kron_a1 and --kron_a2 pair up, but have 1 and 0 values"),
        (["--kron_a1", "0", "--kron_a2", "4"], "argument --kron_a1: 0 is not 1 or more"),
        (["--kron_a1", "d_in", "--kron_a2", "4"], "argument --kron_a1: d_in is not a size for a1"),
        (["--kron_a1", "4", "--kron_a2", "d_in/x"], "argument --kron_a2: d_in/x is not a size for a2"),
        (["--lora_rank", "0"], "argument --lora_rank: 0 is not 1 or more"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert words in capsys.readouterr().err


def test_the_program_prints_its_tables(capsys):
    main([])
    counts, sizes, ranks, models, paper = map(cells, capsys.readouterr().out.strip().split("\n\n"))
    assert models["SDXL UNet", "attention projections"] == "560"
    assert counts["Kronecker (4, 64)", SDXL] == "3,874,560" and sizes["Kronecker (4, 64)", SDXL] == "14.78 MiB"
    assert counts[str(KV_APART), SDXL] == "2,960,640" and sizes[str(KV_ALONE), SDXL] == "1.73 MiB"
    assert counts["LoRA r=4", SDXL] == "5,806,080" and sizes["LoRA r=4", SDXL] == "22.15 MiB"
    assert counts["Kronecker (16, 16)", SD15] == "520,928" and sizes["Kronecker (16, 16)", SD15] == "1.99 MiB"
    assert ranks["1280 -> 1280", "Kronecker (4, 64)"] == "80" and ranks["1280 -> 1280", "LoRA r=4"] == "4"
    assert paper["Table 4, LoRA-DreamBooth, 1.09 M", "counted"] == "1,092,096"
    page = (ROOT / "docs" / "adapter.md").read_text()
    assert documented(page, "trained parameters").items() <= counts.items()
    assert documented(page, "in fp32").items() <= sizes.items()


def documented(page: str, title: str) -> dict:
    """The cells of the table with this first title."""
    table = re.search(rf"^\| {title} .*\n(?:\|.*\n)+", page, re.MULTILINE)
    assert table
    return cells(table[0].strip())


def test_factors_that_fit_no_model_end_in_one_readable_line(tmp_path):
    result = run("--kron_a1", "7", "--kron_a2", "64", cwd=tmp_path)
    assert result.returncode == 2 and not result.stdout
    assert "error: Kronecker (7, 64) fits none of the models; SD 1.5 UNet: layer down_blocks.0" in result.stderr
    assert "a1 = 7 does not divide d_out = 320 (nearest that do: 5 and 8)" in result.stderr
    assert "Traceback" not in result.stderr
