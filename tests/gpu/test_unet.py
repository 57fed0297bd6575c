"""The adapter in a UNet on the device: exact where it must be, and the same gradients however memory is saved."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from kron_adapter import (
    disable_kronecker,
    inject_kronecker,
    kronecker_parameters,
    merge_kronecker,
    unmerge_kronecker,
)

pytestmark = pytest.mark.gpu


@pytest.fixture
def unet(tiny_sd, device):
    return UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet").to(device)


@pytest.fixture
def inputs(device):
    torch.manual_seed(0)
    found = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([10, 700]),
        "encoder_hidden_states": torch.randn(2, 77, 64),
    }
    return {name: tensor.to(device) for name, tensor in found.items()}


def run(unet, inputs):
    cast = {name: tensor.to(unet.dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    with torch.no_grad():
        return unet(**cast).sample


def perturb(unet):
    torch.manual_seed(2)
    for parameter in kronecker_parameters(unet):
        parameter.data += 0.3 * torch.randn(parameter.shape).to(parameter.device)


def gradients(unet, inputs, dtype):
    with torch.autocast(inputs["sample"].device.type, dtype, enabled=dtype != torch.float32):
        prediction = unet(**inputs).sample
    prediction.float().square().mean().backward()
    found = [parameter.grad.clone() for parameter in kronecker_parameters(unet)]
    unet.zero_grad()
    return found


def assert_close(ours, others, tolerance):
    for own, other in zip(ours, others, strict=True):
        assert (own - other).abs().max() <= tolerance * other.abs().max()


def test_disabled_and_unmerged_are_exact(unet, inputs):
    unet = unet.bfloat16()
    before = run(unet, inputs)
    inject_kronecker(unet, 4, 64)
    assert (run(unet, inputs) - before).abs().max() <= 2**-6 * before.abs().max()
    perturb(unet)
    adapted = run(unet, inputs)
    with disable_kronecker(unet):
        assert torch.equal(run(unet, inputs), before)
    merge_kronecker(unet)
    unmerge_kronecker(unet)
    assert torch.equal(run(unet, inputs), adapted)


def test_the_device_computes_what_the_cpu_does(unet, inputs, device):
    """In fp32 without TF32: the outputs, and the gradient of every factor."""
    inject_kronecker(unet, 4, 64)
    perturb(unet)
    here = run(unet, inputs).cpu(), [gradient.cpu() for gradient in gradients(unet, inputs, torch.float32)]
    unet, inputs = unet.cpu(), {name: tensor.cpu() for name, tensor in inputs.items()}
    there = run(unet, inputs), gradients(unet, inputs, torch.float32)
    assert_close([here[0], *here[1]], [there[0], *there[1]], 1e-3)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2**-5)], ids=["fp32", "bf16"])
def test_checkpointing_gives_the_same_gradients(unet, inputs, dtype, tolerance):
    inject_kronecker(unet, 4, 64)
    perturb(unet)
    unet.train()
    plain = gradients(unet, inputs, dtype)
    unet.enable_gradient_checkpointing()
    assert_close(gradients(unet, inputs, dtype), plain, tolerance)
    assert all(gradient.abs().sum() > 0 for gradient in plain)


def test_channels_last_gives_the_same_gradients(unet, inputs):
    inject_kronecker(unet, 4, 64)
    perturb(unet)
    plain = gradients(unet, inputs, torch.float32)
    unet.to(memory_format=torch.channels_last)
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(gradients(unet, inputs, torch.float32), plain, 1e-3)
