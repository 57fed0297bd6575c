"""SVDiff through the training itself, against its equation in plain autograd."""

import shlex

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from dreambooth.base_model.process import DiscreteProcess
from dreambooth.errors import UserError
from dreambooth.families.sd import SD
from dreambooth.method import Host
from dreambooth.options.parsing import parse_options
from dreambooth.options.training import TrainingConfig, config_class
from dreambooth.train import train
from methods.options import SvdiffOptions
from methods.svdiff import SVDIFF, AttachedSvdiff
from scripts import convert, generate

Config = config_class(SvdiffOptions, TrainingConfig)


def configure(**options):
    given = {"pretrained_model_name_or_path": "x", "instance_data_dir": "y", "instance_prompt": "a photo of sks dog"}
    return Config(**{**given, **options})


@pytest.fixture
def trained(tiny_sd, dog_photos, tmp_path, fresh_accelerator):
    """A function that trains, and returns the tensors of the file."""

    def run(name, **options):
        given = {"pretrained_model_name_or_path": str(tiny_sd), "instance_data_dir": str(dog_photos), "resolution": 64}
        given |= {"report_to": ["none"], "output_dir": str(tmp_path / name), "max_train_steps": 2}
        AcceleratorState._reset_state(reset_partial_state=True)  # which has the first run's precision
        train(SD, SVDIFF, configure(**given, **options))
        return load_file(tmp_path / name / SVDIFF.weights_name)

    return run


def test_two_steps_of_the_optimizer_are_those_of_the_equation(trained, tiny_sd, monkeypatch):
    """W = U diag(relu(σ + δ)) Vᵀ of matrices and kernels, W + δ of norms; from what the UNet was given, with numpy."""
    calls, noises = [], []
    forward, make_noise = UNet2DConditionModel.forward, DiscreteProcess.noise

    def watch(self, sample, timestep, encoder_hidden_states, **keywords):
        calls.append((sample.clone(), timestep.clone(), encoder_hidden_states.clone()))
        return forward(self, sample, timestep, encoder_hidden_states, **keywords)

    def remember(self, latents, noise, timesteps):
        noises.append(noise.clone())
        return make_noise(self, latents, noise, timesteps)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watch)
    monkeypatch.setattr(DiscreteProcess, "noise", remember)
    rates = {"learning_rate": 0.05, "learning_rate_1d": 0.02, "adam_epsilon": 1e-3}
    file = trained("run", **rates, gradient_accumulation_steps=2)
    monkeypatch.undo()
    assert len(calls) == len(noises) == 4

    unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet").requires_grad_(False)
    deltas, parts, norms = {}, {}, {}
    for path, module in unet.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            svd = np.linalg.svd(module.weight.flatten(1).double().numpy(), full_matrices=False)
            parts[path] = [torch.from_numpy(part).float() for part in svd]
            deltas[path] = torch.zeros_like(parts[path][1]).requires_grad_()
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            norms[path] = deltas[path] = torch.zeros_like(module.weight).requires_grad_()
    assert file.keys() == {f"{path}.delta" for path in deltas}
    optimizer = torch.optim.AdamW(
        [{"params": [deltas[path] for path in parts], "lr": 0.05}, {"params": list(norms.values()), "lr": 0.02}],
        eps=1e-3,
        weight_decay=1e-2,
    )
    for number, ((sample, timestep, context), noise) in enumerate(zip(calls, noises)):
        weights = {f"{path}.weight": unet.get_submodule(path).weight + delta for path, delta in norms.items()}
        for path, (U, sigma, V) in parts.items():
            composed = U @ torch.diag((sigma + deltas[path]).relu()) @ V
            weights[f"{path}.weight"] = composed.view_as(unet.get_submodule(path).weight)
        prediction = torch.func.functional_call(unet, weights, (sample, timestep, context)).sample
        ((prediction - noise).square().mean() / 2).backward()  # of two that are accumulated
        if number % 2:
            nn.utils.clip_grad_norm_(deltas.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for path, delta in deltas.items():
        torch.testing.assert_close(file[f"{path}.delta"], delta.detach(), rtol=1e-3, atol=2e-5, msg=path)
    assert max(delta.abs().max() for delta in deltas.values()) > 1e-3


def test_checkpointing_gives_the_same_and_bf16_nearly(trained):
    options = {"learning_rate": 1e-2, "adam_epsilon": 1e-3, "train_text_encoder": True}
    plain = trained("plain", **options)
    spared = trained("spared", **options, gradient_checkpointing=True)
    mixed = trained("mixed", **options, gradient_checkpointing=True, mixed_precision="bf16", channels_last=True)
    assert plain.keys() == spared.keys() == mixed.keys()
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1.delta" in plain
    assert "text_encoder.text_model.final_layer_norm.delta" in plain
    for key in plain:
        torch.testing.assert_close(spared[key], plain[key], rtol=1e-4, atol=1e-7)
    stacked = [torch.cat([tensors[key] for key in plain]) for tensors in (plain, mixed)]
    assert torch.nn.functional.cosine_similarity(*stacked, dim=0) > 0.99


@pytest.mark.parametrize(
    "options, variables, flag",
    [
        ({"base_precision": "bf16"}, {}, "--base_precision bf16"),
        ({"base_precision": "nf4"}, {}, "--base_precision nf4"),
        ({"compile": True}, {}, "--compile"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
    ],
)
def test_what_cannot_be_composed_is_refused(options, variables, flag, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=flag):
        SVDIFF.check(Host(SD, {}, {}), [], configure(**options))
    monkeypatch.undo()
    SVDIFF.check(Host(SD, {}, {}), [], configure(base_precision="fp32"))


def test_prodigy_has_one_learning_rate():
    with pytest.raises(UserError, match="--learning_rate_1d"):
        SvdiffOptions.check(configure(optimizer="Prodigy", learning_rate=1.0))
    SvdiffOptions.check(configure(optimizer="Prodigy", learning_rate=1.0, learning_rate_1d=1.0))


def test_the_card_s_commands_parse(tmp_path, monkeypatch):
    path = tmp_path / "a b.safetensors"
    path.touch()
    unet = nn.Module()
    usage = (
        AttachedSvdiff(Host(SD, {"unet": unet}, {}), {"unet": {}}, [])
        .describe(path, "some one/base", 'a "sks" dog')
        .usage
    )
    commands = [shlex.split(line) for line in usage.splitlines() if line.startswith("python ")]
    assert [words[1] for words in commands] == ["scripts/generate.py", "scripts/convert.py", "scripts/convert.py"]
    config = parse_options(generate.Config, "", commands[0][2:])
    assert config.adapter == [path.name] and config.prompt == ['a "sks" dog']
    for words in commands[1:]:
        assert convert.parse(words[2:]).pretrained_model_name_or_path == "some one/base"
