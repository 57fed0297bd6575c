"""A sweep of wandb: what its agent makes of configs/sweeps/wandb.yaml is a run of ours. No server is asked."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from dreambooth.options.parsing import read_options
from tests.conftest import ROOT
from train_dreambooth_kronecker import Config

SWEEP = yaml.safe_load((ROOT / "configs" / "sweeps" / "wandb.yaml").read_text())
RUN = "abcd1234"


@pytest.fixture
def agent(tmp_path, monkeypatch):
    """Return a function that has wandb's agent start a run, and returns its command and its environment."""
    from wandb import wandb_agent

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.environ", {**os.environ, "WANDB_SWEEP_ID": "s1", "WANDB_MODE": "offline"})
    started = []

    def process(command, env, **_):
        started.append((command, env))
        return SimpleNamespace()

    monkeypatch.setattr(wandb_agent, "AgentProcess", process)

    def start(run, **parameters):
        agent = wandb_agent.Agent(api=None, queue=None, sweep_id="s1")
        agent._sweep_command = [*SWEEP["command"]]
        arguments = {name: {"value": value} for name, value in parameters.items()}
        agent._command_run({"run_id": run, "program": str(ROOT / SWEEP["program"]), "args": arguments})
        return started[-1]

    return start


def suggested() -> dict:
    """The parameters of a run, as the server suggests them."""
    found = {name: entry.get("value", entry.get("min")) for name, entry in SWEEP["parameters"].items()}
    return {**found, "kron_a1": 2, "kron_a2": 32}


def options_of(command) -> Config:
    """What our parser reads of a command of the agent, which starts bash."""
    assert command[:2] == ["bash", "-c"] and command[4:6] == ["python", str(ROOT / SWEEP["program"])]
    return read_options(Config, None, command[6:])


def test_the_agent_s_command_means_what_the_sweep_says(agent):
    command, _ = agent(RUN, **suggested())
    config = options_of(command)
    assert config.report_to == ["wandb"] and config.score_checkpoints and config.center_crop
    assert (config.learning_rate, config.kron_a1, config.kron_a2) == (0.001, 2, 32)


@pytest.mark.parametrize(
    "name, value",
    [
        ("learning_rate", 1.5e-05),
        ("random_flip", False),
        ("random_flip", True),
        ("kron_targets", ["to_q", "to_k"]),
        ("validation_prompt", ["a dog's bone", 'a "dog", again']),
        ("snr_gamma", None),
        ("lr_power", -0.5),
    ],
)
def test_every_kind_of_value_arrives(agent, name, value):
    command, _ = agent(RUN, **{**suggested(), name: value})
    assert getattr(options_of(command), name) == value


def test_the_metric_is_logged_and_every_parameter_is_an_option():
    from dreambooth.output.best import LOSS

    assert SWEEP["metric"] == {"name": LOSS, "goal": "minimize"}
    assert SWEEP["parameters"].keys() <= Config.__dataclass_fields__.keys()


def test_a_run_of_the_agent_trains_in_a_folder_of_its_own(agent, tmp_path):
    tiny = {
        "pretrained_model_name_or_path": str(ROOT / "toyworld/models/sd"),
        "instance_data_dir": str(ROOT / "toyworld/photos/dog"),
        "max_train_steps": 2,
        "train_batch_size": 1,
        "reference_dir": None,
        "holdout": 1,
    }
    command, environment = agent(RUN, **{**suggested(), **tiny})
    environment["PATH"] = f"{Path(os.sys.executable).parent}:{environment['PATH']}"
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    folder = tmp_path / "outputs" / "sweeps" / "wandb" / RUN
    assert yaml.safe_load((folder / "config.yaml").read_text())["learning_rate"] == 0.001
    assert json.loads((folder / "trackers.json").read_text()) == {"wandb": RUN}
    (file,) = (tmp_path / "wandb").glob(f"offline-run-*/run-{RUN}.wandb")
    assert b"held_out_loss" in file.read_bytes()
