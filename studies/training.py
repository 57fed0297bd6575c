"""A training of this project as a cell's command will start it: its method, its family and its options.

Reading them imports no torch.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.options.field import public_options
from dreambooth.options.kronecker import KroneckerOptions
from dreambooth.options.parsing import read_options
from dreambooth.options.training import config_class
from dreambooth.scoring.inputs import read_asked, read_others
from methods.train import FAMILIES, Entry, chosen
from studies.cells import evaluate_command, train_command
from studies.grid import Cell

KRONECKER = Entry(KroneckerOptions, "dreambooth.kronecker", "KRONECKER")
KRONECKER_SCRIPTS = {
    "train_dreambooth_kronecker.py": FAMILIES["sd"],
    "train_dreambooth_kronecker_sdxl.py": FAMILIES["sdxl"],
}
RESULT = "result"  # stands for what a training will write


@dataclass(frozen=True)
class Training:
    method: Entry
    family: Entry
    config: Any  # of both their options


def read_training(script: str, cell: Cell, sweep: Path) -> Training:
    """Return what a cell will train. `script` is its script as a path in this project, one of studies/plan.py's.

    Raises UserError if its options, or those of its evaluation, are refused.
    """
    command = train_command(cell, sweep)
    words = command[command.index(cell.script[0]) + 1 :]
    if script in KRONECKER_SCRIPTS:
        training = Training(KRONECKER, KRONECKER_SCRIPTS[script], read_options(_options_of(script), None, words))
    else:
        method, family = chosen(words)
        options = config_class(method.options, family.options)
        training = Training(method, family, read_options(options, None, words[2:]))
    if cell.evaluate is not None:
        _check_evaluation(cell, sweep, public_options(training.config))
    return training


def _check_evaluation(cell: Cell, sweep: Path, trained: Mapping[str, Any]) -> None:
    """Raise UserError if scripts/evaluate.py would refuse its options or prompts once the cell is trained."""
    given = {name: value for name, value in trained.items() if value is not None}
    _, script, *flags = evaluate_command(cell, sweep, RESULT, trained=given)
    try:
        config = read_options(_options_of(script), None, flags)
        read_asked(config)
        read_others(config)
    except UserError as error:
        raise UserError(f"evaluate: {error}") from error


def _options_of(script: str) -> Any:
    """Return the class of options of a program, which commands name by its path."""
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")).Config
