"""Several processes as one: what the main process does or finds out, all of them learn, and none outlives another."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, parse_flag_from_env
from torch.distributed import DistError

from dreambooth.config import UserError

T = TypeVar("T")

# A process that ends closes its connections, which the others see at once. The time is for one that hangs, or whose
# machine is gone: longer than the main process may draw samples while the others wait (NCCL's own are 10 minutes).
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(minutes=30))

SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
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


def refuse_sharding() -> None:
    """Raise UserError where `accelerate launch` was told to split the model or its optimizer over the devices."""
    for variable, name in SHARDING.items():
        if parse_flag_from_env(variable):
            raise UserError(
                f"accelerate launch was told to use {name}, which splits what trains over the devices. Here that is a "
                "few MiB of factors with their optimizer, so that there is nothing to gain, and the frozen model is "
                "whole on each device: start with --multi_gpu (configs/accelerate/multi_gpu.yaml), and where memory "
                "is short, with --base_precision nf4 and --gradient_checkpointing"
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
