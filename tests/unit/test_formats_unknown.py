"""Models for which adapter files have no names: refused with what is known, never left out or written as others."""

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import T5Config, T5EncoderModel

from kron_adapter import (
    KroneckerError,
    attach_to_diffusers,
    disable_kronecker,
    inject_kronecker,
    kronecker_layers,
    load_kronecker,
    merge_kronecker,
    remove_kronecker,
    save_kronecker,
    set_kronecker_scale,
    unmerge_kronecker,
)
from kron_formats.families import FAMILIES, TEXT_ENCODER_TARGETS
from kron_formats.names import component_of, components, family, find_layers, is_kohya
from kron_formats.reading import read_adapter
from tests.adapters import adapted_pipeline, plain_pipeline

KNOWN = r"unet \(UNet2DConditionModel\); text_encoder \(.*\); text_encoder_2 \(.*Pass only those"


class Pipeline:
    """What diffusers' pipelines have in common."""

    def __init__(self, **parts):
        self.components = parts


@pytest.fixture
def dit():
    model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8)
    inject_kronecker(model, 4, 4)
    return model


def t5():
    return T5EncoderModel(T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def unknown_models(dit):
    unet, clip = plain_pipeline("sd").unet, plain_pipeline("sd").text_encoder
    unconditional = UNet2DModel(block_out_channels=(32,), down_block_types=("AttnDownBlock2D",),
                                up_block_types=("AttnUpBlock2D",))  # fmt: skip
    compiled = torch.compile(dit, backend="eager")
    in_peft = get_peft_model(unconditional, LoraConfig(r=1, target_modules=["to_q"]))
    return {
        "DiTTransformer2DModel as unet": dit,
        "DiTTransformer2DModel as  unet": compiled,
        "UNet2DModel as unet": in_peft,
        "CLIPTextModel as unet": clip,
        "T5EncoderModel as text_encoder": {"unet": unet, "text_encoder": t5()},
        "UNet2DConditionModel as text_encoder": {"text_encoder": unet},
        r"transformer \(DiTTransformer2DModel\)": {"transformer": dit},
        r"transformer \(DiTTransformer2DModel\), text_encoder_3 \(T5": Pipeline(
            transformer=dit, text_encoder=clip, text_encoder_3=t5(), scheduler=object()
        ),
        r"denoiser \(UNet2DConditionModel\)": {"unet": unet, "denoiser": unet},
        "a dict with no models": {},
        "a Pipeline with vae": Pipeline(vae=plain_pipeline("sd").vae, unet=None),
    }


def test_models_without_names_are_refused_everywhere_with_what_is_known(dit, tmp_path):
    save_kronecker(adapted_pipeline("sd", 4, 64), tmp_path / "sd.safetensors")
    for words, models in unknown_models(dit).items():
        calls = [
            lambda models=models: load_kronecker(models, tmp_path / "sd.safetensors"),
            lambda models=models: find_layers(models),
            lambda models=models: components(models),
        ]
        if not isinstance(models, nn.Module):
            calls.append(lambda models=models: attach_to_diffusers(models, tmp_path / "sd.safetensors"))
        for call in calls:
            with pytest.raises(KroneckerError, match=f"{words.replace('  ', ' ')}.*{KNOWN}"):
                call()


def test_their_adapters_are_not_written(dit, tmp_path):
    clip = plain_pipeline("sd").text_encoder
    inject_kronecker(clip, 4, 4, TEXT_ENCODER_TARGETS)
    for models in (dit, {"transformer": dit}, Pipeline(transformer=dit), {"unet": dit}, clip):
        with pytest.raises(KroneckerError, match=f"no names for the layers of .*{KNOWN}"):
            save_kronecker(models, tmp_path / "a.safetensors")
    save_kronecker({"text_encoder": clip}, tmp_path / "a.safetensors")
    assert all(name.startswith("lora_te_") for name in read_adapter(tmp_path / "a.safetensors").layers)


def test_an_adapter_beside_those_with_names_is_not_left_out(tmp_path):
    pipeline = adapted_pipeline("sd", 4, 64)
    inject_kronecker(pipeline.vae, 4, 4, ("to_q",))
    with pytest.raises(KroneckerError, match="no name for 2 adapted layers, for example vae.*to_q; nothing was"):
        save_kronecker(pipeline, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    remove_kronecker({"vae": pipeline.vae})
    save_kronecker(pipeline, tmp_path / "a.safetensors")


def test_two_layers_with_one_name_in_the_file_are_not_written(tmp_path):
    model = nn.ModuleDict({"a_b": nn.ModuleDict({"to_q": nn.Linear(4, 4)}),
                           "a": nn.ModuleDict({"b": nn.ModuleDict({"to_q": nn.Linear(4, 4)})})})  # fmt: skip
    inject_kronecker(model, 2, 2, ("to_q",))
    with pytest.raises(KroneckerError, match="unet.a_b.to_q and unet.a.b.to_q would both be lora_unet_a_b_to_q"):
        save_kronecker(model, tmp_path / "a.safetensors")


def test_in_memory_any_model_can_be_adapted(dit):
    for models in (dit, {"transformer": dit}, Pipeline(transformer=dit, scheduler=None)):
        layers = kronecker_layers(dit).values()
        set_kronecker_scale(models, 0.5)
        assert layers and all(layer.scale == 0.5 for layer in layers)
        with disable_kronecker(models):
            assert not any(layer.enabled for layer in layers)
        merge_kronecker(models)
        assert all(layer.merged for layer in layers)
        unmerge_kronecker(models)
    remove_kronecker({"transformer": dit})
    assert not kronecker_layers(dit)


def test_what_is_neither_model_nor_pipeline_is_named():
    with pytest.raises(KroneckerError, match="a str is not a model"):
        components("unet")


@pytest.mark.parametrize("conditioning", ["text", "image", "text_image"])
def test_a_unet_that_is_conditioned_as_no_family_s_is_refused(conditioning):
    unet = plain_pipeline("sd").unet
    unet.register_to_config(addition_embed_type=conditioning)
    for call in (family, find_layers):
        with pytest.raises(
            KroneckerError, match=f"addition_embed_type '{conditioning}' .*Stable Diffusion 1.x, .*SDXL"
        ):
            call(unet)


def test_a_text_encoder_that_the_family_lacks_is_refused():
    pipeline = plain_pipeline("sd")
    with pytest.raises(KroneckerError, match="Stable Diffusion 1.x has no text_encoder_2"):
        find_layers({"unet": pipeline.unet, "text_encoder_2": pipeline.text_encoder})


def test_a_folder_of_peft_s_with_other_components_is_refused(tmp_path):
    for part in ("unet", "transformer"):
        (tmp_path / part).mkdir()
        save_file({"x.to_q.lokr_w1": torch.ones(2, 2)}, tmp_path / part / "adapter_model.safetensors")
    with pytest.raises(KroneckerError, match="has adapters for transformer, .* unet, text_encoder, text_encoder_2"):
        read_adapter(tmp_path)


# ---- the records ----


def test_no_two_families_are_told_by_the_same_sign():
    for sign in ("name", "title", "base_version", "context_width", "architecture", "published"):
        assert len({getattr(record, sign) for record in FAMILIES}) == len(FAMILIES)
    places = [encoder.checkpoint for record in FAMILIES for encoder in record.text_encoders]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_name_in_a_file_begins_as_its_component_s_do(kind):
    for layer in find_layers(plain_pipeline(kind)):
        for name in (layer.native, layer.kohya, layer.dotted):
            assert component_of(name) == layer.component
        assert is_kohya(layer.native) and is_kohya(layer.kohya) and not is_kohya(layer.dotted)
    assert component_of("lora_transformer_x") is None and not is_kohya("lora_transformer_x")
