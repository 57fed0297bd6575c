"""DreamBooth's result: a folder and one file that others load, whole or not at all; and one step from its equation."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, EDMEulerScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open

from dreambooth.base_model.loading import DTYPES
from dreambooth.base_model.process import DiscreteProcess
from dreambooth.base_model.source import base_source
from dreambooth.errors import UserError
from dreambooth.families.sd import SD
from dreambooth.method import Host
from dreambooth.options.base_model import BaseModelOptions
from dreambooth.output.checkpoint import verify_checkpoint
from dreambooth.output.result import result_step
from dreambooth.train import train
from kron_formats.errors import KroneckerError
from kron_formats.single_file import read_header
from methods.dreambooth import DREAMBOOTH
from tests.integration.test_methods import FAMILIES, PROMPT, attach, configure, draw, perturb
from tests.one_file import save_one_file

METADATA = {"instance_prompt": PROMPT, "step": "7", "modelspec.prediction_type": "epsilon"}
FAMILY = pytest.mark.parametrize("name", FAMILIES)
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}


@pytest.fixture
def base(name, request):
    return request.getfixturevalue(f"tiny_{name}")


@pytest.fixture
def trained(name, base):
    """A pipeline that looks trained in all its weights, and what saves it."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    _, attached = attach(DREAMBOOTH, name, pipeline, base, single_file=True)
    perturb(attached)
    return pipeline, attached


def weights(pipeline):
    models = {part: pipeline.components[part] for part in PARTS if pipeline.components.get(part)}
    return {
        f"{part}.{name.removeprefix('text_model.')}": tensor
        for part, model in models.items()
        for name, tensor in model.state_dict().items()
    }


def assert_weights(one, other, dtype):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name].to(dtype)) for name in one)


@FAMILY
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_diffusers_own_loader_gets_every_weight_of_the_folder(name, precision, trained, base, tmp_path):
    pipeline, attached = trained
    attached.save(tmp_path / "pipeline", METADATA, DTYPES[precision])
    fresh = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", dtype=DTYPES[precision])
    assert_weights(fresh, pipeline, DTYPES[precision])
    assert fresh.scheduler.config == pipeline.scheduler.config and type(fresh) is type(pipeline)
    assert {part: type(component) for part, component in fresh.components.items()} == {
        part: type(component) for part, component in pipeline.components.items()
    }
    told = json.loads((tmp_path / "pipeline" / "training.json").read_text())
    assert told == METADATA
    if precision == "fp32":
        fresh.set_progress_bar_config(disable=True)
        assert torch.equal(draw(fresh, PROMPT), draw(pipeline, PROMPT))
    said = " ".join(path.read_text() for path in (tmp_path / "pipeline").rglob("*.json"))
    assert str(base.parent) not in said


