"""The names in our files, against tables written out by hand: what ComfyUI, A1111, Forge and sd-scripts look up."""

import pytest
from torch import nn

from kron_formats.architectures import load_architecture
from kron_formats.families import SD1, SD2, SDXL
from kron_formats.names import family, find_layers, linear_modules, match_target, sgm_name, spelling_index

PROJECTIONS = [f"attn{i}_to_{p}" for i in (1, 2) for p in ("q", "k", "v", "out_0")]
TEXT_PROJECTIONS = ("k_proj", "v_proj", "q_proj", "out_proj")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", *TEXT_PROJECTIONS)

# place in the UNet -> transformer blocks there
SD_BLOCKS = {
    "down_blocks_0_attentions_0": 1, "down_blocks_0_attentions_1": 1,
    "down_blocks_1_attentions_0": 1, "down_blocks_1_attentions_1": 1,
    "down_blocks_2_attentions_0": 1, "down_blocks_2_attentions_1": 1,
    "mid_block_attentions_0": 1,
    "up_blocks_1_attentions_0": 1, "up_blocks_1_attentions_1": 1, "up_blocks_1_attentions_2": 1,
    "up_blocks_2_attentions_0": 1, "up_blocks_2_attentions_1": 1, "up_blocks_2_attentions_2": 1,
    "up_blocks_3_attentions_0": 1, "up_blocks_3_attentions_1": 1, "up_blocks_3_attentions_2": 1,
}  # fmt: skip
SDXL_SGM_BLOCKS = {
    "input_blocks_4_1": 2, "input_blocks_5_1": 2, "input_blocks_7_1": 10, "input_blocks_8_1": 10,
    "middle_block_1": 10,
    "output_blocks_0_1": 10, "output_blocks_1_1": 10, "output_blocks_2_1": 10,
    "output_blocks_3_1": 2, "output_blocks_4_1": 2, "output_blocks_5_1": 2,
}  # fmt: skip
SDXL_BLOCKS = {
    "down_blocks_1_attentions_0": 2, "down_blocks_1_attentions_1": 2,
    "down_blocks_2_attentions_0": 10, "down_blocks_2_attentions_1": 10,
    "mid_block_attentions_0": 10,
    "up_blocks_0_attentions_0": 10, "up_blocks_0_attentions_1": 10, "up_blocks_0_attentions_2": 10,
    "up_blocks_1_attentions_0": 2, "up_blocks_1_attentions_1": 2, "up_blocks_1_attentions_2": 2,
}  # fmt: skip


def unet_names(blocks):
    return {
        f"lora_unet_{block}_transformer_blocks_{i}_{projection}"
        for block, depth in blocks.items()
        for i in range(depth)
        for projection in PROJECTIONS
    }


def text_names(prefix, layers):
    return {
        f"{prefix}_text_model_encoder_layers_{i}_self_attn_{projection}"
        for i in range(layers)
        for projection in TEXT_PROJECTIONS
    }


def adapted_layers(architecture):
    return [layer for layer in find_layers(load_architecture(architecture)) if match_target(layer.name, TARGETS)]


@pytest.mark.parametrize(
    "architecture, unet, text, unet_count",
    [
        ("sd15", unet_names(SD_BLOCKS), text_names("lora_te", 12), 128),
        ("sd21", unet_names(SD_BLOCKS), text_names("lora_te", 23), 128),
        ("sdxl", unet_names(SDXL_SGM_BLOCKS), text_names("lora_te1", 12) | text_names("lora_te2", 32), 560),
    ],
)
def test_native_names_are_those_that_the_tools_know(architecture, unet, text, unet_count):
    assert len(unet) == unet_count
    assert {layer.native for layer in adapted_layers(architecture)} == unet | text


def test_sdxl_has_diffusers_block_names_too_and_both_mean_the_same_layer():
    layers = adapted_layers("sdxl")
    assert {layer.kohya for layer in layers if layer.component == "unet"} == unet_names(SDXL_BLOCKS)
    pairs = {layer.kohya: layer.native for layer in layers}
    tail = "transformer_blocks_1_attn2_to_k"
    for ours, sgm in (
        ("down_blocks_1_attentions_1", "input_blocks_5_1"),
        ("down_blocks_2_attentions_0", "input_blocks_7_1"),
        ("mid_block_attentions_0", "middle_block_1"),
        ("up_blocks_0_attentions_2", "output_blocks_2_1"),
        ("up_blocks_1_attentions_0", "output_blocks_3_1"),
    ):
        assert pairs[f"lora_unet_{ours}_{tail}"] == f"lora_unet_{sgm}_{tail}"


@pytest.mark.parametrize("architecture, record", [("sd15", SD1), ("sd21", SD2), ("sdxl", SDXL)])
def test_no_two_layers_share_a_name_and_the_family_is_known(architecture, record):
    models = load_architecture(architecture)
    layers = find_layers(models)
    assert family(models) is record and record.architecture == architecture
    for spelling in ("native", "kohya", "dotted"):
        assert len({getattr(layer, spelling) for layer in layers}) == len(layers)
    index = spelling_index(layers)
    assert all(index[layer.native] is index[layer.kohya] is index[layer.dotted] is layer for layer in layers)


@pytest.mark.parametrize(
    "architecture, name, sgm",
    [
        ("sdxl", "down_blocks.1.resnets.0.time_emb_proj", "input_blocks.4.0.emb_layers.1"),
        ("sdxl", "down_blocks.1.resnets.0.conv_shortcut", "input_blocks.4.0.skip_connection"),
        ("sdxl", "down_blocks.1.downsamplers.0.conv", "input_blocks.6.0.op"),
        ("sdxl", "up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("sdxl", "add_embedding.linear_1", "label_emb.0.0"),
        ("sdxl", "mid_block.resnets.1.conv1", "middle_block.2.in_layers.2"),
        ("sd15", "down_blocks.0.attentions.0.proj_in", "input_blocks.1.1.proj_in"),
        ("sd15", "up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        ("sd15", "up_blocks.3.resnets.2.conv2", "output_blocks.11.0.out_layers.3"),
    ],
)
def test_layers_outside_attentions_have_names_in_the_sgm_tree_too(architecture, name, sgm):
    assert sgm_name(name, load_architecture(architecture)["unet"]) == sgm


def test_a_name_is_the_path_without_what_wraps_the_layer_or_the_model():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.ModuleDict({"base": nn.Linear(2, 2)})

    model = nn.ModuleDict({"_orig_mod": nn.ModuleDict({"to_out": nn.ModuleList([Wrapped()]), "base": nn.Linear(2, 2)})})
    names = {path: name for path, name, _ in linear_modules(model)}
    assert names == {"_orig_mod.to_out.0.base_layer.base": "to_out.0", "_orig_mod.base": "base"}
