"""Conversions without their clients: the algebra, round trips, the paper's own layout, refusals, inspection."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kron_adapter import (
    KroneckerError,
    attach_to_diffusers,
    kronecker_layers,
    load_kronecker,
    merge_kronecker,
    save_kronecker,
)
from kron_formats.architectures import load_architecture
from kron_formats.changes import Factors, LowRank
from kron_formats.export import dense_bytes, lora_bytes
from kron_formats.lora import kronecker_to_lora, lora_to_kronecker
from kron_formats.names import components, find_layers, match_target
from kron_formats.reading import read_adapter
from scripts import convert
from tests.adapters import (
    KEYS_AND_VALUES,
    adapted_pipeline,
    dense_weights,
    plain_pipeline,
    plain_weights,
    worst_error,
    write_reference_file,
)

EXACT = 2e-8


def factors(a1, a2, b1, b2, transposed_rows=False, seed=0):
    torch.manual_seed(seed)
    return Factors(torch.randn(a1, a2).double(), torch.randn(b1, b2).double(), transposed_rows)


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def run(*arguments):
    convert.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(a1, a2) -> a trained SD pipeline and its file; mixed: the cross-attention's keys and values have (1, d_in)."""
    made = {}

    def get(a1, a2, kind="sd", text=True, mixed=False):
        if (a1, a2, kind, text, mixed) not in made:
            factors = KEYS_AND_VALUES if mixed else None
            pipeline = adapted_pipeline(kind, a1, a2, text=text, strength=0.002, factors=factors)
            path = tmp_path_factory.mktemp("trained") / "native.safetensors"
            save_kronecker(pipeline, path, {"instance_prompt": "a photo of sks dog", "step": "7"})
            made[a1, a2, kind, text, mixed] = pipeline, path
        return made[a1, a2, kind, text, mixed]

    return get


def merged_weights(kind, path):
    """The plain weights after an adapter file was loaded and merged."""
    pipeline = plain_pipeline(kind)
    load_kronecker(pipeline, path)
    merge_kronecker(pipeline)
    return plain_weights(pipeline)


# ---- the algebra ----


