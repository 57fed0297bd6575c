"""--init_adapter: training starts from a file's factors, or from the nearest ones to a LoRA."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth.errors import UserError
from dreambooth.families.sd import SD
from dreambooth.families.sdxl import SDXL
from dreambooth.kronecker import KRONECKER
from dreambooth.method import Host
from dreambooth.options.checking import check_options
from kron_adapter import KroneckerError, inject_kronecker, kronecker_layers, save_kronecker
from kron_formats.export import write_lora
from kron_formats.matching import match_layers
from kron_formats.names import find_layers
from kron_formats.reading import read_adapter
from tests.adapters import adapted_pipeline, perturb, plain_pipeline, write_reference_file
from train_dreambooth_kronecker import Config

FAMILIES = {"sd": SD, "sdxl": SDXL}
HEAD = "down_blocks.0.attentions.0.transformer_blocks.0"


def configure(**options) -> Config:
    required = {"pretrained_model_name_or_path": "base", "instance_data_dir": "photos", "instance_prompt": "sks dog"}
    return Config(**{**required, **options})


def host_of(kind: str, with_text: bool = False) -> Host:
    family = FAMILIES[kind]
    return Host(family, family.trained_models(plain_pipeline(kind).components, with_text), {})


def start(host: Host, path, **options):
    """Attach as a training does; return what trains."""
    return KRONECKER.attach(host, configure(init_adapter=str(path), **options))


def saved(pipeline, path):
    save_kronecker(pipeline, path)
    return path


def deltas(path, kind: str = "sd") -> dict[str, torch.Tensor]:
    adapter = match_layers(read_adapter(path), plain_pipeline(kind))
    return {layer.dotted: change.delta(torch.empty(0)) for layer, change in adapter.layers.items()}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_kronecker_file_is_where_training_starts_bit_for_bit(kind, tmp_path):
    factors = {"attn2.to_k": (1, "d_in"), "to_q": (8, 4)}  # gains of 1, 2 and more
    given = saved(adapted_pipeline(kind, 2, 8, text=True, factors=factors), tmp_path / "given.safetensors")
    attached = start(host_of(kind, with_text=True), given, train_text_encoder=True)
    attached.save(tmp_path / "again.safetensors", {}, torch.float32)
    before, after = load_file(given), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert read_adapter(given).layout.targets == read_adapter(tmp_path / "again.safetensors").layout.targets
    fresh = inject_kronecker(plain_pipeline(kind).unet, 2, 8, factors=factors)
    own = attached.layers["unet"]
    assert {name: layer.gain for name, layer in own.items()} == {name: layer.gain for name, layer in fresh.items()}


def test_the_file_decides_which_layers_are_adapted(tmp_path):
    """As other tools write LoKr: shapes that differ from layer to layer, feed-forward layers, no metadata."""
    unet = plain_pipeline("sd").unet
    wanted = {f"{HEAD}.attn1.to_q": (2, 4), f"{HEAD}.ff.net.2": (8, 2)}
    perturb(inject_kronecker(unet, 1, 1, list(wanted), wanted), 0.05)
    save_kronecker(unet, tmp_path / "own.safetensors")
    save_file(load_file(tmp_path / "own.safetensors"), tmp_path / "bare.safetensors")  # without metadata
    attached = start(host_of("sd"), tmp_path / "bare.safetensors")
    assert {name: tuple(layer.A.shape) for name, layer in attached.layers["unet"].items()} == wanted


def test_rows_in_the_order_of_the_papers_code_stay_so(tmp_path):
    write_reference_file(tmp_path / "paper.safetensors")
    start(host_of("sd"), tmp_path / "paper.safetensors").save(tmp_path / "again.safetensors", {}, torch.float32)
    before, after = deltas(tmp_path / "paper.safetensors"), deltas(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[name], before[name], rtol=1e-6) for name in before)


def write_lora_of(pipeline, path):
    adapter = match_layers(read_adapter(saved(pipeline, path.with_name("factors"))), plain_pipeline("sd"))
    write_lora(path, adapter.factors, adapter.family, {}, torch.float32)
    return path


def test_a_lora_starts_from_the_nearest_factors_and_says_how_near(tmp_path, caplog):
    lora = write_lora_of(adapted_pipeline("sd", 2, 8), tmp_path / "lora.safetensors")
    exact = deltas(lora)
    caplog.set_level(logging.INFO)
    attached = start(host_of("sd"), lora, kron_a1=4, kron_a2=8)
    lost = total = 0.0
    for layer in find_layers(host_of("sd").models):
        if layer.dotted not in exact:
            continue
        found, delta = attached.layers["unet"][layer.path].delta_weight.double(), exact[layer.dotted]
        rearranged = delta.view(4, delta.shape[0] // 4, 8, delta.shape[1] // 8).transpose(1, 2).reshape(32, -1)
        least = torch.linalg.svdvals(rearranged)[1:].norm()  # Eckart and Young
        torch.testing.assert_close((found - delta).norm(), least, rtol=1e-4, atol=1e-6)
        lost, total = lost + least.item() ** 2, total + delta.square().sum().item()
    assert f"relative error of all together: {(lost / total) ** 0.5:.2g}" in caplog.text


def test_a_lora_that_is_a_kronecker_product_is_met_exactly(tmp_path):
    lora = write_lora_of(adapted_pipeline("sd", 2, 8), tmp_path / "lora.safetensors")
    attached = start(host_of("sd"), lora, kron_a1=2, kron_a2=8)
    exact = deltas(lora)
    for name, layer in attached.layers["unet"].items():
        torch.testing.assert_close(layer.delta_weight.double(), exact[f"unet.{name}"], rtol=1e-4, atol=1e-6)


def test_layers_without_weights_are_checked_alone(tmp_path):
    given = saved(adapted_pipeline("sd", 2, 8), tmp_path / "given.safetensors")
    with torch.device("meta"):
        unet = plain_pipeline("sd").unet
    KRONECKER.check(Host(SD, {"unet": unet}, {}), [], configure(init_adapter=str(given)))
    assert all(layer.A.is_meta for layer in kronecker_layers(unet).values())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"kron_a1": 2}, ["--kron_a1"]),
        ({"kron_b2": 8, "kron_factors": ["to_q=2,8"]}, ["--kron_b2", "--kron_factors"]),
        ({"kron_targets": ["to_q"]}, ["--kron_targets"]),
    ],
)
def test_options_that_the_file_decides_are_refused(options, words, tmp_path):
    given = saved(adapted_pipeline("sd", 2, 8), tmp_path / "given.safetensors")
    with pytest.raises(UserError) as error:
        start(host_of("sd"), given, **options)
    assert all(word in str(error.value) for word in [*words, str(given)])


def test_what_cannot_be_started_from_is_refused(tmp_path):
    with_text = saved(adapted_pipeline("sd", 2, 8, text=True), tmp_path / "text.safetensors")
    with pytest.raises(UserError, match="--train_text_encoder"):
        start(host_of("sd"), with_text)
    lora = write_lora_of(adapted_pipeline("sd", 2, 8), tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="--kron_targets to_q "):
        start(host_of("sd"), lora, kron_targets=["to_q"])
    with pytest.raises(KroneckerError, match="not a Kronecker adapter"):
        start(host_of("sd"), write_word(tmp_path))
    with pytest.raises(UserError, match="contrast"):
        check_options(configure(init_adapter=str(lora), kron_init="contrast", class_prompt="dog"))
    kernel = {"lora_unet_conv_in.lokr_w1": torch.ones(2, 1), "lora_unet_conv_in.alpha": torch.tensor(1.0)}
    channels, (c_out, c_in) = plain_pipeline("sd").unet.conv_in, plain_pipeline("sd").unet.conv_in.weight.shape[:2]
    kernel["lora_unet_conv_in.lokr_w2"] = torch.ones(c_out // 2, c_in, *channels.kernel_size)
    save_file(kernel, tmp_path / "convolution.safetensors")
    with pytest.raises(UserError, match="conv_in"):
        start(host_of("sd"), tmp_path / "convolution.safetensors")


def write_word(folder):
    width = plain_pipeline("sd").text_encoder.config.hidden_size
    save_file({"emb_params": torch.randn(1, width)}, folder / "word.safetensors")
    return folder / "word.safetensors"
