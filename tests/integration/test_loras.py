"""LoRAs of other tools in base models: every layer has W + strength · ΔW as the file says, rounded once if merged."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from dreambooth.drawing.pipelines import (
    add_adapters,
    can_merge,
    load_adapted_pipeline,
    merge_adapters,
    prepare_drawing,
    read_adapters,
)
from dreambooth.options.base_model import AdaptedModelOptions
from kron_adapter import KroneckerError, kronecker_layers, save_kronecker
from kron_formats.names import find_layers, linear_modules
from methods.readers import READERS
from tests.adapters import adapted_pipeline, dense_weights, draw, plain_pipeline, quantised, worst_error

ENDS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1", "proj_in", "q_proj", "fc1")
RANKS, ALPHAS = (4, 4, 2, 8), (4.0, 1.0, None, 3.0)  # of the layers in turn; None: the file has no alpha
NAMES = {
    "kohya": (lambda layer: layer.kohya, "lora_down.weight", "lora_up.weight"),
    "sgm": (lambda layer: layer.native, "lora_down.weight", "lora_up.weight"),
    "diffusers": (lambda layer: layer.dotted, "lora_A.weight", "lora_B.weight"),
    "peft": (lambda layer: f"base_model.model.{layer.path}", "lora_A.weight", "lora_B.weight"),
}


def write_lora(folder, names, kind="sd", std=0.02):
    """Write a LoRA whose ranks and alphas differ from layer to layer; return (path, "component.layer" -> ΔW)."""
    torch.manual_seed(0)
    name_of, down_key, up_key = NAMES[names]
    tensors, deltas, patterns = {}, {}, {"rank_pattern": {}, "alpha_pattern": {}}
    layers = [layer for layer in find_layers(plain_pipeline(kind)) if layer.name.endswith(ENDS)]
    layers = [layer for layer in layers if layer.component == "unet" or names != "peft"]
    for number, layer in enumerate(layers):
        (d_out, d_in), rank, alpha = layer.size, RANKS[number % 4], ALPHAS[number // 2 % 4]
        down, up = torch.randn(rank, d_in) * std, torch.randn(d_out, rank) * std
        if names == "peft" or alpha is None:
            alpha = alpha or rank
            patterns["rank_pattern"][layer.path], patterns["alpha_pattern"][layer.path] = rank, alpha
        else:
            tensors[f"{name_of(layer)}.alpha"] = torch.tensor(alpha)
        tensors[f"{name_of(layer)}.{down_key}"] = down.unflatten(1, (-1, *layer.kernel)).contiguous()
        tensors[f"{name_of(layer)}.{up_key}"] = up[(..., *[None] * len(layer.kernel))].contiguous()
        deltas[layer.dotted] = alpha / rank * (up.double() @ down.double())
    path = folder / ("adapter_model.safetensors" if names == "peft" else f"{names}.safetensors")
    if names == "peft":
        (folder / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 1, **patterns}))
    save_file(tensors, path)
    return path, deltas


def options(base, *adapters, **other):
    return AdaptedModelOptions(pretrained_model_name_or_path=str(base), adapter=list(map(str, adapters)), **other)


def weights(pipeline):
    """Return "component.layer" -> weight as a matrix, in float64; kernels too."""
    return {
        layer.dotted: layer.module.weight.detach().double().flatten(1)
        for layer in find_layers(pipeline)
        if "lora_" not in layer.name
    }


@pytest.mark.parametrize("kind, names", [("sd", "kohya"), ("sd", "diffusers"), ("sd", "peft"), ("sdxl", "sgm")])
def test_every_layer_has_its_own_strength(kind, names, tmp_path, request, monkeypatch):
    path, deltas = write_lora(tmp_path, names, kind)
    base = request.getfixturevalue(f"tiny_{kind}")
    monkeypatch.chdir(tmp_path)
    pipeline = load_adapted_pipeline(options(base, f"{path.name}:0.5"), READERS)  # a bare name, in the current folder
    plain = weights(plain_pipeline(kind))
    x = torch.randn(3, 64)
    layer = pipeline.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v")
    exact = plain[name := "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v"] + 0.5 * deltas[name]
    torch.testing.assert_close(layer(x).double(), x.double() @ exact.T, rtol=0, atol=1e-5)

    assert merge_adapters(pipeline, READERS) == len(deltas)
    merged = weights(pipeline)
    assert merged.keys() == plain.keys()
    assert worst_error(merged, {name: plain[name] + 0.5 * delta for name, delta in deltas.items()}) < 4e-8
    assert all(torch.equal(merged[name], plain[name]) for name in plain.keys() - deltas.keys())


def test_a_file_of_loras_and_kronecker_factors_is_used_whole(tmp_path, tiny_sd):
    plain = weights(plain_pipeline("sd"))
    layers = {layer.dotted: layer for layer in find_layers(plain_pipeline("sd"))}
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    first, second = layers[f"{block}.attn1.to_q"], layers[f"{block}.attn2.to_out.0"]
    up, down, A, B = torch.randn(128, 2), torch.randn(2, 128), torch.randn(8, 8), torch.randn(16, 16)
    lora = {f"{first.kohya}.lora_up.weight": up, f"{first.kohya}.lora_down.weight": down}
    save_file(lora | {f"{second.kohya}.lokr_w1": A, f"{second.kohya}.lokr_w2": B}, tmp_path / "both.safetensors")
    pipeline = load_adapted_pipeline(options(tiny_sd, tmp_path / "both.safetensors"), READERS)
    assert merge_adapters(pipeline, READERS) == 2
    exact = {
        first.dotted: plain[first.dotted] + up.double() @ down.double(),
        second.dotted: plain[second.dotted] + torch.kron(A.double(), B.double()),
    }
    assert worst_error(weights(pipeline), exact) < 1e-5


@pytest.fixture
def pair(tmp_path, tiny_sd):
    """A LoRA and a Kronecker adapter on the same layers, and the exact sum of both with the weights."""
    lora, deltas = write_lora(tmp_path, "kohya")
    kronecker = adapted_pipeline("sd", 4, 64)
    save_kronecker(kronecker, tmp_path / "kronecker.safetensors")
    exact = weights(plain_pipeline("sd")) | dense_weights(kronecker)
    return lora, tmp_path / "kronecker.safetensors", {n: w + deltas.get(n, 0) for n, w in exact.items()}


def test_loras_and_kronecker_adapters_are_merged_in_one_rounding(pair, tiny_sd):
    lora, kronecker, exact = pair
    pipeline = load_adapted_pipeline(options(tiny_sd, kronecker, lora), READERS)
    merge_adapters(pipeline, READERS)
    merged, largest = weights(pipeline), max(weight.abs().max().item() for weight in exact.values())
    assert merged.keys() == exact.keys()  # no layer of an adapter is left
    assert worst_error(merged, exact) < 2**-24 * largest * 1.1  # the LoRA's own product is in fp32


@pytest.mark.parametrize("too_strong", ["lora", "kronecker"])
def test_a_merge_that_overflows_is_refused_and_changes_nothing(too_strong, pair, tiny_sd):
    lora, kronecker, _ = pair
    strengths = {"lora": 1.0, "kronecker": 1.0, too_strong: 1e9}
    config = options(tiny_sd, f"{lora}:{strengths['lora']}", f"{kronecker}:{strengths['kronecker']}", dtype="fp16")
    pipeline = load_adapted_pipeline(config, READERS)
    before = {name: weight.clone() for name, weight in weights(pipeline).items()}
    with pytest.raises(KroneckerError, match=r"unet\..*: the merged weight is not finite in torch.float16"):
        prepare_drawing(pipeline, READERS, config)
    after = weights(pipeline)
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())


@pytest.mark.parametrize("kind", ["4-bit", "8-bit", "float8"])
def test_what_cannot_be_merged_draws_unmerged(kind, pair, tiny_sd):
    lora, kronecker, _ = pair
    config = options(tiny_sd, kronecker, lora)
    adapters, pipeline = read_adapters(config, READERS), plain_pipeline("sd")
    if kind == "float8":
        pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    else:
        for path, _, linear in linear_modules(pipeline.unet):
            if ".to_" in path:
                pipeline.unet.set_submodule(path, quantised(linear, kind))
    base = draw(pipeline)
    add_adapters(pipeline, adapters, READERS)
    assert not can_merge(pipeline, READERS)
    prepare_drawing(pipeline, READERS, config)
    pipeline.set_progress_bar_config(disable=True)
    assert len(kronecker_layers(pipeline.unet)) == 32 and (draw(pipeline) - base).abs().max() > 0.01
    with pytest.raises(KroneckerError, match="cannot take a merged delta"):
        merge_adapters(pipeline, READERS)


def test_a_base_model_that_was_saved_quantised_is_matched_by_its_architecture(pair, tiny_sd, tmp_path):
    shutil.copytree(tiny_sd, tmp_path / "base")
    path = tmp_path / "base" / "unet" / "config.json"
    quantised_by = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantised_by}))
    (adapter,) = read_adapters(options(tmp_path / "base", pair[1]), READERS)
    assert len(adapter.matched.layers) == 32


@pytest.mark.parametrize("entry, scale", [(":nan", 1.0), (":inf", 1.0), (":1e300", 1e300)])
def test_a_strength_that_is_not_a_number_is_refused_before_weights_are_read(entry, scale, pair, tiny_sd):
    for path in pair[:2]:
        with pytest.raises(KroneckerError, match=rf"--adapter {path}{entry}: the strength is (nan|inf)"):
            read_adapters(options(tiny_sd, f"{path}{entry}", adapter_scale=scale), READERS)
