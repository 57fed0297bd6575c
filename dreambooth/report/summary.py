"""summary.json: what a finished run trained, at what cost and with which versions, for programs that compare runs."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dreambooth.errors import warn_only
from dreambooth.family import Family
from dreambooth.layout import METRICS_NAME, SUMMARY_NAME
from dreambooth.method import Attached, Method, trained_parameters
from dreambooth.options.output import OutputOptions
from dreambooth.report.metrics import read_metrics
from dreambooth.runtime.memory import peak_memory
from kron_formats.files import size_on_disk, write_text

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def save_summary(
    path: Path,
    method: Method,
    attached: Attached,
    family: Family,
    step: int,
    device: torch.device,
    num_ranks: int,
    config: OutputOptions,
) -> None:
    """Write OUTPUT_DIR/summary.json about the result in `path`. Never raises: a failure is a warning."""
    output = Path(config.output_dir)
    with warn_only(f"{output / SUMMARY_NAME} was not written"):
        rows = read_metrics(output / METRICS_NAME)
        summary: dict[str, Any] = {
            "method": method.name,
            "family": family.name,
            "result": path.name,
            "file_size": size_on_disk(path),  # bytes
            "parameters": sum(parameter.numel() for parameter in trained_parameters(attached)),
            "steps": step,
            "seconds": round(sum(row.get("step_time", 0.0) for row in rows), 3),  # of the steps alone, all resumed runs
            "peak_memory": peak_memory(device),  # bytes, of the last run
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {_processor()}",
            "processes": num_ranks,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        }
        write_text(output / SUMMARY_NAME, json.dumps(summary, indent=1) + "\n")


def _processor() -> str:
    return platform.processor() or platform.machine()
