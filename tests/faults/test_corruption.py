"""Checkpoints that are damaged in any place: known for it by name, and passed over."""

import json
import random
import shutil

import pytest

from dreambooth.errors import UserError
from dreambooth.kronecker import KRONECKER
from dreambooth.layout import MANIFEST_NAME
from dreambooth.output.checkpoint import NEEDED, latest_checkpoint, verify_checkpoint
from tests.faults.checkpoints import Training, content

FILES = (*NEEDED, KRONECKER.weights_name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    training = Training(tmp_path_factory.mktemp("whole"))
    training.step()
    return training.save(1)


@pytest.fixture
def checkpoint(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "checkpoint-1")


def test_a_checkpoint_is_what_its_manifest_says(checkpoint):
    verify_checkpoint(checkpoint)
    assert {path.name for path in checkpoint.iterdir()} == {*FILES, MANIFEST_NAME}


@pytest.mark.parametrize("name", [*FILES, MANIFEST_NAME])
def test_every_byte_counts(name, checkpoint):
    """A flipped bit anywhere, any truncation, one byte more, and no file at all."""
    path, chance = checkpoint / name, random.Random(name)
    original = path.read_bytes()
    places = {0, len(original) - 1, *chance.sample(range(len(original)), 150)}
    if name == MANIFEST_NAME:
        places = {place for place in range(len(original)) if not original[place : place + 1].isspace()}
    for place in places:
        damaged = bytearray(original)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="checkpoint-1 is not a complete checkpoint: "):
            verify_checkpoint(checkpoint)
    for size in {0, len(original) - 1, *chance.sample(range(len(original)), 20)}:
        path.write_bytes(original[:size])
        with pytest.raises(UserError, match=f"checkpoint-1 is not a complete checkpoint: {name}: "):
            verify_checkpoint(checkpoint)
    path.write_bytes(original + b"x")
    with pytest.raises(UserError, match=f"{name}: "):
        verify_checkpoint(checkpoint)
    path.unlink()
    with pytest.raises(UserError, match=f"{name}: "):
        verify_checkpoint(checkpoint)
    path.mkdir()
    with pytest.raises(UserError, match=f"{name}: "):
        verify_checkpoint(checkpoint)


def test_files_of_others_in_a_checkpoint_do_no_harm(checkpoint):
    (checkpoint / ".DS_Store").write_bytes(b"x")
    verify_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "manifest", [[], {}, 7, None, {"../training_state.json": {}}, {name: {} for name in FILES}, dict.fromkeys(FILES)]
)
def test_a_manifest_that_is_none_is_refused(manifest, checkpoint):
    (checkpoint / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["../x", "unet/../../x", "/etc/passwd", "C:x", "..\\x", "unet//x", "./x", ""])
def test_a_manifest_that_names_a_place_elsewhere_is_refused(name, checkpoint):
    manifest = json.loads((checkpoint / MANIFEST_NAME).read_text())
    (checkpoint / MANIFEST_NAME).write_text(json.dumps({**manifest, name: {}}))
    with pytest.raises(UserError, match="which is not the path of a file in it"):
        verify_checkpoint(checkpoint)


def test_the_latest_is_the_newest_whole_one_and_broken_ones_are_named(whole, tmp_path, caplog):
    for step in (3, 20, 100):
        shutil.copytree(whole, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-100" / FILES[0]).unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
    assert f"Skipped: {tmp_path}/checkpoint-100 is not a complete checkpoint: {FILES[0]}: " in caplog.text
    for step in (3, 20):
        (tmp_path / f"checkpoint-{step}" / MANIFEST_NAME).unlink()
    assert latest_checkpoint(tmp_path) is None


def test_what_was_saved_is_what_is_loaded(whole, tmp_path):
    first, other = Training(tmp_path / "first"), Training(tmp_path / "other")
    first.step()
    assert other.load(whole) == 1
    assert str(other.state()) == str(first.state())
    other.step()
    first.step()
    assert content(other.save(2))["training_state.safetensors"] == content(first.save(2))["training_state.safetensors"]
