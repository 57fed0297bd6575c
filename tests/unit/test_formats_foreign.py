"""Files of other tools: the names they use, their rules of strength, what they adapt beside attention."""

import json

import pytest
import torch
from peft import LoKrConfig, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from kron_adapter import KroneckerError, kronecker_layers, load_kronecker, merge_kronecker, save_kronecker
from kron_formats.architectures import load_architecture
from kron_formats.names import find_layers, spelling_index
from kron_formats.reading import read_adapter
from scripts import convert
from tests.adapters import plain_pipeline


def run(*arguments):
    convert.main([str(argument) for argument in arguments])


# ---- names ----


@pytest.mark.parametrize(
    "architecture, name, files",
    [
        (
            "sdxl",
            "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0",
            {
                "ai-toolkit": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_out_0",
                "LyCORIS": "lycoris_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_out_0",
                "sd-scripts, OneTrainer kohya": "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_out_0",
                "ComfyUI": "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_out.0",
                "OneTrainer original": "input_blocks.4.1.transformer_blocks.1.attn2.to_out.0",
                "OneTrainer OMI": "unet.input_blocks.4.1.transformer_blocks.1.attn2.to_out.0",
                "diffusers": "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0",
                "peft": "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0",
                "the paper's code": "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.processor.to_out_lora",
            },
        ),
        (
            "sd15",
            "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
            {
                "ComfyUI": "diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj",
                "ComfyUI, flat": "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj",
                "the paper's code": "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.lora_layer",
            },
        ),
        (
            "sdxl",
            "text_encoder.text_model.encoder.layers.3.self_attn.q_proj",
            {
                "ai-toolkit, OneTrainer": "lora_te1_text_model_encoder_layers_3_self_attn_q_proj",
                "ComfyUI": "text_encoders.clip_l.transformer.text_model.encoder.layers.3.self_attn.q_proj",
                "OneTrainer OMI": "clip_l.text_model.encoder.layers.3.self_attn.q_proj",
                "the paper's code": "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_linear_layer",
            },
        ),
        (
            "sdxl",
            "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj",
            {
                "ai-toolkit, OneTrainer": "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
                "ComfyUI": "text_encoders.clip_g.transformer.text_model.encoder.layers.31.self_attn.out_proj",
                "OneTrainer OMI": "clip_g.text_model.encoder.layers.31.self_attn.out_proj",
            },
        ),
        (
            "sd21",
            "text_encoder.text_model.encoder.layers.22.self_attn.k_proj",
            {
                "ai-toolkit, OneTrainer": "lora_te_text_model_encoder_layers_22_self_attn_k_proj",
                "ComfyUI": "text_encoders.clip_h.transformer.text_model.encoder.layers.22.self_attn.k_proj",
            },
        ),
    ],
)
def test_every_tool_s_name_means_the_layer(architecture, name, files):
    index = spelling_index(find_layers(load_architecture(architecture)))
    assert {tool: index[spelling].dotted for tool, spelling in files.items()} == dict.fromkeys(files, name)


@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_", "unet.", ""])
def test_names_of_other_tools_mean_the_same_layer(prefix, tmp_path):
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    key = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
    save_file({f"{key}.lokr_w1": torch.ones(4, 4), f"{key}.lokr_w2": torch.ones(32, 32)}, tmp_path / "a.safetensors")
    unet = plain_pipeline("sd").unet
    load_kronecker(unet, tmp_path / "a.safetensors")
    assert unet.get_submodule(name).delta_weight.min() == 1


def test_the_dot_that_onetrainer_s_first_files_left_in_kohya_s_names_is_read(tmp_path):
    parent = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1"
    tensors = {f"{parent}.to_q.lokr_w1": torch.ones(4, 4), f"{parent}.to_q.lokr_w2": torch.ones(32, 32)}
    save_file({**tensors, f"{parent}_to_q.alpha": torch.tensor(4.0)}, tmp_path / "a.safetensors")
    unet = plain_pipeline("sd").unet
    load_kronecker(unet, tmp_path / "a.safetensors")
    assert unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.delta_weight.min() == 1


# ---- strengths ----


