"""Adapter files in the tools that people use: diffusers, peft and LyCORIS themselves, against W + torch.kron(A, B)."""

import contextlib
import io
import textwrap

import pytest
import torch
from accelerate import cpu_offload_with_hook
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from dreambooth.options.base_model import AdaptedModelOptions
from kron_adapter import KroneckerError, attach_to_diffusers, load_kronecker, save_kronecker
from kron_formats.names import components, find_layers
from scripts import convert
from tests.adapters import (
    KEYS_AND_VALUES,
    adapted_pipeline,
    dense_weights,
    draw,
    plain_pipeline,
    plain_weights,
    worst_error,
    write_reference_file,
)

EXACT = 2e-8  # W and ΔW as the client holds them, added in float64
FUSED = 4e-8  # the same after one addition in fp32, where weights up to 0.5 are 6e-8 apart
KINDS = ("sd", "sdxl")


def make(kind, a1, a2, tmp_path, text=True, factors=None):
    """Return a trained pipeline, its file, and the exact weights. Deltas are small, so that fp32 rounds below EXACT."""
    pipeline = adapted_pipeline(kind, a1, a2, text=text, strength=0.002, factors=factors)
    save_kronecker(pipeline, tmp_path / "native.safetensors", {"instance_prompt": "a photo of sks dog"})
    return pipeline, tmp_path / "native.safetensors", dense_weights(pipeline)


def run_convert(*arguments) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        convert.main([str(argument) for argument in arguments])
    return output.getvalue()


def base_of(kind, request):
    return request.getfixturevalue(f"tiny_{kind}")


def peft_weights(pipeline) -> dict[str, torch.Tensor]:
    """Return "component.layer" -> W + what peft adds to it, in float64."""
    weights = {}
    for component, model in components(pipeline).items():
        for path, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                name = path.removeprefix("base_model.model.")
                delta = sum(module.get_delta_weight(adapter).double() for adapter in module.active_adapters)
                weights[f"{component}.{name}"] = module.get_base_layer().weight.detach().double() + delta
    return weights


def assert_loaded(client, trained, exact):
    """Every effective weight is exact, and the image is the trained one's."""
    weights = peft_weights(client)
    assert weights.keys() == exact.keys()
    assert worst_error(weights, exact) < EXACT
    assert (draw(client) - draw(trained)).abs().max() < 1e-4


# ---- diffusers ----


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_square_factors_by_the_snippet_that_convert_prints(kind, tmp_path, request):
    trained, path, exact = make(kind, 8, 8, tmp_path)
    output = run_convert(
        path, "--to", "diffusers", "--output", tmp_path / "d.safetensors",
        "--pretrained_model_name_or_path", base_of(kind, request),
    )  # fmt: skip
    pipe = plain_pipeline(kind)
    exec(textwrap.dedent(output.partition("later:\n")[2]), {"pipe": pipe})
    assert_loaded(pipe, trained, exact)
    assert (draw(pipe) - draw(plain_pipeline(kind))).abs().max() > 1e-3


@pytest.mark.parametrize("kind, names", [("sd", "sgm"), ("sdxl", "sgm"), ("sdxl", "diffusers")])
@pytest.mark.parametrize("a1, a2", [(4, 64), (64, 8)])
def test_diffusers_loads_the_lora_of_any_factors(kind, names, a1, a2, tmp_path, request):
    trained, path, exact = make(kind, a1, a2, tmp_path)
    run_convert(
        path, "--to", "lora", "--output", tmp_path / "lora.safetensors", "--sdxl_names", names,
        "--pretrained_model_name_or_path", base_of(kind, request),
    )  # fmt: skip
    pipe = plain_pipeline(kind)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert_loaded(pipe, trained, exact)


def test_diffusers_loads_the_lora_of_factors_that_differ_between_layers_and_have_rank_one(tmp_path, request):
    trained, path, exact = make("sdxl", 4, 64, tmp_path, factors=KEYS_AND_VALUES)
    run_convert(
        path, "--to", "lora", "--output", tmp_path / "lora.safetensors",
        "--pretrained_model_name_or_path", base_of("sdxl", request),
    )  # fmt: skip
    for load in (
        lambda pipe: pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors"),
        lambda pipe: attach_to_diffusers(pipe, path, "dog"),
    ):
        pipe = plain_pipeline("sdxl")
        load(pipe)
        assert_loaded(pipe, trained, exact)


