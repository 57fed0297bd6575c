"""Several processes as one: what the main process does or finds out, all of them learn, and none outlives another."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed import DistError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dreambooth.errors import UserError
from dreambooth.options.training import TrainingConfig

T = TypeVar("T")

# A process that ends closes its connections, which the others see at once. The time is for one that hangs, or whose
# machine is gone: longer than the main process may draw samples while the others wait (NCCL's own are 10 minutes).
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(minutes=30))

SHARDING = {  # what accelerate launch sets; FSDP has a place here, see `split_frozen`
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def on_main(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """Return on every process what act() returns on the main one. What it raises there, all raise: none waits in vain.

    All processes have to call this. What act() returns has to be plain data, which goes from one process to another.
    """
    if accelerator.num_processes == 1:
        return act()
    outcome: list = [None, None]
    failure = None
    if accelerator.is_main_process:
        try:
            outcome[0] = act()
        except Exception as error:
            failure = error
            outcome[1] = error if isinstance(error, UserError) else RuntimeError(f"the main process failed: {error}")
    broadcast_object_list(outcome)
    if failure or outcome[1]:
        raise failure or outcome[1]
    return outcome[0]


def average_gradients(parameters: Sequence[Tensor], accelerator: Accelerator) -> None:
    """Put the mean over all processes in the place of every gradient, in one exchange."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    means = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, mean in zip(gradients, means.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))


# ---- a model that is split ----


def splits_models() -> bool:
    """Whether `accelerate launch` was told to use FSDP."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def split_frozen(models: Iterable[nn.Module], accelerator: Accelerator) -> None:
    """Split the frozen weights of models over the processes, which gather each block's as they come to it (FSDP2).

    What trains stays whole on each: it is small, and is saved and resumed as ever. From here on all processes have to
    call the models together.
    """
    if accelerator.num_processes == 1:
        return
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for model in models:
        whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
        for module in reversed(list(model.modules())):  # inner blocks first, the model itself last
            if module is model or type(module).__name__ in model._no_split_modules:
                fully_shard(module, mesh=mesh, ignored_params=whole)


def check_sharding(config: TrainingConfig) -> None:
    """Raise UserError where `accelerate launch` was told to split models in a way that is not ours."""
    for variable, name in SHARDING.items():
        if parse_flag_from_env(variable):
            raise UserError(
                f"accelerate launch was told to use {name}, which splits what trains over the devices. Here that is a "
                "few MiB of factors with their optimizer, so that there is nothing to gain: start with --multi_gpu "
                "(configs/accelerate/multi_gpu.yaml), or, to split the frozen model, with FSDP "
                "(configs/accelerate/fsdp.yaml)"
            )
    if splits_models() and (config.compile or config.base_precision in ("nf4", "int8")):
        flag = "--compile" if config.compile else f"--base_precision {config.base_precision}"
        raise UserError(
            f"{flag} does not go with FSDP, which accelerate launch was told to use: leave it out, or start with "
            "--multi_gpu (configs/accelerate/multi_gpu.yaml)"
        )


# ---- when one is gone ----


class LostProcessError(UserError):
    """Another process of the run has ended, or does not answer."""

    exit_code = 69  # EX_UNAVAILABLE of sysexits.h


@contextmanager
def explain_lost_process() -> Iterator[None]:
    """Turn the error of an exchange between processes into a LostProcessError: one that is gone ends the others too."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, DistError) and "gloo" not in str(error):  # gloo's errors have no type of their own
            raise
        reason = str(error).strip().split("\n")[0]
        raise LostProcessError(
            f"another process of this run has ended or does not answer, so this one ends too: {reason}\n"
            "What that process said, if it could, tells why. The same command with --resume_from_checkpoint latest "
            "goes on from the last checkpoint"
        ) from error
