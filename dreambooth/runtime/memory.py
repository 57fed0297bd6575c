"""Running out of memory: reported in a few lines, with the options that need less."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from accelerate import Accelerator

from dreambooth.errors import UserError
from dreambooth.options.steps import TextEncoderOptions
from dreambooth.options.training import TrainingConfig

try:
    import resource
except ImportError:  # on Windows
    resource = None

WORDS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


@contextmanager
def explain_out_of_memory(config: TrainingConfig, accelerator: Accelerator) -> Iterator[None]:
    """Turn an out-of-memory error, of the device or the host, into a UserError that lists options that need less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one; on the CPU torch raises it plain
        if not isinstance(error, MemoryError) and not any(word in str(error).lower() for word in WORDS):
            raise
        device = accelerator.device.type
        remedies = "\n".join(f"    {remedy}" for remedy in _remedies(config, accelerator)) or "    a smaller base model"
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"out of memory on {device}: {reason}\nTo use less memory, try in this order:\n{remedies}"
        ) from error


def _remedies(config: TrainingConfig, accelerator: Accelerator) -> list[str]:
    """Return the options that lower memory and are not set yet, those that cost least first."""
    batch, on_cuda = config.train_batch_size, accelerator.device.type == "cuda"
    quantised = config.base_precision in ("nf4", "int8")
    remedies = {
        "--gradient_checkpointing": not config.gradient_checkpointing,
        f"--train_batch_size 1 --gradient_accumulation_steps {batch * config.gradient_accumulation_steps}": batch > 1,
        "--mixed_precision bf16": accelerator.mixed_precision == "no" and not quantised,
        "--center_crop, or --cache_latents on: photos are encoded once, and the VAE leaves the device": (
            config.cache_latents == "off" or not (config.cache_latents == "on" or config.center_crop)
        ),
        "--base_precision nf4": on_cuda and not quantised and not config.compile,
        "--sample_batch_size 1": config.uses_class_images and config.sample_batch_size > 1,
        "--use_8bit_adam": on_cuda and config.optimizer_name() == "AdamW" and not config.use_8bit_adam,
        "without --train_text_encoder": isinstance(config, TextEncoderOptions) and config.train_text_encoder,
        f"a --resolution below {config.resolution}": config.resolution > 64,
    }
    return [remedy for remedy, helps in remedies.items() if helps]


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far, bytes: the device's on a GPU, the process's on the CPU.

    Apple's GPUs count no peak: theirs is what PyTorch holds now, which it rarely gives back.
    """
    if device.type == "cpu":
        return _peak_of_process()
    counters = torch.get_device_module(device)
    if device.type == "mps":
        return counters.driver_allocated_memory()
    return counters.max_memory_reserved(device)


def _peak_of_process() -> int:
    if resource is None:
        used = psutil.Process().memory_info()
        return getattr(used, "peak_wset", used.rss)  # the first is Windows'
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