@pytest.mark.parametrize("kind, a1, a2", [("sd", 4, 64), ("sdxl", 64, 8), ("sd", 16, 16)])
def test_attached_adapters_are_the_pipeline_s_own(kind, a1, a2, tmp_path):
    trained, path, exact = make(kind, a1, a2, tmp_path)
    pipe = plain_pipeline(kind)
    base, parts = draw(pipe), list(components(pipe))
    attach_to_diffusers(pipe, path, "dog")
    assert pipe.get_active_adapters() == ["dog"]
    assert_loaded(pipe, trained, exact)

    pipe.set_adapters(["dog"], [0.5])
    plain = plain_weights(plain_pipeline(kind))
    half = {name: (weight + plain[name]) / 2 for name, weight in exact.items()}
    assert worst_error(peft_weights(pipe), half) < EXACT
    pipe.set_adapters(["dog"], [1.0])

    pipe.fuse_lora(components=parts)
    assert worst_error(plain_weights(pipe), exact) < FUSED
    pipe.unfuse_lora(components=parts)
    pipe.unload_lora_weights()
    assert (draw(pipe) - base).abs().max() < 1e-4
    attach_to_diffusers(pipe, path, "dog")
    pipe.delete_adapters("dog")
    assert (draw(pipe) - base).abs().max() < 1e-4


@pytest.mark.parametrize("first", ["lora", "kronecker"])
def test_attached_adapters_stand_beside_a_lora(first, tmp_path):
    trained, path, exact = make("sd", 4, 64, tmp_path, text=False)
    pipe = plain_pipeline("sd")
    base = plain_weights(pipe)
    torch.manual_seed(0)
    if first == "kronecker":
        attach_to_diffusers(pipe, path, "dog")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "lora")
    if first == "lora":
        attach_to_diffusers(pipe, path, "dog")
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = pipe.unet.get_submodule(name)
    x = torch.randn(4, layer.in_features)
    outputs = {}
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.5, 2.0)):
        pipe.set_adapters(["dog", "lora"], list(weights))
        outputs[weights] = pipe.unet.get_submodule(name)(x).detach().double()
    plain = x.double() @ base[f"unet.{name}"].T
    kronecker = x.double() @ (exact[f"unet.{name}"] - base[f"unet.{name}"]).T
    lora = outputs[0.0, 1.0] - plain
    assert lora.abs().max() > 0.01
    torch.testing.assert_close(outputs[1.0, 0.0], plain + kronecker, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs[0.5, 2.0], plain + kronecker / 2 + 2 * lora, rtol=0, atol=1e-5)


