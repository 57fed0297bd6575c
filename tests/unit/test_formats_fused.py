"""Adapters in the weights of a base model: pipeline folders, and single files in the layout of Stability's code."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kron_adapter import KroneckerError, save_kronecker
from kron_formats.architectures import load_architecture
from kron_formats.fused import original_place
from kron_formats.names import components, family, find_layers, find_parameters
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


CONVERTED = [
    ("sd15", "unet"), ("sd21", "unet"), ("sdxl", "unet"),
    ("sd15", "text_encoder"), ("sd21", "text_encoder"), ("sdxl", "text_encoder"), ("sdxl", "text_encoder_2"),
]  # fmt: skip


@pytest.mark.parametrize("architecture, component", CONVERTED)
def test_places_in_a_single_file_are_those_that_diffusers_reads(architecture, component):
    """Every parameter, put where we think it lies, comes out of diffusers' converters under its own name."""
    models = load_architecture(architecture)
    parameters = [layer for layer in find_parameters(models) if layer.component == component]
    own = {f"{layer.path}.{layer.parameter}" for layer in parameters}
    assert own == {name for name, _ in models[component].named_parameters()}
    markers = {layer: marker(layer, number) for number, layer in enumerate(parameters)}
    file = {}
    for layer, tensor in markers.items():
        place = original_place(layer, family(models))
        rows = 3 * len(tensor) if place.rows else len(tensor)
        place.within(file.setdefault(place.key, tensor.new_zeros(rows, *tensor.shape[1:]))).copy_(tensor)
    converted = convert_as_diffusers(file, component, models)
    for layer, tensor in markers.items():
        assert torch.equal(converted.pop(f"{layer.name}.{layer.parameter}"), tensor), layer.dotted
    assert not converted


def marker(layer, number):
    """A tensor of which every row says whose and which it is, with 2 columns; a projection has all of its columns."""
    rows = 1e5 * number + torch.arange(layer.size[0], dtype=torch.float64)
    columns = layer.size[1] if layer.name == "text_projection" else 2
    return rows if len(layer.size) == 1 else rows[:, None].repeat(1, columns)


def convert_as_diffusers(file, component, models):
    from diffusers.loaders import single_file_utils as theirs

    if component == "unet":
        return theirs.convert_ldm_unet_checkpoint(file, {**models["unet"].config, "class_embed_type": None})
    prefix = next(iter(file)).partition("token_embedding")[0].removesuffix("text_model.embeddings.")
    if "transformer" in prefix:
        return theirs.convert_ldm_clip_checkpoint(file)
    return theirs.convert_open_clip_checkpoint(models[component], file, prefix)


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
