"""Stopping early: on a signal or at the time limit, a run finishes its step, saves a checkpoint and exits."""

import logging
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from dreambooth.options.steps import RuntimeOptions
from dreambooth.runtime.ranks import mean_over_processes

logger = logging.getLogger(__name__)

STOPPED = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again"
# Those that this system has: Windows has no SIGUSR1, and sends SIGBREAK where a console is closed.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGBREAK") if hasattr(signal, name)]
ECHO = 1.0  # seconds in which one signal may arrive twice: from the terminal or scheduler, and through the launcher


class Stop:
    """A request to stop. Inside its context, signals make that request.

    Until `only_between_steps` is called, a signal ends the run at once; every file written before training is written
    whole, and the next start uses it. From then on the run ends between steps. A second signal always ends it at once.
    """

    def __init__(self, config: RuntimeOptions, accelerator: Accelerator):
        self.accelerator = accelerator
        self.time_limit = config.time_limit()
        self.began = time.monotonic()
        self.process = os.getpid()
        self.training = False
        self.reason: str | None = None
        self.signalled: float | None = None  # time.monotonic of the first signal

    def __enter__(self) -> "Stop":
        in_main_thread = threading.current_thread() is threading.main_thread()  # no other may handle signals
        self.previous = {number: signal.signal(number, self._receive) for number in SIGNALS if in_main_thread}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a data-loader worker that was forked and has just begun
        now = time.monotonic()
        if self.signalled is not None:
            if now - self.signalled > ECHO:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.signalled, self.reason = now, signal.Signals(number).name
        if not self.training:
            self._say(f"{self.reason} before training began; what was drawn or encoded is kept. {_AGAIN}")
            sys.exit(STOPPED)
        self._say(f"{self.reason}: saving after this step; a second signal ends the run at once")

    def _say(self, text: str) -> None:
        """Write to standard error without Python's buffers: the signal may have come while they were in use."""
        if self.accelerator.is_local_main_process:
            os.write(2, f"\n{text}\n".encode())

    def only_between_steps(self) -> None:
        """From here on, let a signal wait for the end of the step."""
        self.training = True

    def asked(self) -> bool:
        """Whether to stop now. All processes must call this, and get the same answer."""
        if self.reason is None and self.time_limit is not None and time.monotonic() - self.began >= self.time_limit:
            self.reason = "--max_train_time"
        if self.accelerator.num_processes == 1:
            return self.reason is not None
        mine = torch.tensor(float(self.reason is not None), device=self.accelerator.device)
        return bool(mean_over_processes(mine, self.accelerator).item())

    def leave(self, step: int) -> None:
        """End the program with exit code 75. The caller has saved everything up to `step`."""
        logger.warning("%s: stopped after step %d, which is saved. %s", self.reason or "Another process", step, _AGAIN)
        sys.exit(STOPPED)


def ignore_signals(worker: int) -> None:
    """Leave signals to the training process. Called in a data-loader worker, which ends when that process does.

    It is told to by SIGTERM, for which PyTorch has set a handler: ignored, the training process would wait for ever.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)


_AGAIN = "The same command with --resume_from_checkpoint latest continues the run"
