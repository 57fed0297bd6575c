"""The results of a sweep in files: CSV and JSON for other programs, and JSON read back, without the run folders.

Results are made to be passed on: paths in this project are relative to it, and commands begin with the interpreter's
name.
"""

import csv
import io
import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from kron_formats.files import reason
from studies.cells import ROOT, Ending
from studies.results import MEASURES, Record
from studies.rounds import Rounds, as_data, choose, from_data

CHECKPOINT = "checkpoint"  # stands for a state in the line of one


def csv_text(records: Sequence[Record], axes: Mapping[str, Sequence[str]]) -> str:
    """Return a line for each cell: its entries, state, scores, the base model's, and its command.

    Before it is a line for each of its checkpoints that was scored, whose state is "checkpoint".
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    based = [name for name in MEASURES if any(name in record.base for record in records)]
    of_base = [f"base_{name}" for name in based]
    head = ["cell", *axes, "step", "state", "reason", "exit_code", *MEASURES, *of_base, "command"]
    writer.writerow(head)
    for record in records:
        entries = [record.labels.get(axis, "") for axis in axes]
        for step, scores in record.checkpoints.items():
            line = {**dict(zip(head, [record.cell, *entries])), "step": step, "state": CHECKPOINT, **scores}
            writer.writerow([line.get(column, "") for column in head])
        writer.writerow(
            [
                record.cell,
                *entries,
                record.summary.get("steps", ""),
                record.state,
                record.reason,
                "" if record.ending is None else record.ending.exit_code,
                *(record.scores.get(name, "") for name in MEASURES),
                *(record.base.get(name, "") for name in based),
                command(record),
            ]
        )
    return file.getvalue()


def json_text(
    name: str, records: Sequence[Record], axes: Mapping[str, Sequence[str]], rounds: Sequence[Rounds] = ()
) -> str:
    """Return everything that is known of each cell, its metrics apart, and what second rounds were chosen from it."""
    cells = [
        {
            "cell": record.cell,
            "labels": record.labels,
            "state": record.state,
            "reason": record.reason,
            "scores": record.scores,
            "checkpoints": [{"step": step, "scores": scores} for step, scores in record.checkpoints.items()],
            "base": record.base,
            "photos": record.photos,
            "prompts": record.prompts,
            "options": _portable(record.options),
            "summary": record.summary,
            "command": _words(record) if record.ending else None,
            "exit_code": record.ending.exit_code if record.ending else None,
            "last_line": _portable(record.ending.last_line) if record.ending else None,
            "began": record.ending.began if record.ending else None,
            "wall_seconds": record.ending.seconds if record.ending else None,
        }
        for record in records
    ]
    second = [as_data(each, choose(each, {record.cell: record for record in records})) for each in rounds]
    content = _finite({"sweep": name, "axes": axes, "rounds": second, "cells": cells})
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def read_results(path: Path) -> tuple[str, list[Record], list[Rounds]]:
    """Return what `json_text` has written: the sweep's name, its cells, without their metrics, and its second rounds.

    Raises UserError if the file is not a report's results.json.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rounds = [from_data(each) for each in content["rounds"]]
        return content["sweep"], [_record(cell) for cell in content["cells"]], rounds
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else reason(error)
        raise UserError(f"{path} is not the results.json of a report: {why}") from error


def _record(cell: Mapping[str, Any]) -> Record:
    same = ("cell", "labels", "state", "reason", "scores", "base", "photos", "prompts", "options", "summary")
    ending = None
    if cell["command"] is not None:
        ending = Ending(cell["exit_code"], cell["last_line"], cell["command"], cell["began"], cell["wall_seconds"])
    checkpoints = {each["step"]: each["scores"] for each in cell["checkpoints"]}
    return Record(**{name: cell[name] for name in same}, ending=ending, checkpoints=checkpoints)


def _finite(value: Any) -> Any:
    """Return a value with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def command(record: Record) -> str:
    """Return the command that trained a cell, for a shell; empty if it never ran."""
    return shlex.join(_words(record))


def _words(record: Record) -> list[str]:
    """Return the words of the command that trained a cell, none if it never ran."""
    if record.ending is None:
        return []
    interpreter, *words = record.ending.command
    return [Path(interpreter).name, *_portable(words)]


def _portable(value: Any) -> Any:
    """Return a value with the paths in this project relative to it: where it lies is this machine's affair."""
    if isinstance(value, str):
        return value.replace(f"{ROOT}{os.sep}", "")
    if isinstance(value, Mapping):
        return {name: _portable(entry) for name, entry in value.items()}
    return [_portable(entry) for entry in value] if isinstance(value, list | tuple) else value
