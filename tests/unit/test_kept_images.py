"""Images of the base model that are kept: the same again, or drawn anew if anything else would be drawn."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth.drawing import kept_images
from dreambooth.drawing.kept_images import drawing_identity, load_or_draw
from dreambooth.options.evaluation import EvaluationOptions

CPU = torch.device("cpu")
SEEDS = range(3, 6)


def images(start=0, size=(24, 16)):
    pixels = np.random.default_rng(start).integers(0, 256, (len(SEEDS), size[1], size[0], 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def take(folder, prompt="a dog", identity=b"model", seeds=SEEDS, draw=images):
    """What is returned, and how often it was drawn."""
    calls = []
    taken = load_or_draw(folder, identity, prompt, seeds, lambda: calls.append(1) or draw())
    return [(image.mode, image.size, image.tobytes()) for image in taken], len(calls)


EXPECTED = [(image.mode, image.size, image.tobytes()) for image in images()]


def test_images_are_drawn_once_and_come_back_bit_for_bit(tmp_path):
    assert take(tmp_path / "new") == (EXPECTED, 1)
    assert take(tmp_path / "new") == (EXPECTED, 0)
    assert all(path.suffix == ".png" for path in (tmp_path / "new").iterdir())
    for change in ({"prompt": "a cat"}, {"identity": b"another"}, {"seeds": range(4, 7)}):
        assert take(tmp_path / "new", **change) == (EXPECTED, 1)


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "one byte", "another image", "no checksum", "text"])
def test_what_is_damaged_is_drawn_anew(damage, tmp_path):
    take(tmp_path)
    first, second, _ = sorted(tmp_path.iterdir())
    content = first.read_bytes()
    if damage == "missing":
        first.unlink()
    elif damage == "another image":
        taken = Image.open(second)
        taken.save(first, pnginfo=None)
    elif damage == "no checksum":
        Image.open(first).save(first)
    else:
        middle = len(content) // 2
        broken = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        kinds = {"empty": b"", "half": content[:middle], "one byte": broken, "text": b"not a picture"}
        first.write_bytes(kinds[damage])
    assert take(tmp_path) == (EXPECTED, 1)
    assert take(tmp_path) == (EXPECTED, 0)


def test_a_drawing_that_fails_leaves_nothing_and_a_full_disk_does_not_end_it(tmp_path, monkeypatch, caplog):
    with pytest.raises(ZeroDivisionError):
        take(tmp_path, draw=lambda: 1 / 0)
    assert not list(tmp_path.iterdir())

    def fail(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fail)
        assert take(tmp_path) == (EXPECTED, 1)
    assert not list(tmp_path.iterdir()) and "no space left on device" in caplog.text
    assert take(tmp_path) == (EXPECTED, 1)


def test_several_at_once_do_not_harm_each_other(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        for taken, _ in pool.map(lambda _: take(tmp_path), range(16)):
            assert taken == EXPECTED
    assert take(tmp_path) == (EXPECTED, 0) and len(list(tmp_path.iterdir())) == len(SEEDS)


# ---- what they depend on ----


@pytest.fixture(scope="module")
def base(tiny_sd, tmp_path_factory):
    """A base model that may be changed."""
    return shutil.copytree(tiny_sd, tmp_path_factory.mktemp("base") / "sd", copy_function=os.link)


def identity(base, **options):
    return drawing_identity(
        EvaluationOptions(pretrained_model_name_or_path=str(base), class_noun="dog", **options), CPU
    )


def test_every_option_that_changes_images_counts(base):
    velocity = {"prediction_type": "v_prediction"}
    changes = [
        {}, {"negative_prompt": "blurry"}, {"max_token_length": 150}, {"height": 64}, {"width": 64}, velocity,
        {"num_inference_steps": 9}, {"guidance_scale": 5.0}, {"batch_size": 2}, {"dtype": "bf16"}, {"dtype": "fp16"},
        {**velocity, "rescale_betas_zero_snr": True}, {"variant": "fp16"},
    ]  # fmt: skip
    assert len({identity(base, **change) for change in changes}) == len(changes)


def test_the_adapter_and_what_is_scored_do_not_count(base):
    others = {"adapter": ["a.safetensors"], "prompt": ["a {}"], "output_dir": "x", "num_images": 7, "dino_model": "d"}
    assert identity(base, **others) == identity(base)


@pytest.mark.parametrize(
    "name",
    ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "scheduler/scheduler_config.json", "tokenizer"],
)
def test_the_base_model_s_files_count(base, name, tmp_path):
    changed = shutil.copytree(base, tmp_path / "sd", copy_function=os.link)
    before = identity(changed)
    assert identity(changed) == before
    path = changed / name
    path = next(file for file in path.iterdir()) if path.is_dir() else path
    content = path.read_bytes().replace(b'"beta_start": 0.00', b'"beta_start": 0.10')
    path.unlink()  # the other copies share it
    path.write_bytes(content + b"\n")
    assert identity(changed) != before


def test_a_vae_of_one_s_own_and_the_number_of_threads_count(base, monkeypatch, tmp_path):
    before, vae = identity(base), shutil.copytree(base / "vae", tmp_path / "vae")
    assert identity(base, pretrained_vae_model_name_or_path=str(vae)) != before
    monkeypatch.setattr("torch.get_num_threads", lambda: 99)
    assert identity(base) != before


def test_what_diffusers_keeps_in_a_set_does_not_count(base, monkeypatch):
    """The names of a sampler's defaults are in another order in every process."""
    before, build = identity(base), kept_images.build_sampler

    def reordered(scheduler):
        sampler = build(scheduler)
        names = sampler.config["_use_default_values"]
        assert len(names) > 1
        sampler.register_to_config(_use_default_values=[*reversed(names)])
        return sampler

    monkeypatch.setattr(kept_images, "build_sampler", reordered)
    assert identity(base) == before
