"""Conversion of what changes the base weights themselves: the nearest LoRA, fused models, diffusers' own layout."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from dreambooth.errors import UserError
from kron_adapter import KroneckerError, save_kronecker
from kron_formats.names import components
from kron_formats.nearest import nearest_lora
from kron_formats.reading import read_adapter
from scripts import convert
from tests.adapters import adapted_pipeline, draw, plain_pipeline
from tests.one_file import save_one_file

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


def run(*arguments):
    convert.main([str(argument) for argument in arguments])


def parameters(models) -> dict[str, torch.Tensor]:
    named = ((part, name, p) for part, model in components(models).items() for name, p in model.named_parameters())
    return {f"{part}.{name}": p.detach().clone() for part, name, p in named}


def tuned(kind):
    """A small pipeline of which every parameter of the UNet and the text encoders is another."""
    pipeline = plain_pipeline(kind)
    torch.manual_seed(1)
    for model in components(pipeline).values():
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tuned")
    tuned("sd").save_pretrained(path)
    return path


@pytest.fixture
def custom():
    """Weights of Custom Diffusion for the small UNet, and a word."""
    torch.manual_seed(2)
    unet = plain_pipeline("sd").unet
    ends = ("attn2.to_k.weight", "attn2.to_v.weight")
    return {name: 0.1 * torch.randn_like(p) for name, p in unet.named_parameters() if name.endswith(ends)}


# ---- the nearest LoRA ----


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
@pytest.mark.parametrize("rank", [1, 5, 12, 40])
def test_the_nearest_lora_is_the_truncated_decomposition(shape, rank):
    torch.manual_seed(0)
    delta = torch.randn(*shape, dtype=torch.float64)
    U, s, V = torch.linalg.svd(delta, full_matrices=False)
    lora, error = nearest_lora(delta, rank)
    torch.testing.assert_close(lora.dense(), (U[:, :rank] * s[:rank]) @ V[:rank], rtol=0, atol=1e-12)
    assert error == pytest.approx((s[rank:].norm() / s.norm()).item(), abs=1e-12)
    assert lora.down.shape[0] == min(rank, 12)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_at_full_rank_diffusers_gets_the_weights_of_all_that_a_lora_holds(kind, tiny_sd, tiny_sdxl, tmp_path, capsys):
    base, exact = {"sd": tiny_sd, "sdxl": tiny_sdxl}[kind], tuned(kind)
    exact.save_pretrained(tmp_path / "tuned")
    run(tmp_path / "tuned", "--to", "lora", "--rank", 2000, "--output", tmp_path / "lora.safetensors",
        "--pretrained_model_name_or_path", base)  # fmt: skip
    words = capsys.readouterr().out
    pipeline = plain_pipeline(kind)
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    pipeline.fuse_lora(components=list(components(pipeline)))
    pipeline.unload_lora_weights()
    ours, plain, exact = parameters(pipeline), parameters(plain_pipeline(kind)), parameters(exact)
    held = {name for name in exact if (ours[name] - exact[name]).abs().max() < 1e-6}
    for name in exact.keys() - held:
        outside = name.rpartition(".")[2] == "bias" or "norm" in name or "embed" in name or ".conv_" in name
        # diffusers misses a sampler of a block without attention, which SDXL's UNet has not
        assert outside or "text_projection" in name or (kind == "sdxl" and "up_blocks.0.upsamplers" in name), name
        assert torch.equal(ours[name], plain[name]), name
    assert any(".conv1." in name for name in held) and any("mlp.fc1" in name for name in held)
    left_out = exact.keys() - held - {"unet.up_blocks.0.upsamplers.0.conv.weight"}
    lost, total = (
        sum((exact[name].double() - plain[name].double()).square().sum() for name in names)
        for names in (left_out, exact)
    )
    printed = float(words.partition("changes together: ")[2].split()[0])
    assert printed == pytest.approx((lost / total).sqrt().item(), rel=0.01)
    assert f"cannot hold {len(left_out)} of the parameters" in words


def test_a_smaller_rank_says_what_it_loses_in_every_layer(custom, tiny_sd, tmp_path, capsys):
    save_file({**custom, "<new1>": torch.ones(1, 64)}, tmp_path / "custom.safetensors")
    run(tmp_path / "custom.safetensors", "--to", "lora", "--rank", 4, "--output", tmp_path / "lora.safetensors",
        "--pretrained_model_name_or_path", tiny_sd)  # fmt: skip
    words, unet = capsys.readouterr().out, plain_pipeline("sd").unet
    lost = total = 0.0
    for name, weight in custom.items():
        s = torch.linalg.svdvals(weight.double() - unet.get_parameter(name).detach().double())
        error = (s[4:].norm() / s.norm()).item()
        assert f"rank    4  relative error {error:.2e}  unet.{name.removesuffix('.weight')}" in words
        lost, total = lost + s[4:].square().sum(), total + s.square().sum()
    assert float(words.partition("changes together: ")[2].split()[0]) == pytest.approx(
        (lost / total).sqrt().item(), rel=0.01
    )
    assert "cannot hold" not in words and "The word <new1> is not in it" in words


def test_what_cannot_be_converted_is_refused_before_the_base_model_is_read(folder, custom, tmp_path):
    save_file({"<new1>": torch.ones(1, 64)}, tmp_path / "word.safetensors")
    save_kronecker(adapted_pipeline("sd", 4, 64), tmp_path / "kron.safetensors")
    base, out = ("--pretrained_model_name_or_path", "nobody/no-model"), ("--output", tmp_path / "out.safetensors")
    for source, to, more, words in (
        (folder, "lora", base, "--to lora: .*: give --rank"),
        (folder, "lora", ("--rank", 4), "--to lora needs --pretrained_model_name_or_path"),
        (folder, "native", base, "is not a Kronecker adapter: it is a model that was trained in full"),
        (folder, "peft", base, "is not a Kronecker adapter"),
        (tmp_path / "word.safetensors", "lora", base, "--to lora: .* is a word .*changes no weights"),
        (tmp_path / "word.safetensors", "fused", base, "--to fused: .* is a word .*changes no weights"),
    ):
        target = ("--output", tmp_path / "out") if to == "fused" else out
        with pytest.raises((UserError, KroneckerError), match=words):
            run(source, "--to", to, *target, *more)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.safetensors").exists()


def test_a_lora_becomes_smaller(tiny_sd, tmp_path):
    save_kronecker(adapted_pipeline("sd", 4, 64), tmp_path / "kron.safetensors")
    base = ("--pretrained_model_name_or_path", tiny_sd)
    run(tmp_path / "kron.safetensors", "--to", "lora", "--output", tmp_path / "exact.safetensors", *base)
    run(tmp_path / "exact.safetensors", "--to", "lora", "--rank", 2, "--output", tmp_path / "small.safetensors", *base)
    exact, small = (read_adapter(tmp_path / f"{name}.safetensors").layers for name in ("exact", "small"))
    for name, entry in small.items():
        U, s, V = torch.linalg.svd(exact[name].dense(), full_matrices=False)
        best = (U[:, :2] * s[:2]) @ V[:2]
        torch.testing.assert_close(entry.dense(), best, rtol=0, atol=1e-6 * s[0].item())


# ---- fused ----


def test_a_trained_model_fused_into_one_file_is_read_back_by_diffusers(folder, tmp_path):
    """Norms, biases, embeddings and the stacked q, k and v of OpenCLIP among them."""
    from dreambooth.base_model.source import base_source
    from dreambooth.options.base_model import BaseModelOptions

    for family in ("sd1", "sd2"):
        base = save_one_file(plain_pipeline("sd"), tmp_path / f"{family}.safetensors", family)
        run(folder, "--to", "fused", "--output", tmp_path / f"{family}-fused.safetensors",
            "--pretrained_model_name_or_path", base, "--base_config", folder)  # fmt: skip
        config = BaseModelOptions(
            pretrained_model_name_or_path=str(tmp_path / f"{family}-fused.safetensors"), base_config=str(folder)
        )
        weights, exact = base_source(config).weights, parameters(tuned("sd"))
        fused = parameters({part: weights.load(part, torch.float32) for part in ("unet", "text_encoder")})
        assert all(torch.equal(fused[name], tensor) for name, tensor in exact.items())


def test_spectral_shifts_fused_into_a_folder_are_their_definition(tiny_sd, tmp_path):
    torch.manual_seed(0)
    unet, shifts = plain_pipeline("sd").unet, {}
    for name in (f"{ATTENTION}.to_k", "conv_in", "mid_block.resnets.0.norm1"):
        weight = unet.get_submodule(name).weight
        shifts[name] = 0.1 * torch.randn(min(weight.flatten(1).shape) if weight.dim() > 1 else len(weight))
    tensors = {f"{name}.delta": shift for name, shift in shifts.items()}
    save_file(tensors, tmp_path / "shifts.safetensors", {"kronecker.norms": "elementwise"})
    run(tmp_path / "shifts.safetensors", "--to", "fused", "--output", tmp_path / "fused",
        "--pretrained_model_name_or_path", tiny_sd)  # fmt: skip
    fused = StableDiffusionPipeline.from_pretrained(tmp_path / "fused").unet
    for name, weight in unet.named_parameters():
        expected, module = weight.detach(), name.removesuffix(".weight")
        if module in shifts and weight.dim() == 1:
            expected = expected + shifts[module]
        elif module in shifts:
            U, s, V = torch.linalg.svd(weight.detach().double().flatten(1), full_matrices=False)
            expected = ((U * (s + shifts[module]).relu()) @ V).view_as(weight).float()
        torch.testing.assert_close(fused.get_parameter(name), expected, rtol=0, atol=1e-6 if module in shifts else 0)


# ---- Custom Diffusion for diffusers ----


def test_diffusers_loads_custom_diffusion_by_its_own_processors(custom, tiny_sd, tmp_path, capsys):
    vector = 0.1 * torch.randn(1, 64)
    save_file({**custom, "<new1>": vector}, tmp_path / "custom.safetensors")
    run(tmp_path / "custom.safetensors", "--to", "custom_diffusion", "--output", tmp_path / "theirs",
        "--pretrained_model_name_or_path", tiny_sd)  # fmt: skip
    assert "_process_custom_diffusion" in capsys.readouterr().out
    theirs, ours = plain_pipeline("sd"), plain_pipeline("sd")
    weights = torch.load(tmp_path / "theirs" / "pytorch_custom_diffusion_weights.bin", weights_only=True)
    theirs.unet.set_attn_processor(theirs.unet._process_custom_diffusion(state_dict=weights))
    theirs.load_textual_inversion(str(tmp_path / "theirs"), weight_name="<new1>.bin")
    assert torch.equal(theirs.text_encoder.get_input_embeddings().weight[-1], vector[0])
    before = draw(ours)
    ours.unet.load_state_dict(custom, strict=False)
    torch.testing.assert_close(draw(theirs), draw(ours), rtol=0, atol=1e-5)
    assert (draw(ours) - before).abs().max() > 1e-3
    again = read_adapter(tmp_path / "theirs" / "pytorch_custom_diffusion_weights.bin", allow_pickle=True)
    assert len(again.layers) == len(custom)


def test_what_diffusers_has_no_place_for_is_refused_and_nothing_is_written(custom, folder, tiny_sd, tmp_path):
    part = dict(list(custom.items())[:1])
    for name, tensors, words in (
        ("part", part, "diffusers takes K and V of every cross-attention, or all"),
        ("name", {**custom, "<a/b>": torch.ones(1, 64)}, "no place for the word <a/b>"),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(KroneckerError, match=words):
            run(tmp_path / f"{name}.safetensors", "--to", "custom_diffusion", "--output", tmp_path / "out",
                "--pretrained_model_name_or_path", tiny_sd)  # fmt: skip
    with pytest.raises(KroneckerError, match="is not a weight of cross-attention"):
        run(
            folder, "--to", "custom_diffusion", "--output", tmp_path / "out", "--pretrained_model_name_or_path", tiny_sd
        )
    assert not (tmp_path / "out").exists()


# ---- inspection ----


def test_every_kind_says_what_it_is(custom, folder, tmp_path, capsys):
    save_file({**custom, "<new1>": torch.ones(1, 64)}, tmp_path / "custom.safetensors")
    save_file({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, tmp_path / "dog.safetensors")
    save_file({"conv_in.delta": torch.zeros(36)}, tmp_path / "shifts.safetensors")
    for path, lines in (
        (folder, ["a model that was trained in full", "208 in the UNet, 36 in the text encoder", "from_pretrained"]),
        (tmp_path / "custom.safetensors", ["a Custom Diffusion file", "8 in the UNet", "word: <new1>, 1 vector of 64"]),
        (
            tmp_path / "dog.safetensors",
            ["a word", "for: SDXL", "word: dog, 2 vectors", "once for each text encoder"],
        ),
        (tmp_path / "shifts.safetensors", ["an SVDiff file", "1 (1 in the UNet), 36 parameters", "--to fused"]),
    ):
        run("--inspect", path)
        said = capsys.readouterr().out
        assert all(line in said for line in lines), (said, lines)
        assert ("norm of ΔW: it depends" in said) == ("word:" not in said or "layers:" in said)
