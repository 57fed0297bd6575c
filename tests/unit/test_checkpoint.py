"""Checkpoints on disk: nested state in safetensors and JSON, which one is the latest, what is refused."""

import json

import pytest
import torch

from dreambooth.checkpoint import STATE_NAME, WEIGHTS_NAME, _join, _split, find_start, list_checkpoints, prepare_output
from dreambooth.config import TrainingConfig, UserError


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def config(output):
    def make(**options) -> TrainingConfig:
        return TrainingConfig(
            pretrained_model_name_or_path="base",
            instance_data_dir="photos",
            instance_prompt="sks",
            output_dir=str(output),
            **options,
        )

    return make


def make_checkpoint(output, step, whole=True):
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    if whole:
        (folder / STATE_NAME).write_text("{}")
    return folder


def test_an_optimizer_s_state_goes_through_json_and_tensors_unchanged():
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    tensors, rest = _split({"optimizer": optimizer.state_dict(), "step": 3, "none": None})
    state = _join(tensors, json.loads(json.dumps(rest)))
    other = torch.optim.AdamW([torch.nn.Parameter(parameter.detach().clone())], lr=7)
    other.load_state_dict(state["optimizer"])
    assert other.param_groups[0]["lr"] == 0.1 and (state["step"], state["none"]) == (3, None)
    for name, value in optimizer.state[parameter].items():
        assert torch.equal(other.state[other.param_groups[0]["params"][0]][name], value)


def test_checkpoints_are_ordered_by_step_and_unfinished_ones_do_not_count(output):
    for step in (1000, 9, 200):
        make_checkpoint(output, step)
    make_checkpoint(output, 2000, whole=False)
    make_checkpoint(output, "3000.tmp")
    make_checkpoint(output, "best")
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-9", "checkpoint-200", "checkpoint-1000"]


def test_where_a_run_starts(output, config):
    assert find_start(config()) is None
    assert find_start(config(resume_from_checkpoint="latest")) is None
    first, second = make_checkpoint(output, 5), make_checkpoint(output, 10)
    assert find_start(config(resume_from_checkpoint="latest")) == second
    assert find_start(config(resume_from_checkpoint=str(first))) == first
    assert find_start(config(resume_from_checkpoint="checkpoint-5")) == first
    assert find_start(config(overwrite_output_dir=True)) is None


def test_what_is_refused(output, config):
    with pytest.raises(UserError, match="checkpoint-7: there is no such checkpoint; .* holds: none"):
        find_start(config(resume_from_checkpoint="checkpoint-7"))
    make_checkpoint(output, 5)
    with pytest.raises(UserError, match=r"results of another run \(checkpoint-5\).*--overwrite_output_dir"):
        find_start(config())
    with pytest.raises(UserError, match="holds: checkpoint-5"):
        find_start(config(resume_from_checkpoint="checkpoint-7"))


def test_an_output_folder_that_is_a_file_is_refused(output, config):
    output.write_text("")
    with pytest.raises(UserError, match="is a file"):
        find_start(config())


class MainProcess:
    is_main_process = True


def test_overwriting_clears_an_earlier_run_and_keeps_other_files(output, config):
    make_checkpoint(output, 5)
    (output / "samples").mkdir()
    for name in (WEIGHTS_NAME, "notes.txt", "samples/step-000005.png"):
        (output / name).write_text("")
    prepare_output(config(overwrite_output_dir=True), None, MainProcess())
    assert sorted(path.name for path in output.iterdir()) == ["config.yaml", "notes.txt"]


def test_resuming_clears_nothing(output, config):
    start = make_checkpoint(output, 5)
    prepare_output(config(overwrite_output_dir=True), start, MainProcess())
    assert start.exists()
