"""OUTPUT_DIR/best: which result it is, and when it goes."""

from types import SimpleNamespace

import pytest

from dreambooth.layout import checkpoint_path
from dreambooth.output.best import drop_best, keep_best, read_best

NAME = "weights.safetensors"


@pytest.fixture
def output(tmp_path):
    for step in (2, 4, 6):
        checkpoint_path(tmp_path, step).mkdir()
        (checkpoint_path(tmp_path, step) / NAME).write_text(f"of step {step}")
    (tmp_path / NAME).write_text("of step 7")
    return tmp_path


def keep(output, losses, final=None):
    keep_best(losses, NAME, final, SimpleNamespace(output_dir=str(output)))
    assert sorted(path.name for path in (output / "best").iterdir()) == ["score.json", NAME]
    assert not (output / "best.tmp").exists()
    return read_best(output)["step"], (output / "best" / NAME).read_text()


def test_the_lowest_loss_is_the_best_and_of_equal_ones_the_first(output):
    assert keep(output, {2: 0.5}) == (2, "of step 2")
    assert keep(output, {2: 0.5, 4: 0.3}) == (4, "of step 4")
    assert keep(output, {2: 0.5, 4: 0.3, 6: 0.3}) == (4, "of step 4")
    assert keep(output, {2: 0.5, 4: 0.3, 6: 0.3, 7: 0.2}, final=7) == (7, "of step 7")
    assert read_best(output)["held_out_loss"] == 0.2 and "lowest held_out_loss" in read_best(output)["rule"]


def test_the_final_result_of_an_earlier_run_is_not_taken_for_a_checkpoint_that_was_not_saved(output, caplog):
    assert keep(output, {2: 0.5, 4: 0.4, 8: 0.1}) == (4, "of step 4")
    assert "the result of step 8, which is better" in caplog.text


def test_it_stays_though_its_checkpoint_is_gone(output, caplog):
    keep(output, {2: 0.1})
    (checkpoint_path(output, 2) / NAME).unlink()
    assert keep(output, {2: 0.1, 4: 0.4}) == (2, "of step 2") and not caplog.records


def test_a_resumed_run_keeps_only_the_best_of_what_it_continues(output):
    keep(output, {2: 0.5, 4: 0.3})
    drop_best(output, 4)
    assert read_best(output)["step"] == 4
    drop_best(output, 2)
    assert not (output / "best").exists() and read_best(output) == {}
    assert keep(output, {2: 0.5}) == (2, "of step 2")
    (output / "best" / "score.json").write_text("damaged")
    drop_best(output, 2)
    assert not (output / "best").exists()


def test_a_result_that_is_a_folder_is_kept_whole(output):
    folder = checkpoint_path(output, 6) / "pipeline"
    folder.mkdir()
    (folder / "part").write_text("whole")
    keep_best({6: 0.1}, "pipeline", None, SimpleNamespace(output_dir=str(output)))
    assert (output / "best" / "pipeline" / "part").read_text() == "whole"


def test_a_full_disk_is_a_warning(output, monkeypatch, caplog):
    monkeypatch.setattr("shutil.copyfile", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    keep_best({2: 0.5}, NAME, None, SimpleNamespace(output_dir=str(output)))
    assert "best was not written" in caplog.text and read_best(output) == {}
