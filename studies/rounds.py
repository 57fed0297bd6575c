"""The second round of a sweep: the best entry of one axis, for each setting of the others, on more subjects and seeds.

    best:                       # in a grid, beside its axes
      axis: learning_rate       # whose best entry is looked for ...
      score: dino               # ... by this column of results.csv
      keep: {clip_t: 0.92}      # optional: the share of the base model's that has to be left
      axes: {subject: {dog: {}, robot: {}, cat: {}}, seed: [0, 1, 2]}      # what it is then run on

The first round is the grid's own axes. Those that `best.axes` names are replicates, and so are seed and subject; a
setting is what the others say, apart from the axis itself. An entry of the axis counts if its cells are done on all
replicates of the first round, and if they keep enough of what `keep` names: an overfitted model is liker to its photos
than a good one, and does not follow prompts any more. The one with the best mean score is run on the replicates of
`best.axes`, in cells that are named as the first round would name them: those that it had are done already.

What is chosen follows from the first round's finished cells alone, so all workers, and the report, choose the same.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from dreambooth.errors import UserError
from kron_formats.files import excerpt, reason, whole_file, write_text
from studies.grid import REPLICATES, Axes, Cell, Entry, Grid, combinations, mapping, read_axes
from studies.results import FAILED, MEASURES, OF_TRAINING, UNFINISHED, Record, as_number, read_cell

KEYS, OPTIONAL = ("axis", "score", "axes"), ("keep",)
KEPT = ("clip_t", "diversity", "lpips_diversity")  # scores that the base model has too, and that training costs
FILE = "rounds-{}.json"  # in the sweep's folder, by the name of the grid's file: what a report has to know


@dataclass(frozen=True)
class Setting:
    """What the first round compares with others. Cells are named."""

    labels: Mapping[str, str]  # axis -> its entry, of the axes that are neither replicates nor the one to choose on
    tried: dict[str, list[str]] = field(default_factory=dict)  # entry -> its cells in the first round
    then: dict[str, list[str]] = field(default_factory=dict)  # entry -> its cells in the second, if it is the best

    @property
    def name(self) -> str:
        return ",".join(f"{axis}={label}" for axis, label in self.labels.items()) or "all"


@dataclass(frozen=True)
class Rounds:
    """The two rounds of a grid."""

    axis: str
    score: str  # one of MEASURES
    over: Sequence[str]  # the axes of the replicates
    settings: Sequence[Setting]
    keep: Mapping[str, float] = field(default_factory=dict)  # score -> the share of the base model's to be left

    @property
    def first(self) -> set[str]:
        return {name for setting in self.settings for names in setting.tried.values() for name in names}

    @property
    def added(self) -> set[str]:
        """All cells that the second round may add to the first."""
        return {name for setting in self.settings for names in setting.then.values() for name in names} - self.first

    @property
    def sizes(self) -> list[int]:
        """The number of the second round's cells for each setting, whatever is chosen."""
        return [max(map(len, setting.then.values())) for setting in self.settings]


@dataclass(frozen=True)
class Chosen:
    """What the first round says of a setting."""

    setting: Setting
    means: Mapping[str, float]  # entry -> mean score, of the entries that count
    missing: Mapping[str, str]  # entry -> why it does not count
    best: str | None  # entry; None if none counts, or if cells are still to come

    @property
    def cells(self) -> Sequence[str]:
        """The second round's cells."""
        return self.setting.then[self.best] if self.best is not None else ()


# ---- what a grid says ----


