"""Search for the best cell with optuna, instead of running all of a grid.

    python studies/search.py SEARCH --output_dir DIR --trials 20

Started again, it goes on; started several times, also on several machines, these share the trials. SEARCH is a grid
(studies/grid.py) that also says by which measure cells are compared, any of studies/results.py's:

    maximise: dino                                      # or minimise: held_out_masked
    axes:
      learning_rate: {low: 1.0e-3, high: 0.1, log: true}       # a range; of whole numbers if both ends are
      shape: [{kron_a1: 2, kron_a2: 32}, {kron_a1: 8, kron_a2: 8}]       # or choices, as in a grid

Every trial is an ordinary cell in DIR, so scripts/report.py reads the folder as it is. A trial that was cut off is
continued by whoever comes next, unless a worker is at it. A cell that fails counts as a failed trial.

optuna is an optional package: pip install optuna. Ends with 0 once there are --trials trials, 1 if none of them has a
score, and 75 if it was told to stop: the training then has saved a checkpoint.
"""

import argparse
import importlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth.errors import UserError, readable_errors
from dreambooth.options.paths import path_argument
from dreambooth.options.yaml_file import read_mapping
from studies.cells import ROOT, STOPPED
from studies.grid import Cell, entries_of, grid_of
from studies.plan import check_cells
from studies.results import DONE, MEASURES, read_cell
from studies.sweep import check_same_commands
from studies.worker import ELSEWHERE, Worker

GOALS = {"minimise": "minimize", "maximise": "maximize"}  # key -> optuna's direction
RANGE = {"low", "high", "log"}
DIGITS = 4  # significant ones of a number that is suggested; it is in the name of a folder


def main() -> int:
    arguments = parse()
    optuna = import_optuna()
    search, sweep = Search(arguments.search, optuna), arguments.output_dir.absolute()
    os.chdir(ROOT)
    check_cells(search.probes(), sweep)
    sweep.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=arguments.storage or f"sqlite:///{sweep}/optuna.db",
        study_name=sweep.name,
        direction=GOALS[search.goal],
        load_if_exists=True,
    )
    search.check_same(study)
    worker = Worker(sweep, arguments.processes, time.time())
    while True:
        trials = [trial for trial in study.get_trials() if trial.params.keys() == search.space.keys()]
        check_same_commands([search.cell(trial.params) for trial in trials], sweep)
        for trial in trials:
            if trial.state == optuna.trial.TrialState.RUNNING:  # cut off, unless a worker is at it
                search.run(study, trial, worker)
        if worker.stopping:
            return STOPPED
        if len(trials) >= arguments.trials:
            return search.say_best(study)
        search.run(study, study.ask(search.space), worker)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("search", metavar="SEARCH", help="YAML file")
    parser.add_argument("--output_dir", type=path_argument, required=True, metavar="DIR", help="folder of the cells")
    parser.add_argument("--trials", type=int, required=True, help="trials in all, those of earlier starts included")
    parser.add_argument("--storage", help="optuna's database, a URL; default: sqlite:///DIR/optuna.db")
    parser.add_argument("--processes", type=int, default=1, help="GPUs for each cell; default: 1")
    return parser.parse_args()


