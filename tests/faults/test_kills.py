"""Killed with SIGKILL at any moment and resumed, a run ends with the bytes of one that was never interrupted."""

import itertools
import os
import random
import shutil
import signal
import time

import pytest

from dreambooth.output.checkpoint import latest_checkpoint
from tests.faults import child
from tests.faults.checkpoints import Training, content

# Between them: shuffling, crops, flips, captions and their dropout, accumulation, class images, samples, schedules
SCENARIOS = {
    "class images": {
        "with_prior_preservation": True,
        "class_data_dir": "class",
        "class_prompt": "a photo of dog",
        "num_class_images": 4,
        "sample_batch_size": 1,
        "prior_num_inference_steps": 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
    },
    "text encoder": {
        "train_text_encoder": True,
        "optimizer": "ScheduleFreeAdamW",
        "train_batch_size": 2,
        "aspect_ratio_buckets": True,
        "cache_latents_to_disk": "latents",
        "save_precision": "fp16",
    },
}
COMMON = {
    "random_flip": True,
    "caption_dropout_probability": 0.3,
    "checkpoints_total_limit": 2,
    "validation_prompt": "sks dog",
    "validation_steps": 2,
    "num_validation_images": 1,
    "validation_num_inference_steps": 2,
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_at_random_and_resumed_a_run_ends_with_the_same_bytes(scenario, start_run, request):
    kills, seed = request.config.getoption("--kills"), request.config.getoption("--kill_seed")
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    print(f"--kill_seed {seed}")  # pytest shows it where the test fails
    chance = random.Random(f"{scenario} {seed}")

    uninterrupted = start_run("uninterrupted", **COMMON, **SCENARIOS[scenario])
    began = time.monotonic()
    assert uninterrupted.run()[0] == 0, uninterrupted.said
    duration = time.monotonic() - began
    assert uninterrupted.checkpoints == ["checkpoint-4", "checkpoint-6"]

    killed = finished = 0
    while killed < kills or not finished:
        run = start_run(f"run-{finished}", **COMMON, **SCENARIOS[scenario])
        while True:
            began = time.monotonic()
            process = run.start(child.scramble_random_numbers)
            process.join(chance.uniform(0, duration) if killed < kills else None)
            if process.exitcode is None:
                process.kill()
                process.join()
                killed += 1
                continue
            assert process.exitcode == 0, run.said
            duration = min(duration, time.monotonic() - began)  # the first start may have been slow for other reasons
            break
        assert run.results() == uninterrupted.results()
        finished += 1


def test_killed_before_any_change_on_the_disk_a_save_loses_no_checkpoint(tmp_path):
    """Every file opened for writing, renamed or removed while the second checkpoint is saved: one kill each."""
    training = Training(tmp_path / "out", checkpoints_total_limit=1)
    first = training.save(1)
    training.step()
    expected = {first.name: content(first)}
    expected["checkpoint-2"] = content(training.save(2))
    output = first.parent
    for number in itertools.count(1):
        shutil.rmtree(output)
        output.mkdir()
        write(first, expected["checkpoint-1"])
        child_process = os.fork()
        if not child_process:
            child.kill_at_change(number, str(output))
            training.save(2)
            os._exit(0)
        _, status = os.waitpid(child_process, 0)
        if os.WIFEXITED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        newest = latest_checkpoint(output)
        assert content(newest) == expected[newest.name]
        training.save(2)
        assert {path.name: content(path) for path in output.iterdir()} == {"checkpoint-2": expected["checkpoint-2"]}
    assert os.WEXITSTATUS(status) == 0 and number > 10, "the kills have to reach every change"


def write(folder, files):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
