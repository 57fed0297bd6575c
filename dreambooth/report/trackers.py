"""The trackers of --report_to. One that fails is dropped with a warning.

A run that resumes continues its run in wandb and trackio, which OUTPUT_DIR/trackers.json remembers.
"""

import functools
import importlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker
from PIL import Image
from torch.utils.tensorboard.summary import hparams

from dreambooth.errors import warn_only
from dreambooth.layout import TRACKERS_NAME
from dreambooth.options.field import public_options
from dreambooth.options.training import TrainingConfig
from dreambooth.report.tracked import IDENTITY, PROJECT, tensorboard_run, wandb_project
from kron_formats.files import whole_file


def start_trackers(accelerator: Accelerator, config: TrainingConfig, first_step: int) -> None:
    """Start the trackers of --report_to and send them the options."""
    path = Path(config.output_dir) / TRACKERS_NAME
    for name in map(str, accelerator.log_with):
        project, keywords = _arguments(name, accelerator, config, first_step)
        accelerator.trackers.append(LOGGER_TYPE_TO_CLASS[name](project, **keywords | _identity(name, path, first_step)))
    options = _flat(public_options(config))
    _each_tracker(accelerator, lambda tracker: (tracker.start(), _store_options(tracker, options)))
    _remember(accelerator, path)


def _arguments(
    name: str, accelerator: Accelerator, config: TrainingConfig, first_step: int
) -> tuple[str | None, dict[str, Any]]:
    """Return the project and the keyword arguments of a tracker. wandb reads WANDB_* variables for what is None."""
    project, logs = config.tracker_project_name, Path(accelerator.logging_dir)
    names = {"name": config.tracker_run_name, "group": config.tracker_group}
    if name == "wandb":
        if "WANDB_DIR" not in os.environ:
            with suppress(OSError):  # wandb then warns, and writes elsewhere
                logs.mkdir(parents=True, exist_ok=True)
            names["dir"] = str(logs)
        # It also records the command line, which may contain the token
        settings = {"settings": {"x_disable_meta": True}} if config.hub_token else {}
        return wandb_project(project), names | settings
    if name == "trackio":
        return project or PROJECT, names
    # TensorBoard hides what an earlier run in this folder logged for the steps that this run trains
    return tensorboard_run(project, config.tracker_run_name), {
        "logging_dir": str(logs),
        "purge_step": first_step + 1 if first_step else 0,
    }


def _identity(name: str, path: Path, first_step: int) -> dict[str, str]:
    """Return the keyword arguments with which a tracker continues the run in the file `path`.

    There are none if it does not resume, or if a sweep's agent or the user has chosen the run.
    """
    if not first_step or name == "wandb" and os.environ.keys() & {"WANDB_RUN_ID", "WANDB_SWEEP_ID"}:
        return {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        return {IDENTITY[name]: str(json.loads(path.read_text(encoding="utf-8"))[name]), "resume": "allow"}
    return {}


def _store_options(tracker: GeneralTracker, options: dict[str, int | float | str]) -> None:
    if not isinstance(tracker, TensorBoardTracker):
        tracker.store_init_configuration(options)
        return
    # accelerate's way makes another run in TensorBoard at each start, and says that there are no scores to show
    _, session, _ = hparams(options, {})
    tracker.writer._get_file_writer().add_summary(session)


def _remember(accelerator: Accelerator, path: Path) -> None:
    """Write {tracker: what it finds this run by}, if there is a tracker that continues runs."""
    runs = {tracker.name: getattr(tracker, "run", None) for tracker in accelerator.trackers}
    found = {name: getattr(runs.get(name), attribute, None) for name, attribute in IDENTITY.items()}
    if found := {name: identity for name, identity in found.items() if isinstance(identity, str)}:
        with (
            warn_only(f"{path} was not written: a resumed run will be another run in the tracker"),
            whole_file(path) as unfinished,
        ):
            unfinished.write_text(json.dumps(found), encoding="utf-8")


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
