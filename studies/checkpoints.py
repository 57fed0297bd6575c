"""The checkpoints of a run that are scored besides its result: which, where, and by which files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.layout import checkpoint_path
from dreambooth.options.output import OutputOptions
from dreambooth.wording import counted
from studies.grid import CHECKPOINTS, Cell

SCORES = Path("evaluation", "scores.json")  # of the result, in the folder of a run
COMPONENT = "config.json"  # in a folder of a model that was trained in full


def scores_path(step: int | None) -> Path:
    """Return where the scores of a checkpoint are in the folder of a run; those of its result if `step` is None."""
    return SCORES if step is None else checkpoint_path(SCORES.parent, step) / SCORES.name


def scored_steps(cell: Cell, every: int, total: int) -> list[int]:
    """Return the steps at which the checkpoints of a cell are scored: before `total`, which the result is of.

    Checkpoints are saved `every` so many steps. One that an interruption left between two of them is not scored.
    """
    saved = range(every, total, every)
    return [step for step in saved if cell.checkpoints is True or step in (cell.checkpoints or ())]


def check_steps(cell: Cell, every: int, total: int | None) -> None:
    """Raise UserError if a run of `total` steps, None if they are not known yet, saves no checkpoints to be scored, or
    lacks one of those that are named."""
    where = f"{cell.name}: {CHECKPOINTS}"
    for step in cell.checkpoints if isinstance(cell.checkpoints, tuple) else ():
        if not step or step % every:
            raise UserError(f"{where} {step}: checkpointing_steps {every} saves no checkpoint there")
        if total is not None and step > total:
            raise UserError(f"{where} {step}: the training has {counted(total, 'step')}")
    if total is not None and cell.checkpoints and not scored_steps(cell, every, total):
        raise UserError(
            f"{where}: checkpointing_steps {every} saves no checkpoint before the last of {counted(total, 'step')}"
        )


def adapters_at(folder: Path, step: int | None, result: str) -> list[str]:
    """Return what a checkpoint of a run is drawn with; the run's result if `step` is None.

    That is the file of the method, or, of a method whose result is a whole model, the components that have trained.
    """
    source = folder if step is None else checkpoint_path(folder, step)
    if (source / result).exists():
        return [str(source / result)]
    return sorted(str(path.parent) for path in source.glob(f"*/{COMPONENT}")) or [str(source / result)]


def check_kept(cell: Cell, options: Mapping[str, Any]) -> None:
    """Raise UserError if a run with these options would not save the checkpoints that are to be scored, or not keep
    them. What is not a number is left to the training to refuse."""
    if not cell.checkpoints:
        return
    if (limit := options.get("checkpoints_total_limit")) is not None:
        raise UserError(
            f"{cell.name}: {CHECKPOINTS}: checkpoints_total_limit {limit} would remove checkpoints; set it to null"
        )
    if every := _number(options.get("checkpointing_steps") or OutputOptions.checkpointing_steps):
        check_steps(cell, every, _number(options.get("max_train_steps")))


def _number(value: Any) -> int | None:
    return int(value) if str(value).isdecimal() and int(value) > 0 else None
