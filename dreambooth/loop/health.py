"""What an optimizer step reports, and whether its numbers are finite."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from dreambooth.options.training import TrainingConfig


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did. Its numbers may not be computed yet: see `read_reports`."""

    numbers: Tensor  # (4,): loss, instance loss, prior loss, all means over forward passes and devices; gradient norm
    learning_rate: float


def read_reports(reports: Sequence[StepReport]) -> list[dict[str, float]]:
    """Return each step's numbers by name. Synchronises with the device once, for all steps together."""
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
    """Whether a step's loss and gradients are finite.

    With fp16 only the loss counts: if the scale makes gradients overflow, the scaler itself skips the step and lowers
    the scale.
    """
    return math.isfinite(values["loss"]) and (accelerator.scaler is not None or math.isfinite(values["grad_norm"]))


def what_to_try(config: TrainingConfig) -> str:
    """Return advice on keeping the loss finite: the options that may help and are not set yet."""
    advice = [f"a lower --learning_rate than {config.learning_rate:g}"]
    if config.mixed_precision == "fp16" or config.base_precision == "fp16":
        advice.append("--mixed_precision bf16, which has the range of fp32, instead of fp16")
    if config.vae_precision != "fp32" or config.pretrained_vae_model_name_or_path:
        advice.append(
            "--vae_precision fp32, or --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix, if the "
            "VAE's latents overflow"
        )
    if config.snr_gamma is None:
        advice.append("--snr_gamma 5")
    advice.append("--skip_nonfinite N, which skips up to N such steps")
    return f"Try {'; '.join(advice)}. If the very first step fails, the base model's weights may be damaged"
