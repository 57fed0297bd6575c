"""--ema_decay: an exponential moving average of what trains, beside it."""

import pytest
import torch

import train_dreambooth_kronecker
from dreambooth.errors import UserError
from dreambooth.layout import AVERAGE_NAME
from dreambooth.loop.average import Average
from dreambooth.loop.optimizers import build_optimizer
from dreambooth.method import Group
from dreambooth.options.checking import check_options
from tests.conftest import assert_same, factors
from tests.faults.checkpoints import make_config

SIZES = [(3, 2), (5,), (1, 4)]


def trained(tmp_path, **options):
    """Return parameters, and the optimizer over them."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in SIZES]
    groups = [Group("a", parameters[:2], 0.1, 0.0), Group("b", parameters[2:], 0.2, 0.0)]
    return parameters, build_optimizer(groups, make_config(tmp_path, **options), 1)


def step(parameters, optimizer, number):
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.copy_(gradient)
    optimizer.step()


@pytest.mark.parametrize("optimizer_name", ["AdamW", "Adafactor"])  # as vectors, and tensor by tensor
def test_it_is_the_average_done_by_hand_and_leaves_no_trace(optimizer_name, tmp_path):
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # torch then runs the hooks of every AdamW in its step
    parameters, optimizer = trained(tmp_path, optimizer=optimizer_name)
    average = Average(optimizer, 0.7)
    expected = [parameter.detach().clone() for parameter in parameters]
    for number in range(1, 31):
        step(parameters, optimizer, number)
        decay = min(0.7, (1 + number) / (10 + number))
        expected = [decay * old + (1 - decay) * new.detach() for old, new in zip(expected, parameters)]
    before = [parameter.detach().clone() for parameter in parameters]
    versions = [parameter._version for parameter in parameters]
    with average.applied():
        for parameter, value in zip(parameters, expected):
            torch.testing.assert_close(parameter.detach(), value)
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, before))
    assert all(parameter._version > version for parameter, version in zip(parameters, versions))


def test_it_continues_exactly_and_another_one_is_refused(tmp_path):
    parameters, optimizer = trained(tmp_path)
    average = Average(optimizer, 0.99)
    for number in range(3):
        step(parameters, optimizer, number)
    state = {"steps": average.steps, "values": [value.clone() for value in average.state()["values"]]}
    step(parameters, optimizer, 3)
    again, other = trained(tmp_path)
    later = Average(other, 0.99)
    for number in range(3):
        step(again, other, number)
    later.load_state({"steps": 0, "values": [torch.zeros_like(value) for value in later.values]})
    later.load_state(state)
    step(again, other, 3)
    assert all(torch.equal(one, two) for one, two in zip(average.values, later.values))
    with pytest.raises(ValueError):
        later.load_state({"steps": 1, "values": [torch.zeros(2)]})


def test_a_run_saves_it_and_resumes_it_exactly(options, run_main, tmp_path):
    given = {**options, "ema_decay": 0.5, "learning_rate": 0.01, "checkpointing_steps": 2}
    run_main(train_dreambooth_kronecker, **given)
    cut = {**given, "output_dir": tmp_path / "cut"}
    run_main(train_dreambooth_kronecker, **{**cut, "max_train_steps": 2})
    run_main(train_dreambooth_kronecker, **{**cut, "resume_from_checkpoint": "latest"})
    whole = options["output_dir"]
    assert_same(factors(whole / AVERAGE_NAME), factors(tmp_path / "cut" / AVERAGE_NAME))
    assert_same(factors(whole), factors(tmp_path / "cut"))
    assert_same(factors(whole / "checkpoint-4" / AVERAGE_NAME), factors(whole / AVERAGE_NAME))
    last, average = factors(whole), factors(whole / AVERAGE_NAME)
    assert any(not torch.equal(last[name], average[name]) for name in last)
    assert f"`{AVERAGE_NAME}/`" in (whole / "README.md").read_text()


def test_an_optimizer_that_averages_itself_is_refused(tmp_path):
    with pytest.raises(UserError, match="--ema_decay"):
        check_options(make_config(tmp_path, ema_decay=0.9, optimizer="ScheduleFreeAdamW"))
