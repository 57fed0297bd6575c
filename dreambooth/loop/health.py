"""What a step reports, and whether its numbers are finite."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from dreambooth.options.training import TrainingConfig


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did. Its numbers are still on their way from the device: see `read_reports`."""

    numbers: Tensor  # (4,): loss, instance loss, prior loss, all means over forward passes and devices; gradient norm
    learning_rate: float


def read_reports(reports: Sequence[StepReport]) -> list[dict[str, float]]:
    """Return the numbers of steps by name. Waits, once for all, until the device has done the last of them."""
    rows = torch.stack([report.numbers for report in reports]).tolist()
    return [
        {
            "loss": loss,
            "instance_loss": instance_loss,
            "prior_loss": prior_loss,
            "learning_rate": report.learning_rate,
            "grad_norm": grad_norm,
        }
        for report, (loss, instance_loss, prior_loss, grad_norm) in zip(reports, rows)
    ]


def is_sound(values: Mapping[str, float], accelerator: Accelerator) -> bool:
    """Whether a step's loss and gradients are finite; with fp16, its loss: the scaler itself passes over gradients
    that its scale made overflow, and lowers it."""
    return math.isfinite(values["loss"]) and (accelerator.scaler is not None or math.isfinite(values["grad_norm"]))


def what_to_try(config: TrainingConfig) -> str:
    """Return what may keep losses finite that these options leave to do."""
    advice = [f"a lower --learning_rate than {config.learning_rate:g}"]
    if config.mixed_precision == "fp16" or config.base_precision == "fp16":
        advice.append("--mixed_precision bf16, whose range is that of fp32, instead of fp16")
    if config.vae_precision != "fp32" or config.pretrained_vae_model_name_or_path:
        advice.append(
            "--vae_precision fp32, or --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix, if the "
            "VAE's latents overflow"
        )
    if config.snr_gamma is None:
        advice.append("--snr_gamma 5")
    advice.append("--skip_nonfinite N, which passes over up to N such steps")
    return f"Try {'; '.join(advice)}. If the first step already fails, the base model's weights may be damaged"
