"""Sweeps that fail, are stopped, killed or started twice. The trainings are stand-ins; other tests have real ones."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

STAND_IN = "tests/faults/sweep_stand_in.py"
ENVIRONMENT = {**os.environ, "PATH": f"{Path(os.sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture
def sweep(tmp_path):
    """Return a function that starts scripts/sweep.sh on a grid of stand-ins, in one folder."""
    started = []

    def start(*arguments, steps=1, best=None, **axes):
        grid = {"script": STAND_IN, "options": {"steps": steps, "report_to": "none"}, "axes": axes, "best": best}
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
        command = [
            str(ROOT / "scripts" / "sweep.sh"),
            str(tmp_path / "grid.yaml"),
            "--output_dir",
            str(tmp_path / "out"),
        ]
        started.append(
            subprocess.Popen(
                [*command, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()


def ended(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def events(folder):
    """What the trainings of a cell noted, in order."""
    return [json.loads(line)["event"] for line in (folder / "runs.jsonl").read_text().splitlines()]


def wait_for(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


def test_a_cell_that_fails_is_a_row_and_is_tried_again_by_the_next_sweep(sweep, tmp_path):
    code, out, _ = ended(sweep("--jobs", "2", fails=["always", "once", "no"]))
    assert code == 1
    assert "fails=always: exit code 2: error: --fails was given" in out
    ending = json.loads((tmp_path / "out" / "fails=always" / "sweep.json").read_text())
    assert (ending["exit_code"], ending["last_line"]) == (2, "error: --fails was given")
    assert events(tmp_path / "out" / "fails=always") == ["begins", "fails"]  # once, not by both workers
    assert events(tmp_path / "out" / "fails=no") == ["begins", "ends"]
    assert ended(sweep("--jobs", "1", fails=["always", "once", "no"]))[0] == 1
    assert events(tmp_path / "out" / "fails=once") == ["begins", "fails", "begins", "ends"]
    assert events(tmp_path / "out" / "fails=no") == ["begins", "ends"]  # not run again


def test_a_sweep_that_is_told_to_stop_ends_its_trainings_and_continues_later(sweep, tmp_path):
    process = sweep("--jobs", "2", steps=300, seed=[0, 1, 2])
    for seed in (0, 1):
        wait_for(tmp_path / "out" / f"seed={seed}" / "steps")
    process.send_signal(signal.SIGTERM)
    code, _, _ = ended(process)
    assert code == 75
    assert events(tmp_path / "out" / "seed=0") == events(tmp_path / "out" / "seed=1") == ["begins", "stops"]
    for seed in (0, 1):
        (tmp_path / "out" / f"seed={seed}" / "steps").write_text("299")
    (tmp_path / "out" / "seed=2").mkdir(exist_ok=True)
    (tmp_path / "out" / "seed=2" / "steps").write_text("299")
    assert ended(sweep("--jobs", "2", steps=300, seed=[0, 1, 2]))[0] == 0
    assert events(tmp_path / "out" / "seed=0") == ["begins", "stops", "begins", "ends"]


def test_a_cell_is_never_run_twice_at_once_even_if_its_worker_is_killed(sweep, tmp_path):
    first = sweep(steps=15, seed=[0])
    wait_for(tmp_path / "out" / "seed=0" / "steps")
    for pid in subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, text=True).stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    assert ended(first)[0] == 137
    assert "1 running elsewhere" in ended(sweep(steps=15, seed=[0]))[1]  # the orphan holds it
    while events(tmp_path / "out" / "seed=0")[-1] != "ends":
        time.sleep(0.1)
    code, out, _ = ended(sweep(steps=15, seed=[0]))
    assert code == 0 and "1 done" in out
    assert events(tmp_path / "out" / "seed=0") == ["begins", "ends"]


def test_a_second_sweep_joins_in(sweep, tmp_path):
    first, second = (sweep(steps=3, seed=[0, 1, 2, 3]) for _ in range(2))
    assert ended(first)[0] == ended(second)[0] == 0
    assert all(events(tmp_path / "out" / f"seed={seed}") == ["begins", "ends"] for seed in range(4))


def test_a_dry_run_runs_nothing_and_a_changed_grid_is_refused(sweep, tmp_path):
    code, out, _ = ended(sweep("--dry_run", seed=[0, 1]))
    assert code == 0 and "2 cells, 0 done" in out and f"{STAND_IN} --cache_latents_to_disk" in out
    assert not (tmp_path / "out").exists()
    assert ended(sweep(seed=[0]))[0] == 0
    code, _, err = ended(sweep(steps=2, seed=[0]))
    assert code == 2 and "seed=0 was trained by another command" in err and "--steps=2" in err


# ---- two rounds ----

FIRST = {"fails": ["no", "3"], "rate": [1, 2, 3], "seed": [0]}
SECOND = {"axis": "rate", "score": "seconds", "axes": {"seed": [0, 1]}}
SIX = {f"fails={fails},rate={rate},seed=0" for fails in ("no", "3") for rate in (1, 2, 3)}
TWO = {f"fails={fails},rate=2,seed=1" for fails in ("no", "3")}


def test_the_best_of_the_first_round_runs_on_the_second_s_replicates_once(sweep, tmp_path):
    code, out, _ = ended(sweep("--jobs", "2", best=SECOND, **FIRST))
    assert code == 1 and "fails=no: 2 (1: 1, 2: 0, 3: 1)" in out and "fails=3: 2 (1: 1, 2: 0, 3: 1 of 1 failed)" in out
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == SIX | TWO
    done = SIX | TWO - {"fails=3,rate=3,seed=0"}
    assert all(
        events(tmp_path / "out" / cell) == ["begins", "ends"] for cell in done if cell != "fails=3,rate=3,seed=0"
    )
    code, out, _ = ended(sweep("--dry_run", best=SECOND, **FIRST))
    assert code == 0
    for number, seed in ((8, 0), (9, 1)):
        assert re.search(rf"^ +{number}  fails=3,rate=2,seed={seed}  .*parameters.*\(done\)$", out, re.M)
    assert out.splitlines()[-1] == "8 cells, 7 done"
    assert ended(sweep(best=SECOND, **FIRST))[0] == 1
    assert events(tmp_path / "out" / "fails=no,rate=2,seed=1") == ["begins", "ends"]  # not run again


def test_a_worker_waits_for_the_first_round_s_cells_elsewhere_and_ends_at_a_signal(sweep, tmp_path):
    axes = {"rate": [2], "seed": [0]}
    first = sweep(steps=40, best=SECOND, **axes)
    wait_for(tmp_path / "out" / "rate=2,seed=0" / "steps")
    code, _, err = ended(sweep("--cell", "2", steps=40, best=SECOND, **axes))
    assert code == 2 and "--dependency=afterany" in err
    waiting = sweep(steps=40, best=SECOND, **axes)
    lines = iter(waiting.stdout.readline, "")
    assert next(line for line in lines if "waiting for 1 cell" in line)
    waiting.send_signal(signal.SIGTERM)
    assert ended(waiting)[0] == 75
    waiting = sweep(steps=40, best=SECOND, **axes)
    first.send_signal(signal.SIGTERM)
    assert ended(first)[0] == 75
    (tmp_path / "out" / "rate=2,seed=0" / "steps").write_text("39")
    (tmp_path / "out" / "rate=2,seed=1").mkdir(exist_ok=True)
    (tmp_path / "out" / "rate=2,seed=1" / "steps").write_text("39")
    assert ended(waiting)[0] == 0  # it took over
    assert events(tmp_path / "out" / "rate=2,seed=0") == ["begins", "stops", "begins", "ends"]
    assert events(tmp_path / "out" / "rate=2,seed=1") == ["begins", "ends"]


def test_a_setting_whose_cells_all_failed_is_said_and_left_out(sweep, tmp_path):
    axes = {"fails": ["no", "always"], "rate": [1, 2], "seed": [0]}
    code, out, _ = ended(sweep(best=SECOND, **axes))
    assert code == 1 and "fails=always: left out" in out and "fails=no: 2 (" in out
    assert not (tmp_path / "out" / "fails=always,rate=2,seed=1").exists()
    task = [os.sys.executable, "studies/sweep.py", str(tmp_path / "grid.yaml"), "--output_dir", str(tmp_path / "out")]
    for number, said in ((5, 0), (6, 1), (8, 2)):  # of the setting that has a second round, of the other, of none
        result = subprocess.run([*task, "--cell", str(number)], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == said and ("has no second round" in result.stdout) == (said == 1)


@pytest.mark.parametrize("arguments", [["--jobs", "x"], ["--jobs", "0"], ["--gpus"], ["--cell", "9"], ["--nonsense"]])
def test_a_wrong_command_is_refused(sweep, tmp_path, arguments):
    code, _, err = ended(sweep(*arguments, seed=[0]))
    assert code == 2 and arguments[0] in err
    assert not (tmp_path / "out").exists()
