"""Whole programs as processes of their own: what they cost, how they end, and what they say then."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dreambooth.errors import UserError

GRACE = 5.0  # s, for a program that was interrupted to write what it has


class RunFailed(UserError):
    """A run ended with an error. The message has the command and the end of what it said."""


def measure(command: list[str], log: Path, environment: Mapping[str, str] | None = None) -> tuple[float, float, float]:
    """Run a command, by default in this environment; return its wall time and processor time, s, and peak memory, MiB.

    Raises RunFailed.
    """
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT, env=environment)
        # The usage is that of the process and of the processes that it waited for: the training is a child's child.
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise _failure(command, log)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss: bytes on macOS, KiB elsewhere
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit


def run_within(
    seconds: float,
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    accepted: Sequence[int] = (0,),
) -> None:
    """Run a command. If it takes longer, interrupt it, and then end it with all that it started.

    Raises RunFailed if it does, or unless its exit code is one of `accepted`.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            raise RunFailed(f"error: it was ended after {seconds:.0f} s, its share of the time") from error
        finally:
            _end_group(process.pid)
            process.wait()
    if status not in accepted:
        raise _failure(command, log)


def _end_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(leader, signal.SIGKILL)


def _failure(command: Sequence[str], log: Path) -> RunFailed:
    said = log.read_text(encoding="utf-8", errors="replace")
    return RunFailed(f"{' '.join(command)} failed:\n{said[-3000:]}")


def last_error(said: str) -> str:
    """Return the last error in what a run said, but for that of the launcher."""
    errors = re.findall(r"^\W*([\w.]*(?:Error|Exception): .*|error: .*)$", said, re.MULTILINE)
    errors = [error.strip() for error in errors if not error.startswith("CalledProcessError")]
    return errors[-1] if errors else said.strip().splitlines()[-1]
