"""What a sweep will train, checked before anything runs: whatever a cell's script will refuse is said at the start."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dreambooth.errors import UserError
from dreambooth.wording import counted
from kron_formats.errors import KroneckerError
from studies.cells import ROOT
from studies.grid import Cell

if TYPE_CHECKING:
    from studies.training import Training

T = TypeVar("T")

TRAININGS = ("train_dreambooth_kronecker.py", "train_dreambooth_kronecker_sdxl.py", "methods/train.py")
NOT_OURS = "its script is not one of this project's trainings"


def check_cells(cells: Sequence[Cell], sweep: Path) -> list["Training | None"]:
    """Return what each cell will train, None for scripts that are not this project's.

    Raises UserError if a script does not exist, or if options of a training or an evaluation are refused.
    """
    return each(cells, lambda cell: _read(cell, sweep))


def count_cells(cells: Sequence[Cell], sweep: Path) -> dict[str, int | str]:
    """Return cell -> how many parameters it trains, or why that is not known here. Takes seconds, and no network.

    Raises UserError as `check_cells`, and if training will refuse its base model, or the method these models.
    """
    trainings = dict(zip((cell.name for cell in cells), check_cells(cells, sweep)))
    if not any(trainings.values()):
        return dict.fromkeys(trainings, NOT_OURS)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are imported now
    from dreambooth.runtime.startup import lean_imports

    with lean_imports():
        from studies.counting import Counter
    counter = Counter()

    def count(cell: Cell) -> int | str:
        training = trainings[cell.name]
        return NOT_OURS if training is None else counter.count(training)

    return dict(zip(trainings, each(cells, count)))


def each(cells: Sequence[Cell], act: Callable[[Cell], T]) -> list[T]:
    """Return what `act` returns for each cell. Raises UserError that says all that is wrong, the same thing once."""
    found, problems = [], {}
    for cell in cells:
        try:
            found.append(act(cell))
        except (UserError, KroneckerError) as error:
            problems.setdefault(str(error), []).append(cell.name)
    if problems:
        raise UserError("\n".join(f"{_named(names)}: {problem}" for problem, names in problems.items()))
    return found


def _named(names: Sequence[str]) -> str:
    others = f" and {counted(len(names) - 1, 'other cell')}" if len(names) > 1 else ""
    return f"{names[0]}{others}"


def _read(cell: Cell, sweep: Path) -> "Training | None":
    if cell.script[0].startswith("-"):  # words of python itself: -m MODULE
        return None
    path = (ROOT / cell.script[0]).resolve()
    if not path.is_file():
        raise UserError(f"script: {path} does not exist")
    script = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
    if script not in TRAININGS:
        return None
    from studies.training import read_training  # half a second, for the parser of options

    return read_training(script, cell, sweep)
