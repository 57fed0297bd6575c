"""The trackers of --report_to. One that fails is dropped with a warning."""

import functools
import importlib
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
    """Start the trackers of --report_to and send them the options."""
    extra: dict[str, dict[str, Any]] = {
        # TensorBoard hides what an earlier run in this folder logged for the steps that this run trains.
        "tensorboard": {"logging_dir": accelerator.logging_dir, "purge_step": first_step + 1 if first_step else 0},
        # wandb also records the command line, which may contain the token.
        "wandb": {"settings": {"x_disable_meta": True}} if config.hub_token else {},
    }
    for name in map(str, accelerator.log_with):
        accelerator.trackers.append(LOGGER_TYPE_TO_CLASS[name](PROJECT, **extra.get(name, {})))
    options = _flat(public_options(config))
    _each_tracker(accelerator, lambda tracker: (tracker.start(), tracker.store_init_configuration(options)))


def finish_trackers(accelerator: Accelerator) -> None:
    """Flush and drop all trackers."""
    _each_tracker(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers.clear()


def log_values(accelerator: Accelerator, values: dict[str, float], step: int) -> None:
    """Send numbers to every tracker."""
    _each_tracker(accelerator, lambda tracker: tracker.log(values, step=step))


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Send a picture to every tracker."""
    _each_tracker(accelerator, functools.partial(_log_image, name=name, image=image, step=step))


# Any: accelerate's GeneralTracker declares neither `name` nor `log_images`, which its trackers have
def _log_image(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    if tracker.name == "tensorboard":
        tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
    elif tracker.name == "trackio":
        trackio = importlib.import_module("trackio")  # it is optional, and accelerate's tracker for it takes no images
        tracker.log({name: trackio.Image(image)}, step=step)
    else:
        tracker.log_images({name: [image]}, step=step)


def _each_tracker(accelerator: Accelerator, act: Callable[[GeneralTracker], Any]) -> None:
    for tracker in list(accelerator.trackers):
        accelerator.trackers.remove(tracker)
        with warn_only(f"--report_to {tracker.name} failed; training continues without it"):
            act(tracker)
            accelerator.trackers.append(tracker)


def _flat(options: dict[str, Any]) -> dict[str, int | float | str]:
    """Return the options in the types that every tracker accepts."""
    return {name: value if isinstance(value, (int, float)) else json.dumps(value) for name, value in options.items()}
