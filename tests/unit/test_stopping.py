"""How long a run may take, and when it is to stop."""

import re
import signal
from types import SimpleNamespace

import pytest
import torch

from dreambooth.errors import UserError
from dreambooth.runtime.stopping import Stop
from tests.faults.checkpoints import ALONE, make_config


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("3h", 10800), ("90m", 5400), ("45s", 45), ("1h30m", 5400), ("1h 30m", 5400), ("1.5H", 5400), ("2d", 172800),
        ("1:30:00", 5400), ("0:00:10", 10), ("1-12:00:00", 129600),
    ],
)  # fmt: skip
def test_times_as_people_write_them(text, seconds, tmp_path):
    assert make_config(tmp_path, max_train_time=text).time_limit() == seconds


@pytest.mark.parametrize(
    "text", ["", " ", "3", "h", "3x", "30m1h", "-1h", "0s", "0:00:00", "1:30", "1:5:00", "nan", "."]
)
def test_what_is_no_time_is_refused(text, tmp_path):
    with pytest.raises(UserError, match=f"--max_train_time {re.escape(text)}: .*3h, 90m"):
        make_config(tmp_path, max_train_time=text).time_limit()


def test_a_run_stops_when_its_time_is_up(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stop = Stop(make_config(tmp_path, max_train_time="10s"), ALONE)
    now = 109.9
    assert not stop.asked()
    now = 110.0
    assert stop.asked()


def test_one_process_that_is_told_to_stop_stops_all(tmp_path):
    def reduce(mine, how):
        assert how == "mean"
        return (mine + others) / 2

    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"), reduce=reduce, is_local_main_process=True)
    stop = Stop(make_config(tmp_path), two)
    others = 0
    assert not stop.asked()
    others = 1
    assert stop.asked()


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with Stop(make_config(tmp_path), ALONE):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
