"""Several processes as one: what the main process does or finds out, all of them learn."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dreambooth.config import UserError

T = TypeVar("T")


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