def test_low_rank_factors_of_lycoris_are_multiplied_out_with_their_alpha(tmp_path):
    torch.manual_seed(0)
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    w1, left, right = torch.randn(4, 4), torch.randn(32, 3), torch.randn(3, 32)
    tensors = {f"{key}.lokr_w1": w1, f"{key}.lokr_w2_a": left, f"{key}.lokr_w2_b": right}
    save_file({**tensors, f"{key}.alpha": torch.tensor(1.5)}, tmp_path / "a.safetensors")
    unet = plain_pipeline("sd").unet
    load_kronecker(unet, tmp_path / "a.safetensors")
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    torch.testing.assert_close(layer.delta_weight, torch.kron(w1, left @ right) * 1.5 / 3)


def test_alpha_scales_a_low_rank_first_factor_too_and_full_factors_never(tmp_path):
    """The rule of LyCORIS, ComfyUI, ai-toolkit and OneTrainer: alpha / rank where a factor is a product, else 1."""
    torch.manual_seed(0)
    parent = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to"
    left, right, w2 = torch.randn(4, 2), torch.randn(2, 4), torch.randn(32, 32)
    tensors = {
        f"{parent}_q.lokr_w1_a": left, f"{parent}_q.lokr_w1_b": right, f"{parent}_q.lokr_w2": w2,
        f"{parent}_q.alpha": torch.tensor(6.0),
        f"{parent}_k.lokr_w1": left @ right, f"{parent}_k.lokr_w2": w2.clone(), f"{parent}_k.alpha": torch.tensor(6.0),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    unet = plain_pipeline("sd").unet
    load_kronecker(unet, tmp_path / "a.safetensors")
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    torch.testing.assert_close(attention.to_q.delta_weight, torch.kron(left @ right, w2) * 6 / 2)
    torch.testing.assert_close(attention.to_k.delta_weight, torch.kron(left @ right, w2))


def test_the_strength_of_a_peft_adapter_is_alpha_over_r_and_has_to_be_known(tmp_path):
    key = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{key}.lokr_w1": torch.ones(4, 4), f"{key}.lokr_w2": torch.ones(32, 32)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(KroneckerError, match="strength is unknown: adapter_config.json beside it"):
        load_kronecker(plain_pipeline("sd").unet, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": 32, "alpha": 8}))
    unet = plain_pipeline("sd").unet
    load_kronecker(unet, tmp_path)
    assert unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.delta_weight.max() == 0.25
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 32}))
    with pytest.raises(KroneckerError, match="attn1.to_q is unknown: peft's configuration has no 'lora_alpha'"):
        load_kronecker(plain_pipeline("sd").unet, tmp_path)


PEFT_ADAPTERS = {
    "full": LoKrConfig(r=64, alpha=16, decompose_factor=4, target_modules=["to_q", "to_v"]),
    "low-rank": LoKrConfig(r=2, alpha=6, decompose_factor=8, decompose_both=True, target_modules=["to_q", "to_v"]),
    "patterns": LoKrConfig(r=4, alpha=6, rank_pattern={"to_q": 64}, alpha_pattern={"attn1.to_v": 3, "to_q": 5},
                           target_modules=["to_q", "to_v"]),
    "convolutions": LoKrConfig(r=64, alpha=16, decompose_factor=4, target_modules=["to_q", "proj_in", "conv1"]),
}  # fmt: skip


