"""Photos to moments: encoded once or at every step, the same bit for bit; in memory and in a folder."""

import dataclasses
import itertools
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from dreambooth.base_model.cache import text_identity, vae_identity
from dreambooth.base_model.loading import DTYPES
from dreambooth.base_model.moments import cache_moments, encode_moments
from dreambooth.data.crops import Crops
from dreambooth.data.dataset import DreamBoothDataset, build_loader, prompts_of
from dreambooth.data.noise import noise_drawer
from dreambooth.data.photos import Photo
from dreambooth.data.pixels import Pixels
from dreambooth.errors import UserError
from dreambooth.families.sd import SD
from dreambooth.options.training import TrainingConfig
from kron_formats.kept import key_of, load_or_make, load_tensors, save_tensors

RESOLUTION = 64
FIXED = {"center_crop": True}


def make_config(**options):
    required = {"pretrained_model_name_or_path": "base", "instance_data_dir": "photos", "instance_prompt": "sks dog"}
    return TrainingConfig(**required | {"resolution": RESOLUTION} | options)


def make_photo(number, height=64, width=64):
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    return Photo(Path(f"{number}.png"), Pixels(pixels), f"photo {number}", "a dog", (height, width))


PHOTOS = [make_photo(0, 64, 80), make_photo(1, 72, 64), make_photo(2)]
CLASS_PHOTOS = [make_photo(100, 64, 70), make_photo(101)]


def make_crops(photos=PHOTOS, class_photos=(), **options):
    config = make_config(**options)
    return Crops(photos, class_photos, config), config


def make_dataset(crops, moments=None):
    return DreamBoothDataset(crops, prompts_of(crops.photos, crops.class_photos, crops.config), moments, crops.config)


class CountingVae(AutoencoderKL):
    """A VAE that counts the images it encodes."""

    encoded = 0

    def encode(self, x, **kwargs):
        type(self).encoded += len(x)
        return super().encode(x, **kwargs)


@pytest.fixture
def make_vae(monkeypatch):
    """Make VAEs with the same weights for the same seed; `CountingVae.encoded` begins at 0."""
    monkeypatch.setattr(CountingVae, "encoded", 0)

    def make(seed=0, **options):
        torch.manual_seed(seed)
        shape = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        return CountingVae(**shape | blocks | options)

    return make


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These images are so small that threads on a busy machine only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def accelerator(rank=0, num_ranks=1):
    """What cache_moments asks of an accelerator."""
    return SimpleNamespace(
        process_index=rank, num_processes=num_ranks, is_main_process=rank == 0, wait_for_everyone=lambda: None
    )


def batches_of(dataset, config, count):
    return list(itertools.islice(build_loader(dataset, noise_drawer(4, 8, 1000, config), config, 0, 1, 0), count))


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "dreambooth.base_model.moments"]


# ---- cached or not, the same ----

SETTINGS = {
    "instances": ({}, ()),
    "flips": ({"random_flip": True}, ()),
    "class images": ({"random_flip": True, "with_prior_preservation": True}, CLASS_PHOTOS),
    "frozen crops": ({"center_crop": False, "cache_latents": "on", "random_flip": True}, CLASS_PHOTOS),
    "base model": ({"random_flip": True, "with_prior_preservation": True, "prior_source": "base_model"}, ()),
    "buckets": ({"aspect_ratio_buckets": True, "resolution": 192, "random_flip": True}, CLASS_PHOTOS),
}


def assert_cached_is_uncached(crops, moments, config, vae):
    dataset, reference = make_dataset(crops, moments), make_dataset(crops)
    for cached, batch in zip(batches_of(dataset, config, 6), batches_of(reference, config, 6), strict=True):
        assert cached.pixel_values is None and batch.moments is None
        assert cached.moments.dtype == torch.float32 and cached.moments.device.type == "cpu"
        assert torch.equal(cached.moments, encode_moments(vae, batch.pixel_values))
        for name in ("prompt_rows", "noise", "posterior_noise", "timesteps", "size_conditions"):
            assert torch.equal(getattr(cached, name), getattr(batch, name))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("to_disk", [False, True])
