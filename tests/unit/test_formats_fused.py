"""Adapters in the weights of a base model: pipeline folders, and single files in the layout of Stability's code."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kron_adapter import KroneckerError, save_kronecker
from kron_formats.architectures import load_architecture
from kron_formats.fused import original_key
from kron_formats.names import components, family, find_layers
from scripts import convert
from tests.adapters import adapted_pipeline, dense_weights, draw, plain_weights, worst_error

EXACT = 2e-8


def run(*arguments):
    convert.main([str(argument) for argument in arguments])


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_fused_folder_draws_the_same_image_without_this_project(tiny_sd, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipeline, path = adapted_pipeline("sd", 4, 64, text=True, strength=0.002), tmp_path / "native.safetensors"
    save_kronecker(pipeline, path)
    run(path, "--to", "fused", "--output", tmp_path / "fused", "--pretrained_model_name_or_path", tiny_sd)
    fused = StableDiffusionPipeline.from_pretrained(tmp_path / "fused")
    fused.set_progress_bar_config(disable=True)
    assert worst_error(plain_weights(fused), dense_weights(pipeline)) < EXACT
    assert (draw(fused) - draw(pipeline)).abs().max() < 1e-4
    assert components(fused).keys() == {"unet", "text_encoder"}


@pytest.mark.parametrize("architecture", ["sd15", "sd21", "sdxl"])
def test_places_in_a_single_file_are_those_that_diffusers_reads(architecture):
    """Every weight of the UNet, put where we think it lies, comes out of diffusers' converter as the right layer's."""
    from diffusers.loaders import single_file_utils as theirs

    unet = load_architecture(architecture)["unet"]
    layers = {f"{layer.name}.weight": layer for layer in find_layers({"unet": unet})}
    markers = {name: torch.tensor(float(n)) for n, name in enumerate(layers)}
    file = {original_key(layer, family(unet))[0]: markers[name] for name, layer in layers.items()}
    assert len(file) == len(layers)
    file |= {key.replace(".weight", ".bias"): torch.tensor(-1.0) for key in file}
    file |= {key.replace("in_layers.2", "in_layers.0"): torch.tensor(-1.0) for key in file if "in_layers.2" in key}
    file |= {f"model.diffusion_model.out.0.{part}": torch.tensor(-1.0) for part in ("weight", "bias")}
    config = {"layers_per_block": 2, "addition_embed_type": unet.config["addition_embed_type"],
              "class_embed_type": None}  # fmt: skip
    converted = theirs.convert_ldm_unet_checkpoint(file, config)
    assert {name: converted.get(name) for name in layers} == markers


@pytest.mark.parametrize("architecture, component", [("sd21", "text_encoder"), ("sdxl", "text_encoder_2")])
def test_places_of_open_clip_in_a_single_file_are_those_that_diffusers_reads(architecture, component):
    """OpenCLIP stacks q, k and v, and has other names; diffusers' converter takes them apart again."""
    from diffusers.loaders import single_file_utils as theirs

    models = load_architecture(architecture)
    made_for, encoder = family(models), models[component]
    prefix = {"sd21": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}[architecture]
    size = encoder.config.hidden_size
    layers = [layer for layer in find_layers(models) if layer.dotted.startswith(f"{component}.text_model.encoder.")]
    assert len(layers) == 6 * encoder.config.num_hidden_layers
    file = {}
    for n, layer in enumerate(layers):
        key, rows = original_key(layer, made_for)
        tensor = file.setdefault(key, torch.zeros(3 * size if rows.start is not None else 2, 1))
        tensor[rows] = n + 1
    file |= {f"{prefix}text_projection": torch.zeros(size, size), f"{prefix}positional_embedding": torch.zeros(2)}
    converted = theirs.convert_open_clip_checkpoint(encoder, dict(file), prefix)
    converted = {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}
    for n, layer in enumerate(layers):
        assert (converted[f"{layer.name.removeprefix('text_model.')}.weight"] == n + 1).all(), layer.name


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_clip_has_transformers_names_in_a_single_file(architecture):
    models = load_architecture(architecture)
    prefix = {"sd15": "cond_stage_model", "sdxl": "conditioner.embedders.0"}[architecture]
    for layer in find_layers(models):
        if layer.component == "text_encoder":
            assert original_key(layer, family(models)) == (f"{prefix}.transformer.{layer.name}.weight", slice(None))


def test_fusing_into_one_file_changes_the_adapted_weights_alone(tmp_path):
    models = load_architecture("sd21")
    layers = {x.name: x for x in find_layers(models)}
    attention = layers["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    text = layers["text_model.encoder.layers.3.self_attn.k_proj"]
    query = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    stacked = "cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight"
    torch.manual_seed(0)
    base = {query: torch.randn(1280, 1280).half(), stacked: torch.randn(3072, 1024), "other": torch.ones(2)}
    save_file(base, tmp_path / "base.safetensors", metadata={"format": "pt"})
    pairs = {attention: (torch.randn(4, 64), torch.randn(320, 20)), text: (torch.randn(4, 64), torch.randn(256, 16))}
    deltas = {layer: torch.kron(A.double(), B.double()) for layer, (A, B) in pairs.items()}
    native = {f"{layer.native}.lokr_w{i}": factor for layer, pair in pairs.items() for i, factor in enumerate(pair, 1)}
    save_file(native, tmp_path / "adapter.safetensors")
    run(tmp_path / "adapter.safetensors", "--to", "fused", "--output", tmp_path / "fused.safetensors",
        "--pretrained_model_name_or_path", tmp_path / "base.safetensors")  # fmt: skip
    fused = load_file(tmp_path / "fused.safetensors")
    assert torch.equal(fused[query], (base[query].double() + deltas[attention]).half())
    expected = base[stacked].double()
    expected[1024:2048] += deltas[text]
    torch.testing.assert_close(fused[stacked], expected.float(), rtol=0, atol=0)
    assert torch.equal(fused["other"], base["other"]) and metadata_of(tmp_path / "fused.safetensors") == {
        "format": "pt"
    }


def test_a_weight_that_overflows_once_fused_into_a_folder_is_refused(tiny_sd, tmp_path):
    save_kronecker(adapted_pipeline("sd", 4, 64, strength=1e6), tmp_path / "adapter.safetensors")
    with pytest.raises(KroneckerError, match="fused weight of unet.* is not finite in torch.float16; nothing was"):
        run(tmp_path / "adapter.safetensors", "--to", "fused", "--output", tmp_path / "fused",
            "--pretrained_model_name_or_path", tiny_sd, "--save_precision", "fp16")  # fmt: skip
    assert not (tmp_path / "fused").exists()


def test_a_weight_that_overflows_once_fused_into_a_file_is_refused(tmp_path):
    query = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    save_file(
        {query: torch.ones(1280, 1280).half(), "cond_stage_model.model.x": torch.ones(1)}, tmp_path / "base.safetensors"
    )
    layer = {x.name: x for x in find_layers(load_architecture("sd21"))}[
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    ]
    factors = {"lokr_w1": torch.full((4, 64), 300.0), "lokr_w2": torch.full((320, 20), 300.0)}
    save_file({f"{layer.native}.{name}": factor for name, factor in factors.items()}, tmp_path / "adapter.safetensors")
    with pytest.raises(KroneckerError, match="fused weight of unet.* is not finite in torch.float16; nothing was"):
        run(tmp_path / "adapter.safetensors", "--to", "fused", "--output", tmp_path / "fused.safetensors",
            "--pretrained_model_name_or_path", tmp_path / "base.safetensors")  # fmt: skip
    assert not (tmp_path / "fused.safetensors").exists()