@pytest.mark.parametrize(
    "shape", [(4, 16, 8, 2), (16, 4, 2, 8), (6, 6, 5, 5), (1, 3, 7, 2), (8, 1, 2, 9), (1, 24, 40, 1), (40, 1, 1, 24)]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_exact_lora_is_the_product_and_has_its_rank(shape, transposed):
    entry = factors(*shape, transposed)
    lora, error = kronecker_to_lora(entry)
    exact = entry.dense()
    assert lora.down.shape[0] == torch.linalg.matrix_rank(torch.kron(entry.A, entry.B)).item()
    torch.testing.assert_close(lora.dense(), exact, rtol=0, atol=1e-13 * exact.norm().item())
    assert error == 0


def test_zero_and_rank_deficient_factors_have_small_loras():
    full = factors(6, 6, 5, 5)
    thin = Factors(full.A[:, :2] @ full.A[:2], full.B)
    assert kronecker_to_lora(thin)[0].down.shape[0] == 2 * 5
    lora, error = kronecker_to_lora(Factors(full.A, torch.zeros(5, 5)))
    assert lora.down.shape[0] == 1 and not lora.dense().any() and error == 0


@pytest.mark.parametrize("rank", [1, 3, 10, 100])
def test_a_lora_of_lower_rank_is_the_best_one_and_its_error_is_true(rank):
    entry = factors(6, 6, 5, 5)
    exact = entry.dense()
    U, s, Vt = torch.linalg.svd(exact)
    lora, error = kronecker_to_lora(entry, rank)
    torch.testing.assert_close(lora.dense(), (U[:, :rank] * s[:rank]) @ Vt[:rank], rtol=0, atol=1e-12)
    assert error == pytest.approx(((lora.dense() - exact).norm() / exact.norm()).item(), abs=1e-12)


@pytest.mark.parametrize("shape", [(4, 16, 8, 2), (16, 4, 2, 8), (6, 6, 5, 5), (1, 24, 40, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_lora_that_is_a_kronecker_product_comes_back(shape, transposed):
    entry = factors(*shape, transposed)
    lora, _ = kronecker_to_lora(entry)
    again, error = lora_to_kronecker(lora, *shape[:2], transposed)
    assert again.A.shape == entry.A.shape and error < 1e-7
    torch.testing.assert_close(again.dense(), entry.dense(), rtol=0, atol=1e-5)


def test_the_nearest_kronecker_product_of_anything_else_is_nearest():
    torch.manual_seed(0)
    other = LowRank(torch.randn(12, 3), torch.randn(3, 10))
    nearest, error = lora_to_kronecker(other, 4, 5)
    delta = other.dense()
    assert error == pytest.approx(((nearest.dense() - delta).norm() / delta.norm()).item(), rel=1e-4)
    for _ in range(20):  # no small change makes it nearer
        moved = torch.kron(nearest.A + 0.01 * torch.randn(4, 5), nearest.B + 0.01 * torch.randn(3, 2))
        assert (moved - delta).norm() >= (nearest.dense() - delta).norm()


# ---- round trips ----


@pytest.mark.parametrize("way", ["diffusers", "peft"])
def test_square_factors_go_around_bit_for_bit(way, trained, tiny_sd, tmp_path):
    _, path = trained(8, 8)
    base = ("--pretrained_model_name_or_path", tiny_sd)
    there = tmp_path / ("there" if way == "peft" else "there.safetensors")
    run(path, "--to", way, "--output", there, *base)
    run(there, "--to", "native", "--output", tmp_path / "back.safetensors", *base)
    first, second = load_file(path), load_file(tmp_path / "back.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    if way == "diffusers":
        assert metadata_of(tmp_path / "back.safetensors") == metadata_of(path)


@pytest.mark.parametrize("kind, a1, a2", [("sd", 4, 64), ("sd", 64, 8), ("sdxl", 4, 64)])
def test_any_factors_come_back_from_their_lora(kind, a1, a2, trained, tiny_sd, tiny_sdxl, tmp_path):
    pipeline, path = trained(a1, a2, kind)
    base = ("--pretrained_model_name_or_path", {"sd": tiny_sd, "sdxl": tiny_sdxl}[kind])
    run(path, "--to", "lora", "--output", tmp_path / "lora.safetensors", *base)
    run(tmp_path / "lora.safetensors", "--to", "native", "--output", tmp_path / "back.safetensors", *base)
    assert worst_error(merged_weights(kind, tmp_path / "back.safetensors"), dense_weights(pipeline)) < 2 * EXACT
    own = read_adapter(tmp_path / "back.safetensors").own_metadata
    assert (own["a1"], own["a2"], own["step"]) == (str(a1), str(a2), "7")


def test_a_mixed_file_loads_bit_for_bit_and_other_tools_arithmetic_gives_its_deltas(trained):
    """ComfyUI and A1111 take torch.kron(w1, w2), in the shape of the weight, times 1 for whole factors."""
    pipeline, path = trained(4, 64, mixed=True)
    loaded = plain_pipeline("sd")
    load_kronecker(loaded, path)
    theirs, ours = kronecker_layers(loaded.unet), kronecker_layers(pipeline.unet)
    assert all(torch.equal(theirs[name].factors.A, layer.factors.A) for name, layer in ours.items())
    assert all(torch.equal(theirs[name].factors.B, layer.factors.B) for name, layer in ours.items())
    assert {name: layer.target for name, layer in theirs.items()} == {n: layer.target for n, layer in ours.items()}
    tensors, narrow = load_file(path), 0
    for layer in find_layers({"unet": plain_pipeline("sd").unet}):
        if layer.name in ours:
            w1, w2 = (tensors[f"{layer.kohya}.{part}"] for part in ("lokr_w1", "lokr_w2"))
            delta = torch.kron(w1, w2).reshape(layer.size)
            torch.testing.assert_close(delta, ours[layer.name].delta_weight, rtol=1e-6, atol=0)
            if "attn2.to_k" in layer.name or "attn2.to_v" in layer.name:
                assert w1.shape == (1, layer.size[1]) and w2.shape == (layer.size[0], 1)
                narrow += 1
    assert narrow == 8 and len(ours) == 32


def test_layers_of_rank_one_become_loras_of_rank_one_and_come_back(trained, tiny_sd, tmp_path, capsys):
    pipeline, path = trained(4, 64, mixed=True)
    base = ("--pretrained_model_name_or_path", tiny_sd)
    run(path, "--to", "lora", "--output", tmp_path / "lora.safetensors", *base)
    assert "Relative error of all layers together: 0.00e+00" in capsys.readouterr().out
    lora, exact = load_file(tmp_path / "lora.safetensors"), dense_weights(pipeline)
    plain = plain_weights(plain_pipeline("sd"))
    ranks = {}
    for layer in find_layers(components(plain_pipeline("sd"))):
        if layer.dotted in exact:
            up, down = (lora[f"{layer.kohya}.lora_{side}.weight"].double() for side in ("up", "down"))
            delta = exact[layer.dotted] - plain[layer.dotted]
            assert (up @ down / len(down) - delta).norm() < 1e-6 * delta.norm()  # alpha is 1
            ranks[layer.dotted] = len(down)
    assert {name for name, rank in ranks.items() if rank == 1} == {
        name for name in exact if name.endswith(("attn2.to_k", "attn2.to_v"))
    }
    run(tmp_path / "lora.safetensors", "--to", "native", "--output", tmp_path / "back.safetensors", *base)
    assert worst_error(merged_weights("sd", tmp_path / "back.safetensors"), exact) < 2 * EXACT
    first, second = load_file(path), load_file(tmp_path / "back.safetensors")
    assert {name: tensor.shape for name, tensor in first.items()} == {n: tensor.shape for n, tensor in second.items()}
    run("--inspect", path)
    words = capsys.readouterr().out
    assert "(4, 64) in 32 layers" in words and "(1, 64) in 8 layers" in words and "rank(A) · rank(B): 1 to" in words
    assert "convert.py --to lora (as LoKr they take only a square A" in words and "LyCORIS, sd-scripts" not in words


def test_any_lora_of_rank_one_is_kronecker_factors_of_one_row_and_one_column(tiny_sd, tmp_path, capsys):
    torch.manual_seed(0)
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    (layer,) = (layer for layer in find_layers({"unet": plain_pipeline("sd").unet}) if layer.kohya == key)
    up, down = torch.randn(layer.size[0], 1), torch.randn(1, layer.size[1])
    save_file(
        {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)},
        tmp_path / "lora.safetensors",
    )
    command = (tmp_path / "lora.safetensors", "--to", "native", "--pretrained_model_name_or_path", tiny_sd)
    run(*command, "--output", tmp_path / "n.safetensors", "--kron_a1", "1", "--kron_a2", "d_in")
    factors = read_adapter(tmp_path / "n.safetensors").layers[key].multiplied()
    assert factors.A.shape == (1, layer.size[1]) and factors.B.shape == (layer.size[0], 1)
    torch.testing.assert_close(factors.dense().float(), up @ down, rtol=1e-5, atol=1e-5)
    with pytest.raises(KroneckerError, match=r"attn2.to_k .* b2 = 7 \(a2 = d_in/7\) does not divide"):
        run(*command, "--output", tmp_path / "m.safetensors", "--kron_a1", "1", "--kron_a2", "d_in/7")


def test_a_lora_has_one_alpha_and_the_metadata_of_a_lora(trained, tiny_sd, tmp_path):
    _, path = trained(4, 64)
    run(path, "--to", "lora", "--output", tmp_path / "a.safetensors", "--pretrained_model_name_or_path", tiny_sd)
    tensors, metadata = load_file(tmp_path / "a.safetensors"), metadata_of(tmp_path / "a.safetensors")
    assert {tensor.item() for name, tensor in tensors.items() if name.endswith("alpha")} == {1.0}
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if "lora_down" in name}
    assert len(ranks) > 1, "all ranks are the same: the test no longer tells"
    assert metadata["ss_network_module"] == "networks.lora" and metadata["ss_network_dim"] == str(max(ranks))
    assert metadata["ss_base_model_version"] == "sd_v1"


@pytest.mark.parametrize("to", ["native", "lora", "diffusers", "peft"])
def test_a_converted_file_says_no_folders_and_without_metadata_no_prompts(to, trained, tiny_sd, tmp_path):
    _, path = trained(8, 8)
    old, base = tmp_path / "old.safetensors", ["--pretrained_model_name_or_path", str(tiny_sd)]
    config = json.dumps({"output_dir": r"C:\Users\secret\dog", "validation_prompt": ["a dog"]})
    metadata = metadata_of(path) | {"kronecker.base_model": "/home/secret/sd", "kronecker.config": config}
    save_file(load_file(path), old, metadata)
    said = {}
    for flag in ((), ("--no_metadata",)):
        output = tmp_path / f"made{len(flag)}.safetensors"
        run(old, "--to", to, "--output", output, *base, *flag)
        files = [output] if output.is_file() else [f for f in output.rglob("*") if f.is_file()]
        said[flag] = b"".join(file.read_bytes() for file in files)
        assert b"secret" not in said[flag] and str(tiny_sd.parent).encode() not in said[flag]
    assert to == "peft" or all(words in said[()] for words in (b"a photo of sks dog", b"kronecker.config"))
    assert not any(
        words in said["--no_metadata",] for words in (b"sks dog", b"a dog", b"kronecker.config", b"modelspec")
    )
    if to in ("native", "lora"):
        kept = metadata_of(tmp_path / "made1.safetensors")
        assert {"ss_base_model_version", "ss_network_module", "kronecker.layers", "kronecker.targets"} <= set(kept)


def test_size_and_errors_of_a_lora_are_printed(trained, tiny_sd, tmp_path, capsys):
    pipeline, path = trained(8, 8)
    output = tmp_path / "a.safetensors"
    run(path, "--to", "lora", "--rank", 4, "--output", output, "--save_precision", "fp16",
        "--pretrained_model_name_or_path", tiny_sd)  # fmt: skip
    words = capsys.readouterr().out
    size = sum(t.nbytes for name, t in load_file(output).items() if not name.endswith("alpha"))
    assert words.startswith(f"The LoRA takes {size / 2**20:.1f} MiB in fp16")
    exact, plain, loras = dense_weights(pipeline), plain_pipeline("sd"), read_adapter(output).layers
    base, square, total = plain_weights(plain), 0.0, 0.0
    for layer in find_layers(plain):
        if (path := f"{layer.component}.{layer.path}") in exact:
            delta = exact[path] - base[path]
            square += (loras[layer.native].dense() - delta).square().sum().item()
            total += delta.square().sum().item()
    printed = float(words.partition("layers together: ")[2].split()[0])
    assert printed == pytest.approx((square / total) ** 0.5, rel=0.01)


@pytest.mark.parametrize("a1, a2, mebibytes", [(4, 64, 257), (64, 8, 423), (16, 16, 3384)])
def test_the_size_of_an_exact_lora_of_sdxl_is_known_before_it_is_made(a1, a2, mebibytes):
    """(16, 16) has full rank: such a LoRA is larger than the weights that it changes, and the others are not."""
    layers = {}
    for layer in find_layers({"unet": load_architecture("sdxl")["unet"]}):
        if match_target(layer.name, ("to_q", "to_k", "to_v", "to_out.0")):
            b1, b2 = layer.size[0] // a1, layer.size[1] // a2
            layers[layer] = Factors(torch.empty(a1, a2, device="meta"), torch.empty(b1, b2, device="meta"))
    size = lora_bytes(layers, None, torch.float16)
    assert round(size / 2**20) == mebibytes
    assert (size > dense_bytes(layers, torch.float16)) == (a1 == 16)


def test_a_lora_that_makes_no_sense_is_called_so_before_it_is_written(trained, tiny_sd, tmp_path, capsys):
    base = ("--pretrained_model_name_or_path", tiny_sd)
    for a1, a2, senseless in ((8, 8, True), (64, 4, False)):
        run(trained(a1, a2)[1], "--to", "lora", "--output", tmp_path / f"{a1}.safetensors", *base)
        assert ("use a small --rank" in capsys.readouterr().out.splitlines()[0]) == senseless


@pytest.mark.parametrize("way", ["native", "lora", "diffusers"])
def test_what_model_browsers_show_goes_along(way, tiny_sd, tmp_path):
    shown = {"modelspec.thumbnail": "data:image/jpeg;base64,AA==", "modelspec.resolution": "64x64"}
    save_kronecker(adapted_pipeline("sd", 8, 8), tmp_path / "a.safetensors", {**shown, "instance_prompt": "sks dog"})
    run(tmp_path / "a.safetensors", "--to", way, "--output", tmp_path / "b.safetensors",
        "--pretrained_model_name_or_path", tiny_sd)  # fmt: skip
    metadata = metadata_of(tmp_path / "b.safetensors")
    assert metadata.items() >= {**shown, "modelspec.trigger_phrase": "sks dog"}.items()
    assert "lora_adapter_metadata" not in metadata


@pytest.mark.parametrize("names, block", [("sgm", "input_blocks_1_1"), ("diffusers", "down_blocks_0_attentions_0")])
def test_sdxl_names_are_a_choice(names, block, trained, tiny_sdxl, tmp_path):
    _, path = trained(4, 64, "sdxl")
    run(path, "--to", "native", "--output", tmp_path / "a.safetensors", "--sdxl_names", names,
        "--pretrained_model_name_or_path", tiny_sdxl)  # fmt: skip
    assert any(name.startswith(f"lora_unet_{block}_") for name in load_file(tmp_path / "a.safetensors"))
    assert (
        worst_error(merged_weights("sdxl", tmp_path / "a.safetensors"), dense_weights(trained(4, 64, "sdxl")[0])) < 4e-8
    )


def test_a_real_architecture_is_recognised_without_a_name(tmp_path, capsys):
    """An adapter for SD 2.1's UNet, in files with kohya's names and no metadata at all."""
    tensors = {}
    for layer in find_layers({"unet": load_architecture("sd21")["unet"]}):
        if match_target(layer.name, ("to_q", "to_k")):
            tensors[f"{layer.kohya}.lokr_w1"] = torch.ones(4, 64)
            tensors[f"{layer.kohya}.lokr_w2"] = torch.ones(
                layer.module.out_features // 4, layer.module.in_features // 64
            )
    save_file(tensors, tmp_path / "foreign.safetensors")
    run(tmp_path / "foreign.safetensors", "--to", "native", "--output", tmp_path / "native.safetensors")
    assert "Wrote 64 layers for Stable Diffusion 2.x" in capsys.readouterr().out
    metadata = metadata_of(tmp_path / "native.safetensors")
    assert metadata["ss_base_model_version"] == "sd_v2" and metadata["ss_v2"] == "True"


# ---- the paper's own code ----


def reference_delta(down, up, x):
    """What the paper's layer adds to y, step by step as its forward does: X is x, read as (a2, b2)."""
    (a2, a1), (b1, b2) = down.shape, up.shape
    X = x.view(-1, a2, b2).transpose(1, 2)  # (n, b2, a2)
    return (up @ (X @ down)).reshape(*x.shape[:-1], a1 * b1)  # (n, b1, a1), read row by row


@pytest.fixture
def reference_file(tmp_path):
    """A file of the paper's code for the UNet, and every layer's (down, up)."""
    path = tmp_path / "pytorch_lora_weights.safetensors"
    return path, write_reference_file(path)


def assert_is_reference(unet, layers):
    plain = plain_pipeline("sd").unet
    for name, (down, up) in layers.items():
        x = torch.randn(2, 5, plain.get_submodule(name).in_features)
        expected = plain.get_submodule(name)(x) + reference_delta(down, up, x)
        torch.testing.assert_close(unet.get_submodule(name)(x), expected, rtol=0, atol=2e-6)


def test_files_of_the_paper_s_code_load_as_they_are_and_through_native(reference_file, tiny_sd, tmp_path, capsys):
    path, layers = reference_file
    run(path, "--to", "native", "--output", tmp_path / "n.safetensors", "--pretrained_model_name_or_path", tiny_sd)
    assert "order of the paper's code" in capsys.readouterr().out
    for file in (path, tmp_path / "n.safetensors"):
        pipeline = plain_pipeline("sd")
        load_kronecker(pipeline, file)
        assert_is_reference(pipeline.unet, layers)
        merge_kronecker(pipeline)
        assert_is_reference(pipeline.unet, layers)
    assert metadata_of(tmp_path / "n.safetensors")["kronecker.rows"] == "transposed"
    save_kronecker(pipeline, tmp_path / "again.safetensors")
    first, second = load_file(tmp_path / "n.safetensors"), load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first | second)


def test_no_other_tool_can_read_them_wrongly_and_a_lora_is_exact(reference_file, tiny_sd, tmp_path):
    path, layers = reference_file
    base = ("--pretrained_model_name_or_path", tiny_sd)
    run(path, "--to", "native", "--output", tmp_path / "n.safetensors", *base)
    assert not [name for name in load_file(tmp_path / "n.safetensors") if "lokr" in name or "lora_down" in name]
    for way in ("diffusers", "peft"):
        with pytest.raises(
            KroneckerError, match="the rows are in the order of the paper's code. What works: --to lora"
        ):
            run(path, "--to", way, "--output", tmp_path / "x.safetensors", *base)
    with pytest.raises(KroneckerError, match="which peft cannot express"):
        attach_to_diffusers(plain_pipeline("sd"), path)
    run(path, "--to", "lora", "--output", tmp_path / "lora.safetensors", *base)
    pipeline = plain_pipeline("sd")
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert_is_reference(pipeline.unet, layers)


# ---- refusals, before anything is written ----


@pytest.mark.parametrize("way", ["diffusers", "peft"])
@pytest.mark.parametrize(
    "a1, a2, words", [(4, 64, "A is 4 x 64, and not the same square"), (16, 16, "A is 16 x 16, larger than B")]
)
def test_factors_that_diffusers_and_peft_cannot_create_are_refused(way, a1, a2, words, trained, tiny_sd, tmp_path):
    _, path = trained(a1, a2)
    with pytest.raises(KroneckerError, match=f"{words}.*What works: --to lora, .* attach_to_diffusers"):
        run(path, "--to", way, "--output", tmp_path / "out", "--pretrained_model_name_or_path", tiny_sd)
    assert not list(tmp_path.iterdir())


def test_wrong_input_is_called_by_its_name(trained, tiny_sd, tiny_sdxl, tmp_path):
    _, path = trained(4, 64)
    base = ("--pretrained_model_name_or_path", tiny_sd)
    run(path, "--to", "lora", "--output", tmp_path / "lora.safetensors", *base)
    with pytest.raises(KroneckerError, match="is not a Kronecker adapter: it is a LoRA; load it with"):
        load_kronecker(plain_pipeline("sd"), tmp_path / "lora.safetensors")
    out = ("--output", tmp_path / "out.safetensors")
    for arguments, words in (
        (
            (path, "--to", "native", *out, "--pretrained_model_name_or_path", tiny_sdxl),
            "Kronecker adapter for Stable Diffusion 1",
        ),
        ((path, "--to", "native", *out), "fits none of SD 1.5, SD 2.1, SDXL: .*--pretrained_model"),
        ((tmp_path / "lora.safetensors", "--to", "diffusers", *out, *base), "--to diffusers: .* is a LoRA"),
        (
            (path, "--to", "native", *out, *base, "--kron_a1", 4, "--kron_a2", 64),
            "--kron_a1, .* is not a LoRA",
        ),
        ((tiny_sd, "--to", "native", *out), "is not a Kronecker adapter: it is a model that was trained in full"),
    ):
        with pytest.raises(ValueError, match=words):
            run(*arguments)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "give INPUT, --to and --output, or --inspect FILE"),
        (["a", "--to", "native", "--output", "b", "--rank", "4"], "--rank is for --to lora"),
        (["a", "--to", "fused", "--output", "b"], "--to fused needs --pretrained_model_name_or_path"),
        (["a", "--to", "onnx", "--output", "b"], "invalid choice: 'onnx'"),
        (["a", "--to", "native", "--output", "b", "--kron_a1", "4"], "--kron_a1 and --kron_a2 must be"),
        (["a", "--to", "lora", "--output", "b", "--rank", "0"], "argument --rank: 0 is not 1 or more"),
        (["a", "--to", "lora", "--output", "b", "--rank", "x"], "argument --rank: invalid"),
        (["a", "--to", "native", "--output", "b", "--kron_a1", "-4", "--kron_a2", "4"], "argument --kron_a1: -4 is"),
        (["a", "--to", "native", "--output", "b", "--kron_a1", "d_in", "--kron_a2", "4"], "--kron_a1: d_in is not"),
        (["a", "--to", "lora", "--output", "b", "--kron_a1", "4", "--kron_a2", "4"], "--kron_a1 is for --to native"),
        (["a", "--to", "peft", "--output", "b", "--sdxl_names", "sgm"], "--sdxl_names is for --to native"),
        (["a", "--to", "native", "--output", "."], "--output . exists already"),
        (["a", "--inspect", "b"], "--inspect FILE cannot be combined with INPUT"),
        (["--inspect", "b", "--rank", "4"], "--inspect FILE cannot be combined with --rank"),
        (["a", "--to", "fused", "--output", "b.safetensors", "--pretrained_model_name_or_path", "."],
         "--output b.safetensors: a base that is a folder is fused into a folder"),
        (["a", "--to", "fused", "--output", "b", "--pretrained_model_name_or_path", convert.__file__],
         "--output b: a base that is one file is fused into one .safetensors file"),
        (["a", "--to", "fused", "--output", "b.safetensors", "--save_precision", "fp16",
          "--pretrained_model_name_or_path", convert.__file__], "--save_precision: "),
    ],
)  # fmt: skip
def test_a_command_line_that_does_not_go_together_is_refused_before_anything_is_read(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit:
        convert.main(arguments)  # there is no file "a"
    assert exit.value.code == 2 and words in capsys.readouterr().err


# ---- in words ----


def test_inspect_says_what_a_file_is_and_who_loads_it(trained, reference_file, tiny_sd, tmp_path, capsys):
    def inspect(path):
        run("--inspect", path)
        return capsys.readouterr().out

    words = inspect(trained(4, 64)[1])
    for part in (
        "a Kronecker adapter (LoKr) with kohya's names",
        "for: Stable Diffusion 1.x",
        "layers: 40 (8 in the text encoder, 32 in the UNet), 11,200 parameters",
        "factors (a1, a2): (4, 64) in 40 layers",
        "metadata: kronecker.step = 7",
        "loads in: ComfyUI, A1111, Forge\n",
        "scripts/convert.py --to lora (as LoKr they take only a square A no larger than B)",
    ):
        assert part in words
    assert "LyCORIS, sd-scripts" not in words
    words = inspect(trained(8, 8)[1])
    assert "LyCORIS, sd-scripts" in words and "--to diffusers, peft or lora" in words
    assert "this project alone (load_kronecker)" in inspect(reference_file[0])
    assert "order of the paper's code" in inspect(reference_file[0])
    run(
        trained(8, 8)[1],
        "--to",
        "lora",
        "--output",
        tmp_path / "l.safetensors",
        "--pretrained_model_name_or_path",
        tiny_sd,
    )
    capsys.readouterr()
    assert "a LoRA\n" in inspect(tmp_path / "l.safetensors") and "rank: " in inspect(tmp_path / "l.safetensors")
    tensors = {name: tensor for name, tensor in load_file(trained(4, 64, "sdxl")[1]).items() if "q_proj" not in name}
    save_file(tensors, tmp_path / "bare.safetensors", metadata={"ss_network_module": "lycoris.kohya"})
    words = inspect(tmp_path / "bare.safetensors")
    assert "A1111 skips the second text encoder" in words
    tensors = {name: tensor for name, tensor in load_file(trained(8, 8)[1]).items() if not name.endswith("alpha")}
    save_file(tensors, tmp_path / "bare.safetensors")
    assert "square A no larger than B; not without alphas" in inspect(tmp_path / "bare.safetensors")


def test_inspect_s_ranks_and_norms_are_those_of_the_dense_deltas(trained, capsys):
    pipeline, path = trained(4, 64)
    layers = [layer for model in components(pipeline).values() for layer in kronecker_layers(model).values()]
    norms = [layer.delta_weight.norm().item() for layer in layers]
    ranks = [torch.linalg.matrix_rank(layer.delta_weight).item() for layer in layers]
    run("--inspect", path)
    words = capsys.readouterr().out
    assert f"norm of ΔW: {min(norms):.3g} to {max(norms):.3g} (in lora_" in words
    assert f"rank(A) · rank(B): {min(ranks)} to {max(ranks)}\n" in words
