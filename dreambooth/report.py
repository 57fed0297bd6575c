"""What the user is told: progress, trackers, and the closing line."""

import json
import os
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from dreambooth.config import TrainingConfig
from dreambooth.training import StepReport


class Progress:
    """The progress bar with loss and learning rate, metrics.jsonl, the trackers, and the time since it began."""

    def __init__(self, accelerator: Accelerator, config: TrainingConfig, first_step: int, total_steps: int):
        self.accelerator = accelerator
        self.began = time.monotonic()
        self.bar = tqdm(
            total=total_steps, initial=first_step, desc="Training", unit="step", disable=not accelerator.is_main_process
        )
        self.metrics = open(os.devnull, "w")
        if accelerator.is_main_process:
            self.metrics = _open_metrics(Path(config.output_dir) / "metrics.jsonl", first_step)
            accelerator.init_trackers("dreambooth-kronecker", config=_flat(config))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def update(self, step: int, report: StepReport) -> None:
        self.bar.set_postfix(loss=f"{report.loss:.4f}", lr=f"{report.learning_rate:.2e}", refresh=False)
        self.bar.update()
        self.metrics.write(json.dumps({"step": step, **asdict(report)}) + "\n")
        self.metrics.flush()
        self.accelerator.log(asdict(report), step=step)

    def say(self, line: str) -> None:
        self.bar.clear()
        print(line, flush=True)

    def close(self) -> None:
        self.bar.close()
        self.metrics.close()
        self.accelerator.wait_for_everyone()  # a rank that leaves while another still works can hang at its exit
        self.accelerator.end_training()


def _open_metrics(path: Path, first_step: int) -> IO[str]:
    """Open metrics.jsonl for the steps after `first_step`; what a run left that got further is dropped."""
    kept = path.read_text().splitlines(keepends=True)[:first_step] if path.exists() else []
    path.write_text("".join(kept))
    return path.open("a")


def _flat(config: TrainingConfig) -> dict[str, int | float | str]:
    """The options in the only types that every tracker takes."""
    options = asdict(config)
    return {name: value if isinstance(value, (int, float)) else json.dumps(value) for name, value in options.items()}


def closing_line(parameters: list[nn.Parameter], steps: int, seconds: float, path: Path, device: torch.device) -> str:
    """Say what was trained, how long it took, the peak memory, and where the file is."""
    count = sum(parameter.numel() for parameter in parameters)
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"Trained {count:,} parameters ({count * 4 / 2**20:.2f} MiB in fp32) for {steps} steps in {minutes} min "
        f"{rest} s; peak memory {peak_memory(device) / 2**30:.2f} GiB on {device.type}; the adapter is {path}"
    )


def peak_memory(device: torch.device) -> int:
    """Return the most memory used so far, bytes: the device's on a GPU, the process's on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
