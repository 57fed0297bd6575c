"""--ema_decay: an exponential moving average of what trains, kept beside it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from dreambooth.loop.optimizers import restored, set_values, values_of


class Average:
    """The average of an optimizer's vectors, one `lerp` after each of its steps.

    After step t it is decay · average + (1 - decay) · parameters. The decay is at most (1 + t) / (10 + t), so that the
    start soon counts no more.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float):
        self.optimizer, self.decay, self.steps = optimizer, decay, 0
        self.values = [value.clone() for value in values_of(optimizer)]
        optimizer.register_step_post_hook(lambda *_: self._update())

    def _update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, values_of(self.optimizer), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside this context what trains has the averaged values; afterwards, bit for bit, what it had before."""
        with restored(self.optimizer):
            set_values(self.optimizer, self.values)
            yield

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "values": self.values}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned. Raises ValueError, with nothing changed, if the sizes differ."""
        sizes = [value.shape for value in state["values"]]
        if sizes != [value.shape for value in self.values]:
            raise ValueError(f"the average is of vectors of {sizes}")
        self.steps = state["steps"]
        for own, value in zip(self.values, state["values"]):
            own.copy_(value)
