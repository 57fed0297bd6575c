"""What is refused before several processes are started, and which errors are those of a lost process."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed import DistNetworkError

from dreambooth.errors import UserError
from dreambooth.runtime.accelerator import start_accelerator
from dreambooth.runtime.ranks import (
    LostProcessError,
    average_gradients,
    begin_alike,
    check_sharding,
    explain_lost_process,
)
from tests.faults.checkpoints import make_config


@pytest.mark.parametrize(
    "variable, name",
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config"),
    ],
)
def test_ways_to_split_what_trains_are_refused_by_name_before_anything_else(variable, name, monkeypatch, tmp_path):
    config = make_config(tmp_path)
    monkeypatch.setenv(variable, "false")
    check_sharding(config)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=f"to use {name}, which splits .*configs/accelerate/fsdp.yaml"):
        start_accelerator(config)


@pytest.mark.parametrize(
    "options, named", [({"compile": True}, "--compile"), ({"base_precision": "nf4"}, "--base_precision nf4")]
)
def test_what_does_not_go_with_fsdp_is_refused(options, named, monkeypatch, tmp_path):
    flags = "--use_fsdp --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no train.py"
    set_by_launcher = prepare_multi_gpu_env(launch_command_parser().parse_args(flags.split()))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", set_by_launcher["ACCELERATE_USE_FSDP"])
    check_sharding(make_config(tmp_path))
    with pytest.raises(UserError, match=f"^{named} does not work with FSDP.*configs/accelerate/multi_gpu.yaml"):
        start_accelerator(make_config(tmp_path, **options))


@pytest.mark.parametrize(
    "error",
    [
        DistNetworkError("the server has closed the connection"),
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
    ],
)
def test_the_end_of_a_connection_is_a_lost_process(error):
    with pytest.raises(LostProcessError, match="has ended or does not respond.*(\n.*)*--resume_from_checkpoint latest"):
        with explain_lost_process():
            raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="mat1 and mat2"), explain_lost_process():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_all_processes_begin_with_the_main_one_s_values(monkeypatch):
    sizes, shapes = [], [(3,), (2, 2), (2,), (9, 1)]
    parameters = [torch.nn.Parameter(torch.full(shape, float(number))) for number, shape in enumerate(shapes)]
    before = [*parameters]

    def broadcast(tensor):
        sizes.append(len(tensor))
        return tensor + 0.5

    monkeypatch.setattr("dreambooth.runtime.ranks.broadcast", broadcast)
    monkeypatch.setattr("dreambooth.runtime.ranks.LARGEST_EXCHANGE", 7)
    begin_alike(parameters, SimpleNamespace(num_processes=1))
    assert sizes == [] and all((p == number).all() for number, p in enumerate(parameters))
    begin_alike(parameters, SimpleNamespace(num_processes=2))
    assert sizes == [7, 2, 9] and all(parameter is same for parameter, same in zip(parameters, before))
    assert all((p == number + 0.5).all() and p.requires_grad for number, p in enumerate(parameters))


def test_gradients_are_averaged_in_parts_of_a_limited_size_and_none_is_missed(monkeypatch):
    sizes, numbers = [], [3, 4, 2, 9, 1, 1]
    parameters = [torch.nn.Parameter(torch.zeros(number)) for number in [*numbers, 5]]
    for number, parameter in enumerate(parameters[:-1]):  # the last has no gradient
        parameter.grad = torch.full_like(parameter, float(number))

    def mean(tensor, accelerator):
        sizes.append(len(tensor))
        return tensor + 0.5

    monkeypatch.setattr("dreambooth.runtime.ranks.mean_over_processes", mean)
    monkeypatch.setattr("dreambooth.runtime.ranks.LARGEST_EXCHANGE", 7)
    average_gradients(parameters, SimpleNamespace(num_processes=2))
    assert sizes == [7, 2, 9, 2] and parameters[-1].grad is None
    assert all((parameter.grad == number + 0.5).all() for number, parameter in enumerate(parameters[:-1]))
