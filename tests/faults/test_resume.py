"""A resumed run is the same run, or it is refused with the difference."""

import pytest

from dreambooth.kronecker import KRONECKER


@pytest.fixture
def run(start_run):
    run = start_run(max_train_steps=2)
    assert run.run()[0] == 0
    return run


def test_other_options_are_refused_with_the_difference(run, tiny_sd):
    before = run.results()
    code, said = run.run(learning_rate=1e-3, seed=1, gradient_accumulation_steps=2, max_train_steps=4)
    assert code == 2 and "Loading pipeline" not in said
    rows = [line.split() for line in said.partition("would change the result:")[2].splitlines()]
    assert ["then", "now"] in rows and ["seed", "0", "1"] in rows and ["learning_rate", "0.0005", "0.001"] in rows
    assert ["global", "batch", "(devices", "x", "accumulation", "x", "train_batch_size)", "1", "2"] in rows
    assert "--allow_config_change" in said
    code, said = run.run(max_train_steps=1)
    assert code == 2 and "Loading pipeline" not in said
    assert "--resume_from_checkpoint out/checkpoint-2 is at step 2" in said and "--max_train_steps 1" in said
    assert run.results() == before


def test_a_run_that_is_done_is_done_again_without_training(run):
    before = run.results()
    (run.output / KRONECKER.weights_name).unlink()  # as if it had been killed before that was written
    code, said = run.run()
    assert code == 0 and "already trained" in said and "for 0 steps" in said
    assert run.results() == before


def test_allowed_changes_take_effect(run):
    code, said = run.run(learning_rate=1e-3, max_train_steps=4, allow_config_change=True)
    assert code == 0 and "was trained with other options" in said
    assert [row["learning_rate"] for row in run.results()["metrics.jsonl"]] == [5e-4, 5e-4, 1e-3, 1e-3]


def test_a_run_can_be_made_longer_and_move(run, start_run):
    longer = start_run("longer", max_train_steps=4)
    assert longer.run()[0] == 0
    moved = run.output.rename(run.folder / "moved")
    code, said = run.run(output_dir="moved", max_train_steps=4, checkpointing_steps=4, validation_prompt="sks")
    assert code == 0 and "other options" not in said
    state = "checkpoint-4/training_state.safetensors"
    assert (moved / state).read_bytes() == longer.results()[state]


def test_the_same_global_batch_may_be_split_otherwise(start_run):
    run = start_run(max_train_steps=2, train_batch_size=2)
    assert run.run()[0] == 0
    assert run.run(max_train_steps=4, train_batch_size=1, gradient_accumulation_steps=2)[0] == 0
