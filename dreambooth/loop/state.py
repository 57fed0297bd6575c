"""Everything that training changes, saved and restored together."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dreambooth.loop.average import Average
from dreambooth.loop.optimizers import load_optimizer_state
from dreambooth.method import Attached


@dataclass(frozen=True)
class TrainingState:
    """What trains, its optimizer and schedule, with fp16 the gradient scaler, and with --ema_decay the average."""

    attached: Attached
    optimizer: Any
    lr_scheduler: Any
    scaler: Any | None = None
    average: Average | None = None
    base_metadata: Mapping[str, str] = field(default_factory=dict)  # what the result says of the base model; not state

    def state_dict(self) -> dict[str, Any]:
        """Return nested dicts and lists of tensors and plain values."""
        return {
            "trained": self.attached.state(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "average": self.average.state() if self.average else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Learning rates and other optimizer options keep their present values."""
        self.attached.load_state(state["trained"])
        load_optimizer_state(self.optimizer, self.lr_scheduler, state["optimizer"], state["lr_scheduler"])
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.load_state(state["average"])