def peft_deltas(model) -> dict[str, torch.Tensor]:
    return {
        path.removeprefix("base_model.model."): module.get_delta_weight(module.active_adapters[0]).detach()
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def randomise(model) -> None:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lokr_" in name or "lora_" in name:
            nn.init.normal_(parameter, std=0.1)


def assert_same_deltas(unet, deltas):
    layers = {path: layer.delta_weight for path, layer in kronecker_layers(unet).items()}
    assert layers.keys() == deltas.keys()
    for path, delta in deltas.items():
        torch.testing.assert_close(layers[path].view_as(delta), delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", PEFT_ADAPTERS.values(), ids=PEFT_ADAPTERS)
def test_what_peft_saves_is_read_with_peft_s_strength(config, tmp_path):
    model = get_peft_model(plain_pipeline("sd").unet, config)
    randomise(model)
    deltas = peft_deltas(model)
    model.save_pretrained(tmp_path)
    unet = plain_pipeline("sd").unet
    load_kronecker(unet, tmp_path)
    assert_same_deltas(unet, deltas)


@pytest.mark.parametrize("config", PEFT_ADAPTERS.values(), ids=PEFT_ADAPTERS)
def test_what_diffusers_saves_is_read_with_the_strength_in_its_metadata(config, tmp_path):
    pipe = plain_pipeline("sd")
    pipe.unet.add_adapter(config, "default")
    randomise(pipe.unet)
    pipe.unet.save_lora_adapter(tmp_path, weight_name="a.safetensors")
    unet = plain_pipeline("sd").unet
    load_kronecker(unet, tmp_path / "a.safetensors")
    assert_same_deltas(unet, peft_deltas(pipe.unet))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_of_a_pipeline_has_the_strength_in_its_metadata(rslora, tiny_sd, tmp_path):
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    pipe = plain_pipeline("sd")
    targets = ["to_q", "proj_in"]
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=12, use_rslora=rslora, target_modules=targets), "default")
    randomise(pipe.unet)
    pipe.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet), weight_name="a.safetensors",
        **_collate_lora_metadata({"unet": pipe.unet}),
    )  # fmt: skip
    deltas = peft_deltas(pipe.unet)
    layers = read_adapter(tmp_path / "a.safetensors").layers
    entries = {name.removeprefix("unet."): entry for name, entry in layers.items()}
    assert entries.keys() == deltas.keys()
    for path, delta in deltas.items():
        torch.testing.assert_close(entries[path].dense().float().view_as(delta), delta)
    run(tmp_path / "a.safetensors", "--to", "fused", "--output", tmp_path / "fused",
        "--pretrained_model_name_or_path", tiny_sd)  # fmt: skip
    fused = load_file(tmp_path / "fused" / "unet" / "diffusion_pytorch_model.safetensors")
    base = dict(plain_pipeline("sd").unet.named_parameters())
    for path, delta in deltas.items():
        torch.testing.assert_close(fused[f"{path}.weight"], base[f"{path}.weight"].detach() + delta)


# ---- LyCORIS itself ----


@pytest.mark.parametrize(
    "options",
    [{"factor": 4, "full_matrix": True}, {"factor": 8}, {"factor": -1, "decompose_both": True}],
    ids=["full", "low-rank", "both low-rank"],
)
def test_what_lycoris_trains_on_attention_and_convolutions_is_read(options, tmp_path):
    wrapper = pytest.importorskip("lycoris.wrapper")
    unet = plain_pipeline("sd").unet
    wrapper.LycorisNetwork.apply_preset({"target_module": ["Transformer2DModel", "ResnetBlock2D"]})
    network = wrapper.create_lycoris(
        unet, 1.0, linear_dim=2, linear_alpha=3.0, algo="lokr", conv_dim=2, conv_alpha=1.0, use_tucker=False, **options
    )
    network.apply_to()
    randomise(network)
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {"ss_network_module": "lycoris.kohya"})
    deltas = {module.lora_name: module.get_weight(module.shape).detach() for module in network.loras}
    assert any(delta.dim() == 4 for delta in deltas.values()), "no convolutions: the test no longer tells"
    client = plain_pipeline("sd").unet
    load_kronecker(client, tmp_path / "a.safetensors")
    layers = {f"lycoris_{path.replace('.', '_')}": layer for path, layer in kronecker_layers(client).items()}
    assert layers.keys() == deltas.keys()
    for name, delta in deltas.items():
        torch.testing.assert_close(layers[name].delta_weight.view_as(delta), delta, rtol=1e-5, atol=1e-6)


def test_tucker_s_kernels_are_refused_by_name(tmp_path):
    key = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {f"{key}.lokr_w1": torch.ones(4, 4), f"{key}.lokr_w2_a": torch.ones(2, 16),
               f"{key}.lokr_w2_b": torch.ones(2, 16), f"{key}.lokr_t2": torch.ones(2, 2, 3, 3)}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(KroneckerError, match="it is a LoKr file with Tucker-decomposed factors of convolutions"):
        load_kronecker(plain_pipeline("sd").unet, tmp_path / "a.safetensors")


