"""Run the cells of a grid, one after another: a worker of scripts/sweep.sh, of which several may share a folder.

    python studies/sweep.py GRID --output_dir DIR                # every cell that lacks its result and nobody works on
    python studies/sweep.py GRID --output_dir DIR --cell 7       # only cell 7, counted from 0: a task of a Slurm array
    python studies/sweep.py GRID --output_dir DIR --dry_run      # what would run

studies/grid.py says what a grid is, and studies/rounds.py what its second round is. Each cell is an ordinary run
folder, DIR/AXIS=ENTRY,.../, with evaluation/ if the grid says how to evaluate. What was cut off continues; what has
failed is tried again by the next sweep. sweep.log in the folder has what the commands printed, sweep.json how they
ended.

Ends with 0 if the sweep is complete as far as this worker can tell, 1 if a cell failed or a setting has no second
round, and 75 if it was told to stop: the training then has saved a checkpoint.
"""

import argparse
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth.errors import UserError, readable_errors
from dreambooth.options.paths import path_argument
from dreambooth.wording import counted
from studies.cells import (
    ROOT,
    STOPPED,
    is_done,
    parts_of,
    read_ending,
    read_summary,
    run_options,
    train_command,
)
from studies.checkpoints import check_kept
from studies.grid import Cell, parse_grid
from studies.plan import check_cells, count_cells
from studies.rounds import Chosen, Rounds, choose_in, in_words, numbered, read_rounds, write_rounds
from studies.worker import FAILED, Worker, is_settled

BEGAN = "SWEEP_BEGAN"  # variable: when scripts/sweep.sh was started; cells that failed later are not tried again


def main() -> int:
    arguments = parse()
    grid, sweep = parse_grid(arguments.grid), arguments.output_dir.absolute()
    first, plan = grid.cells(), read_rounds(grid)
    second = None if plan is None else SecondRound(sweep, first, *plan)
    cells = first
    if arguments.cell is not None:
        if (cell := cell_of_number(arguments, first, second)) is None:
            return 1
        cells = [cell]
    os.chdir(ROOT)  # where commands run, so that a relative path means the same to them and to what checks them
    known = cells if second is None else [*second.cells.values()]
    check_same_commands(known, sweep)
    for cell in known:
        check_kept(cell, run_options(cell))
    to_come = [cell for cell in known if not is_done(cell, sweep)]
    if arguments.dry_run:
        listed = {cell.name for cell in cells}  # which are checked as they are counted
        check_cells([cell for cell in to_come if cell.name not in listed], sweep)
        show(cells, sweep, None if arguments.cell is not None else second)
        return 0
    if BEGAN not in os.environ:  # scripts/sweep.sh has looked at everything
        check_cells(to_come, sweep)
    began = float(os.environ.get(BEGAN) or time.time())
    worker = Worker(sweep, arguments.processes, began)
    for cell in first:  # a report then knows what is still to come
        (sweep / cell.name).mkdir(parents=True, exist_ok=True)
    if second is not None:
        write_rounds(sweep, grid, second.rounds)
    states, left_out = worker.run_all(cells), False
    if second is not None and arguments.cell is None:
        left_out = run_second_round(worker, second, states)
    if worker.stopping:
        return STOPPED
    print(", ".join(f"{count} {state}" for state, count in Counter(states.values()).items()), flush=True)
    return 1 if left_out or FAILED in states.values() else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("grid", metavar="GRID", help="YAML file")
    parser.add_argument("--output_dir", type=path_argument, required=True, metavar="DIR", help="folder of the sweep")
    parser.add_argument("--cell", type=int, help="run only this cell, counted from 0")
    parser.add_argument("--processes", type=int, default=1, help="GPUs for each cell; default: 1")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the cells, how many parameters each trains, and their commands"
    )
    return parser.parse_args()