def test_cached_moments_are_those_of_the_step_bit_for_bit(make_vae, tmp_path, setting, batch_size, to_disk):
    options, class_photos = SETTINGS[setting]
    photos = [make_photo(0, 128, 256), make_photo(1, 192, 192)] if setting == "buckets" else PHOTOS
    options = FIXED | options | {"train_batch_size": batch_size}
    if to_disk:
        options |= {"cache_latents_to_disk": str(tmp_path / "cache"), "pretrained_model_name_or_path": str(tmp_path)}
    crops, config = make_crops(photos, class_photos, **options)
    vae = make_vae()
    moments = cache_moments(crops, lambda: vae, config, accelerator())
    assert_cached_is_uncached(crops, moments, config, vae)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_a_half_precision_vae_are_the_step_s(make_vae, dtype):
    vae = make_vae().to(dtype)
    crops, config = make_crops(**FIXED, train_batch_size=3)
    moments = cache_moments(crops, lambda: vae, config, accelerator())
    assert_cached_is_uncached(crops, moments, config, vae)


def test_moments_are_the_vae_s_own(make_vae):
    vae = make_vae()
    dataset = make_dataset(make_crops(**FIXED)[0])
    pixel_values = torch.stack([dataset[k][0].pixel_values for k in range(3)])
    moments = encode_moments(vae, pixel_values)
    assert moments.shape == (3, 8, 8, 8) and not moments.requires_grad
    for row, image in zip(moments, pixel_values):
        assert torch.equal(row, vae.encode(image[None]).latent_dist.parameters[0])


@pytest.mark.parametrize("random_flip, encoded", [(False, 5), (True, 10)])
def test_every_crop_is_encoded_once(make_vae, random_flip, encoded):
    crops, config = make_crops(PHOTOS, CLASS_PHOTOS, **FIXED, random_flip=random_flip)
    moments = cache_moments(crops, make_vae, config, accelerator())
    batches_of(make_dataset(crops, moments), config, 30)
    assert CountingVae.encoded == encoded


# ---- whether to cache ----


@pytest.mark.parametrize(
    "photos, options, cached",
    [
        (PHOTOS, {}, False),
        (PHOTOS, {"center_crop": True}, True),
        (PHOTOS, {"cache_latents": "on"}, True),
        (PHOTOS, {"center_crop": True, "cache_latents": "off"}, False),
        (PHOTOS[2:], {}, True),
        (PHOTOS[2:], {"random_flip": True}, True),
        (PHOTOS[2:], {"cache_latents": "off"}, False),
    ],
)
def test_latents_are_cached_where_the_options_and_crops_allow(make_vae, photos, options, cached):
    crops, config = make_crops(photos, **options)
    moments = cache_moments(crops, make_vae, config, accelerator())
    assert (moments is not None) == bool(CountingVae.encoded) == cached
    row = make_dataset(crops, moments)[0][0]
    assert (row.pixel_values is None) == cached and (row.moments is not None) == cached