def import_optuna() -> Any:
    try:
        optuna: Any = importlib.import_module("optuna")
    except ModuleNotFoundError as error:
        raise UserError("searching needs a package that is not installed: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class Search:
    """What is searched, and by which measure."""

    def __init__(self, path: str, optuna: Any):
        self.path, self.optuna = path, optuna
        self.grid = read_mapping(path, "search")
        goals = [goal for goal in GOALS if goal in self.grid]
        if len(goals) != 1:
            raise UserError(f"search {path}: give either minimise or maximise, and a measure: {', '.join(MEASURES)}")
        self.goal, self.measure = goals[0], self.grid.pop(goals[0])
        if self.measure not in MEASURES:
            raise UserError(f"search {path}: {self.goal}: {self.measure}: choose from {', '.join(MEASURES)}")
        axes = self.grid.pop("axes", None)
        if not isinstance(axes, Mapping) or not axes:
            raise UserError(f"search {path}: axes: expected lines of the form 'axis: range or choices'")
        self.space, self.choices = {}, {}
        for axis, values in axes.items():
            where = f"search {path}: axes: {axis}"
            if isinstance(values, Mapping) and values.keys() & RANGE:
                self.space[axis] = self._range(values, where)
            else:
                self.choices[axis] = dict(entries_of(axis, values, where))
                self.space[axis] = optuna.distributions.CategoricalDistribution([*self.choices[axis]])

    def _range(self, values: Mapping[str, Any], where: str) -> Any:
        """Return optuna's distribution of {low, high, log}. Raises UserError if it is not one."""
        ends, log = (
            [values[end] for end in ("low", "high") if isinstance(values.get(end), str)],
            values.get("log", "false"),
        )
        if not values.keys() <= RANGE or len(ends) < 2 or log not in ("true", "false"):
            raise UserError(f"{where}: expected {{low: NUMBER, high: NUMBER}}, and log: true for a logarithmic scale")
        kinds = self.optuna.distributions
        whole = all(re.fullmatch(r"[+-]?\d+", end) for end in ends)
        try:
            if whole:
                return kinds.IntDistribution(*map(int, ends), log=log == "true")
            low, high = map(float, ends)
            if not math.isfinite(high - low):
                raise ValueError(f"{low} and {high} must be finite")
            return kinds.FloatDistribution(low, high, log=log == "true")
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error

    def cell(self, chosen: Mapping[str, Any]) -> Cell:
        """Return the cell of what is chosen on each axis: a number of a range, or the name of a choice."""
        axes = {
            axis: {value: self.choices[axis][value]} if axis in self.choices else [_text(value)]
            for axis, value in chosen.items()
        }
        (cell,) = grid_of({**self.grid, "axes": axes}, self.path).cells()
        return cell

    def probes(self) -> list[Cell]:
        """Return cells with every choice and both ends of every range, which show what a script would refuse."""
        ends = {axis: self.choices.get(axis) or (space.low, space.high) for axis, space in self.space.items()}
        first = {axis: next(iter(values)) for axis, values in ends.items()}
        return [self.cell({**first, axis: value}) for axis, values in ends.items() for value in values]

    def check_same(self, study: Any) -> None:
        """Raise UserError if the study searches something else: the file has changed since."""
        what = {axis: self.optuna.distributions.distribution_to_json(space) for axis, space in self.space.items()}
        now = json.dumps({self.goal: self.measure, "axes": what})
        then = study.user_attrs.get("search", now)
        if then != now:
            raise UserError(
                f"--output_dir: it holds another search:\n    then {then}\n    now  {now}\nChoose another folder"
            )
        study.set_user_attr("search", now)

    def run(self, study: Any, trial: Any, worker: Worker) -> None:
        """Run the cell of a trial and tell the study its score, unless it is stopped or somebody else is at it."""
        cell = self.cell(trial.params)
        state = worker.run(cell)
        if state == ELSEWHERE or worker.stopping:
            return
        record = read_cell(worker.sweep / cell.name)
        score = record.scores.get(self.measure)
        result = {"state": self.optuna.trial.TrialState.FAIL} if score is None else {"values": score}
        study.tell(trial.number, **result, skip_if_finished=True)
        if record.state == DONE and score is None:
            raise UserError(
                f"search {self.path}: {self.goal}: {cell.name} was scored without {self.measure}, only by "
                f"{', '.join(record.scores)}; say what else to measure with evaluate: in that file"
            )

    def say_best(self, study: Any) -> int:
        """Print the best trial; return the exit code of the program."""
        if not study.get_trials(states=[self.optuna.trial.TrialState.COMPLETE]):
            print("no trial has a score", flush=True)
            return 1
        best = study.best_trial
        print(f"best of {len(study.trials)}: {self.cell(best.params).name}: {self.measure} {best.value:g}", flush=True)
        return 0


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.{DIGITS}g}"


if __name__ == "__main__":
    with readable_errors():
        sys.exit(main())
