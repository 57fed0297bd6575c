"""Told to stop, a run saves after the step and ends with code 75; the same command continues it."""

import signal
import time

import pytest

from tests.faults import child

CLASS_IMAGES = {
    "with_prior_preservation": True,
    "class_data_dir": "class",
    "class_prompt": "a photo of dog",
    "num_class_images": 3,
    "sample_batch_size": 1,
    "prior_num_inference_steps": 2,
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(number, start_run):
    run = start_run(max_train_steps=4, checkpointing_steps=100)
    code, said = run.run(child.after_step, 2, child.signal_oneself, number)
    assert code == 75 and run.checkpoints == ["checkpoint-2"]
    assert f"{number.name}: saving after this step" in said
    assert f"{number.name}: stopped after step 2, which is saved. The same command with --resume_from" in said
    if number is signal.SIGTERM:
        uninterrupted = start_run("uninterrupted", max_train_steps=4, checkpointing_steps=100)
        assert uninterrupted.run()[0] == run.run()[0] == 0
        again = {name: data for name, data in run.results().items() if not name.startswith("checkpoint-")}
        assert again == uninterrupted.results()


def test_a_second_signal_leaves_at_once_and_an_echo_of_the_first_does_not(start_run):
    """Launchers pass on what the terminal has already sent to all."""
    run = start_run(checkpointing_steps=1)
    began = time.monotonic()
    code, _ = run.run(child.after_step, 2, child.signal_oneself, signal.SIGTERM, signal.SIGTERM, 1.5)
    assert code == -signal.SIGTERM and run.checkpoints == ["checkpoint-1"]
    assert time.monotonic() - began < 60, "the step went on"
    code, _ = run.run(child.after_step, 2, child.signal_oneself, signal.SIGINT, signal.SIGINT, 0.1, 0.5)
    assert code == 75 and run.checkpoints == ["checkpoint-1", "checkpoint-2"]


def test_stopped_while_class_images_are_drawn_it_keeps_them_and_draws_the_rest(start_run):
    run = start_run(max_train_steps=1, **CLASS_IMAGES)
    code, said = run.run(child.between_class_images, child.signal_oneself, signal.SIGTERM)
    drawn = {path.name: path.stat().st_mtime_ns for path in (run.folder / "class").glob("*.png")}
    assert code == 75 and list(drawn) == ["class-000000.png"]
    assert "SIGTERM before training began; what was drawn or encoded is kept" in said
    code, said = run.run()
    assert code == 0 and "Drawing 2 class images" in said
    assert (run.folder / "class" / "class-000000.png").stat().st_mtime_ns == drawn["class-000000.png"]


def test_the_time_limit_ends_the_run_like_a_signal(start_run):
    run = start_run(checkpointing_steps=100, max_train_time="0.01s")
    code, said = run.run()
    assert code == 75 and run.checkpoints == ["checkpoint-1"]
    assert "--max_train_time: stopped after step 1, which is saved" in said
    assert run.run(max_train_time="1h")[0] == 0