def test_a_folder_that_nothing_can_be_kept_in_is_worth_a_warning(make_vae, tmp_path, caplog):
    crops, config = make_crops(cache_latents_to_disk=str(tmp_path / "cache"))
    assert cache_moments(crops, make_vae, config, accelerator()) is None
    (warning,) = warnings_in(caplog)
    assert "--cache_latents_to_disk" in warning and "--center_crop or --cache_latents on" in warning
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_latents_that_are_not_finite_are_an_error_that_names_the_photo(make_vae, tmp_path, value):
    photos = [
        PHOTOS[2],
        dataclasses.replace(PHOTOS[2], path=Path("overflows.png"), stored=Pixels(PHOTOS[2].pixels // 2)),
    ]
    vae = make_vae()
    encode = vae.encode

    def overflow(x):
        posterior = encode(x)
        if x.max() < 0.1:
            posterior.latent_dist.parameters[0, 0, 0, 0] = value
        return posterior

    vae.encode = overflow
    crops, config = make_crops(
        photos, cache_latents_to_disk=str(tmp_path / "cache"), pretrained_model_name_or_path=str(tmp_path)
    )
    words = "overflows.png are not finite; use --vae_precision fp32, or --pretrained_vae_model_name_or_path .*fp16-fix"
    with pytest.raises(UserError, match=words):
        cache_moments(crops, lambda: vae, config, accelerator())
    assert len(list((tmp_path / "cache").iterdir())) == 1  # what is not finite is not kept


# ---- in a folder ----


@pytest.fixture
def run(make_vae, tmp_path):
    """Cache moments in a folder, as a new run does with the VAE in tmp_path; return the number of images that were
    encoded, and the moments."""
    make_vae().save_pretrained(tmp_path / "vae")

    def run(photos=PHOTOS, ranks=None, **options):
        CountingVae.encoded = 0
        base = {"pretrained_model_name_or_path": str(tmp_path)}
        folder = {"cache_latents_to_disk": str(tmp_path / "a" / "cache")}
        crops, config = make_crops(photos, **base | FIXED | folder | options)
        source = config.pretrained_vae_model_name_or_path or tmp_path / "vae"

        def load_vae():
            return CountingVae.from_pretrained(source, dtype=DTYPES[config.vae_precision])

        moments = cache_moments(crops, load_vae, config, ranks or accelerator())
        assert moments is not None
        return CountingVae.encoded, moments

    return run


def files(folder):
    return sorted((folder / "a" / "cache").iterdir())


def assert_same_moments(moments, others):
    assert moments.keys() == others.keys()
    assert all(torch.equal(moments[crop], others[crop]) for crop in moments)


def test_a_second_run_encodes_nothing(run, tmp_path):
    count, first = run()
    assert count == 3 and len(files(tmp_path)) == 3 and {path.suffix for path in files(tmp_path)} == {".safetensors"}
    count, second = run()
    assert count == 0
    assert_same_moments(first, second)


def test_the_same_pixels_are_known_by_another_name_and_in_another_order(run):
    run()
    renamed = [dataclasses.replace(photo, path=Path("renamed.png"), prompt="another") for photo in reversed(PHOTOS)]
    assert run(renamed)[0] == 0


def test_a_photo_that_changed_by_one_pixel_is_encoded_again(run):
    run()
    pixels = PHOTOS[1].pixels.copy()
    pixels[20, 20, 1] ^= 1
    changed = [PHOTOS[0], dataclasses.replace(PHOTOS[1], stored=Pixels(pixels)), PHOTOS[2]]
    count, moments = run(changed)
    assert count == 1
    assert_same_moments(moments, run(changed, cache_latents_to_disk=None)[1])


@pytest.mark.parametrize(
    "options, count",
    [
        ({"random_flip": True}, 3),  # the mirrored ones
        ({"center_crop": False, "cache_latents": "on"}, 2),  # the square photo has one crop only
        ({"resolution": 56}, 3),
        ({"repeats": 3, "seed": 5, "train_batch_size": 2}, 0),
    ],
)
def test_another_crop_is_encoded_and_another_order_is_not(run, options, count):
    run()
    encoded, moments = run(**options)
    assert encoded == count
    assert_same_moments(moments, run(**options, cache_latents_to_disk=None)[1])


def test_another_vae_encodes_again(run, make_vae, tmp_path):
    run()
    make_vae(seed=1).save_pretrained(tmp_path / "other")
    assert run(pretrained_vae_model_name_or_path=str(tmp_path / "other"))[0] == 3
    assert run(vae_precision="bf16")[0] == 3
    assert run()[0] == 0
    make_vae(seed=1).save_pretrained(tmp_path / "vae")
    assert run()[0] == 3


def test_nothing_is_read_of_a_vae_that_has_nothing_to_encode(run, tmp_path, monkeypatch):
    _, first = run()
    monkeypatch.setattr(CountingVae, "from_pretrained", lambda *_, **__: pytest.fail("the VAE was read"))
    assert_same_moments(run()[1], first)


# ---- which model: what a cache is good for ----


@pytest.fixture
def base(tmp_path):
    """The files of a base model, as far as their names and sizes go."""
    folder = tmp_path / "base"
    for name in (
        "model_index.json",
        "vae/config.json",
        "vae/a.safetensors",
        "text_encoder/b.safetensors",
        "unet/c.bin",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def identities(base, **options):
    config = make_config(pretrained_model_name_or_path=str(base), **options)
    return vae_identity(config), text_identity(SD, config, torch.float32)


def rewrite(path):
    """Other content of the same size."""
    path.write_bytes(path.read_bytes()[::-1])


def touch(path):
    os.utime(path, ns=(0, 1))


@pytest.mark.parametrize("change", [rewrite, touch, lambda path: path.write_text("longer than it was"), Path.unlink])
@pytest.mark.parametrize(
    "name, concerned",
    [
        ("vae/a.safetensors", (True, False)),
        ("vae/config.json", (True, False)),
        ("text_encoder/b.safetensors", (False, True)),
        ("model_index.json", (False, True)),
        ("unet/c.bin", (False, False)),
    ],
)
def test_a_model_is_another_where_a_file_of_it_changed(base, change, name, concerned):
    before = identities(base)
    assert identities(base) == before
    change(base / name)
    assert tuple(now != then for now, then in zip(identities(base), before)) == concerned


def test_precision_variant_and_place_are_part_of_the_model(base, tmp_path):
    shutil.copytree(base, tmp_path / "copy")
    config = make_config(pretrained_model_name_or_path=str(base))
    vae = {identities(base, **options)[0] for options in ({}, {"vae_precision": "bf16"}, {"variant": "fp16"})}
    text = {text_identity(SD, config, dtype) for dtype in DTYPES.values()}
    assert len(vae) == len(text) == 3
    assert identities(tmp_path / "copy")[0] not in vae


def test_a_model_on_the_hub_is_known_by_its_commit(monkeypatch):
    asked = []

    def load_config(name, cache_dir, return_commit_hash, revision=None):
        asked.append((name, revision, cache_dir))
        return {}, f"commit of {revision}"

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", load_config)
    monkeypatch.setattr("diffusers.AutoencoderKL.load_config", load_config)
    seen = [identities("some/model"), identities("some/model", revision="v2")]
    seen += [identities("some/model", pretrained_vae_model_name_or_path="some/vae")]
    identities("some/model", pretrained_vae_model_name_or_path="some/vae", cache_dir="/downloads")
    assert len({vae for vae, _ in seen}) == 3 and len({text for _, text in seen}) == 2
    where = {("some/model", None), ("some/model", "v2"), ("some/vae", None)}
    kept = {("some/vae", None, "/downloads"), ("some/model", None, "/downloads")}
    assert set(asked) == {(*place, None) for place in where} | kept


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def change_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def rename_the_tensor(path):
    path.write_bytes(path.read_bytes().replace(b"moments", b"momentz"))


@pytest.mark.parametrize(
    "damage", [truncate, change_a_bit, rename_the_tensor, lambda path: path.write_bytes(b""), Path.unlink]
)
def test_a_damaged_file_is_encoded_again(run, tmp_path, damage):
    _, first = run()
    damage(files(tmp_path)[1])
    count, second = run()
    assert count == 1
    assert_same_moments(first, second)
    assert run()[0] == 0


def test_an_unfinished_file_is_no_file(run, tmp_path, monkeypatch):
    def stop(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", stop)
        run()
    assert not [path for path in files(tmp_path) if path.suffix == ".safetensors"]
    assert run()[0] == 3


@pytest.mark.parametrize("path", ["file", "file/inside"])
def test_a_folder_that_cannot_be_made_is_named(make_vae, tmp_path, path):
    (tmp_path / "file").touch()
    folder = {"cache_latents_to_disk": str(tmp_path / path), "pretrained_model_name_or_path": str(tmp_path)}
    crops, config = make_crops(**FIXED, **folder)
    with pytest.raises(UserError, match=f"--cache_latents_to_disk {tmp_path / path}: "):
        cache_moments(crops, make_vae, config, accelerator())


def test_tensors_come_back_as_they_were_written(tmp_path):
    tensors = {"prompt_embeds": torch.randn(1, 4, 6).to(torch.bfloat16), "pooled": torch.randn(1, 3)}
    save_tensors(tensors, tmp_path / "a.safetensors")
    back = load_tensors(tmp_path / "a.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert load_tensors(tmp_path / "b.safetensors") is None


def test_tensors_are_made_once(tmp_path):
    made = []

    def make():
        made.append(torch.zeros(1))
        return {"a": made[-1]}

    for _ in range(3):
        assert load_or_make(tmp_path / "a.safetensors", make) == {"a": torch.zeros(1)}
    assert len(made) == 1


def test_parts_of_a_key_are_told_apart():
    assert len({key_of(b"a", b"bc"), key_of(b"ab", b"c"), key_of(b"abc"), key_of(b"a", b"b", b"c")}) == 4


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_devices_share_the_work_and_all_have_everything(run, num_ranks):
    """Each comes to the barrier with its share written, and goes on when all shares are there."""
    alone = run(cache_latents_to_disk=None)[1]
    shares = []

    def barrier():
        shares.append(CountingVae.encoded)
        raise StopIteration

    for rank in range(num_ranks):
        ranks = accelerator(rank, num_ranks)
        ranks.wait_for_everyone = barrier
        with pytest.raises(StopIteration):
            run(ranks=ranks)
    assert sum(shares) == 3 and max(shares) - min(shares) <= 1
    for rank in range(num_ranks):
        count, moments = run(ranks=accelerator(rank, num_ranks))
        assert count == 0
        assert_same_moments(moments, alone)


def test_devices_that_do_not_share_the_folder_encode_the_rest_themselves(run):
    count, moments = run(ranks=accelerator(1, 2))
    assert count == 3
    assert_same_moments(moments, run(cache_latents_to_disk=None)[1])