@pytest.mark.parametrize("name, kind", [("sd", "sd1"), ("sd", "sd2"), ("sdxl", "sdxl")])
def test_a_base_in_one_file_becomes_a_folder_and_a_file_with_every_weight(name, kind, base, tmp_path):
    """Read through diffusers' converters, as every base model in one file is."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    file = save_one_file(pipeline, tmp_path / "base.safetensors", kind)
    _, attached = attach(DREAMBOOTH, name, pipeline, file, base_config=str(base), single_file=True)
    perturb(attached)
    attached.save(tmp_path / "pipeline", METADATA, torch.float32)
    assert_weights(DiffusionPipeline.from_pretrained(tmp_path / "pipeline"), pipeline, torch.float32)

    result = tmp_path / "pipeline.safetensors"
    source = base_source(BaseModelOptions(pretrained_model_name_or_path=str(result), base_config=str(base)))
    present = [part for part in PARTS if part in source.configurations.classes]
    source.weights.check(present)
    for part in present:
        loaded, own = source.weights.load(part, torch.float32).state_dict(), getattr(pipeline, part).state_dict()
        assert loaded.keys() == own.keys() and all(torch.equal(loaded[key], own[key]) for key in own)
    with safe_open(result, framework="pt") as ours, safe_open(file, framework="pt") as outsider:
        assert {*ours.keys()} == {*outsider.keys()}
        metadata = ours.metadata()
    assert metadata["modelspec.architecture"] == ARCHITECTURES[kind] and metadata["kronecker.step"] == "7"


@pytest.mark.parametrize("name", ["sd"])
def test_diffusers_from_single_file_draws_the_same(trained, base, tmp_path):
    pipeline, attached = trained
    attached.save(tmp_path / "pipeline", METADATA, torch.float32)
    fresh = StableDiffusionPipeline.from_single_file(
        tmp_path / "pipeline.safetensors", config=str(base), safety_checker=None, local_files_only=True
    )
    assert_weights(fresh, pipeline, torch.float32)


@pytest.mark.parametrize("name", ["sd"])
def test_what_does_not_train_is_read_from_the_base_and_the_vae_option(name, base, tmp_path):
    other = DiffusionPipeline.from_pretrained(base)
    with torch.no_grad():
        other.vae.decoder.conv_out.bias.add_(1)
    other.vae.save_pretrained(tmp_path / "vae")
    pipeline = DiffusionPipeline.from_pretrained(base)
    options = {"train_text_encoder": False, "pretrained_vae_model_name_or_path": str(tmp_path / "vae")}
    _, attached = attach(DREAMBOOTH, name, pipeline, base, **options)
    perturb(attached)
    attached.save(tmp_path / "pipeline", {}, torch.float32)
    fresh = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    other.unet = pipeline.unet
    assert_weights(fresh, other, torch.float32)
    parts, whole = attached.result_sizes(torch.float32)
    written = {file.parent.name: file.stat().st_size for file in (tmp_path / "pipeline").glob("*/*.safetensors")}
    assert parts == pytest.approx(written["unet"], rel=0.02) and whole == pytest.approx(sum(written.values()), rel=0.02)


@pytest.mark.parametrize("name", ["sd"])
def test_a_result_is_replaced_whole_or_not_at_all(name, trained, tmp_path, monkeypatch):
    pipeline, attached = trained
    attached.save(tmp_path / "pipeline", {**METADATA, "step": "3"}, torch.float32)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("methods.dreambooth.write_index", full)
        attached.save(tmp_path / "pipeline", METADATA, torch.float32)
    with torch.no_grad():
        pipeline.unet.conv_out.bias[0] = 1e5
    with pytest.raises(KroneckerError, match="unet.conv_out.bias .*--save_precision"):
        attached.save(tmp_path / "pipeline", METADATA, torch.float16)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert result_step(tmp_path / "pipeline") == 3
    with torch.no_grad():
        pipeline.unet.conv_out.bias[0] = 0
    later = replace(attached, config=replace(attached.config, single_file=False))
    later.save(tmp_path / "pipeline", METADATA, torch.float32)
    assert result_step(tmp_path / "pipeline") == 7
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]  # the one file had other weights


@pytest.mark.parametrize("name", ["sd"])
def test_without_a_copy_the_base_model_cannot_be_had(name, trained):
    _, attached = trained
    with pytest.raises(UserError, match="--prior_source base_model"), attached.without():
        pass


@pytest.mark.parametrize(
    "options, variables, flag",
    [
        ({"base_precision": "bf16"}, {}, "--base_precision bf16"),
        ({"base_precision": "nf4"}, {}, "--base_precision nf4"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
    ],
)
def test_what_would_lose_steps_or_split_what_trains_is_refused(options, variables, flag, tiny_sd, monkeypatch):
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=flag):
        DREAMBOOTH.check(Host(FAMILIES["sd"][0], {}, {}), [], configure(DREAMBOOTH, "sd", tiny_sd, **options))


# ---- training ----


def test_a_step_is_what_the_equation_says(tiny_sd, dog_photos, tmp_path, fresh_accelerator, monkeypatch):
    """|ε - ε_θ(αx + σε, c_θ)|², its gradient clipped to norm 1, and AdamW, over plain models of diffusers."""
    seen, noise = [], DiscreteProcess.noise
    monkeypatch.setattr(DiscreteProcess, "noise", lambda self, *given: (seen.append(given), noise(self, *given))[1])
    options = {"instance_data_dir": str(dog_photos), "resolution": 64, "max_train_steps": 1, "report_to": ["none"]}
    options |= {"learning_rate": 1e-3, "text_encoder_lr": 3e-4, "adam_epsilon": 1e-4, "checkpointing_steps": 1}
    train(SD, DREAMBOOTH, configure(DREAMBOOTH, "sd", tiny_sd, **options, output_dir=str(tmp_path / "out")))
    ((latents, noise, timesteps),) = seen

    pipeline = DiffusionPipeline.from_pretrained(tiny_sd)
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    kept = pipeline.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    tokens = pipeline.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt")
    prediction = unet(kept.sqrt() * latents + (1 - kept).sqrt() * noise, timesteps, text_encoder(tokens.input_ids)[0])
    (prediction.sample - noise).square().mean().backward()
    torch.nn.utils.clip_grad_norm_([*unet.parameters(), *text_encoder.parameters()], 1.0)
    groups = [{"params": unet.parameters()}, {"params": text_encoder.parameters(), "lr": 3e-4}]
    torch.optim.AdamW(groups, lr=1e-3, eps=1e-4, weight_decay=1e-2, foreach=False).step()

    fresh = DiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    expected = weights(pipeline)
    for name, tensor in weights(fresh).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-6, msg=name)
    before = DiffusionPipeline.from_pretrained(tiny_sd)
    assert (before.unet.conv_in.weight - fresh.unet.conv_in.weight).abs().max() > 1e-4

    checkpoint = tmp_path / "out" / "checkpoint-1"
    verify_checkpoint(checkpoint)
    assert {"unet", "text_encoder"} == {path.name for path in checkpoint.iterdir() if path.is_dir()}
    so_far = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    assert all(torch.equal(weight, fresh.unet.get_parameter(key)) for key, weight in so_far.named_parameters())
    damaged = checkpoint / "unet" / "config.json"
    damaged.write_text(damaged.read_text().replace("4", "5", 1))
    with pytest.raises(UserError, match="unet/config.json"):
        verify_checkpoint(checkpoint)


def test_one_file_of_a_model_that_predicts_the_velocity_says_so_to_comfyui(tiny_sdxl, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(tiny_sdxl)
    _, attached = attach(DREAMBOOTH, "sdxl", pipeline, tiny_sdxl, single_file=True)
    noise = {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}
    attached.save(tmp_path / "pipeline", noise, torch.float32)
    file = read_header(tmp_path / "pipeline.safetensors")
    assert file.shapes["v_pred"] == file.shapes["ztsnr"] == (0,)
    assert file.prediction_type == "v_prediction" and file.has_zero_terminal_snr
    assert file.metadata == noise  # a result without metadata says what tools need


def test_a_base_model_with_edm_s_noise_has_no_one_file(tiny_sdxl, tmp_path):
    shutil.copytree(tiny_sdxl, tmp_path / "edm")
    EDMEulerScheduler().save_pretrained(tmp_path / "edm" / "scheduler")
    index = json.loads((tmp_path / "edm" / "model_index.json").read_text())
    (tmp_path / "edm" / "model_index.json").write_text(
        json.dumps({**index, "scheduler": ["diffusers", "EDMEulerScheduler"]})
    )
    check = [Host(FAMILIES["sdxl"][0], {}, {}), []]
    DREAMBOOTH.check(*check, configure(DREAMBOOTH, "sdxl", tmp_path / "edm"))
    with pytest.raises(UserError, match="--single_file"):
        DREAMBOOTH.check(*check, configure(DREAMBOOTH, "sdxl", tmp_path / "edm", single_file=True))
