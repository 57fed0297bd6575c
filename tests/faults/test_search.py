"""Searches with optuna: trials that end, fail, or are cut off. The trainings are stand-ins."""

import json
import os
import signal
import subprocess
import sys
import time

import optuna
import pytest
import yaml

from dreambooth.errors import UserError
from studies import search as program
from studies.cells import train_command
from studies.plan import check_cells
from studies.results import read_sweep
from studies.search import Search
from studies.worker import Worker, claimed
from tests.conftest import ROOT

STAND_IN = "tests/faults/sweep_stand_in.py"
PLAIN = {
    "script": STAND_IN,
    "options": {"steps": 1, "report_to": "none"},
    "minimise": "loss",
    "axes": {"loss": {"low": 0.5, "high": 2.0}},
}
STATE = optuna.trial.TrialState


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a search, and returns its path."""

    def write(**entries):
        path = tmp_path / "search.yaml"
        entries = {name: value for name, value in {**PLAIN, **entries}.items() if value is not None}
        path.write_text(yaml.safe_dump(entries, sort_keys=False))
        return str(path)

    return write


@pytest.fixture
def run(tmp_path, monkeypatch, write):
    """Return a function that searches in this process, in one folder, and returns the exit code."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(trials, **entries):
        monkeypatch.chdir(ROOT)
        arguments = [write(**entries), "--output_dir", str(tmp_path / "out"), "--trials", str(trials)]
        monkeypatch.setattr(sys, "argv", ["search.py", *arguments])
        return program.main()

    return run


def study_of(folder) -> optuna.Study:
    return optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder}/optuna.db")


def test_a_search_that_is_killed_goes_on_with_its_trial_and_tells_every_score(write, run, tmp_path):
    command = [sys.executable, str(ROOT / "studies" / "search.py"), write(options={"steps": 600, "report_to": "none"})]
    process = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path / "out"), "--trials", "2"], start_new_session=True
    )
    try:
        while not (steps := list((tmp_path / "out").glob("*/steps"))):
            assert process.poll() is None
            time.sleep(0.05)
    finally:  # the training too, which is in a session of its own
        process.kill()
        process.wait()
        runs = [json.loads(line) for file in (tmp_path / "out").glob("*/runs.jsonl") for line in file.open()]
        for note in runs:
            os.kill(note["process"], signal.SIGKILL)
    cell = steps[0].parent
    assert [trial.state for trial in study_of(tmp_path / "out").trials] == [STATE.RUNNING]
    while True:  # until the claim of the killed training is gone
        with claimed(cell) as claim:
            if claim is not None:
                break
    assert run(2) == 0
    first, second = study_of(tmp_path / "out").trials
    assert first.state == second.state == STATE.COMPLETE
    assert [json.loads(line)["event"] for line in (cell / "runs.jsonl").open()] == ["begins", "begins", "ends"]
    records = {record.cell: record.scores["loss"] for record in read_sweep(tmp_path / "out")}  # as a report reads it
    assert sorted(records.values()) == pytest.approx(sorted([first.value, second.value]))
    assert records[cell.name] == first.value == pytest.approx(first.params["loss"], rel=1e-3)


def test_a_trial_whose_cell_somebody_is_at_is_left_to_them(run, tmp_path, capsys):
    assert run(1) == 0
    search = Search(str(tmp_path / "search.yaml"), optuna)
    trial = study_of(tmp_path / "out").ask(search.space)
    folder = tmp_path / "out" / search.cell(trial.params).name
    folder.mkdir()
    with claimed(folder):
        assert run(2) == 0
    assert study_of(tmp_path / "out").trials[1].state == STATE.RUNNING and not (folder / "runs.jsonl").exists()
    assert "loss" in capsys.readouterr().out
    assert run(2) == 0 and study_of(tmp_path / "out").trials[1].state == STATE.COMPLETE


def test_a_cell_that_fails_is_a_failed_trial(run, tmp_path):
    assert run(2, options={**PLAIN["options"], "fails": "always"}) == 1
    assert [trial.state for trial in study_of(tmp_path / "out").trials] == [STATE.FAIL, STATE.FAIL]
    assert run(3) == 0  # they count


def test_a_search_that_has_changed_is_refused(run, tmp_path):
    assert run(1) == 0
    for changed in ({"axes": {"loss": {"low": 0.1, "high": 2.0}}}, {"minimise": "seconds"}, {"options": {"steps": 2}}):
        with pytest.raises(UserError, match="--output_dir"):
            run(2, **changed)
    assert run(1) == 0


