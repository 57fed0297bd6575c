"""Two processes that train together: what one is told or cannot do, both learn, and neither hangs."""

import signal
import socket

import pytest

from tests.faults import child


@pytest.fixture
def run_two(start_run):
    """Run two processes as Slurm's srun starts them; return their exit codes and what they said."""

    def run_two(run, act=None, *arguments, acting=1, **options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        said = len(run.said)
        processes = [
            run.start(child.join, rank, port, *((act, *arguments) if act and rank == acting else ()), **options)
            for rank in (0, 1)
        ]
        for process in processes:
            process.join(100)
        assert all(process.exitcode is not None for process in processes), f"a process hangs:\n{run.said[said:]}"
        return [process.exitcode for process in processes], run.said[said:]

    return run_two


def test_a_signal_to_one_stops_both_after_the_same_step_and_they_resume_exactly(run_two, start_run):
    run, uninterrupted = start_run(max_train_steps=4), start_run("uninterrupted", max_train_steps=4)
    codes, said = run_two(run, child.after_step, 3, child.signal_oneself, signal.SIGUSR1)
    assert codes == [75, 75] and run.checkpoints == ["checkpoint-2", "checkpoint-3"], said
    assert "Another process: stopped after step 3" in said
    assert run_two(run)[0] == run_two(uninterrupted)[0] == [0, 0]
    ours, theirs = run.results(), uninterrupted.results()
    assert all(ours[name] == theirs[name] for name in theirs)


def test_what_the_main_process_refuses_and_cannot_save_ends_both(run_two, start_run):
    run = start_run(max_train_steps=4)
    codes, said = run_two(run, child.after_step, 1, child.limit_file_size, 10_000, acting=0)
    assert codes == [74, 74] and not run.checkpoints, said
    assert run_two(run)[0] == [0, 0]
    codes, said = run_two(run, seed=1)
    assert codes == [2, 2] and "was trained with other options" in said