def read_rounds(grid: Grid) -> tuple[Rounds, dict[str, Cell]] | None:
    """Return the rounds of a grid, and every cell that they may have by its name; None if it has no second round.

    Raises UserError if `best` is not what it has to be, or if the first round cannot decide it.
    """
    if grid.best is None:
        return None
    where = f"grid {grid.path}: best"
    axis, score, over, keep = _read_best(grid.best, where)
    for axes in grid.products:
        if lacking := [name for name in (axis, *over) if name not in axes]:
            raise UserError(
                f"{where}: {excerpt(lacking[0])} is not an axis of the first round, or not of every item of its axes. "
                "Give it an entry there: cells of both rounds then have the same names, and none is trained twice"
            )
    cells = {cell.name: cell for cell in grid.cells()}
    evaluated = [name for name in (score, *keep) if name not in OF_TRAINING]
    if evaluated and (bare := [name for name, cell in cells.items() if cell.evaluate is None]):
        raise UserError(f"{where}: {bare[0]} will have no {evaluated[0]}: the grid does not say how to evaluate it")
    settings: dict[frozenset, Setting] = {}
    replicates: dict[str, None] = {}
    for axes in grid.products:
        first = {name: axes[name] for name in axes if name != axis and (name in over or name in REPLICATES)}
        replicates |= dict.fromkeys(first)
        for fixed in combinations({name: axes[name] for name in axes if name != axis and name not in first}):
            labels = {name: label for name, (label, _) in fixed.items()}
            setting = settings.setdefault(frozenset(labels.items()), Setting(labels))
            for entry in axes[axis]:
                for found, runs in ((setting.tried, first), (setting.then, {**first, **over})):
                    made = _runs(grid, axes, {**fixed, axis: entry}, runs)
                    _add(cells, made, where)
                    found[entry[0]] = [*dict.fromkeys([*found.get(entry[0], ()), *(cell.name for cell in made)])]
    rounds = Rounds(axis, score, [*replicates], [*settings.values()], keep)
    _check_replicates(rounds, cells, where)
    return rounds, cells


def _read_best(best: Any, where: str) -> tuple[str, str, Axes, dict[str, float]]:
    """Return its axis, its score, the axes of the second round, and what has to be kept."""
    said = mapping(best, where)
    if unknown := [str(key) for key in said if key not in KEYS + OPTIONAL]:
        known = ", ".join(KEYS + OPTIONAL)
        raise UserError(f"{where}: unknown keys: {', '.join(map(excerpt, unknown))}; known: {known}")
    if missing := [key for key in KEYS if key not in said]:
        raise UserError(f"{where}: {missing[0]} is missing; it has {', '.join(KEYS)}")
    axis, score = said["axis"], said["score"]
    if score not in MEASURES:
        raise UserError(f"{where}: score: {excerpt(str(score))} is not a score; known: {', '.join(MEASURES)}")
    over = read_axes(said["axes"], f"{where}: axes")
    if not isinstance(axis, str) or axis in over:
        raise UserError(f"{where}: axis: {excerpt(str(axis))}: expected an axis that {where}: axes does not name")
    return axis, score, over, _read_keep(said.get("keep", {}), f"{where}: keep")


def _read_keep(keep: Any, where: str) -> dict[str, float]:
    shares = {}
    for name, said in mapping(keep, where).items():
        if name not in KEPT:
            raise UserError(f"{where}: {excerpt(str(name))} is not a score to keep; known: {', '.join(KEPT)}")
        share = as_number(str(said))
        if share is None or not 0 < share <= 1:
            raise UserError(f"{where}: {name}: {excerpt(str(said))}: expected a share above 0 and up to 1")
        shares[name] = share
    return shares


def _runs(grid: Grid, axes: Axes, fixed: Mapping[str, Entry], replicates: Axes) -> list[Cell]:
    """Return the cells with fixed entries of some axes on all replicates, named in the order of `axes`."""
    return [grid.cell({name: {**fixed, **chosen}[name] for name in axes}) for chosen in combinations(replicates)]


def _add(cells: dict[str, Cell], made: Sequence[Cell], where: str) -> None:
    for cell in made:
        if cells.setdefault(cell.name, cell) != cell:
            raise UserError(
                f"{where}: {cell.name} has other options than the cell of that name in the first round, which cannot "
                "stand for it; give the entries of `best` the options that they have in the grid's axes"
            )


def _check_replicates(rounds: Rounds, cells: Mapping[str, Cell], where: str) -> None:
    """Raise UserError if two entries of a setting would be compared on different replicates."""
    for setting in rounds.settings:
        on = {
            entry: {tuple(cells[name].labels.get(axis) for axis in rounds.over) for name in names}
            for entry, names in setting.tried.items()
        }
        every = set.union(*on.values())
        if fewer := [entry for entry in on if on[entry] != every]:
            raise UserError(
                f"{where}: {setting.name}: {rounds.axis} {fewer[0]} is not run on every "
                f"{', '.join(rounds.over)} of the others, so their means could not be compared"
            )


# ---- what the first round says ----


