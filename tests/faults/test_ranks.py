"""Processes that train together: what one is told or cannot do, all learn; if one dies, none waits for it in vain."""

import os
import re
import shutil
import signal
import socket
import time
from functools import partial

import pytest
import torch

from tests.conftest import assert_same, factors, launch, metrics
from tests.faults import child


@pytest.fixture
def run_ranks():
    """Run processes as Slurm's srun starts them; return their exit codes and what they said."""

    def run_ranks(run, act=None, *arguments, ranks=2, acting=1, split=False, **options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        said = len(run.said)
        processes = [
            run.start(
                child.join, rank, ranks, port, split, *((act, *arguments) if act and rank == acting else ()), **options
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.join(300)  # on a busy machine a start alone takes minutes; one that waits in vain, 30
        assert all(process.exitcode is not None for process in processes), f"a process hangs:\n{run.said[said:]}"
        assert_no_orphans(processes)
        return [process.exitcode for process in processes], run.said[said:]

    return run_ranks


def assert_no_orphans(processes) -> None:
    """Each has a process group of its own; the workers of one that was killed look every 5 s whether it is there."""
    groups, end = {process.pid for process in processes}, time.monotonic() + 120
    while groups:
        assert time.monotonic() < end, "a process of a run that has ended is still there"
        try:
            os.killpg(min(groups), 0)
            time.sleep(0.1)
        except ProcessLookupError:
            groups.remove(min(groups))


@pytest.mark.parametrize("split", [False, True])
def test_one_dies_both_end_one_is_told_to_stop_both_stop_and_they_resume_exactly(split, run_ranks, start_run):
    run_ranks = partial(run_ranks, split=split)
    run, uninterrupted = start_run(), start_run("uninterrupted")
    codes, said = run_ranks(run, child.after_step, 3, child.signal_oneself, signal.SIGKILL, dataloader_num_workers=1)
    assert codes == [69, -signal.SIGKILL] and run.checkpoints == ["checkpoint-2"], said
    assert re.search("error: another process of this run has ended .*\n.*--resume_from_checkpoint latest", said)
    assert "Traceback" not in said
    codes, said = run_ranks(run, child.after_step, 5, child.signal_oneself, signal.SIGUSR1)
    assert codes == [75, 75] and run.checkpoints == ["checkpoint-2", "checkpoint-4", "checkpoint-5"], said
    assert "Another process: stopped after step 5" in said
    assert run_ranks(run)[0] == run_ranks(uninterrupted)[0] == [0, 0]
    ours, theirs = run.results(), uninterrupted.results()
    differing = [name for name in theirs if ours[name] != theirs[name]]
    assert all(name.startswith("checkpoint-2/") for name in differing)  # its config.yaml tells of the loader's worker


def test_under_the_launcher_all_end_when_one_dies(options):
    """The launcher's pipes are inherited: as long as any process of the run is there, launch() does not return."""
    several = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    result = launch(*several, "--module", "tests.faults.dying_rank", **{**options, "max_train_steps": 1000})
    assert result.returncode == 1
    assert "another process of this run has ended" in result.stderr
    assert "Signal 9 (SIGKILL) received" in result.stderr  # the launcher's own report, which names the one that died


def test_what_the_main_process_refuses_and_cannot_save_ends_both(run_ranks, start_run):
    run = start_run(max_train_steps=4)
    codes, said = run_ranks(run, child.after_step, 1, child.limit_file_size, 10_000, acting=0)
    assert codes == [74, 74] and not run.checkpoints, said
    assert run_ranks(run)[0] == [0, 0]
    codes, said = run_ranks(run, seed=1)
    assert codes == [2, 2] and "was trained with other options" in said


def test_photos_that_one_process_sees_otherwise_are_refused(run_ranks, start_run, dog_photos):
    """As on machines that do not share their folders."""
    codes, said = run_ranks(start_run(), child.add_flags, "--instance_data_dir", str(dog_photos))
    assert codes == [69, 2] and re.search("process 1 sees other photos .* instance photo 0.png", said)


def seen(run, ranks: int, num_instances: int) -> list[list[torch.Tensor]]:
    """Latents, noise and timesteps of each step, its instance rows first, whichever process had them."""
    forwards = [torch.load(run.folder / f"seen-{rank}.pt") for rank in range(ranks)]
    return [
        [
            torch.cat([rows[:num_instances] for rows in kind] + [rows[num_instances:] for rows in kind])
            for kind in zip(*step)
        ]
        for step in zip(*forwards)
    ]


def test_runs_on_other_numbers_of_processes_are_the_same_run(run_ranks, start_run):
    """Class images drawn by three of which one dies; a run of two; its checkpoint resumed by one and by three."""
    prior = {"with_prior_preservation": True, "class_data_dir": "class", "class_prompt": "a photo of dog"}
    drawing = {"num_class_images": 5, "sample_batch_size": 1, "prior_num_inference_steps": 2}
    common = {**prior, **drawing, "max_train_steps": 4, "gradient_accumulation_steps": 1}
    two = start_run("two", **common, train_batch_size=3)
    kill = (child.between_class_images, child.signal_oneself, signal.SIGKILL)
    codes, said = run_ranks(two, *kill, ranks=3, acting=0, train_batch_size=2)
    assert codes == [-signal.SIGKILL, 69, 69], said
    before = {path.name: path.stat().st_mtime_ns for path in (two.folder / "class").glob("*.png")}
    assert sorted(before) == [f"class-{number:06d}.png" for number in (0, 1, 2, 4)]  # number 3 was the dead one's

    assert run_ranks(two)[0] == [0, 0], two.said
    after = {path.name: path for path in (two.folder / "class").glob("*.png")}
    assert before.items() <= {name: path.stat().st_mtime_ns for name, path in after.items()}.items()
    assert len({path.read_bytes() for path in after.values()}) == len(after) == 5

    then, now = factors(two.output / "checkpoint-2"), factors(two.output)
    assert max((now[name] - then[name]).abs().max() for name in now) > 1e-4  # what the comparisons below can see
    for ranks in (1, 3):
        other = start_run(f"{ranks} processes", **common, train_batch_size=6 // ranks)
        for path in ("class", "out/checkpoint-2"):
            shutil.copytree(two.folder / path, other.folder / path)
        shutil.copy(two.output / "metrics.jsonl", other.output)
        codes, said = run_ranks(other, ranks=ranks)
        assert codes == [0] * ranks, said
        assert_same(factors(other.output), factors(two.output), tolerance=1e-5)
        for ours, theirs in zip(metrics(other.output), metrics(two.output), strict=True):
            assert {**ours, "step_time": 0} == pytest.approx({**theirs, "step_time": 0}, rel=1e-4)
        whole = seen(two, 2, num_instances=3)[2:]
        for ours, theirs in zip(seen(other, ranks, num_instances=6 // ranks), whole, strict=True):
            torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=0)
            assert all(torch.equal(mine, yours) for mine, yours in zip(ours[1:], theirs[1:]))

    code, said = two.run(train_batch_size=3)
    assert code == 2 and re.search(r"global batch \(devices x accumulation x train_batch_size\) +6 +3$", said, re.M), (
        said
    )
