"""A sweep over the training steps: the cells at each step at which they were scored."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from studies.grid import STEP
from studies.results import DONE, OF_TRAINING, Record


def at_steps(records: Sequence[Record]) -> list[Record]:
    """Return a record for each step at which a cell was scored, its result among them, with the axis STEP.

    A cell that is not done stands at every step of the others. Empty if no cell has scored checkpoints.
    """
    if not any(record.checkpoints for record in records):
        return []
    scored = [(record, step, *entry) for record in records for step, entry in _steps_of(record).items()]
    steps = sorted({step for _, step, *_ in scored})
    scored += [(record, step, None, {}) for record in records if record.state != DONE for step in steps]
    return [
        replace(record, labels={**record.labels, STEP: str(step)}, scores=scores, checkpoints={}, step=checkpoint)
        for record, step, checkpoint, scores in scored
    ]


def _steps_of(record: Record) -> dict[int, tuple[int | None, Mapping[str, float]]]:
    """Return the steps at which a cell was scored -> (step of the checkpoint, None for the result; scores)."""
    found: dict[int, tuple[int | None, Mapping[str, float]]] = {
        step: (step, scores) for step, scores in record.checkpoints.items()
    }
    if record.state == DONE and "steps" in record.summary:
        of_result = {name: score for name, score in record.scores.items() if name not in OF_TRAINING}
        found[record.summary["steps"]] = (None, of_result)
    return found
