"""A grid: a YAML file that says which runs a sweep makes. Each combination of its axes' entries is a cell, one run.

    script: train_dreambooth_kronecker.py         # and its words: methods/train.py lora sd
    config: configs/quickstart.yaml               # optional: options of every cell
    options: {max_train_steps: 300}               # optional: more of them
    evaluate: {class_noun: dog, prompt: [a {}]}   # optional: options of scripts/evaluate.py
    evaluate_checkpoints: true                    # optional: score every checkpoint too, or those at [100, 200] steps
    axes:
      learning_rate: [0.005, 0.01]                # values of an option
      shape:                                      # or what else belongs together, named by its values ...
        - {kron_a1: 2, kron_a2: 32}
      subject:                                    # ... or by a name of its own
        dog: {instance_data_dir: photos/dog, evaluate: {class_noun: dog}}

Where axes belong to one another, such as each method to learning rates of its own, `axes` is a list, and the cells are
those of all its items:

    axes:
      - {method: {kronecker: {}}, learning_rate: [0.005, 0.01], seed: &seeds [0, 1]}
      - {method: {lora: {script: methods/train.py lora sd}}, learning_rate: [0.01, 0.02], seed: *seeds}

`best` adds a second round, at the best entry of one axis for each setting of the others; studies/rounds.py explains it.

An axis' entry may hold any option, and `script`, `config`, `evaluate` and `evaluate_checkpoints`. Where several say the
same, the entry of the later axis counts, and all count more than the file of `config`. Values are text, as on the
command line; null is an option's default, and {subject} in a value is the cell's entry of that axis.
"""

import itertools
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dreambooth.errors import UserError
from dreambooth.options.yaml_file import flags_of, read_mapping
from kron_formats.files import excerpt

CHECKPOINTS, STEP = "evaluate_checkpoints", "step"  # the key, and what reports call its axis
KEYS = ("script", "config", "options", "evaluate", CHECKPOINTS, "axes", "best")
OWN = ("script", "config", "evaluate", CHECKPOINTS)  # keys of an axis' entry that are not options of the training
TAKEN = {  # options that the sweep sets itself -> why
    "output_dir": "every cell has a folder of its own in the sweep's --output_dir",
    "resume_from_checkpoint": "every cell continues where it was cut off",
    "overwrite_output_dir": "finished cells are kept",
}
WORD = r"[\w.+-]+"  # an axis or one of its entries, as the name of a cell has it
CELL_NAME = re.compile(f"{WORD}={WORD}(,{WORD}={WORD})*")
LONGEST_NAME = 200  # bytes; file systems take 255
REPLICATES = ("seed", "subject")  # axes that a setting has to be good on all over, unless told otherwise

Entry = tuple[str, Mapping[str, Any]]  # of an axis: its label and its options
Axes = Mapping[str, Sequence[Entry]]


@dataclass(frozen=True)
class Cell:
    """A run of a sweep."""

    labels: Mapping[str, str]  # axis -> its entry, as the cell's name has it
    script: tuple[str, ...]  # path, and words that follow it
    options: Mapping[str, Any]  # of the training, `config` included
    evaluate: Mapping[str, Any] | None  # of scripts/evaluate.py; None if it is not to be evaluated
    checkpoints: Sequence[int] | bool = False  # at which steps they are evaluated too, or whether all are

    @property
    def name(self) -> str:
        """What varies, as the name of a folder: learning_rate=0.01,seed=0"""
        return ",".join(f"{axis}={label}" for axis, label in self.labels.items())


@dataclass(frozen=True)
class Grid:
    """What the file of a grid says."""

    path: str
    common: Mapping[str, Any]  # options of every cell; `script`, `config` and `evaluate` among them
    products: Sequence[Axes]  # the items of `axes`
    best: Any  # what it says of a second round; None if it has none

    def cell(self, chosen: Mapping[str, Entry]) -> Cell:
        """Return the cell with these entries of its axes."""
        return _cell(chosen, self.common, self.path)

    def cells(self) -> list[Cell]:
        """Return the cells, those of the second round apart: item by item, the last axis varying fastest.

        Raises UserError if a cell sets what the sweep sets itself, or if two have one name.
        """
        cells = [self.cell(chosen) for axes in self.products for chosen in combinations(axes)]
        counts = Counter(frozenset(cell.labels.items()) for cell in cells)
        if twice := [cell.name for cell in cells if counts[frozenset(cell.labels.items())] > 1]:
            raise UserError(
                f"grid {self.path}: two cells would be called {twice[0]}; give the entries of an axis names"
            )
        return cells


def combinations(axes: Axes) -> Iterator[dict[str, Entry]]:
    """Yield {axis: entry} for every combination of the axes' entries, the last axis varying fastest."""
    for chosen in itertools.product(*axes.values()):
        yield dict(zip(axes, chosen))


def read_grid(path: str) -> list[Cell]:
    """Return the cells of a grid, those of a second round apart. Raises UserError as `parse_grid` and `Grid.cells`."""
    return parse_grid(path).cells()


def parse_grid(path: str) -> Grid:
    """Return what the file of a grid says. Raises UserError if it is not a grid."""
    return grid_of(read_mapping(path, "grid"), path)


