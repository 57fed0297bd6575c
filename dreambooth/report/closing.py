"""The closing line: what was trained, how long it took, and where the result is."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from dreambooth.options.base_model import FrozenModelOptions
from dreambooth.runtime.memory import peak_memory
from dreambooth.wording import size


def closing_line(
    parameters: Iterable[nn.Parameter],
    steps: int,
    seconds: float,
    compiling: float,
    path: Path,
    device: torch.device,
) -> str:
    """Return the line: how many parameters were trained, for how long, the peak memory, and where the result is.

    `seconds` is the whole time, of which `compiling` seconds were spent in torch.compile.
    """
    count = sum(parameter.numel() for parameter in parameters)
    minutes, rest = divmod(round(seconds), 60)
    compiled = f", {compiling:.1f} s of it compiling" if compiling else ""
    return (
        f"Trained {count:,} parameters ({size(4 * count)} in fp32) for {steps} steps in {minutes} min "
        f"{rest} s{compiled}; peak memory {size(peak_memory(device))} on {device.type}; the result is {path}"
    )


def compile_seconds(config: FrozenModelOptions) -> float:
    """Return the time spent in torch.compile so far, s, by its own count; 0 without --compile."""
    if not config.compile:
        return 0.0
    from torch._dynamo.utils import calculate_time_spent  # slow to import, and most runs do not compile

    return calculate_time_spent()["total_wall_time"]