def test_attached_adapters_follow_model_offloading_and_half_precision(tmp_path):
    trained, path, exact = make("sd", 4, 64, tmp_path, text=False)
    pipe = plain_pipeline("sd")
    attach_to_diffusers(pipe, path, "dog")
    expected = draw(pipe)
    _, hook = cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    assert torch.equal(draw(pipe), expected)
    with pytest.raises(KroneckerError, match="the unet is offloaded; attach adapters before"):
        attach_to_diffusers(pipe, path, "again")
    half = plain_pipeline("sd").to(torch.bfloat16)
    attach_to_diffusers(half, path, "dog")
    layer = half.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert layer.lokr_w1["dog"].dtype == torch.bfloat16
    assert layer(torch.randn(2, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_pipeline_s_own_scale_of_a_call_holds_for_attached_adapters(tmp_path):
    trained, path, _ = make("sd", 4, 64, tmp_path)
    pipe = plain_pipeline("sd")
    attach_to_diffusers(pipe, path, "dog")
    half = draw(pipe, cross_attention_kwargs={"scale": 0.5})
    assert (draw(pipe) - draw(trained)).abs().max() < 1e-4  # afterwards it is whole again
    pipe.set_adapters("dog", 0.5)
    assert (draw(pipe) - half).abs().max() < 1e-5
    pipe.disable_lora()
    assert torch.equal(draw(pipe), draw(plain_pipeline("sd")))


def test_what_cannot_be_attached_is_refused_and_the_pipeline_untouched(tmp_path):
    _, path, _ = make("sd", 4, 64, tmp_path)
    (tmp_path / "sdxl").mkdir()
    _, other, _ = make("sdxl", 4, 64, tmp_path / "sdxl")
    pipe = plain_pipeline("sd")
    with pytest.raises(KroneckerError, match="a Kronecker adapter for SDXL, the model is Stable Diffusion 1.x"):
        attach_to_diffusers(pipe, other, "dog")
    load_kronecker(pipe, path)
    with pytest.raises(KroneckerError, match="has adapters from load_kronecker"):
        attach_to_diffusers(pipe, path, "dog")
    pipe = plain_pipeline("sd")
    attach_to_diffusers(pipe, path, "dog")
    with pytest.raises(KroneckerError, match='has an adapter named "dog" already'):
        attach_to_diffusers(pipe, path, "dog")


# ---- peft ----


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_square_factors_by_the_snippet_that_convert_prints(kind, tmp_path, request):
    trained, path, exact = make(kind, 4, 4, tmp_path)
    output = run_convert(
        path, "--to", "peft", "--output", tmp_path / "peft",
        "--pretrained_model_name_or_path", base_of(kind, request),
    )  # fmt: skip
    pipe = plain_pipeline(kind)
    exec(textwrap.dedent(output.partition("In peft:\n")[2]), {"pipe": pipe})
    weights = peft_weights(pipe)
    assert weights.keys() == exact.keys() and worst_error(weights, exact) < EXACT


# ---- LyCORIS ----


@pytest.fixture
def lycoris(monkeypatch):
    """LyCORIS' loader for kohya's files. It trips over TimestepEmbedding while it looks for layers of its own."""
    kohya = pytest.importorskip("lycoris.kohya")
    for name in ("UNET_TARGET_REPLACE_MODULE", "UNET_TARGET_REPLACE_NAME", "TEXT_ENCODER_TARGET_REPLACE_MODULE"):
        monkeypatch.setattr(kohya.LycorisNetworkKohya, name, [])
    return kohya


@pytest.mark.parametrize("text", [False, True])
def test_lycoris_loads_the_native_file_of_square_factors(text, lycoris, tmp_path):
    trained, path, exact = make("sd", 8, 8, tmp_path, text=text)
    pipe = plain_pipeline("sd")
    encoder = torch.nn.ModuleDict({"text_model": pipe.text_encoder}) if text else None  # files keep that level
    network, _ = lycoris.create_network_from_weights(1.0, str(path), None, encoder, pipe.unet)
    assert len(network.unet_loras) == 32 and len(network.text_encoder_loras) == (8 if text else 0)
    for module in (*network.unet_loras, *network.text_encoder_loras):
        module.merge_to(1.0)
    assert worst_error(plain_weights(pipe), exact) < FUSED


def test_lycoris_arithmetic_and_its_loader_of_loras_give_the_deltas_of_rank_one(lycoris, tmp_path, request):
    """LyCORIS makes LoKr layers from one number, so that of a file with (1, d_in) it loads the LoRA, which is exact."""
    from safetensors.torch import load_file

    lokr = pytest.importorskip("lycoris.functional.lokr")
    trained, path, exact = make("sd", 4, 64, tmp_path, text=False, factors=KEYS_AND_VALUES)
    tensors, plain = load_file(path), plain_weights(plain_pipeline("sd"))
    for layer in find_layers({"unet": plain_pipeline("sd").unet}):
        if layer.dotted in exact:
            w1, w2 = (tensors[f"{layer.kohya}.{part}"] for part in ("lokr_w1", "lokr_w2"))
            delta = lokr.diff_weight(w1, None, None, w2, None, None, None)
            torch.testing.assert_close(delta.double(), exact[layer.dotted] - plain[layer.dotted], rtol=1e-4, atol=1e-9)
    run_convert(
        path, "--to", "lora", "--output", tmp_path / "lora.safetensors",
        "--pretrained_model_name_or_path", base_of("sd", request),
    )  # fmt: skip
    pipe = plain_pipeline("sd")
    network, _ = lycoris.create_network_from_weights(1.0, str(tmp_path / "lora.safetensors"), None, None, pipe.unet)
    assert len(network.unet_loras) == 32
    for module in network.unet_loras:
        module.merge_to(1.0)
    assert worst_error(plain_weights(pipe), exact) < FUSED


def test_lycoris_needs_the_alpha_that_native_files_have(lycoris, tmp_path):
    from safetensors.torch import load_file, save_file

    _, path, _ = make("sd", 8, 8, tmp_path, text=False)
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith("alpha")}
    save_file(tensors, tmp_path / "without.safetensors")
    with pytest.raises(Exception):  # noqa: B017
        lycoris.create_network_from_weights(
            1.0, str(tmp_path / "without.safetensors"), None, None, plain_pipeline("sd").unet
        )


# ---- scripts/generate.py ----


def test_generate_takes_several_adapters_of_any_layout_with_their_strengths(tmp_path, tiny_sd, run_main):
    from PIL import Image, ImageChops

    from scripts import generate

    _, native, _ = make("sd", 8, 8, tmp_path)
    base = ("--pretrained_model_name_or_path", tiny_sd)
    files = {"native": native, "lora": tmp_path / "lora.safetensors", "peft": tmp_path / "peft",
             "diffusers": tmp_path / "d.safetensors"}  # fmt: skip
    for way in ("lora", "peft", "diffusers"):
        run_convert(native, "--to", way, "--output", files[way], *base)
    write_reference_file(tmp_path / "reference.safetensors")
    run_convert(tmp_path / "reference.safetensors", "--to", "lora", "--output", tmp_path / "rl.safetensors", *base)

    def draw_with(name, *adapters):
        run_main(
            generate, pretrained_model_name_or_path=tiny_sd, adapter=list(adapters), prompt=["sks dog"], num_images=1,
            height=64, width=64, num_inference_steps=2, output_dir=tmp_path / name,
        )  # fmt: skip
        return Image.open(tmp_path / name / "00-0.png")

    def difference(left, right):
        return max(high for _, high in ImageChops.difference(left, right).getextrema())

    double = draw_with("double", f"{native}:2.5")
    assert difference(double, draw_with("base", f"{native}:0")) > 3
    for name, adapters in {
        "sum": (f"{native}:1.5", f"{native}:1"),
        "peft": (f"{files['peft']}:2.5",),
        "diffusers": (f"{files['diffusers']}:2.5",),
        "lora": (f"{files['lora']}:2.5",),
        "mixed": (f"{native}:0.5", f"{files['lora']}:2"),
    }.items():
        assert difference(double, draw_with(name, *adapters)) <= 1, name
    reference = draw_with("reference", f"{tmp_path / 'reference.safetensors'}:9")
    assert difference(reference, draw_with("reference-lora", f"{tmp_path / 'rl.safetensors'}:9")) <= 1
    assert difference(reference, draw_with("again", f"{native}:0")) > 3


def test_merge_takes_loras_beside_kronecker_adapters(tmp_path, tiny_sd, run_main):
    from diffusers import StableDiffusionPipeline

    from scripts import merge

    _, native, exact = make("sd", 4, 64, tmp_path)
    run_convert(native, "--to", "lora", "--output", tmp_path / "lora.safetensors",
                "--pretrained_model_name_or_path", tiny_sd)  # fmt: skip
    run_main(merge, pretrained_model_name_or_path=tiny_sd, output_dir=tmp_path / "merged",
             adapter=[f"{native}:0.25", f"{tmp_path / 'lora.safetensors'}:0.75"])  # fmt: skip
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert worst_error(plain_weights(merged), exact) < 2 * FUSED


def test_a_lora_in_a_folder_that_peft_wrote_is_drawn_with_as_peft_does(tmp_path, tiny_sd):
    from peft import get_peft_model

    from dreambooth.drawing.pipelines import load_adapted_pipeline
    from methods.readers import READERS

    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"], init_lora_weights=False)
    pipe = plain_pipeline("sd")
    get_peft_model(pipe.unet, config).save_pretrained(tmp_path)
    options = AdaptedModelOptions(pretrained_model_name_or_path=str(tiny_sd), adapter=[str(tmp_path)])
    ours, exact = peft_weights(load_adapted_pipeline(options, READERS)), peft_weights(pipe)
    assert ours.keys() == exact.keys() and worst_error(ours, exact) < 1e-7  # the strength is in the factors


def test_an_adapter_s_colon_is_a_strength_only_before_a_number():
    from dreambooth.options.base_model import split_scale

    assert split_scale("a.safetensors") == ("a.safetensors", 1.0)
    assert split_scale("a.safetensors:0.8") == ("a.safetensors", 0.8)
    assert split_scale("C:\\a.safetensors") == ("C:\\a.safetensors", 1.0)
    assert split_scale("C:\\a.safetensors:-1e-1") == ("C:\\a.safetensors", -0.1)
