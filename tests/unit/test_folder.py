"""The output folder: who holds it, where a run in it starts, what is cleared."""

import os
import shutil
from pathlib import Path

import pytest

from dreambooth.errors import UserError
from dreambooth.kronecker import KRONECKER
from dreambooth.layout import LOCK_NAME
from dreambooth.output.folder import check_start, find_start, hold_folder, prepare_output
from dreambooth.output.result import result_step
from methods.dreambooth import DREAMBOOTH
from tests.faults.checkpoints import ALONE, Training, content, make_config


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs another process at once, by os.fork")


def save(output, *steps) -> list[Path]:
    training = Training(output)
    return [training.save(step) for step in steps]


# ---- the lock ----


@forks
def test_a_folder_that_is_held_says_by_whom_and_is_free_afterwards(output):
    with hold_folder(make_config(output), ALONE):
        child = os.fork()  # the lock is not inherited, so that a forked process is a stranger
        if not child:
            try:
                with hold_folder(make_config(output), ALONE):
                    os._exit(1)
            except UserError as error:
                os._exit(0 if f"(process {os.getppid()} on {os.uname().nodename})" in str(error) else 2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        (output / "kept").write_text("")
    assert os.listdir(output) == ["kept"]
    with hold_folder(make_config(output), ALONE):
        pass


@forks
def test_the_lock_of_a_dead_run_is_taken_over(output):
    child = os.fork()
    if not child:
        with hold_folder(make_config(output), ALONE):
            os._exit(0)
    os.waitpid(child, 0)
    assert (output / LOCK_NAME).exists()
    with hold_folder(make_config(output), ALONE):
        pass
    assert not (output / LOCK_NAME).exists()


def test_a_run_that_is_refused_leaves_no_folder_behind(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="no photos"), hold_folder(make_config(tmp_path / "mine" / "a" / "b"), ALONE):
        raise UserError("no photos")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_an_output_folder_that_is_a_file_is_refused(output):
    output.write_text("")
    with pytest.raises(UserError, match="is a file"), hold_folder(make_config(output), ALONE):
        pass


# ---- where a run starts ----


def test_where_a_run_starts(output):
    assert find_start(KRONECKER, make_config(output), ALONE) is None
    assert find_start(KRONECKER, make_config(output, resume_from_checkpoint="latest"), ALONE) is None
    first, second = save(output, 5, 10)
    assert find_start(KRONECKER, make_config(output, resume_from_checkpoint="latest"), ALONE) == second
    assert find_start(KRONECKER, make_config(output, resume_from_checkpoint=str(first)), ALONE) == first
    assert find_start(KRONECKER, make_config(output, resume_from_checkpoint="checkpoint-5"), ALONE) == first
    assert find_start(KRONECKER, make_config(output, overwrite_output_dir=True), ALONE) is None


def test_what_is_refused(output):
    with pytest.raises(UserError, match="checkpoint-7: there is no such checkpoint; .* holds: none"):
        find_start(KRONECKER, make_config(output, resume_from_checkpoint="checkpoint-7"), ALONE)
    (path,) = save(output, 5)
    with pytest.raises(UserError, match=r"results of another run \(checkpoint-5\).*--overwrite_output_dir"):
        find_start(KRONECKER, make_config(output), ALONE)
    with pytest.raises(UserError, match="holds: checkpoint-5"):
        find_start(KRONECKER, make_config(output, resume_from_checkpoint="checkpoint-7"), ALONE)
    (path / "run.json").unlink()
    with pytest.raises(UserError, match="checkpoint-5 is not a complete checkpoint: run.json"):
        find_start(KRONECKER, make_config(output, resume_from_checkpoint="checkpoint-5"), ALONE)
    with pytest.raises(UserError, match=r"results of another run \(checkpoint-5\)"):  # never begun anew over it
        find_start(KRONECKER, make_config(output, resume_from_checkpoint="latest"), ALONE)


# ---- what a resumed run may replace ----


def check(start, total_steps, output, **options):
    config = make_config(output, resume_from_checkpoint=str(start), **options)
    check_start(start, KRONECKER, total_steps, config, ALONE)


@pytest.fixture
def trained(output):
    """A run that saved at steps 2, 4 and 6, and whose result is that of step 6."""
    paths = save(output, 2, 4, 6)
    shutil.copy(paths[-1] / KRONECKER.weights_name, output)
    return paths


@pytest.mark.parametrize(
    "options, flag",
    [
        ({"max_train_steps": 5}, "--max_train_steps 5"),
        ({"num_train_epochs": 1}, "--num_train_epochs 1"),
        ({}, "--max_train_steps"),
    ],
)
def test_a_run_that_ends_before_its_checkpoint_is_refused(options, flag, output, trained):
    before = content(trained[-1])
    for overwrite in (False, True):
        with pytest.raises(UserError, match=rf"checkpoint-6 is at step 6, .* after 5 steps .*{flag}"):
            check(trained[-1], 5, output, overwrite_output_dir=overwrite, **options)
    assert content(trained[-1]) == before


def test_the_step_of_a_checkpoint_is_the_one_inside(output, trained):
    renamed = trained[-1].rename(output / "checkpoint-2-best")
    with pytest.raises(UserError, match="checkpoint-2-best is at step 6"):
        check(renamed, 5, output)
    prepare_output(KRONECKER, make_config(output), renamed, ALONE)


def test_a_run_that_is_done_says_so(output, trained, caplog):
    caplog.set_level("INFO")
    check(trained[-1], 6, output)
    assert "checkpoint-6 is at step 6" in caplog.text and "already trained" in caplog.text


def test_going_back_is_told_and_replaces_only_what_comes_out_the_same(output, trained, caplog):
    check(trained[-1], 8, output)
    assert not caplog.text
    check(trained[0], 6, output)
    assert "checkpoint-2 is at step 2" in caplog.text and "replace checkpoint-4, checkpoint-6" in caplog.text
    with pytest.raises(UserError, match=r"\(checkpoint-4, checkpoint-6\).*--overwrite_output_dir"):
        check(trained[0], 6, output, allow_config_change=True)
    with pytest.raises(UserError, match=rf"--max_train_steps 4\).*\({KRONECKER.weights_name} of step 6\)"):
        check(trained[0], 4, output, max_train_steps=4)
    check(trained[0], 4, output, allow_config_change=True, overwrite_output_dir=True)


def test_latest_does_not_replace_a_result_of_more_steps(output, trained):
    shutil.rmtree(trained[-1])
    config = make_config(output, resume_from_checkpoint="latest")
    check_start(trained[1], KRONECKER, 6, config, ALONE)
    with pytest.raises(UserError, match="of step 6"):
        check_start(trained[1], KRONECKER, 5, config, ALONE)


def test_a_run_from_elsewhere_does_not_replace_what_is_there(output, trained, tmp_path):
    check(trained[0], 9, tmp_path / "new")
    (elsewhere,) = save(tmp_path / "other", 1)
    with pytest.raises(UserError, match=f"checkpoint-2, .*{KRONECKER.weights_name} of step 6"):
        check(elsewhere, 9, output)


# ---- what is cleared ----


def make(output, *names):
    (output / "samples").mkdir(parents=True, exist_ok=True)
    for name in names:
        (output / name).write_text("")


def test_overwriting_clears_an_earlier_run_and_keeps_other_files(output):
    save(output, 5)
    sheets = ("samples/step-000005.png", "samples/step-000000.png", "samples/mine.png")
    make(output, KRONECKER.weights_name, "notes.txt", *sheets)
    prepare_output(KRONECKER, make_config(output, overwrite_output_dir=True), None, ALONE)
    assert sorted(os.listdir(output)) == ["config.yaml", "notes.txt", "samples"]
    assert os.listdir(output / "samples") == ["mine.png"]


def test_a_result_that_is_a_folder_is_another_run_s_too_and_is_cleared_with_its_copy(output):
    folders = ("pipeline/unet", ".pipeline.1-abc.tmp/unet")
    for name in folders:
        (output / name).mkdir(parents=True)
        make(output, f"{name}/config.json")
    make(output, "pipeline.safetensors", "notes.txt")
    (output / "pipeline" / "training.json").write_text('{"step": "6"}')
    assert result_step(output / "pipeline") == 6 and result_step(output / ".pipeline.1-abc.tmp") == 0
    with pytest.raises(UserError, match=r"\(pipeline, pipeline.safetensors\).*--overwrite_output_dir"):
        find_start(DREAMBOOTH, make_config(output), ALONE)
    prepare_output(DREAMBOOTH, make_config(output, overwrite_output_dir=True), None, ALONE)
    assert sorted(os.listdir(output)) == ["config.yaml", "notes.txt", "samples"]


def test_going_back_with_overwriting_clears_what_does_not_lead_there(output, trained, tmp_path):
    for start, left in ((trained[1], ["checkpoint-2", "checkpoint-4", "config.yaml"]), (tmp_path, ["config.yaml"])):
        if start == tmp_path:
            (start,) = save(tmp_path / "other", 1)
        prepare_output(KRONECKER, make_config(output, overwrite_output_dir=True), start, ALONE)
        assert sorted(os.listdir(output)) == left


def test_resuming_clears_what_comes_later_and_what_was_cut_off(output):
    save(output, 3, 4, 5)
    (output / "checkpoint-6.tmp").mkdir()
    make(output, *(f"samples/step-00000{step}.png" for step in (0, 5, 6)))
    config = make_config(output, overwrite_output_dir=True, checkpoints_total_limit=2)
    prepare_output(KRONECKER, config, output / "checkpoint-5", ALONE)
    assert sorted(os.listdir(output)) == ["checkpoint-4", "checkpoint-5", "config.yaml", "samples"]
    assert sorted(os.listdir(output / "samples")) == ["step-000000.png", "step-000005.png"]
