"""Training pixels that are not held in memory: read again, the same, and noticed if they are not."""

import itertools
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth.base_model.moments import cache_moments
from dreambooth.data import photos, pixels
from dreambooth.data.crops import Crops
from dreambooth.data.dataset import DreamBoothDataset, build_loader, prompts_of
from dreambooth.data.noise import noise_drawer
from dreambooth.data.photos import read_class_photos, read_instance_photos
from dreambooth.errors import UserError
from dreambooth.options.training import TrainingConfig


@pytest.fixture
def folder(tmp_path):
    """Six photos of different sizes, two of which have a mask."""
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 256, (96 + 8 * number, 100, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
        if number < 2:
            Image.fromarray(noise[..., 0]).save(tmp_path / f"{number}.mask.png")
    return tmp_path


@pytest.fixture
def config(folder):
    def make(**options):
        required = {"pretrained_model_name_or_path": "base", "instance_prompt": "sks dog", "resolution": 64}
        prior = {"with_prior_preservation": True, "class_data_dir": str(folder), "class_prompt": "a dog"}
        return TrainingConfig(**required | prior | {"instance_data_dir": str(folder)} | options)

    return make


@pytest.fixture
def decoded(monkeypatch):
    """The names of files as they are decoded."""
    names, read = [], photos.read_picture

    def reading(path):
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(photos, "read_picture", reading)
    return names


def is_held(photo, decoded):
    decoded.clear()
    _ = photo.pixels
    return not decoded


def crops_of(config):
    return Crops(read_instance_photos(config), read_class_photos(config.all_subjects[0], config), config)


def batches_of(crops, config, moments=None, count=8):
    dataset = DreamBoothDataset(crops, prompts_of(crops.photos, crops.class_photos, config), moments, config)
    return list(itertools.islice(build_loader(dataset, noise_drawer(4, 8, 1000, config), config, 0, 1, 0), count))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for name, value in vars(batch).items():
            theirs = getattr(other, name)
            assert torch.equal(value, theirs) if isinstance(value, torch.Tensor) else value == theirs


def test_a_folder_holds_no_more_than_there_is_room_for(folder, config, monkeypatch, decoded):
    first, second = (photo.size for photo in read_instance_photos(config())[:2])
    monkeypatch.setattr(pixels, "HELD", 3 * (first[0] * first[1] + second[0] * second[1]))
    decoded.clear()
    read = read_instance_photos(config())
    assert decoded == [f"{number}.png" for number in range(6)]
    assert [is_held(photo, decoded) for photo in read] == [True] * 2 + [False] * 4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"random_flip": True, "center_crop": True, "image_interpolation_mode": "bicubic"},
        {"aspect_ratio_buckets": True, "resolution": 128},
        {"dataloader_num_workers": 1},
    ],
)
def test_what_is_read_again_is_what_was_held(config, monkeypatch, options):
    held = batches_of(crops_of(config(**options)), config(**options))
    monkeypatch.setattr(pixels, "HELD", 0)
    assert_same(batches_of(crops_of(config(**options)), config(**options)), held)


def test_workers_that_are_started_anew_can_read(config, monkeypatch):
    monkeypatch.setattr(pixels, "HELD", 0)
    crops = crops_of(config())
    assert_same(batches_of(pickle.loads(pickle.dumps(crops)), config()), batches_of(crops, config()))


class Vae:
    """Moments that are means of 8 x 8 pixels."""

    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, image):
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=torch.nn.functional.avg_pool2d(image, 8)))


VAE = Vae()
ALONE = SimpleNamespace(process_index=0, num_processes=1, is_main_process=False, wait_for_everyone=int)


@pytest.mark.parametrize("room", [0, 2**27])
@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize(
    "options", [{"random_flip": True}, {"aspect_ratio_buckets": True, "random_flip": True, "resolution": 128}]
)
def test_each_photo_is_decoded_once_more_for_its_latents_and_then_forgotten(
    config, monkeypatch, decoded, tmp_path, room, to_disk, options
):
    monkeypatch.setattr(pixels, "HELD", room)
    cache = {"cache_latents_to_disk": str(tmp_path / "cache"), "pretrained_model_name_or_path": str(tmp_path)}
    options = config(center_crop=True, **options, **(cache if to_disk else {}))
    crops = crops_of(options)
    assert len(decoded) == 12
    moments = cache_moments(crops, lambda: VAE, options, ALONE)
    assert len(decoded) == 12 + (0 if room else 12)
    assert not any(is_held(photo, decoded) for photo in (*crops.photos, *crops.class_photos))
    places = {(moments[crop].shape, moments[crop].untyped_storage().data_ptr()) for crop in moments}
    assert len(places) == len({crop.shape for crop in moments})  # one tensor for each shape
    reference = cache_moments(crops_of(options), lambda: VAE, options, ALONE)
    assert moments.keys() == reference.keys()
    assert all(torch.equal(moments[crop], reference[crop]) for crop in moments)
    decoded.clear()
    batches_of(crops, options, moments)
    assert not decoded


def change(path):
    values = np.asarray(Image.open(path)).copy()
    values[50, 50, 0] ^= 128
    Image.fromarray(values).save(path)


def resize(path):
    Image.open(path).resize((100, 100)).save(path)


@pytest.mark.parametrize(
    "disturb", [change, resize, lambda path: path.unlink(), lambda path: path.write_bytes(b"damaged")]
)
def test_a_photo_that_changes_before_it_is_read_again_is_named(folder, config, monkeypatch, disturb):
    monkeypatch.setattr(pixels, "HELD", 0)
    read = read_instance_photos(config(resolution=96))
    disturb(folder / "3.png")
    with pytest.raises(UserError, match=f"{folder}/3.png (has changed|cannot be read any more)"):
        _ = read[3].pixels


def test_rows_of_a_dataset_are_read_again(folder, config, monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = [{"bytes": (folder / f"{number}.png").read_bytes(), "path": None} for number in range(3)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features).to_parquet(tmp_path / "photos.parquet")
    options = config(instance_data_dir=None, dataset_name=str(tmp_path / "photos.parquet"))
    held = read_instance_photos(options)
    monkeypatch.setattr(pixels, "HELD", 0)
    again = pickle.loads(pickle.dumps(read_instance_photos(options)))
    assert all(np.array_equal(photo.pixels, other.pixels) for photo, other in zip(held, again, strict=True))
