"""One cell of a sweep: its folder, the commands that train and evaluate it, and how it ended."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dreambooth.layout import CONFIG_NAME, SUMMARY_NAME
from dreambooth.options.base_model import BaseModelOptions
from dreambooth.options.field import option_names
from dreambooth.options.yaml_file import flags_of, read_mapping
from kron_formats.files import write_text
from studies.checkpoints import SCORES, adapters_at, check_steps, scored_steps, scores_path
from studies.grid import Cell

ROOT = Path(__file__).resolve().parents[1]
LOG_NAME = "sweep.log"  # what the commands printed
ENDING_NAME = "sweep.json"
SHARED_NAME = "shared"  # beside the cells: the latents, prompt encodings and base model's images of all
STOPPED = 75  # exit code of a training that was told to stop and has saved a checkpoint
SHARED_SEED = "0"  # of class images, so that cells of several seeds can share them


@dataclass(frozen=True)
class Ending:
    """How the commands of a cell ended, the last time that they ran."""

    exit_code: int
    last_line: str  # of what they printed: the error if there was one
    command: list[str]  # that trains it
    began: float  # seconds since 1970
    seconds: float


def parts_of(command: Sequence[str]) -> list[list[str]]:
    """Return a command's script and flags, each with its values, in an order of their own: theirs says nothing."""
    groups: list[list[str]] = [[]]
    for word in command[1:]:  # without the interpreter
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    return sorted(groups)


def train_command(cell: Cell, sweep: Path, processes: int = 1) -> list[str]:
    """Return the command that trains a cell in its folder, or continues where it was cut off.

    One process needs no `accelerate launch`, which would end at a signal without passing it on.
    """
    launch = [sys.executable]
    if processes > 1:
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        launch += ["--num_processes", str(processes), "--main_process_port", "0"]
    script, *words = cell.script
    options = run_options(cell)
    flags = flags_of({**_defaults(cell, options, sweep), **options}, cell.name)
    return [
        *launch,
        script,
        *words,
        *flags,
        "--output_dir",
        str(sweep / cell.name),
        "--resume_from_checkpoint",
        "latest",
    ]


def run_options(cell: Cell) -> dict[str, Any]:
    """Return the options of a cell and, below them, those of its config.

    They become flags together: null in the grid could not undo what the script reads from a file.
    """
    options = dict(cell.options)
    config = options.pop("config", None)
    return {**(read_mapping(config, f"{cell.name}: config") if config else {}), **options}


def _defaults(cell: Cell, given: Mapping[str, Any], sweep: Path) -> dict[str, str]:
    """Return the options by which cells share what they encode and draw, and are found in trackers."""
    trackers = given.get("report_to", "tensorboard")
    trackers = trackers if isinstance(trackers, list) else [trackers]
    wanted = {
        "cache_latents_to_disk": (str(sweep / SHARED_NAME), given.get("cache_latents") != "off"),
        "prior_seed": (SHARED_SEED, given.get("class_data_dir") is not None),
        "tracker_run_name": (cell.name, "none" not in trackers),
        "tracker_group": (sweep.name, bool({"wandb", "trackio"} & {*trackers})),
    }
    return {name: value for name, (value, applies) in wanted.items() if applies and name not in given}


def evaluate_commands(cell: Cell, sweep: Path, summary: Mapping[str, Any]) -> list[list[str]]:
    """Return the commands that score what a trained cell lacks the scores of: its checkpoints, in their order, and its
    result, the last of all. Raises UserError if the run has not saved the checkpoints."""
    folder = sweep / cell.name
    if cell.checkpoints:
        check_steps(cell, read_options_of(folder)["checkpointing_steps"], summary["steps"])
    return [evaluate_command(cell, sweep, summary["result"], step) for step in _lacking(cell, folder, summary)]


def _lacking(cell: Cell, folder: Path, summary: Mapping[str, Any]) -> list[int | None]:
    """Return the steps of the checkpoints whose scores a trained cell lacks, and None if it lacks its result's."""
    steps: list[int | None] = [None]
    if cell.checkpoints:
        steps = [*scored_steps(cell, read_options_of(folder)["checkpointing_steps"], summary["steps"]), None]
    return [step for step in steps if not (folder / scores_path(step)).exists()]


def evaluate_command(
    cell: Cell, sweep: Path, result: str, step: int | None = None, trained: Mapping[str, Any] | None = None
) -> list[str]:
    """Return the command that scores the result of a cell, or its checkpoint after `step` optimizer steps.

    Base model and photos are those it was trained with: `trained` has the options of its training; by default those in
    its folder.
    """
    folder = sweep / cell.name
    trained = read_options_of(folder) if trained is None else trained
    same = {
        name: str(trained[name]) for name in (*option_names(BaseModelOptions), "instance_data_dir") if name in trained
    }
    shared = {"base_images_cache": str(sweep / SHARED_NAME)}
    options = {**same, **shared, **(cell.evaluate or {}), "adapter": adapters_at(folder, step, result)}
    flags = flags_of(options, f"{cell.name}: evaluate")
    return [sys.executable, "scripts/evaluate.py", *flags, "--output_dir", str(folder / scores_path(step).parent)]


def log_scores_command(cell: Cell, sweep: Path) -> list[str]:
    """Return the command that sends the scores of a cell to where its training was logged."""
    return [sys.executable, "studies/log_scores.py", str(sweep / cell.name)]


def read_options_of(folder: Path) -> dict[str, Any]:
    """Return the options with which a cell was trained."""
    return yaml.safe_load((folder / CONFIG_NAME).read_text(encoding="utf-8"))


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return the summary that a training writes when it is finished; None if it is not, or if the file is damaged."""
    try:
        return json.loads((folder / SUMMARY_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_done(cell: Cell, sweep: Path) -> bool:
    """Whether a cell has all that it is to have."""
    folder = sweep / cell.name
    if cell.evaluate is not None:
        if not (folder / SCORES).exists():  # those of the result, which come last
            return False
        summary = read_summary(folder)
        return not cell.checkpoints or summary is None or not _lacking(cell, folder, summary)
    return (ending := read_ending(folder)) is not None and ending.exit_code == 0


def read_ending(folder: Path) -> Ending | None:
    """Return how a cell's commands ended; None if they never did."""
    try:
        return Ending(**json.loads((folder / ENDING_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_ending(folder: Path, ending: Ending) -> None:
    write_text(folder / ENDING_NAME, json.dumps(asdict(ending), indent=1) + os.linesep)


def last_line(log: Path) -> str:
    """Return the last error that a program printed, or, if there is none, its last line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1]
