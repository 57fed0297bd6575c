"""Where a run is in its trackers, for training, which logs to it, and for what is added later."""

import os
from pathlib import Path

PROJECT = "dreambooth-kronecker"
IDENTITY = {"wandb": "id", "trackio": "name"}  # what a tracker finds a run by: an attribute of its run, and a keyword


def tensorboard_run(project: str | None, name: str | None) -> str:
    """Return the folder of a run inside --logging_dir."""
    return str(Path(project or PROJECT, name or ""))


def wandb_project(project: str | None) -> str | None:
    """Return the project of a run in wandb; None if wandb itself reads it from WANDB_PROJECT."""
    return project or (None if "WANDB_PROJECT" in os.environ else PROJECT)