def grid_of(entries: Mapping[str, Any], path: str) -> Grid:
    """Return a grid by what is in its file. Raises UserError as `parse_grid`."""
    if unknown := [key for key in entries if key not in KEYS]:
        raise UserError(f"grid {path}: unknown keys: {', '.join(map(excerpt, unknown))}; known: {', '.join(KEYS)}")
    common = mapping(entries.get("options") or {}, f"grid {path}: options")
    common |= {key: entries[key] for key in OWN if key in entries}
    items = entries.get("axes")
    if isinstance(items, list) and items:
        products = [read_axes(axes, f"grid {path}: axes: item {number}") for number, axes in enumerate(items, 1)]
    else:
        products = [read_axes(items, f"grid {path}: axes")]
    return Grid(path, common, products, entries.get("best"))


def read_axes(axes: Any, where: str) -> Axes:
    """Return {axis: entries} of a mapping in a grid's file. Raises UserError, beginning with `where`."""
    axes = mapping(axes, where)
    if odd := [axis for axis in axes if not re.fullmatch(WORD, str(axis))]:
        raise UserError(f"{where}: {excerpt(str(odd[0]))}: a name has letters, digits and _.+- alone")
    if not axes:
        raise UserError(f"{where}: expected at least one axis")
    return {axis: entries_of(axis, values, f"{where}: {axis}") for axis, values in axes.items()}


def entries_of(axis: str, values: Any, where: str) -> list[Entry]:
    """Return (label, options) for each entry of an axis. Raises UserError, beginning with `where`, if it has none."""
    if isinstance(values, Mapping):
        found = [(name, mapping(entry, f"{where}: {name}")) for name, entry in values.items()]
    elif isinstance(values, Sequence) and not isinstance(values, str):
        found = [
            (_label(entry), dict(entry)) if isinstance(entry, Mapping) else (_label(entry), {axis: entry})
            for entry in values
        ]
    else:
        found = []
    if not found:
        raise UserError(f"{where}: expected a list of values, a list of options, or names with their options")
    return [(_as_name(label), options) for label, options in found]


def _as_name(label: str) -> str:
    """Return a label with dashes for what the name of a folder had better not have."""
    return re.sub(r"[^\w.+-]+", "-", re.sub(r"^[^\w.+-]+|[^\w.+-]+$", "", label)) or "none"


def _label(entry: Any) -> str:
    """Return an entry's values joined by dashes: {kron_a1: 2, kron_a2: 32} is 2-32."""
    if isinstance(entry, Mapping):
        return "-".join(_label(value) for value in entry.values())
    return "-".join(map(_label, entry)) if isinstance(entry, list) else str(entry)


def _cell(chosen: Mapping[str, Entry], common: Mapping[str, Any], path: str) -> Cell:
    options: dict[str, Any] = dict(common)
    for _, entry in chosen.values():
        evaluate = {**(options.get("evaluate") or {}), **(entry.get("evaluate") or {})}
        options |= {**entry, "evaluate": evaluate or None}
    labels = {axis: label for axis, (label, _) in chosen.items()}
    options = _filled(options, labels)
    script, evaluate = options.pop("script", None), options.pop("evaluate", None)
    checkpoints = options.pop(CHECKPOINTS, None)
    cell = Cell(labels, tuple(shlex.split(script or "")), options, evaluate)
    where = f"grid {path}: {cell.name}"
    if not cell.script:
        raise UserError(f"{where}: script is missing: the training to run, for example train_dreambooth_kronecker.py")
    if taken := [f"{name} ({TAKEN[name]})" for name in TAKEN if name in options]:
        raise UserError(f"{where}: the sweep sets these itself: {'; '.join(taken)}")
    if len(cell.name.encode()) > LONGEST_NAME:
        raise UserError(f"{where}: the name is too long for a folder; give the entries of an axis short names")
    flags_of(options, where)
    flags_of(evaluate or {}, f"{where}: evaluate")
    cell = replace(cell, checkpoints=_checkpoints(checkpoints, f"{where}: {CHECKPOINTS}"))
    if cell.checkpoints and not evaluate:
        raise UserError(f"{where}: {CHECKPOINTS} needs evaluate: the options of scripts/evaluate.py")
    if cell.checkpoints and STEP in labels:
        raise UserError(f"{where}: axes: {STEP} is the axis of the checkpoints that are evaluated; choose another name")
    return cell


def _checkpoints(value: Any, where: str) -> tuple[int, ...] | bool:
    """Return at which steps checkpoints are evaluated, in their order, or whether all are."""
    if value is None or value in ("true", "false"):
        return value == "true"
    steps = value if isinstance(value, list) else []
    if not steps or not all(isinstance(step, str) and step.isascii() and step.isdecimal() for step in steps):
        raise UserError(f"{where} {excerpt(str(value))}: expected true, false, or a list of steps: [100, 200, 400]")
    return tuple(sorted({int(step) for step in steps}))


def _filled(value: Any, labels: Mapping[str, str]) -> Any:
    """Return a value, or what is in its lists and dicts, with the cell's entry of an axis for {AXIS}."""
    if isinstance(value, Mapping):
        return {name: _filled(entry, labels) for name, entry in value.items()}
    if isinstance(value, list):
        return [_filled(entry, labels) for entry in value]
    for axis, label in labels.items() if isinstance(value, str) else ():
        value = value.replace(f"{{{axis}}}", label)
    return value


def mapping(value: Any, where: str) -> dict[str, Any]:
    """Return a value that is a mapping. Raises UserError, beginning with `where`, for any other."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected lines of the form 'name: value'")
    return dict(value)
