"""The training programs' loop: resuming, Muon on convolutions, the learning rate."""

import argparse

import pytest
import torch
from torch import nn

from toyworld.fitting import FlatMuon, build_optimizers, fit, rate


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.hidden = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x):
        return self.hidden(self.norm(self.conv_in(x)))


def options(folder, steps=6):
    return argparse.Namespace(output_dir=folder, steps=steps, learning_rate=1e-2, seed=0, save_every=2)


def loss_of(model, step):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    return (model(x).float() - 1).square().mean() + 0 * torch.rand(())


def train(folder, loss_of=loss_of):
    torch.manual_seed(0)
    model, saved = Small(), {}

    def save(average, step):
        saved[step] = {name: tensor.clone() for name, tensor in average.state_dict().items()}

    fit(model, loss_of, save, options(folder))
    return model, saved


def test_a_stopped_program_continues_as_if_it_never_had(tmp_path):
    whole, averages = train(tmp_path / "whole")

    def interrupted(model, step):
        if step == 3:
            raise KeyboardInterrupt
        return loss_of(model, step)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", interrupted)
    resumed, later = train(tmp_path / "stopped")
    assert list(averages) == [2, 4, 6] and list(later) == [4, 6]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])
    for name, tensor in averages[6].items():
        assert torch.equal(tensor, later[6][name])


def test_training_lowers_the_loss(tmp_path):
    torch.manual_seed(0)
    before = loss_of(Small(), 100).item()
    model, _ = train(tmp_path)
    assert loss_of(model, 100).item() < 0.9 * before


def test_muon_moves_convolutions_as_it_moves_the_same_matrices():
    convolution = nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
    matrix = nn.Parameter(convolution.detach().permute(0, 2, 3, 1).reshape(8, -1).clone())
    gradient = torch.randn(8, 4, 3, 3)
    convolution.grad, matrix.grad = gradient, gradient.permute(0, 2, 3, 1).reshape(8, -1)
    FlatMuon([convolution], 0.1).step()
    torch.optim.Muon([matrix], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw").step()
    assert torch.equal(convolution.detach().permute(0, 2, 3, 1).reshape(8, -1), matrix.detach())


def test_every_parameter_has_one_optimizer():
    model = Small()
    adam, muon = build_optimizers(model, 1e-2)
    assert muon.parameters == [model.hidden.weight]
    assert len(adam.param_groups[0]["params"]) == len(list(model.parameters())) - 1


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    rates = [rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1)
    assert set(rates[10:600]) == {1.0}
    assert rates[800] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(1 / 400)
