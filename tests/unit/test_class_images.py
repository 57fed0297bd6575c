"""Class images: which of a folder are used, what is drawn, and what drawn images say of themselves."""

import logging
from types import SimpleNamespace

import pytest
from PIL import Image

from dreambooth.drawing import class_images
from dreambooth.drawing.class_images import ensure_class_images
from dreambooth.options.training import TrainingConfig


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "class"


@pytest.fixture
def ensure(folder, monkeypatch):
    """Ensure class images in the folder; the base model draws in grey. Return the photos and what was logged."""

    def draw(base, indices, subject, config):
        yield [Image.new("RGB", (16, 16), (10 * index,) * 3) for index in indices]

    monkeypatch.setattr(class_images, "_draw", draw)
    ranks = SimpleNamespace(process_index=0, num_processes=1, is_local_main_process=False, wait_for_everyone=int)

    def ensure(count=4, prompt="a dog"):
        required = {
            "pretrained_model_name_or_path": "base",
            "instance_data_dir": "photos",
            "instance_prompt": "sks dog",
        }
        prior = {"with_prior_preservation": True, "class_data_dir": str(folder), "class_prompt": prompt}
        config = TrainingConfig(**required, **prior, num_class_images=count, resolution=16)
        return ensure_class_images(SimpleNamespace(accelerator=ranks), config)

    return ensure


def own_images(folder, count):
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{number:03d}.png")


def messages(caplog, level):
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_no_more_are_used_than_asked_for_and_others_are_not_decoded(folder, ensure, caplog):
    caplog.set_level(logging.INFO)
    own_images(folder, 30)
    (folder / "020.png").write_bytes(b"damaged")
    photos = ensure(10)
    assert [photo.path.name for photo in photos] == [f"{number:03d}.png" for number in range(10)]
    (line,) = messages(caplog, logging.INFO)
    assert "Using 10 class images" in line and "30" in line and "--num_class_images" in line
    assert not messages(caplog, logging.WARNING)
    assert len(list(folder.iterdir())) == 30


def test_a_damaged_one_is_replaced_by_the_next(folder, ensure, caplog):
    own_images(folder, 5)
    (folder / "001.png").write_bytes(b"damaged")
    assert [photo.path.name for photo in ensure(3)] == ["000.png", "002.png", "003.png"]
    assert "001.png" in messages(caplog, logging.WARNING)[0]


def test_as_many_as_there_are_is_no_news(folder, ensure, caplog):
    caplog.set_level(logging.INFO)
    own_images(folder, 3)
    ensure(3)
    (line,) = messages(caplog, logging.INFO)
    assert "Using 3 class images" in line and "--num_class_images" not in line


def test_those_missing_are_drawn_and_say_what_for(folder, ensure):
    own_images(folder, 1)
    photos = ensure(3)
    assert [photo.path.name for photo in photos] == ["000.png", "class-000000.png", "class-000001.png"]
    texts = [Image.open(photo.path).text for photo in photos]
    assert texts[0] == {}
    assert all((text["class_prompt"], text["base_model"]) == ("a dog", "base") for text in texts[1:])
    assert len({text["seed"] for text in texts[1:]}) == 2


def test_images_of_an_earlier_prompt_are_worth_a_warning(folder, ensure, caplog):
    own_images(folder, 1)
    ensure(3, "ein Hündchen 🐕")
    assert not messages(caplog, logging.WARNING)
    ensure(5, "a cat")
    (warning,) = messages(caplog, logging.WARNING)
    assert f"--class_data_dir {folder}: 2 of 3 " in warning
    assert "--class_prompt 'a cat'" in warning and "2 for 'ein Hündchen 🐕'" in warning
    caplog.clear()
    ensure(5, "a cat")  # two are still of the other prompt, two of this, and one says nothing
    assert "2 of 5" in messages(caplog, logging.WARNING)[0]


def test_images_with_a_caption_have_a_prompt_of_their_own(folder, ensure, caplog):
    ensure(2, "a cat")
    for number in range(2):
        (folder / f"class-{number:06d}.txt").write_text("a cat, seen by a dog")
    assert [photo.prompt for photo in ensure(2)] == ["a cat, seen by a dog"] * 2
    assert not messages(caplog, logging.WARNING)
