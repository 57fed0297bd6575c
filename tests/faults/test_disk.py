"""Disks that are full or read-only when a run saves, and folders that vanish."""

import pytest

from tests.faults import child

# bytes; the adapter of these runs has 63,000 and the training state 134,000
FULL_FOR_THE_STATE, FULL_FOR_ALL = 100_000, 10_000


@pytest.mark.parametrize("limit", [FULL_FOR_THE_STATE, FULL_FOR_ALL])
def test_where_a_checkpoint_cannot_be_written_the_run_stops_and_the_last_one_stays(limit, start_run):
    run = start_run()
    code, said = run.run(child.after_step, 3, child.limit_file_size, limit)
    assert code == 74 and run.checkpoints == ["checkpoint-2"]
    assert "error: out/checkpoint-4 could not be saved: " in said and "File too large" in said
    assert "MiB are free in " in said and "checkpoint-2 is still there, to resume from with --resume_from" in said
    assert "Traceback" not in said
    uninterrupted = start_run("uninterrupted")
    assert uninterrupted.run()[0] == run.run()[0] == 0
    assert run.results() == uninterrupted.results()


def test_a_run_can_go_on_without_its_checkpoints(start_run):
    run = start_run(on_save_error="continue")
    code, said = run.run(child.after_step, 3, child.limit_file_size, FULL_FOR_THE_STATE)
    assert code == 0 and run.checkpoints == ["checkpoint-2"], said
    assert said.count("(--on_save_error continue)") == 2
    assert "Trained 9,024 parameters" in said


def test_a_result_that_cannot_be_written_ends_in_an_error_and_the_checkpoint_stays(start_run):
    run = start_run(checkpointing_steps=5, on_save_error="continue")
    code, said = run.run(child.after_step, 6, child.limit_file_size, FULL_FOR_ALL)
    assert code == 74 and run.checkpoints == ["checkpoint-5"]
    assert "error: out/pytorch_kronecker_weights.safetensors could not be saved: " in said
    assert "Trained" not in said
    assert run.run()[0] == 0


def test_permissions_that_are_revoked_while_training(start_run):
    run = start_run()
    code, said = run.run(child.after_step, 3, child.revoke_permissions, str(run.output))
    run.output.chmod(0o755)
    assert code == 74 and run.checkpoints == ["checkpoint-2"]
    assert "error: out/checkpoint-4 could not be saved: [Errno 13] Permission denied" in said
    assert run.run()[0] == 0


def test_a_disk_without_room_for_a_checkpoint_is_told_before_training(start_run):
    run = start_run()
    code, said = run.run(child.have_free, 100_000)
    assert code == 74 and "Training:" not in said
    assert "error: --output_dir out has 0 MiB free; a checkpoint and the result need 0 MiB. " in said
    assert run.run(child.have_free, 200_000)[0] == 0


def test_an_output_folder_that_cannot_be_made_is_refused(start_run):
    run = start_run(output_dir="file/out")
    (run.folder / "file").write_text("")
    code, said = run.run()
    assert code == 2 and "error: --output_dir file/out cannot be created: [Errno 20] Not a directory" in said
