"""Several processes acting as one: what the main process does or finds, all of them learn; none outlives another."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast, broadcast_object_list, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed import DistError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dreambooth.errors import UserError
from dreambooth.options.base_model import FrozenModelOptions

T = TypeVar("T")

# A process that ends closes its connections, which the others notice at once. The timeout is for one that hangs, or
# whose machine is gone. NCCL's own, 10 minutes, is too short: the others wait while the main process draws samples.
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(minutes=30))

LARGEST_EXCHANGE = 2**24  # numbers that processes exchange at once: an adapter, or a part of a whole model

SHARDING = {  # set by accelerate launch; FSDP is supported, see `split_frozen`
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def on_main(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """Return on every process what act() returns on the main one. If it raises there, all processes raise.

    All processes must call this. act() must return something that can be pickled.
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


@torch.no_grad()
def begin_alike(parameters: Sequence[Tensor], accelerator: Accelerator) -> None:
    """Give all processes the main one's values, in as many exchanges as LARGEST_EXCHANGE asks for.

    What was computed from the base model differs in its last bits between kinds of devices.
    """
    if accelerator.num_processes == 1:
        return
    for batch in _batches(parameters):
        values = broadcast(torch.cat([parameter.flatten() for parameter in batch]))
        assert isinstance(values, Tensor)  # accelerate broadcasts containers of tensors too
        for parameter, value in zip(batch, values.split([parameter.numel() for parameter in batch])):
            parameter.copy_(value.view_as(parameter))


def average_gradients(parameters: Sequence[Tensor], accelerator: Accelerator) -> None:
    """Replace every gradient by its mean over all processes, in as many exchanges as LARGEST_EXCHANGE asks for.

    Parameters without a gradient, which then have none on any process, are left out.
    """
    if accelerator.num_processes == 1:
        return
    for gradients in _batches([parameter.grad for parameter in parameters if parameter.grad is not None]):
        means = mean_over_processes(torch.cat([gradient.flatten() for gradient in gradients]), accelerator)
        for gradient, mean in zip(gradients, means.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(mean.view_as(gradient))


def _batches(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors in order, as many at once as have at most LARGEST_EXCHANGE numbers, but at least one."""
    batch: list[Tensor] = []
    for tensor in tensors:
        if batch and sum(other.numel() for other in batch) + tensor.numel() > LARGEST_EXCHANGE:
            yield batch
            batch = []
        batch.append(tensor)
    if batch:
        yield batch


def mean_over_processes(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the mean of a tensor over all processes, which must all call this."""
    mean = accelerator.reduce(tensor, "mean")
    assert isinstance(mean, Tensor)  # accelerate reduces containers of tensors too
    return mean


# ---- a model split over the processes ----


def splits_models() -> bool:
    """Whether `accelerate launch` was told to use FSDP."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def split_frozen(models: Iterable[nn.Module], accelerator: Accelerator) -> None:
    """Shard the frozen weights of models over the processes, which gather each block's as they need it (FSDP2).

    What trains stays whole on every process: it is small, and is saved and resumed as usual. From here on all processes
    must call the models together.
    """
    if accelerator.num_processes == 1:
        return
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for model in models:
        whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
        blocks = getattr(model, "_no_split_modules", None) or ()
        for module in reversed(list(model.modules())):  # inner blocks first, the model itself last
            if module is model or type(module).__name__ in blocks:
                fully_shard(module, mesh=mesh, ignored_params=whole)


def check_sharding(config: FrozenModelOptions) -> None:
    """Raise UserError if `accelerate launch` was told to split models in a way that is not supported."""
    for variable, name in SHARDING.items():
        if parse_flag_from_env(variable):
            raise UserError(
                f"accelerate launch was told to use {name}, which splits what trains over the devices. Here that is "
                "a few MiB, so there is nothing to gain: use --multi_gpu (configs/accelerate/multi_gpu.yaml), or, to "
                "split the frozen model, FSDP (configs/accelerate/fsdp.yaml)"
            )
    if splits_models() and (config.compile or config.base_precision in ("nf4", "int8")):
        flag = "--compile" if config.compile else f"--base_precision {config.base_precision}"
        raise UserError(
            f"{flag} does not work with FSDP, which accelerate launch was told to use: leave it out, or use "
            "--multi_gpu (configs/accelerate/multi_gpu.yaml)"
        )


# ---- when a process is lost ----


class LostProcessError(UserError):
    """Another process of the run has ended or does not respond."""

    exit_code = 69  # EX_UNAVAILABLE of sysexits.h


@contextmanager
def explain_lost_process() -> Iterator[None]:
    """Turn an error of communication between processes into a LostProcessError, which ends this process too."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, DistError) and "gloo" not in str(error):  # gloo raises plain RuntimeErrors
            raise
        reason = str(error).strip().split("\n")[0]
        raise LostProcessError(
            f"another process of this run has ended or does not respond, so this one ends too: {reason}\n"
            "See that process's own output for the cause. The same command with --resume_from_checkpoint latest "
            "continues from the last checkpoint"
        ) from error
