"""A worker of a sweep: it runs cells, one at a time, that nobody else works on."""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dreambooth.errors import UserError
from dreambooth.wording import counted
from studies.cells import (
    LOG_NAME,
    ROOT,
    STOPPED,
    Ending,
    evaluate_commands,
    is_done,
    last_line,
    log_scores_command,
    read_ending,
    read_summary,
    train_command,
    write_ending,
)
from studies.grid import Cell

DONE, FAILED, ELSEWHERE = "done", "failed", "running elsewhere"
POLL = 1.0  # seconds between looks at cells that others are at


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

    def run_all(self, cells: Iterable[Cell]) -> dict[str, str]:
        """Run cells one after another, until told to stop; return the state of each by its name."""
        states = {}
        for cell in cells:
            if self.stopping:
                break
            states[cell.name] = self.run(cell)
        return states

    def wait_for(self, cells: Sequence[Cell], states: dict[str, str]) -> bool:
        """Wait until cells are done or have failed, and run those that others drop; return False if told to stop."""
        looks = 0
        states |= self.run_all(cells)
        while not self.stopping:
            elsewhere = [cell for cell in cells if states[cell.name] == ELSEWHERE]
            if not elsewhere:
                return True
            looks += 1
            if looks == 2:  # at the first look somebody may just be looking too
                print(
                    f"waiting for {counted(len(elsewhere), 'cell')} of the first round, running elsewhere", flush=True
                )
            time.sleep(POLL)
            states |= self.run_all(elsewhere)
        return False

    def run(self, cell: Cell) -> str:
        """Train and evaluate a cell, unless it is done, has just failed or is claimed by another; return its state."""
        folder = self.sweep / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        with claimed(folder) as claim:
            if claim is None:
                return DONE if is_done(cell, self.sweep) else ELSEWHERE
            if is_done(cell, self.sweep):
                return DONE
            ending = read_ending(folder)
            if ending and ending.exit_code not in (0, STOPPED) and ending.began >= self.began:
                return FAILED
            print(f"{cell.name} ...", flush=True)
            began = time.time()
            try:
                code = self._train_and_evaluate(cell, folder, claim)
            except UserError as error:  # what the run lacks, as only its end can tell
                code = 2
                with (folder / LOG_NAME).open("a", encoding="utf-8") as log:
                    print(f"error: {error}", file=log)
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
        for command in evaluate_commands(cell, self.sweep, summary):
            if code := self._call(command, folder, claim):
                return code
        return 0

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


def is_settled(cell: Cell, sweep: Path) -> bool:
    """Whether a cell is done, or has failed and nobody is trying it again."""
    if is_done(cell, sweep):
        return True
    ending = read_ending(sweep / cell.name)
    if ending is None or ending.exit_code in (0, STOPPED):
        return False
    with claimed(sweep / cell.name) as claim:
        return claim is not None
