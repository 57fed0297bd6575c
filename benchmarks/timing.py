"""Time several ways of doing one thing fairly, and write down the results.

The ways take turns, each once per round and in a new order, so that what slows the machine for a while slows all of
them. They are compared round by round: a ratio is the median of the rounds' own ratios, with its quartiles.
"""

import argparse
import json
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeVar

import torch

from dreambooth.markdown import table
from dreambooth.options.paths import path_argument

Measurement = TypeVar("Measurement")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"Timed rounds (default: {rounds}).")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: the process's own processor time, for a CPU that other programs use too (default: wall).",
    )
    parser.add_argument(
        "--output_dir",
        type=path_argument,
        default=Path("outputs/benchmarks"),
        help="Folder for the JSON and Markdown files.",
    )
    return parser


def interleave(
    ways: Mapping[str, Callable[[], Measurement]], rounds: int, warm_up: int
) -> dict[str, list[Measurement]]:
    """Return what each way returned in each of `rounds` rounds, after `warm_up` rounds that do not count."""
    found = {name: [] for name in ways}
    for number in range(warm_up + rounds):
        for name in random.sample(list(ways), len(ways)):
            measurement = ways[name]()
            if number >= warm_up:
                found[name].append(measurement)
    return found


def milliseconds(action: Callable[[], Any], device: torch.device, clock: str) -> float:
    now = CLOCKS[clock]
    synchronize = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    synchronize()
    start = now()
    action()
    synchronize()
    return 1e3 * (now() - start)


def ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return value / other of each round."""
    return [value / other for value, other in zip(values, others)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return "median (first to third quartile)"."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    first, _, third = quantiles(values, n=4, method="inclusive")
    return f"{median(values):.{digits}f} ({first:.{digits}f} to {third:.{digits}f})"


def machine(device: torch.device) -> str:
    """Return in words what it ran on: the GPU, or processor and threads, and the version of PyTorch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    return f"{_processor()}, {torch.get_num_threads()} thread(s), PyTorch {torch.__version__}"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_results(
    arguments: argparse.Namespace,
    name: str,
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    measurements: Any,
) -> None:
    """Print the table and write it, with its caption, to NAME.md, and all measurements to NAME.json."""
    text = f"{caption}\n\n{table(header, rows)}\n"
    settings = {key: str(value) for key, value in vars(arguments).items()}
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / f"{name}.md").write_text(text, encoding="utf-8")
    (arguments.output_dir / f"{name}.json").write_text(
        json.dumps({"caption": caption, "settings": settings, "measurements": measurements}, indent=1),
        encoding="utf-8",
    )
    print(text)
