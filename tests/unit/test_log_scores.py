"""The scores of a cell in the trackers of its training, read back as the trackers' own programs read them."""

import json
import sys
from types import SimpleNamespace

import pytest
import wandb
import yaml
from tensorboard import context
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from dreambooth.report.trackers import finish_trackers, log_values, start_trackers
from studies import log_scores
from tests.synthetic_sweep import write_cell
from train_dreambooth_kronecker import Config


@pytest.fixture
def trained(tmp_path):
    """Return a function that writes a scored cell whose training logged to some trackers, and returns its folder."""

    def write(rate, dino, *trackers, runs=None, starts=1):
        folder = write_cell(tmp_path / "sweep", {"learning_rate": rate}, dino, rate)
        options = {
            "report_to": [*trackers],
            "logging_dir": "logs",
            "learning_rate": rate,
            "tracker_run_name": folder.name,
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(options))
        if runs:
            (folder / "trackers.json").write_text(json.dumps(runs))
        if "tensorboard" in trackers:
            same = {"output_dir": str(folder), "learning_rate": rate, "tracker_run_name": folder.name}
            config = Config(pretrained_model_name_or_path="base", instance_prompt="a dog", **same)
            for start in range(starts):
                accelerator = SimpleNamespace(log_with=["tensorboard"], logging_dir=str(folder / "logs"), trackers=[])
                start_trackers(accelerator, config, start)
                log_values(accelerator, {"loss": 0.5}, start + 1)
                finish_trackers(accelerator)
        return folder

    return write


def send(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["log_scores.py", str(folder)])
    log_scores.main()


def hparams_tab(logs) -> dict[str, tuple[float, dict[str, float]]]:
    """What TensorBoard's HPARAMS tab shows: {row: (its learning rate, {metric: value})}."""
    events = EventMultiplexer()
    events.AddRunsFromDirectory(str(logs))
    events.Reload()
    provider, request = MultiplexerDataProvider(events, str(logs)), context.RequestContext()
    hparams = backend_context.Context(base_plugin.TBContext(data_provider=provider, logdir=str(logs)))
    metrics = hparams.experiment_from_metadata(
        request, "", True, hparams.hparams_metadata(request, ""), hparams.hparams_from_data_provider(request, "", None)
    ).metric_infos
    asked = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=99,
        allowed_statuses=[0, 1, 2, 3],
        col_params=[{"metric": one.name} for one in metrics],
    )
    rows = list_session_groups.Handler(request, hparams, "", asked).run().session_groups
    return {
        row.name: (
            row.hparams["learning_rate"].number_value,
            {value.name.tag: value.value for value in row.metric_values},
        )
        for row in rows
    }


def test_tensorboard_shows_one_row_for_each_cell_with_options_and_scores(trained, tmp_path, monkeypatch):
    resumed, other = trained(0.01, 0.625, "tensorboard", starts=2), trained(0.02, 0.5, "tensorboard")
    for folder in (resumed, resumed, other):  # it may be done again
        send(folder, monkeypatch)
    rows = hparams_tab(tmp_path / "sweep")
    assert [row.partition("/")[0] for row in rows] == ["learning_rate=0.01", "learning_rate=0.02"]
    for (rate, metrics), (wanted, dino) in zip(rows.values(), [(0.01, 0.625), (0.02, 0.5)]):
        assert rate == pytest.approx(wanted) and metrics["scores/dino"] == dino and metrics["loss"] == 0.5
        assert metrics["scores/parameters"] > 13_000
    assert len(list(resumed.rglob("*.scores"))) == 1


def test_wandb_has_them_in_the_summary_of_the_same_run(trained, offline_wandb, monkeypatch):
    monkeypatch.delenv("WANDB_DIR")
    folder = trained(0.01, 0.625, "wandb", runs={"wandb": "a1b2c3d4"})
    send(folder, monkeypatch)
    wandb.teardown()  # its service then has written everything
    (file,) = (folder / "logs" / "wandb").glob("offline-run-*/run-*.wandb")
    assert file.name == "run-a1b2c3d4.wandb"
    assert b"scores/dino" in file.read_bytes() and b"0.625" in file.read_bytes()


def test_trackio_has_them_as_the_last_point_of_the_same_run(trained, monkeypatch):
    told = []
    run = SimpleNamespace(log=lambda scores, step: told.append((scores["scores/dino"], step)), finish=lambda: None)
    trackio = SimpleNamespace(init=lambda **keywords: told.append(keywords) or run)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    send(trained(0.01, 0.625, "trackio", runs={"trackio": "sunny-1"}), monkeypatch)
    assert told == [{"project": "dreambooth-kronecker", "name": "sunny-1", "resume": "must"}, (0.625, 60)]


def test_a_tracker_that_fails_is_a_warning(trained, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "trackio", None)  # not installed
    folder = trained(0.01, 0.625, "wandb", "trackio", "tensorboard", runs={"trackio": "sunny-1"})
    send(folder, monkeypatch)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2 and all("learning_rate=0.01" in warning for warning in warnings)
    assert "wandb" in warnings[0] and "trackers.json" in warnings[0] and "trackio" in warnings[1]
    assert list(folder.rglob("*.scores"))


def test_a_cell_without_trackers_or_without_scores_changes_nothing(trained, monkeypatch):
    folder = trained(0.01, 0.5, "none")
    before = sorted(folder.rglob("*"))
    send(folder, monkeypatch)
    assert sorted(folder.rglob("*")) == before
    (folder / "summary.json").unlink()
    with pytest.raises(ValueError, match="learning_rate=0.01 has no scores"):
        send(folder, monkeypatch)