def test_a_measure_that_nothing_measures_ends_the_search_at_once(run, tmp_path):
    with pytest.raises(UserError, match="minimise: loss=.* without held_out"):
        run(5, minimise="held_out")
    assert len(study_of(tmp_path / "out").trials) == 1


def test_a_stop_leaves_the_trial_to_the_next_start(run, tmp_path, monkeypatch):
    def stopped(worker, cell):
        worker.stopping = True
        return "failed"

    with monkeypatch.context() as patched:
        patched.setattr(Worker, "run", stopped)
        assert run(2) == 75
    assert [trial.state for trial in study_of(tmp_path / "out").trials] == [STATE.RUNNING]
    assert run(1) == 0 and len(study_of(tmp_path / "out").trials) == 1


# ---- the file ----


def test_a_cell_is_what_is_chosen_on_each_axis(write):
    axes = {
        "learning_rate": {"low": "1.0e-3", "high": 0.1, "log": True},
        "kron_a1": {"low": 1, "high": 8},
        "shape": [{"a": 2, "b": 32}, {"a": 8, "b": 8}],
        "subject": {"dog": {"photos": "x"}, "a cat": {}},
    }
    search = Search(write(axes=axes), optuna)
    assert search.space["learning_rate"] == optuna.distributions.FloatDistribution(1e-3, 0.1, log=True)
    assert search.space["kron_a1"] == optuna.distributions.IntDistribution(1, 8)
    assert search.space["shape"].choices == ("2-32", "8-8") and search.space["subject"].choices == ("dog", "a-cat")
    cell = search.cell({"learning_rate": 0.00123456, "kron_a1": 3, "shape": "8-8", "subject": "dog"})
    assert cell.name == "learning_rate=0.001235,kron_a1=3,shape=8-8,subject=dog"
    assert cell.options == {
        "steps": "1",
        "report_to": "none",
        "learning_rate": "0.001235",
        "kron_a1": "3",
        "a": "8",
        "b": "8",
        "photos": "x",
    }


@pytest.mark.parametrize(
    "entries, named",
    [
        ({"minimise": None}, "minimise or maximise"),
        ({"maximise": "dino"}, "minimise or maximise"),
        ({"minimise": "beauty"}, "minimise: beauty: .*held_out"),
        ({"axes": None}, "axes"),
        ({"axes": {"seed": 3}}, "axes: seed"),
        ({"axes": {"seed": []}}, "axes: seed"),
        ({"axes": {"rate": {"low": 1}}}, "axes: rate: .*high"),
        ({"axes": {"rate": {"low": 1, "high": "x"}}}, "axes: rate: .*x"),
        ({"axes": {"rate": {"low": 1, "high": 2, "step": 1}}}, "axes: rate"),
        ({"axes": {"rate": {"low": 0.0, "high": 2, "log": True}}}, "axes: rate"),
        ({"axes": {"rate": {"low": 3, "high": 2}}}, "axes: rate"),
        ({"axes": {"rate": {"low": "nan", "high": 2}}}, "axes: rate"),
        ({"axes": {"rate": {"low": 1, "high": 2, "log": "sometimes"}}}, "axes: rate: .*log"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_what_is_not_a_search_is_refused_by_name(run, tmp_path, entries, named):
    with pytest.raises(UserError, match=named):
        run(1, **entries)
    assert not (tmp_path / "out").exists()


def test_what_a_script_would_refuse_is_refused_before_anything_runs(run, tmp_path):
    script = {"script": "train_dreambooth_kronecker.py", "options": {"pretrained_model_name_or_path": "x"}}
    with pytest.raises(UserError, match="learning_rate=-1.*--learning_rate"):
        photos = {**script["options"], "instance_data_dir": "x", "instance_prompt": "x"}
        run(1, **{**script, "options": photos}, axes={"learning_rate": {"low": -1, "high": 0.1}})
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_the_command_that_installs_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="pip install optuna"):
        run(1)


def test_the_search_that_is_here_says_its_command_and_is_understood(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    path = "configs/sweeps/search.yaml"
    command = f"# python studies/search.py {path} --output_dir outputs/sweeps/search --trials 20\n"
    assert (ROOT / path).read_text().startswith(command)
    search = Search(path, optuna)
    cells = search.probes()
    assert all(check_cells(cells, tmp_path)) and search.measure == "dino" and cells[0].evaluate
    assert "--learning_rate=0.001" in train_command(cells[0], tmp_path)
