"""The native file: what is in it, and that it comes back whole into models of every kind."""

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
    load_kronecker,
    read_kronecker,
    save_kronecker,
)
from tests.adapters import adapted_pipeline, draw, plain_pipeline


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def sd():
    return adapted_pipeline("sd", 4, 64, text=True)


@pytest.fixture(scope="module")
def sdxl():
    return adapted_pipeline("sdxl", 4, 64, text=True)


@pytest.mark.parametrize(
    "kind, prefixes",
    [
        ("sd", {"lora_unet_down": 8, "lora_unet_mid": 8, "lora_unet_up": 16, "lora_te_text_model_encoder": 8}),
        (
            "sdxl",
            {
                "lora_unet_input_blocks_1_1_transformer_blocks_0": 8,
                "lora_unet_middle_block_1_transformer_blocks_0": 8,
                "lora_unet_output_blocks_2_1_transformer_blocks_0": 8,
                "lora_unet_output_blocks_3_1_transformer_blocks_0": 8,
                "lora_te1_text_model_encoder": 8,
                "lora_te2_text_model_encoder": 8,
            },
        ),
    ],
)
def test_every_layer_has_two_factors_and_an_alpha_and_nothing_else_is_there(kind, prefixes, tmp_path, request):
    save_kronecker(request.getfixturevalue(kind), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    assert len(tensors) == 3 * sum(prefixes.values())
    for prefix, count in prefixes.items():
        for part in ("lokr_w1", "lokr_w2", "alpha"):
            assert sum(name.startswith(prefix) and name.endswith(f".{part}") for name in tensors) == count
    assert all(tensor.item() == 1 and tensor.dim() == 0 for name, tensor in tensors.items() if name.endswith("alpha"))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("a1, a2", [(4, 64), (64, 8), (16, 16)])
def test_a_pipeline_draws_the_same_image_from_the_file(kind, a1, a2, tmp_path):
    trained = adapted_pipeline(kind, a1, a2, text=True)
    save_kronecker(trained, tmp_path / "a.safetensors")
    loaded = plain_pipeline(kind)
    base = draw(loaded)
    load_kronecker(loaded, tmp_path / "a.safetensors")
    assert torch.equal(draw(loaded), draw(trained))
    assert (draw(loaded) - base).abs().max() > 0.01


def test_sdxl_files_with_diffusers_block_names_are_read_too(sdxl, tmp_path):
    """Files of other tools, and those that this project wrote before it knew the SGM names."""
    save_kronecker(sdxl, tmp_path / "a.safetensors")
    renames = {
        "input_blocks_1_1": "down_blocks_0_attentions_0",
        "middle_block_1": "mid_block_attentions_0",
        "output_blocks_2_1": "up_blocks_1_attentions_0",
        "output_blocks_3_1": "up_blocks_1_attentions_1",
    }
    tensors = {}
    for name, tensor in load_file(tmp_path / "a.safetensors").items():
        for sgm, ours in renames.items():
            name = name.replace(f"lora_unet_{sgm}_", f"lora_unet_{ours}_")
        tensors[name] = tensor
    save_file(tensors, tmp_path / "b.safetensors")
    first, second = plain_pipeline("sdxl"), plain_pipeline("sdxl")
    load_kronecker(first, tmp_path / "a.safetensors")
    load_kronecker(second, tmp_path / "b.safetensors")
    assert torch.equal(draw(first), draw(second))


def test_a_unet_alone_takes_a_unet_s_file_and_refuses_one_with_text_encoders(sd, tmp_path):
    save_kronecker(sd.unet, tmp_path / "unet.safetensors")
    save_kronecker(sd, tmp_path / "both.safetensors")
    unet = plain_pipeline("sd").unet
    load_kronecker(unet, tmp_path / "unet.safetensors")
    assert len(kronecker_layers(unet)) == 32
    with pytest.raises(KroneckerError, match=r"8 not in the model \(lora_te_text_model_encoder_layers_0_self_attn"):
        load_kronecker(plain_pipeline("sd").unet, tmp_path / "both.safetensors")


# ---- metadata ----


def test_metadata_is_strings_that_the_tools_read(sd, sdxl, tmp_path):
    ours = {"instance_prompt": "a photo of sks dog", "step": "7", "modelspec.thumbnail": "data:image/png;base64,AA=="}
    save_kronecker(sd, tmp_path / "sd.safetensors", ours)
    save_kronecker(sdxl, tmp_path / "sdxl.safetensors", ours)
    for path, version, architecture in (
        ("sd", "sd_v1", "stable-diffusion-v1/lora"),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ):
        metadata = metadata_of(tmp_path / f"{path}.safetensors")
        assert metadata["kronecker.instance_prompt"] == "a photo of sks dog" and metadata["kronecker.step"] == "7"
        assert metadata["ss_base_model_version"] == version and metadata["ss_v2"] == "False"
        assert metadata["ss_network_module"] == "lycoris.kohya" and metadata["ss_network_alpha"] == "1.0"
        assert json.loads(metadata["ss_network_args"]) == {"algo": "lokr", "full_matrix": "True"}
        assert metadata["modelspec.architecture"] == architecture
        assert metadata["modelspec.trigger_phrase"] == "a photo of sks dog"
        assert metadata["modelspec.thumbnail"].startswith("data:image")
        assert not [key for key in metadata if not key.startswith(("kronecker.", "ss_", "modelspec."))]


def test_a_factor_is_named_only_where_it_is_one_number(tmp_path):
    save_kronecker(adapted_pipeline("sd", 16, 16), tmp_path / "a.safetensors")
    assert json.loads(metadata_of(tmp_path / "a.safetensors")["ss_network_args"])["factor"] == "16"


# ---- precision ----


@pytest.mark.parametrize("dtype, worst", [(torch.float16, 4e-4), (torch.bfloat16, 4e-3)])
def test_half_precision_files_are_balanced_first(dtype, worst, tmp_path):
    """A of size 1 and B of size 1e-6: B alone would lose most of its bits to fp16's smallest numbers."""
    model = nn.ModuleDict({"to_q": nn.Linear(64, 64)})
    layer = inject_kronecker(model, 4, 16, ("to_q",))["to_q"]
    nn.init.normal_(layer.A)
    nn.init.normal_(layer.B, std=1e-6)
    exact = layer.delta_weight
    save_kronecker(model, tmp_path / "half.safetensors", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "half.safetensors").values()} == {dtype}

    def error(A, B):
        return ((torch.kron(A.float(), B.float()) - exact).norm() / exact.norm()).item()

    (saved,) = read_kronecker(tmp_path / "half.safetensors").layers.values()
    assert error(saved.A, saved.B) < worst
    if dtype == torch.float16:
        assert error((layer.A * layer.gain).to(dtype), layer.B.to(dtype)) > 3 * worst, "the test no longer tells"


