"""What a report shows of a sweep: which of its axes are drawn from left to right, and which scores are compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dreambooth.errors import UserError
from studies.grid import REPLICATES, STEP
from studies.results import MEASURES, Measure, Record, axes_of, axis_numbers, entries_of, values
from studies.steps import at_steps

FIRST = "learning_rate"  # the axis that is drawn from left to right if there is one


@dataclass(frozen=True)
class Choice:
    """What a report shows of a sweep; None for the defaults."""

    scores: Sequence[str] | None = None
    over: Sequence[str] | None = None  # axes that spreads are over
    heatmap: Sequence[str] | None = None  # the axes from left to right and from top to bottom
    pictures: Sequence[str] | None = None  # the axes of rows and of columns


@dataclass(frozen=True)
class Layout:
    """The axes of a sweep, and what each is used for."""

    axes: Mapping[str, Sequence[str]]
    over: Sequence[str]
    settings: Sequence[str]  # all other axes: together they name a setting
    x: str | None
    y: str | None
    measures: Sequence[Measure]
    rows: str
    columns: str
    steps: Sequence[str]  # at which cells were scored; none if no checkpoint was

    def others(self, *axes: str | None) -> list[str]:
        """The axes with several entries that tell settings apart besides `axes`."""
        return [axis for axis in self.settings if axis not in axes]


def plan(records: Sequence[Record], choice: Choice) -> Layout:
    """Return what each axis is used for. Raises UserError for an axis or a score that the sweep lacks."""
    axes, stepped = axes_of(records), at_steps(records)
    steps = entries_of(stepped, STEP) if stepped else []
    varied = [axis for axis, entries in axes.items() if len(entries) > 1]
    with_steps = [*axes, STEP] if steps else [*axes]
    flags = {"--over": choice.over, "--heatmap": choice.heatmap, "--pictures": choice.pictures}
    for flag, chosen in flags.items():
        known = [*axes] if flag == "--over" else with_steps
        if missing := [axis for axis in chosen or () if axis not in known]:
            raise UserError(f"{flag} {missing[0]}: the sweep has no such axis; it has {', '.join(known)}")
        if chosen and len({*chosen}) < len(chosen):
            raise UserError(f"{flag} {' '.join(chosen)}: an axis is named twice")
    over = [axis for axis in REPLICATES if axis in axes] if choice.over is None else [*choice.over]
    settings = [axis for axis in varied if axis not in over]
    candidates = [FIRST] if FIRST in settings else [axis for axis in settings if axis_numbers(axes[axis])]
    x = next(iter([*candidates, *settings, *varied]), None)
    y = next((axis for axis in [*settings, *varied] if axis != x), None)
    x, y = choice.heatmap or (x, y)
    rows, columns = choice.pictures or ((y or "", x or "") if settings or not steps else (x or "", STEP))
    return Layout(axes, over, settings, x, y, _measures(records, choice.scores), rows, columns, steps)


def _measures(records: Sequence[Record], names: Sequence[str] | None) -> list[Measure]:
    """Return the scores that are compared: those asked for, else likeness and truth to the prompt, else the loss."""
    known = [name for name in MEASURES if values(records, name)]
    if missing := [name for name in names or () if name not in known]:
        there = f"its cells have {', '.join(known)}" if known else "none of its cells is done"
        raise UserError(f"--scores {missing[0]}: no finished cell has it; {there}")
    usual = [name for name in ("dino", "clip_t") if name in known] or [name for name in ("loss",) if name in known]
    return [MEASURES[name] for name in names or usual]
