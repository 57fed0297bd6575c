"""The examples that start a run again: their shell, with programs in the place of Slurm and of the training."""

import os
import signal
import subprocess
import time

import pytest

from tests.conftest import ROOT

# Notes its arguments and ends with the next code of a list, or waits for a signal and ends with 75 where that is "wait"
TRAINING = """#!/bin/bash
echo "$@" >> calls
code=$(head -n 1 codes); sed -i 1d codes
if [ "$code" = wait ]; then
    trap 'sleep 0.3; exit 75' TERM
    touch waiting
    while true; do sleep 0.05; done
fi
exit $code
"""


@pytest.fixture
def start(tmp_path):
    def start(script: str, *codes) -> subprocess.Popen:
        programs = {
            "python": TRAINING,
            "srun": '#!/bin/bash\nexec "$@"',
            "scontrol": '#!/bin/bash\necho "$@" > requeued',
        }
        for name, text in programs.items():
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PAUSE": "0"}
        command = [str(ROOT / "scripts" / script), "train.py", "--config", "a b.yaml"]
        return subprocess.Popen(command, cwd=tmp_path, env={**environment, "SLURM_JOB_ID": "7"})

    return start


def interrupt(process: subprocess.Popen, folder) -> int:
    while not (folder / "waiting").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    return process.wait(20)


@pytest.mark.parametrize(
    "codes, last, calls",
    [((75, 0), 0, 2), ((2,), 2, 1), ((1, 74, 0), 0, 3), ((1, 1, 1, 1), 1, 4), ((1, 1, 75, 1, 1, 0), 0, 6)],
)
def test_spot_goes_on_as_long_as_that_can_help(codes, last, calls, start, tmp_path):
    assert start("spot.sh", *codes).wait(20) == last
    assert (tmp_path / "calls").read_text().splitlines() == [
        "train.py --config a b.yaml --resume_from_checkpoint latest"
    ] * calls


def test_spot_passes_a_signal_on_and_waits_for_the_checkpoint(start, tmp_path):
    assert interrupt(start("spot.sh", "wait"), tmp_path) == 75
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


@pytest.mark.parametrize("code, requeued", [(75, True), (0, False), (2, False)])
def test_slurm_puts_a_job_back_that_was_stopped_and_saved(code, requeued, start, tmp_path):
    assert start("slurm.sh", code).wait(20) == code
    assert (tmp_path / "requeued").exists() == requeued


def test_slurm_passes_a_preemption_on_and_waits_for_the_checkpoint(start, tmp_path):
    assert interrupt(start("slurm.sh", "wait"), tmp_path) == 75
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