def show(cells: Sequence[Cell], sweep: Path, second: "SecondRound | None" = None) -> None:
    """Print every cell: its number and name, how many parameters it trains, whether it is done, and its command.

    Those of the second round are known once the first is done. Raises UserError if a training or an evaluation that is
    still to come will be refused.
    """
    rows, to_come = dict(enumerate(cells)), ""
    if second is not None and second.is_open():
        rounds = second.rounds
        to_come = (
            f"; then a second round, cells {len(cells)} to {len(cells) + sum(rounds.sizes) - 1}, at the best "
            f"{rounds.axis} by {rounds.score} for each of {counted(len(rounds.settings), 'setting')}"
        )
    elif second is not None:
        chosen = second.choose()
        print(in_words(second.rounds, chosen))
        rows |= {number: second.cells[name] for number, name in numbered(second.rounds, chosen).items()}
    by_name = {cell.name: cell for cell in rows.values()}
    done = {name: read_summary(sweep / name) or {} for name, cell in by_name.items() if is_done(cell, sweep)}
    counts = count_cells([cell for name, cell in by_name.items() if name not in done], sweep)
    for number, cell in rows.items():
        count = counts.get(cell.name) or done[cell.name].get("parameters", "not in its summary")
        parameters = f"{count:,} parameters" if isinstance(count, int) else f"? parameters ({count})"
        print(f"{number:4d}  {cell.name}  {parameters}{'  (done)' if cell.name in done else ''}")
        print(f"      {shlex.join(train_command(cell, sweep))}")
    print(f"{counted(len(by_name), 'cell')}, {len(done)} done{to_come}")


def check_same_commands(cells: Sequence[Cell], sweep: Path) -> None:
    """Raise UserError if a finished cell was trained by another command: the grid has changed since."""
    for cell in cells:
        ending = read_ending(sweep / cell.name)
        if ending and is_done(cell, sweep) and parts_of(ending.command) != parts_of(train_command(cell, sweep)):
            raise UserError(
                f"--output_dir {sweep}: {cell.name} was trained by another command, so its scores cannot be compared:\n"
                f"    then {shlex.join(ending.command)}\n    now  {shlex.join(train_command(cell, sweep))}\n"
                "Choose another folder for the changed grid"
            )


# ---- two rounds ----


class SecondRound:
    """The second round of a sweep: what the first round's cells in its folder say."""

    def __init__(self, sweep: Path, first: Sequence[Cell], rounds: Rounds, cells: Mapping[str, Cell]):
        self.sweep, self.first, self.rounds = sweep, first, rounds
        self.cells = cells  # by name: those of the first round, and all that the second may have

    def is_open(self) -> bool:
        """Whether a cell of the first round is not done, and has not failed or is tried again."""
        return not all(is_settled(cell, self.sweep) for cell in self.first)

    def choose(self) -> list[Chosen]:
        return choose_in(self.sweep, self.rounds)


def cell_of_number(arguments: argparse.Namespace, first: Sequence[Cell], second: SecondRound | None) -> Cell | None:
    """Return the cell that --cell asks for; None, and say so, if its setting has no second round.

    Raises UserError if there is no such cell, or if it is not known yet.
    """
    number, count = arguments.cell, len(first) + (sum(second.rounds.sizes) if second else 0)
    if not 0 <= number < count:
        raise UserError(f"--cell {number}: {arguments.grid} has {counted(count, 'cell')}, from 0 on")
    if second is None or number < len(first):
        return first[number]
    if second.is_open():
        raise UserError(
            f"--cell {number} is of the second round, which follows from the first, cells 0 to {len(first) - 1}. "
            "That is not done: submit the second with sbatch --dependency=afterany:JOB, JOB being the first one's array"
        )
    chosen = second.choose()
    if (name := numbered(second.rounds, chosen).get(number)) is None:
        print(f"--cell {number}: its setting has no second round\n{in_words(second.rounds, chosen)}", flush=True)
        return None
    return second.cells[name]


def run_second_round(worker: Worker, second: SecondRound, states: dict[str, str]) -> bool:
    """Run the second round once the first is done, and update `states`; return whether a setting has none.

    If another worker meanwhile tries a failed cell of the first round again, the choice may change. It is then followed
    too, so that all workers end with the same.
    """
    followed = None
    while worker.wait_for(second.first, states):
        chosen = second.choose()
        if chosen == followed:
            return any(one.best is None for one in chosen)
        print(in_words(second.rounds, chosen), flush=True)
        cells = [second.cells[name] for one in chosen for name in one.cells]
        for cell in cells:
            (second.sweep / cell.name).mkdir(parents=True, exist_ok=True)
        states |= worker.run_all(cells)
        followed = chosen
    return False


if __name__ == "__main__":
    with readable_errors():
        sys.exit(main())
