"""Photos that are deleted or changed while they are trained on, or between a run and its resumption."""

import shutil

import pytest
from PIL import Image

from tests.faults import child


@pytest.fixture
def own_photos(photos, tmp_path):
    return shutil.copytree(photos, tmp_path / "own")


def test_photos_are_read_once_and_what_becomes_of_them_then_changes_nothing(own_photos, start_run):
    run, undisturbed = start_run(instance_data_dir=own_photos), start_run("undisturbed")
    assert run.run(child.after_step, 1, child.remove_files, str(own_photos))[0] == undisturbed.run()[0] == 0
    ours, theirs = run.results(), undisturbed.results()
    state = "checkpoint-6/training_state.safetensors"
    assert ours[state] == theirs[state] and ours["metrics.jsonl"] == theirs["metrics.jsonl"]


def test_resuming_on_other_photos_is_refused_naming_each(own_photos, start_run):
    run = start_run(instance_data_dir=own_photos, max_train_steps=2)
    assert run.run()[0] == 0
    Image.new("RGB", (96, 80)).save(own_photos / "0.png")
    (own_photos / "1.png").rename(own_photos / "3.png")
    (own_photos / "2.txt").write_text("sks dog, awake")
    before = run.results()
    code, said = run.run(max_train_steps=4)
    assert code == 2 and "error: --resume_from_checkpoint out/checkpoint-2 was trained with other photos" in said
    rows = [line.split() for line in said.splitlines()]
    found = {(" ".join(row[2:4]), *row[-2:]) for row in rows if row[:2] == ["instance", "photo"]}
    assert {name for name, *_ in found} == {"0.png, image", "1.png, image", "1.png, prompt", "2.png, prompt",
                                            "3.png, image", "3.png, prompt"}  # fmt: skip
    assert run.results() == before
    code, said = run.run(max_train_steps=4, allow_config_change=True)
    assert code == 0 and "was trained with other photos" in said