def choose(rounds: Rounds, records: Mapping[str, Record]) -> list[Chosen]:
    """Return the best entry for each setting, from the first round's cells as they are now; of equals the earlier."""
    better = max if MEASURES[rounds.score].higher_is_better else min
    found = []
    for setting in rounds.settings:
        runs = {
            entry: [records.get(name, Record(name, {}, UNFINISHED, "not begun")) for name in names]
            for entry, names in setting.tried.items()
        }
        missing = {entry: why for entry, cells in runs.items() if (why := _why_not(cells, rounds))}
        means = {
            entry: fmean(cell.scores[rounds.score] for cell in cells)
            for entry, cells in runs.items()
            if entry not in missing
        }
        to_come = any(cell.state == UNFINISHED for cells in runs.values() for cell in cells)
        best = better(means, key=means.__getitem__) if means and not to_come else None
        found.append(Chosen(setting, means, missing, best))
    return found


def _why_not(cells: Sequence[Record], rounds: Rounds) -> str:
    """Return why the mean of some cells does not count; empty if it does."""
    for state in (FAILED, UNFINISHED):
        if number := sum(cell.state == state for cell in cells):
            return f"{number} of {len(cells)} {state}"
    for name in (rounds.score, *rounds.keep):
        if any(name not in cell.scores for cell in cells):
            return f"no {name}"
    for name, share in rounds.keep.items():
        if any(name not in cell.base for cell in cells):
            return f"no {name} of the base model"
        mean, needed = fmean(cell.scores[name] for cell in cells), share * fmean(cell.base[name] for cell in cells)
        if mean < needed:
            return f"{name} {mean:.3f}, below {needed:.3f}"
    return ""


def choose_in(sweep: Path, rounds: Rounds) -> list[Chosen]:
    """Return the same for the folder of a sweep."""
    return choose(rounds, {name: read_cell(sweep / name) for name in rounds.first})


def as_data(rounds: Rounds, chosen: Sequence[Chosen]) -> dict[str, Any]:
    """Return what was chosen and from what, for other programs."""
    settings = [
        {
            "labels": one.setting.labels,
            "best": one.best,
            "means": one.means,
            "missing": one.missing,
            "first_round": one.setting.tried,
            "second_round": one.cells,
            "second_rounds": one.setting.then,
        }
        for one in chosen
    ]
    better = "higher" if MEASURES[rounds.score].higher_is_better else "lower"
    return {
        "axis": rounds.axis,
        "score": rounds.score,
        "better": better,
        "over": rounds.over,
        "keep": rounds.keep,
        "settings": settings,
    }


def from_data(data: Mapping[str, Any]) -> Rounds:
    """Return rounds from what `as_data` has returned."""
    settings = [Setting(one["labels"], one["first_round"], one["second_rounds"]) for one in data["settings"]]
    return Rounds(data["axis"], data["score"], data["over"], settings, data.get("keep", {}))


def in_words(rounds: Rounds, chosen: Sequence[Chosen]) -> str:
    """Return what was chosen and why, a line for each setting."""
    lines = [f"second round: the best {rounds.axis} by {rounds.score}, means over {', '.join(rounds.over)}:"]
    for one in chosen:
        what = f"left out, no {rounds.axis} counts" if one.best is None else one.best
        scores = [*(f"{entry}: {mean:.4g}" for entry, mean in one.means.items()), *map(": ".join, one.missing.items())]
        lines.append(f"    {one.setting.name}: {what} ({', '.join(scores)})")
    return "\n".join(lines)


def numbered(rounds: Rounds, chosen: Sequence[Chosen]) -> dict[int, str]:
    """Return the second round's cells by their number. The first round's come before; a setting has its numbers
    whatever is chosen, and also if it is left out."""
    numbers, start = {}, len(rounds.first)
    for one, size in zip(chosen, rounds.sizes):
        numbers |= {start + place: name for place, name in enumerate(one.cells)}
        start += size
    return numbers


# ---- in the sweep's folder ----


def write_rounds(sweep: Path, grid: Grid, rounds: Rounds) -> None:
    """Leave word of the rounds in the folder of a sweep, for reports."""
    path, text = sweep / FILE.format(Path(grid.path).stem), json.dumps(asdict(rounds), indent=1) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        with whole_file(path) as unfinished:
            write_text(unfinished, text)


def rounds_in(sweep: Path) -> list[Rounds]:
    """Return the rounds of the grids that were run in a folder. Raises UserError if a file is damaged."""
    found = []
    for path in sorted(sweep.glob(FILE.format("*"))):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            found.append(Rounds(**{**said, "settings": [Setting(**setting) for setting in said["settings"]]}))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is damaged: {reason(error)}. Start its sweep again, which writes it anew"
            ) from error
    return found
