"""Two runs in one output folder: the second is refused, until the first has ended, however it did."""

import time

from tests.faults import child


def test_a_second_run_is_refused_while_the_first_lives_and_not_after_it_is_killed(start_run):
    run, reached = start_run(max_train_steps=3, dataloader_num_workers=1), start_run("other").folder / "reached"
    first = run.start(child.after_step, 2, child.stay, str(reached))
    while not reached.exists():
        assert first.is_alive(), run.said
        time.sleep(0.05)
    before = run.results()
    code, said = run.run()
    assert code == 2
    assert f"error: --output_dir out is in use by another run (process {first.pid} on " in said
    assert run.results() == before
    first.kill()
    first.join()
    assert run.run()[0] == 0
    assert not (run.output / ".lock").exists()
