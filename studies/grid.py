"""A grid: a YAML file that says which runs a sweep makes. Each combination of its axes' entries is a cell, one run.

    script: train_dreambooth_kronecker.py         # and its words: methods/train.py lora sd
    config: configs/quickstart.yaml               # optional: options of every cell
    options: {max_train_steps: 300}               # optional: more of them
    evaluate: {class_noun: dog, prompt: [a {}]}   # optional: options of scripts/evaluate.py
    axes:
      learning_rate: [0.005, 0.01]                # values of an option
      shape:                                      # or what else belongs together, named by its values ...
        - {kron_a1: 2, kron_a2: 32}
      subject:                                    # ... or by a name of its own
        dog: {instance_data_dir: photos/dog, evaluate: {class_noun: dog}}

An axis' entry may hold any option, and `script`, `config` and `evaluate`. Where several say the same, the entry of the
later axis counts, and all count more than the file of `config`. Values are text, as on the command line; null is an
option's default, and {subject} in a value is the cell's entry of that axis.
"""

import itertools
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreambooth.errors import UserError
from dreambooth.options.yaml_file import flags_of, read_mapping
from kron_formats.files import excerpt

KEYS = ("script", "config", "options", "evaluate", "axes")
OWN = ("script", "config", "evaluate")  # keys of an axis' entry that are not options of the training
TAKEN = {  # options that the sweep sets itself -> why
    "output_dir": "every cell has a folder of its own in the sweep's --output_dir",
    "resume_from_checkpoint": "every cell continues where it was cut off",
    "overwrite_output_dir": "finished cells are kept",
}
WORD = r"[\w.+-]+"  # an axis or one of its entries, as the name of a cell has it
CELL_NAME = re.compile(f"{WORD}={WORD}(,{WORD}={WORD})*")
LONGEST_NAME = 200  # bytes; file systems take 255


@dataclass(frozen=True)
class Cell:
    """A run of a sweep."""

    labels: Mapping[str, str]  # axis -> its entry, as the cell's name has it
    script: tuple[str, ...]  # path, and words that follow it
    options: Mapping[str, Any]  # of the training, `config` included
    evaluate: Mapping[str, Any] | None  # of scripts/evaluate.py; None if it is not to be evaluated

    @property
    def name(self) -> str:
        """What varies, as the name of a folder: learning_rate=0.01,seed=0"""
        return ",".join(f"{axis}={label}" for axis, label in self.labels.items())


def read_grid(path: str) -> list[Cell]:
    """Return the cells of a grid, the last axis varying fastest.

    Raises UserError if the file is not a grid, sets what the sweep sets itself, or names two cells alike.
    """
    return cells_of(read_mapping(path, "grid"), path)


def cells_of(entries: Mapping[str, Any], path: str) -> list[Cell]:
    """Return the cells of a grid by what is in its file. Raises UserError as `read_grid`."""
    if unknown := [key for key in entries if key not in KEYS]:
        raise UserError(f"grid {path}: unknown keys: {', '.join(map(excerpt, unknown))}; known: {', '.join(KEYS)}")
    axes = _mapping(entries.get("axes"), f"grid {path}: axes")
    if odd := [axis for axis in axes if not re.fullmatch(WORD, str(axis))]:
        raise UserError(f"grid {path}: axes: {excerpt(str(odd[0]))}: a name has letters, digits and _.+- alone")
    common = _mapping(entries.get("options") or {}, f"grid {path}: options")
    common |= {key: entries[key] for key in OWN if key in entries}
    choices = [entries_of(axis, values, f"grid {path}: axes: {axis}") for axis, values in axes.items()]
    cells = [_cell(dict(zip(axes, chosen)), common, path) for chosen in itertools.product(*choices)]
    if twice := [name for name, count in Counter(cell.name for cell in cells).items() if count > 1]:
        raise UserError(f"grid {path}: two cells would be called {twice[0]}; give the entries of an axis names")
    return cells


def entries_of(axis: str, values: Any, where: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (label, options) for each entry of an axis. Raises UserError, beginning with `where`, if it has none."""
    if isinstance(values, Mapping):
        found = [(name, _mapping(entry, f"{where}: {name}")) for name, entry in values.items()]
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


def _cell(chosen: Mapping[str, tuple[str, Mapping[str, Any]]], common: Mapping[str, Any], path: str) -> Cell:
    options: dict[str, Any] = dict(common)
    for _, entry in chosen.values():
        evaluate = {**(options.get("evaluate") or {}), **(entry.get("evaluate") or {})}
        options |= {**entry, "evaluate": evaluate or None}
    labels = {axis: label for axis, (label, _) in chosen.items()}
    options = _filled(options, labels)
    script, evaluate = options.pop("script", None), options.pop("evaluate", None)
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
    return cell


def _filled(value: Any, labels: Mapping[str, str]) -> Any:
    """Return a value, or what is in its lists and dicts, with the cell's entry of an axis for {AXIS}."""
    if isinstance(value, Mapping):
        return {name: _filled(entry, labels) for name, entry in value.items()}
    if isinstance(value, list):
        return [_filled(entry, labels) for entry in value]
    for axis, label in labels.items() if isinstance(value, str) else ():
        value = value.replace(f"{{{axis}}}", label)
    return value


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected lines of the form 'name: value'")
    return dict(value)
