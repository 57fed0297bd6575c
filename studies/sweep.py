"""Run the cells of a grid, one after another: a worker of scripts/sweep.sh, of which several may share a folder.

    python studies/sweep.py GRID --output_dir DIR                # every cell that lacks its result and nobody works on
    python studies/sweep.py GRID --output_dir DIR --cell 7       # only cell 7, counted from 0: a task of a Slurm array
    python studies/sweep.py GRID --output_dir DIR --dry_run      # what would run

studies/grid.py says what a grid is. Each cell is an ordinary run folder, DIR/AXIS=ENTRY,.../, with evaluation/ if the
grid says how to evaluate. What was cut off continues; what has failed is tried again by the next sweep. sweep.log in
the folder has what the commands printed, sweep.json how they ended.

Ends with 0 if the sweep is complete as far as this worker can tell, 1 if a cell failed, and 75 if it was told to stop:
the training then has saved a checkpoint.
"""

import argparse
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth.errors import UserError, readable_errors
from dreambooth.options.paths import path_argument
from dreambooth.wording import counted
from studies.cells import (
    LOG_NAME,
    ROOT,
    STOPPED,
    Ending,
    evaluate_command,
    is_done,
    last_line,
    log_scores_command,
    read_ending,
    read_summary,
    train_command,
    write_ending,
)
from studies.grid import Cell, read_grid
from studies.plan import check_cells, count_cells

DONE, FAILED, ELSEWHERE = "done", "failed", "running elsewhere"
BEGAN = "SWEEP_BEGAN"  # variable: when scripts/sweep.sh was started; cells that failed later are not tried again


def main() -> int:
    arguments = parse()
    everything, sweep = read_grid(arguments.grid), arguments.output_dir.absolute()
    cells = everything
    if arguments.cell is not None:
        if arguments.cell >= len(cells):
            raise UserError(f"--cell {arguments.cell}: {arguments.grid} has {counted(len(cells), 'cell')}, from 0 on")
        cells = [cells[arguments.cell]]
    os.chdir(ROOT)  # where commands run, so that a relative path means the same to them and to what checks them
    check_same_commands(cells, sweep)
    if arguments.dry_run:
        show(cells, sweep)
        return 0
    if BEGAN not in os.environ:  # scripts/sweep.sh has looked at everything
        check_cells([cell for cell in everything if not is_done(cell, sweep)], sweep)
    began = float(os.environ.get(BEGAN) or time.time())
    worker = Worker(sweep, arguments.processes, began)
    for cell in everything:  # a report then knows what is still to come
        (sweep / cell.name).mkdir(parents=True, exist_ok=True)
    states = Counter()
    for cell in cells:
        states[worker.run(cell)] += 1
        if worker.stopping:
            return STOPPED
    print(", ".join(f"{count} {state}" for state, count in states.items()), flush=True)
    return 1 if states[FAILED] else 0


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


def show(cells: Sequence[Cell], sweep: Path) -> None:
    """Print every cell: its number and name, how many parameters it trains, whether it is done, and its command.

    Raises UserError if a training or an evaluation that is still to come will be refused.
    """
    done = {cell.name: read_summary(sweep / cell.name) or {} for cell in cells if is_done(cell, sweep)}
    counts = count_cells([cell for cell in cells if cell.name not in done], sweep)
    for number, cell in enumerate(cells):
        count = counts.get(cell.name) or done[cell.name].get("parameters", "not in its summary")
        parameters = f"{count:,} parameters" if isinstance(count, int) else f"? parameters ({count})"
        print(f"{number:4d}  {cell.name}  {parameters}{'  (done)' if cell.name in done else ''}")
        print(f"      {shlex.join(train_command(cell, sweep))}")
    print(f"{counted(len(cells), 'cell')}, {len(done)} done")


def check_same_commands(cells: Sequence[Cell], sweep: Path) -> None:
    """Raise UserError if a finished cell was trained by another command: the grid has changed since."""
    for cell in cells:
        ending = read_ending(sweep / cell.name)
        if ending and is_done(cell, sweep) and ending.command[1:] != train_command(cell, sweep)[1:]:
            raise UserError(
                f"--output_dir {sweep}: {cell.name} was trained by another command, so its scores cannot be compared:\n"
                f"    then {shlex.join(ending.command)}\n    now  {shlex.join(train_command(cell, sweep))}\n"
                "Choose another folder for the changed grid"
            )


class Worker:
    """Runs cells, one at a time, and ends its training if it is told to end."""

    def __init__(self, sweep: Path, processes: int, began: float):
        self.sweep, self.processes, self.began = sweep, processes, began
        self.running: subprocess.Popen | None = None
        self.stopping = False
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(name, self._stop)

    def _stop(self, number: int, _) -> None:
        self.stopping = True
        if self.running is not None and self.running.poll() is None:
            self.running.send_signal(signal.SIGTERM)

    def run(self, cell: Cell) -> str:
        """Train and evaluate a cell, unless it is done, has just failed or is claimed by another; return its state."""
        folder = self.sweep / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        with claimed(folder) as claim:
            if claim is None:
                return ELSEWHERE
            if is_done(cell, self.sweep):
                return DONE
            ending = read_ending(folder)
            if ending and ending.exit_code not in (0, STOPPED) and ending.began >= self.began:
                return FAILED
            print(f"{cell.name} ...", flush=True)
            began = time.time()
            code = self._train_and_evaluate(cell, folder, claim)
            if not code and cell.evaluate is not None:
                self._call(log_scores_command(cell, self.sweep), folder, claim)  # trackers decide nothing
            line, command = last_line(folder / LOG_NAME), train_command(cell, self.sweep, self.processes)
            write_ending(folder, Ending(code, line, command, began, round(time.time() - began, 1)))
        if code and not self.stopping:
            print(f"{cell.name}: exit code {code}: {line}", flush=True)
        return FAILED if code else DONE

    def _train_and_evaluate(self, cell: Cell, folder: Path, claim: int) -> int:
        """Return 0, or the exit code of the command that failed."""
        if read_summary(folder) is None:
            code = self._call(train_command(cell, self.sweep, self.processes), folder, claim)
            if code:
                return code
        summary = read_summary(folder)
        if summary is None:
            return 1
        if cell.evaluate is None:
            return 0
        return self._call(evaluate_command(cell, self.sweep, summary["result"]), folder, claim)

    def _call(self, command: Sequence[str], folder: Path, claim: int) -> int:
        """Run a command with its output in the cell's log; return its exit code. It holds the claim until it ends."""
        if self.stopping:
            return STOPPED
        with (folder / LOG_NAME).open("a", encoding="utf-8") as log:
            print("$", *command, file=log, flush=True)
            # A session of its own: Ctrl-C reaches it through this process alone, once
            self.running = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True, pass_fds=[claim]
            )
            if self.stopping:  # the signal came before there was anything to stop
                self.running.send_signal(signal.SIGTERM)
            return self.running.wait()


@contextmanager
def claimed(folder: Path) -> Iterator[int | None]:
    """Claim a cell for the time of this context: a locked descriptor, or None if another worker has claimed it.

    The lock is the operating system's. A command that inherits the descriptor keeps it if the worker is killed.
    """
    claim = os.open(folder / ".claim", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield claim
    except BlockingIOError:
        yield None
    finally:
        os.close(claim)


if __name__ == "__main__":
    with readable_errors():
        sys.exit(main())
