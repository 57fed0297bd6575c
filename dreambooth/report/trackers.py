"""The trackers of --report_to; one that fails is dropped with a warning."""

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from dreambooth.errors import warn_only
from dreambooth.options.field import public_options
from dreambooth.options.training import TrainingConfig

PROJECT = "dreambooth-kronecker"


def start_trackers(accelerator: Accelerator, config: TrainingConfig, first_step: int) -> None:
    """Start the trackers of --report_to, several side by side, and give them the options."""
    extra: dict[str, dict[str, Any]] = {
        # TensorBoard hides what an earlier run in this folder wrote for the steps that come now.
        "tensorboard": {"logging_dir": accelerator.logging_dir, "purge_step": first_step + 1 if first_step else 0},
        # Beside what it is told, wandb keeps the command line, where a token may stand.
        "wandb": {"settings": {"x_disable_meta": True}} if config.hub_token else {},
    }
    for name in map(str, accelerator.log_with):
        accelerator.trackers.append(LOGGER_TYPE_TO_CLASS[name](PROJECT, **extra.get(name, {})))
    options = _flat(public_options(config))
    _each_tracker(accelerator, lambda tracker: (tracker.start(), tracker.store_init_configuration(options)))


def finish_trackers(accelerator: Accelerator) -> None:
    """Have every tracker write what it holds, and let them go."""
    _each_tracker(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers.clear()


def log_values(accelerator: Accelerator, values: dict[str, float], step: int) -> None:
    """Send numbers to every tracker."""
    _each_tracker(accelerator, lambda tracker: tracker.log(values, step=step))


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Send a picture to every tracker."""
    _each_tracker(accelerator, functools.partial(_log_image, name=name, image=image, step=step))


def _log_image(tracker: GeneralTracker, name: str, image: Image.Image, step: int) -> None:
    if tracker.name == "tensorboard":
        tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
    elif tracker.name == "trackio":
        import trackio

        tracker.log({name: trackio.Image(image)}, step=step)
    else:
        tracker.log_images({name: [image]}, step=step)


def _each_tracker(accelerator: Accelerator, act: Callable[[GeneralTracker], Any]) -> None:
    for tracker in list(accelerator.trackers):
        accelerator.trackers.remove(tracker)
        with warn_only(f"--report_to {tracker.name} failed; training goes on without it"):
            act(tracker)
            accelerator.trackers.append(tracker)


def _flat(options: dict[str, Any]) -> dict[str, int | float | str]:
    """The options in the only types that every tracker takes."""
    return {name: value if isinstance(value, (int, float)) else json.dumps(value) for name, value in options.items()}