# ---- convolutions ----


@pytest.fixture
def with_convolutions(tmp_path):
    """A file for an attention projection, kernels of 1 and 3 px, and a downsampler; and {path: dense kernel}."""
    torch.manual_seed(0)
    unet, tensors, deltas = plain_pipeline("sd").unet, {}, {}
    for path in ("mid_block.attentions.0.proj_in", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
                 "mid_block.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv"):  # fmt: skip
        weight = unet.get_submodule(path).weight
        A, B = torch.randn(4, 8) * 0.1, torch.randn(weight.shape[0] // 4, weight.shape[1] // 8, *weight.shape[2:]) * 0.1
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors |= {f"{name}.lokr_w1": A, f"{name}.lokr_w2": B, f"{name}.alpha": torch.tensor(1.0)}
        deltas[path] = torch.kron(A[(..., *[None] * (B.dim() - 2))], B)
    save_file(tensors, tmp_path / "conv.safetensors")
    return tmp_path / "conv.safetensors", deltas


def assert_adds(unet, deltas):
    """The UNet draws what the base draws with the dense deltas in its weights."""
    base = plain_pipeline("sd").unet
    for path, delta in deltas.items():
        base.get_submodule(path).weight.data += delta
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor(7), torch.randn(1, 77, 64)
    with torch.no_grad():
        expected = base(x, t, text).sample
        torch.testing.assert_close(unet(x, t, text).sample, expected, rtol=1e-4, atol=1e-4)
        assert (plain_pipeline("sd").unet(x, t, text).sample - expected).abs().max() > 0.01


def test_convolutions_load_merge_and_come_back(with_convolutions, tmp_path):
    path, deltas = with_convolutions
    unet = plain_pipeline("sd").unet
    load_kronecker(unet, path, 0.25, "quarter")
    load_kronecker(unet, path, 0.75, "rest")
    assert_adds(unet, deltas)
    save_kronecker(unet, tmp_path / "again.safetensors", name="rest")
    first, second = load_file(path), load_file(tmp_path / "again.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    load_kronecker(plain_pipeline("sd").unet, tmp_path / "again.safetensors")
    merge_kronecker(unet)
    assert_adds(unet, deltas)


def test_convolutions_go_into_loras_and_attached_adapters(with_convolutions, tiny_sd, tmp_path):
    from kron_adapter import attach_to_diffusers

    path, deltas = with_convolutions
    base = ("--pretrained_model_name_or_path", tiny_sd)
    run(path, "--to", "lora", "--output", tmp_path / "lora.safetensors", *base)
    lora, attached = plain_pipeline("sd"), plain_pipeline("sd")
    lora.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert_adds(lora.unet, deltas)
    attach_to_diffusers(attached, path)
    assert_adds(attached.unet, deltas)
    with pytest.raises(KroneckerError, match="downsamplers.0.conv, the layer is a convolution"):
        run(path, "--to", "diffusers", "--output", tmp_path / "d.safetensors", *base)


# ---- LoRAs ----


def test_a_foreign_lora_needs_factors(tmp_path, tiny_sd, capsys):
    torch.manual_seed(0)
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{key}.lora_down.weight": torch.randn(2, 128), f"{key}.lora_up.weight": torch.randn(128, 2)}
    save_file({**tensors, f"{key}.alpha": torch.tensor(2.0)}, tmp_path / "lora.safetensors")
    options = ("--to", "native", "--output", tmp_path / "n.safetensors", "--pretrained_model_name_or_path", tiny_sd)
    with pytest.raises(ValueError, match="--kron_a1 and --kron_a2"):
        run(tmp_path / "lora.safetensors", *options)
    run(tmp_path / "lora.safetensors", *options, "--kron_a1", 8, "--kron_a2", 8)
    assert "largest relative error 0." in capsys.readouterr().out
    assert read_adapter(tmp_path / "n.safetensors").layers[key].A.shape == (8, 8)
