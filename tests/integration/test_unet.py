"""The adapter in a real UNet and a real pipeline: equal to the base where it must be, and gone when it is gone."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from kron_adapter import (
    disable_kronecker,
    inject_kronecker,
    kronecker_layers,
    kronecker_parameters,
    load_kronecker,
    merge_kronecker,
    remove_kronecker,
    save_kronecker,
    unmerge_kronecker,
)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([10, 700]),
        "encoder_hidden_states": torch.randn(2, 77, 64),
    }


@pytest.fixture
def unet(tiny_sd):
    return UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")


def run(unet, inputs):
    dtype = next(unet.parameters()).dtype
    with torch.no_grad():
        return unet(inputs["sample"].to(dtype), inputs["timestep"], inputs["encoder_hidden_states"].to(dtype)).sample


def perturb(unet):
    torch.manual_seed(2)
    for parameter in kronecker_parameters(unet):
        parameter.data += 0.3 * torch.randn_like(parameter)


@pytest.mark.parametrize("a1, a2", [(4, 64), (64, 4), (16, 16)])
def test_step_zero_is_the_base_unet_bit_for_bit(unet, inputs, a1, a2):
    before = run(unet, inputs)
    inject_kronecker(unet, a1, a2)
    assert torch.equal(run(unet, inputs), before)


def test_step_zero_in_bf16_is_the_base_unet_within_rounding(unet, inputs):
    unet = unet.bfloat16()
    before = run(unet, inputs)
    inject_kronecker(unet, 4, 64)
    assert (run(unet, inputs) - before).abs().max() <= 2**-7 * before.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_disabled_it_is_the_base_unet_bit_for_bit_in_every_dtype(unet, inputs, dtype):
    unet = unet.to(dtype)
    before = run(unet, inputs)
    inject_kronecker(unet, 4, 64)
    perturb(unet)
    adapted = run(unet, inputs)
    assert not torch.allclose(adapted, before, rtol=0.01)
    with disable_kronecker(unet):
        assert torch.equal(run(unet, inputs), before)
    assert torch.equal(run(unet, inputs), adapted)


def test_merging_equals_not_merging_and_unmerging_is_exact(unet, inputs):
    before = run(unet, inputs)
    inject_kronecker(unet, 4, 64)
    perturb(unet)
    adapted = run(unet, inputs)
    merge_kronecker(unet)
    torch.testing.assert_close(run(unet, inputs), adapted, rtol=1e-4, atol=1e-5)
    unmerge_kronecker(unet)
    assert torch.equal(run(unet, inputs), adapted)
    remove_kronecker(unet)
    assert torch.equal(run(unet, inputs), before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_factor_gets_a_gradient_with_and_without_checkpointing(unet, inputs, checkpointing):
    inject_kronecker(unet, 4, 64)
    perturb(unet)
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"]).sample.square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in kronecker_parameters(unet))
    assert sum(parameter.grad is not None for parameter in unet.parameters()) == 64


def test_a_pipeline_draws_the_same_image_from_the_file(tiny_sd, tmp_path):
    def draw(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipeline("sks dog", num_inference_steps=3, generator=generator, output_type="pt").images

    trained = StableDiffusionPipeline.from_pretrained(tiny_sd)
    base = draw(trained)
    inject_kronecker(trained.unet, 4, 64)
    perturb(trained.unet)
    save_kronecker(trained.unet, tmp_path / "a.safetensors")
    loaded = StableDiffusionPipeline.from_pretrained(tiny_sd)
    load_kronecker(loaded, tmp_path / "a.safetensors")
    assert len(kronecker_layers(loaded.unet)) == 32
    assert torch.equal(draw(loaded), draw(trained))
    assert (draw(loaded) - base).abs().max() > 0.05