def test_what_a_precision_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    model = nn.ModuleDict({"to_q": nn.Linear(64, 64)})
    layer = inject_kronecker(model, 4, 16, ("to_q",))["to_q"]
    nn.init.constant_(layer.B, 1e30)
    with pytest.raises(KroneckerError, match="lora_unet_to_q are not all finite in torch.float16"):
        save_kronecker(model, tmp_path / "a.safetensors", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


# ---- wrong files ----


def test_a_file_for_another_base_is_called_by_its_base(sd, sdxl, tmp_path):
    save_kronecker(sd, tmp_path / "sd.safetensors")
    save_kronecker(sdxl, tmp_path / "sdxl.safetensors")
    for kind, path, words in (
        ("sd", "sdxl", "it is a Kronecker adapter for SDXL, the model is Stable Diffusion 1.x"),
        ("sdxl", "sd", "it is a Kronecker adapter for Stable Diffusion 1.x, the model is SDXL"),
    ):
        pipeline = plain_pipeline(kind)
        with pytest.raises(KroneckerError, match=f"does not fit this model: {words}"):
            load_kronecker(pipeline, tmp_path / f"{path}.safetensors")
        assert not kronecker_layers(pipeline.unet)


def test_a_file_without_metadata_is_told_by_the_width_of_its_text(tmp_path):
    from kron_formats.architectures import load_architecture

    model = load_architecture("sd15")
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file({f"{key}.lokr_w1": torch.ones(4, 64), f"{key}.lokr_w2": torch.ones(320, 16)}, tmp_path / "a.safetensors")
    with pytest.raises(KroneckerError, match="for Stable Diffusion 2.x, the model is Stable Diffusion 1.x; .* 1024 to"):
        load_kronecker(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda A, B: (B, A), r"A \(16, 1\), the file's metadata says \(4, 64\); A and B seem to be swapped"),
        (lambda A, B: (A.t(), B), r"says \(4, 64\); A seems to be transposed"),
        (lambda A, B: (A * torch.nan, B), "are not all finite"),
        (lambda A, B: (A, None), "does not hold two full factors"),
        (lambda A, B: (A, B.reshape(2, 8, 1)), r"lokr_w2 is of the shape \(2, 8, 1\)"),
        (lambda A, B: (A[..., None, None], B), r"lokr_w1 is of the shape \(4, 64, 1, 1\)"),
        (lambda A, B: (A, B.reshape(2, 8, 1, 1)), "holds factors for 512 to 8 features"),
        (lambda A, B: (None, None), r"1 missing \(lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q\)"),
    ],
)
def test_factors_that_cannot_be_right_are_refused(change, words, tmp_path):
    pipeline = adapted_pipeline("sd", 4, 64)
    save_kronecker(pipeline, tmp_path / "a.safetensors")
    metadata, tensors = metadata_of(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    if "mid_block" in words:
        key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
        del tensors[f"{key}.alpha"]
    pair = change(tensors.pop(f"{key}.lokr_w1"), tensors.pop(f"{key}.lokr_w2"))
    new = {f"{key}.lokr_w{i}": factor.contiguous() for i, factor in enumerate(pair, 1) if factor is not None}
    save_file({**tensors, **new}, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(KroneckerError, match=words):
        load_kronecker(plain_pipeline("sd"), tmp_path / "a.safetensors")


def test_a_file_without_one_of_its_parts_is_refused(sd, tmp_path):
    save_kronecker(sd, tmp_path / "a.safetensors")
    tensors = {name: t for name, t in load_file(tmp_path / "a.safetensors").items() if not name.startswith("lora_te")}
    save_file(tensors, tmp_path / "b.safetensors", metadata=metadata_of(tmp_path / "a.safetensors"))
    with pytest.raises(KroneckerError, match="the file holds 32 of its 40 layers"):
        load_kronecker(plain_pipeline("sd"), tmp_path / "b.safetensors")


def test_a_foreign_file_for_some_layers_is_saved_and_loads_again(tmp_path):
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{key}.lokr_w1": torch.ones(4, 4), f"{key}.lokr_w2": torch.ones(32, 32)}, tmp_path / "a.safetensors")
    unet = plain_pipeline("sd").unet
    load_kronecker(unet, tmp_path / "a.safetensors")
    save_kronecker(unet, tmp_path / "b.safetensors")
    again = plain_pipeline("sd").unet
    load_kronecker(again, tmp_path / "b.safetensors")
    assert kronecker_layers(again).keys() == kronecker_layers(unet).keys()


def test_a_layer_that_is_there_twice_is_refused(sdxl, tmp_path):
    save_kronecker(sdxl.unet, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    again = {name.replace("middle_block_1", "mid_block_attentions_0"): tensor for name, tensor in tensors.items()}
    save_file({**tensors, **{name: tensor.clone() for name, tensor in again.items()}}, tmp_path / "a.safetensors")
    with pytest.raises(KroneckerError, match="some layers are in it twice"):
        load_kronecker(plain_pipeline("sdxl"), tmp_path / "a.safetensors")
