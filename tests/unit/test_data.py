"""Photos to samples, samples to batches: by pixel values that say which photo they are of, and which part of it."""

import dataclasses
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dreambooth.data.crops import Crops
from dreambooth.data.dataset import DreamBoothDataset, build_loader, collate, prompts_of
from dreambooth.data.noise import draw_noise, noise_drawer
from dreambooth.data.order import GlobalSampler, samples_of_step, samples_per_pass
from dreambooth.data.photos import Photo
from dreambooth.data.pixels import Pixels
from dreambooth.data.sizes import cover, shape_of
from dreambooth.options.training import TrainingConfig

RESOLUTION = 16


def make_config(**options):
    required = {"pretrained_model_name_or_path": "base", "instance_data_dir": "photos", "instance_prompt": "sks dog"}
    return TrainingConfig(**required | {"resolution": RESOLUTION} | options)


# ---- photos to samples ----


def make_photo(number, height=24, width=40, original_size=None, prompt=None, mask=None):
    """A photo whose pixels say (its number, row, column), with prompts of its own."""
    rows, columns = np.indices((height, width))
    pixels = np.stack([np.full_like(rows, number), rows, columns], -1).astype(np.uint8)
    prompt = f"photo {number}" if prompt is None else prompt
    return Photo(
        Path(f"{number}.png"), Pixels(pixels), prompt, f"class of {number}", original_size or (height, width), mask
    )


def make_photos(numbers):
    return [make_photo(number) for number in numbers]


INSTANCES, CLASSES = range(5), range(100, 103)


def dataset_of(photos, class_photos, **options):
    """A dataset whose prompts are encoded in another order than that of the photos."""
    config = make_config(**options)
    prompts = ["", *sorted({*prompts_of(photos, class_photos, config), "unused"} - {""}, reverse=True)]
    return DreamBoothDataset(Crops(photos, class_photos, config), prompts, None, config), prompts, config


def make_dataset(instances=INSTANCES, classes=CLASSES, **options):
    return dataset_of(make_photos(instances), make_photos(classes), **options)


def decode(pixel_values):
    """Return (number of the photo, top, left) of a crop that is whole and one piece, and not mirrored."""
    *place, mirrored = decode_mirrored(pixel_values)
    assert not mirrored
    return tuple(place)


def decode_mirrored(pixel_values):
    """Return (number of the photo, top, left, whether it is mirrored) of a crop that is whole and one piece."""
    pixels = ((pixel_values + 1) * 127.5).round().int()
    mirrored = bool(pixels[2, 0, 0] > pixels[2, 0, -1])
    pixels = pixels.flip(2) if mirrored else pixels
    number, top, left = pixels[:, 0, 0].tolist()
    rows, columns = torch.meshgrid(*map(torch.arange, pixels.shape[1:]), indexing="ij")
    assert torch.equal(pixels, torch.stack([torch.full_like(rows, number), top + rows, left + columns]).int())
    return number, top, left, mirrored


def draws(dataset, kind, count):
    """What samples 0 to count - 1 show of one kind (0 instance, 1 class): [(number, top, left)]."""
    return [decode(dataset[k][kind].pixel_values) for k in range(count)]


def drawer(config):
    """The noise of a base model with 4 latent channels."""
    return noise_drawer(4, 8, 1000, config)


def loader_of(dataset, config, rank=0, num_ranks=1, first_step=0):
    return build_loader(dataset, drawer(config), config, rank, num_ranks, first_step)


def make_loader(rank=0, num_ranks=1, first_step=0, **options):
    dataset, _, config = make_dataset(**options)
    return loader_of(dataset, config, rank, num_ranks, first_step)


def batches_of(dataset, config, count):
    return list(itertools.islice(loader_of(dataset, config), count))


def assert_equal(batch, other):
    for field in dataclasses.fields(batch):
        a, b = getattr(batch, field.name), getattr(other, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
@pytest.mark.parametrize("classes", [CLASSES, []])
def test_every_row_has_the_prompt_of_its_photo(batch_size, classes):
    dataset, prompts, config = make_dataset(classes=classes, train_batch_size=batch_size)
    for batch in itertools.islice(loader_of(dataset, config, 0, 1, 0), 10):
        numbers = [decode(pixel_values)[0] for pixel_values in batch.pixel_values]
        assert [prompts[row] for row in batch.prompt_rows] == [f"photo {number}" for number in numbers]
        assert batch.num_instances == batch_size and len(numbers) == batch_size * (2 if classes else 1)
        assert all(number in INSTANCES for number in numbers[:batch_size])
        assert all(number in classes for number in numbers[batch_size:])


def test_a_batch_is_what_the_training_step_expects():
    halves = np.array([[(0,) * 3, (255,) * 3]], np.uint8).repeat(20, 0).repeat(10, 1)
    photo = Photo(Path("halves.png"), Pixels(halves), "", None, (40, 40), np.full((20, 20), 255, np.uint8))
    config = make_config(center_crop=True)
    dataset = DreamBoothDataset(Crops([photo], [], config), [""], None, config)
    batch = collate([dataset[0], dataset[1]], drawer(dataset.config))
    assert batch.pixel_values.shape == (2, 3, RESOLUTION, RESOLUTION) and batch.pixel_values.dtype == torch.float32
    assert batch.pixel_values.unique().tolist() == [-1, 1]
    assert batch.moments is None
    assert batch.prompt_rows.shape == batch.timesteps.shape == (2,)
    assert batch.prompt_rows.dtype == batch.timesteps.dtype == torch.int64
    assert batch.noise.shape == batch.posterior_noise.shape == (2, 4, RESOLUTION // 8, RESOLUTION // 8)
    assert batch.noise.dtype == batch.posterior_noise.dtype == torch.float32
    assert batch.size_conditions.tolist() == [[40, 40, 2, 2, 16, 16]] * 2
    assert batch.size_conditions.dtype == batch.loss_weights.dtype == torch.float32
    assert batch.loss_weights.shape == (2, 1, RESOLUTION, RESOLUTION)
    moved = batch.to(torch.device("meta"))
    assert moved.num_instances == 2 and moved.moments is None
    tensors = {name: value for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == 7 and all(tensor.is_meta for tensor in tensors.values())


@pytest.mark.parametrize("count", [1, 2, 5, 13])
@pytest.mark.parametrize("kind", [0, 1])
def test_every_pass_shows_every_photo_once_in_an_order_of_its_own(kind, count):
    dataset = make_dataset(instances=range(count), classes=range(100, 100 + count))[0]
    numbers = [number for number, _, _ in draws(dataset, kind, 30 * count)]
    passes = [tuple(numbers[first : first + count]) for first in range(0, len(numbers), count)]
    assert {tuple(sorted(numbers)) for numbers in passes} == {tuple(range(100 * kind, 100 * kind + count))}
    assert len(set(passes)) > {1: 0, 2: 1, 5: 20, 13: 29}[count]


def test_every_class_image_meets_every_instance():
    dataset = make_dataset(instances=range(3), classes=range(100, 103))[0]
    pairs = zip(draws(dataset, 0, 90), draws(dataset, 1, 90))
    assert len({(instance[0], class_image[0]) for instance, class_image in pairs}) == 9


@pytest.mark.parametrize("kind", [0, 1])
def test_every_sample_has_a_crop_of_its_own(kind):
    corners = {crop[1:] for crop in draws(make_dataset()[0], kind, 300)}
    assert len(corners) > 100
    for axis, last in enumerate((24 - RESOLUTION, 40 - RESOLUTION)):  # the edges of the photo are within reach
        assert {corner[axis] for corner in corners} == set(range(last + 1))


@pytest.mark.parametrize("kind", [0, 1])
def test_center_crop_is_always_the_middle(kind):
    assert {crop[1:] for crop in draws(make_dataset(center_crop=True)[0], kind, 20)} == {(4, 12)}


def test_instances_and_class_images_are_cropped_apart():
    dataset = make_dataset()[0]
    same = [a[1:] == b[1:] for a, b in zip(draws(dataset, 0, 50), draws(dataset, 1, 50))]
    assert sum(same) < 10


def test_every_row_has_noise_of_its_own():
    batches = list(itertools.islice(make_loader(train_batch_size=2), 100))
    noise = torch.cat([tensor for batch in batches for tensor in (batch.noise, batch.posterior_noise)])
    assert len(noise.flatten(1).unique(dim=0)) == 800


def test_a_row_s_noise_is_that_of_its_own_seed():
    dataset, _, config = make_dataset(train_batch_size=2, noise_offset=0.1)
    (batch,) = batches_of(dataset, config, 1)
    for row, sample in enumerate([dataset[0][0], dataset[1][0], dataset[0][1], dataset[1][1]]):
        drawn = draw_noise(sample.noise_seed, (RESOLUTION, RESOLUTION), 4, 8, 1000, config)
        for ours, theirs in zip((batch.posterior_noise, batch.noise, batch.timesteps), vars(drawn).values()):
            assert torch.equal(ours[row], theirs)


def test_the_seed_changes_order_crops_and_noise():
    one, other = make_dataset(seed=0)[0], make_dataset(seed=1)[0]
    for kind in (0, 1):
        ours, theirs = np.array(draws(one, kind, 30)), np.array(draws(other, kind, 30))
        assert (ours != theirs).any(0).all()  # the photos, the tops and the lefts
        assert all(one[k][kind].noise_seed != other[k][kind].noise_seed for k in range(30))


def test_a_sample_depends_on_nothing_but_its_number():
    numbers = range(20)
    dataset = make_dataset()[0]
    in_order = [collate([dataset[k]], drawer(dataset.config)) for k in numbers]
    dataset = make_dataset()[0]
    torch.manual_seed(7)
    np.random.seed(7)
    state = torch.get_rng_state()
    backwards = [collate([dataset[k]], drawer(dataset.config)) for k in reversed([*numbers, 3, 10**12])]
    for sample, same in zip(in_order, reversed(backwards)):
        assert_equal(sample, same)
    assert torch.equal(torch.get_rng_state(), state)  # and drawing it moves no other random numbers


# ---- samples to devices ----

SPLITS = [(12, 1, 1), (6, 2, 1), (6, 1, 2), (3, 2, 2), (2, 3, 2), (1, 3, 4), (2, 1, 6), (1, 12, 1), (1, 1, 12)]


@pytest.mark.parametrize("first_step", [0, 3])
@pytest.mark.parametrize("batch_size, accumulation, num_ranks", SPLITS)
def test_each_step_uses_the_same_samples_however_it_is_split(batch_size, accumulation, num_ranks, first_step):
    ranks = [iter(GlobalSampler(batch_size, accumulation, rank, num_ranks, first_step)) for rank in range(num_ranks)]
    for step in range(first_step, first_step + 4):
        used = [next(rank) for rank in ranks for _ in range(accumulation)]
        assert {len(samples) for samples in used} == {batch_size}
        assert sorted(itertools.chain(*used)) == list(range(12 * step, 12 * step + 12))


@pytest.mark.parametrize("batch_size, accumulation, num_ranks", SPLITS[:4])
def test_the_files_of_a_step_are_those_that_its_batches_show(batch_size, accumulation, num_ranks):
    options = {"train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    dataset, _, config = make_dataset(instances=range(7), classes=range(100, 109), **options)
    sampler = [iter(GlobalSampler(batch_size, accumulation, rank, num_ranks, 0)) for rank in range(num_ranks)]
    for step in (1, 2, 3):
        used = sorted(itertools.chain(*(next(rank) for rank in sampler for _ in range(accumulation))))
        assert used == list(samples_of_step(step, config, num_ranks))
        shown = [decode(row.pixel_values)[0] for kind in (0, 1) for row in (dataset[k][kind] for k in used)]
        names = [path.name for path in dataset.paths_of_step(step, num_ranks)]
        assert names == list(dict.fromkeys(f"{number}.png" for number in shown))


@pytest.mark.parametrize("batch_size, accumulation", [(2, 1), (1, 2)])
def test_two_devices_train_on_what_one_would(batch_size, accumulation):
    def rows(batches):
        columns = zip(*((batch.noise, batch.timesteps, batch.prompt_rows, batch.pixel_values) for batch in batches))
        columns = list(map(torch.cat, columns))
        order = columns[0][:, 0, 0, 0].argsort()
        return [column[order] for column in columns]

    alone = make_loader(train_batch_size=4)
    split = {"train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    ranks = [iter(make_loader(rank, 2, **split)) for rank in (0, 1)]
    for batch in itertools.islice(alone, 3):
        shares = [next(rank) for rank in ranks for _ in range(accumulation)]
        for whole, parts in zip(rows([batch]), rows(shares)):
            assert torch.equal(whole, parts)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_later_start_continues_where_the_run_was_also_with_workers(num_workers):
    options = {"train_batch_size": 3, "gradient_accumulation_steps": 2}
    run = itertools.islice(make_loader(1, 2, **options), 10)
    resumed = make_loader(1, 2, first_step=3, dataloader_num_workers=num_workers, **options)
    assert resumed.num_workers == num_workers
    for batch, same in zip(itertools.islice(run, 6, None), itertools.islice(resumed, 4), strict=True):
        assert_equal(batch, same)


@pytest.mark.parametrize("batch_size, accumulation, num_ranks", [(2, 1, 1), (2, 1, 3), (2, 2, 1), (2, 3, 2)])
def test_batches_with_buckets_are_the_same_however_they_are_split(batch_size, accumulation, num_ranks):
    def first_batches(rank, num_ranks, count, **options):
        dataset, _, config = bucket_dataset(train_batch_size=batch_size, random_flip=True, **options)
        return list(itertools.islice(loader_of(dataset, config, rank, num_ranks, 0), count))

    whole = first_batches(0, 1, 12)
    options = {"gradient_accumulation_steps": accumulation}
    shares = [first_batches(rank, num_ranks, 12 // num_ranks, **options) for rank in range(num_ranks)]
    for batch, same in zip(whole, itertools.chain(*zip(*shares)), strict=True):
        assert_equal(batch, same)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_later_start_continues_with_all_options(num_workers):
    options = {"train_batch_size": 2, "random_flip": True, "repeats": 2, "caption_dropout_probability": 0.5}
    dataset, _, config = bucket_dataset(gradient_accumulation_steps=2, dataloader_num_workers=num_workers, **options)
    run = itertools.islice(loader_of(dataset, config, 1, 2, 0), 14)
    resumed = loader_of(bucket_dataset(gradient_accumulation_steps=2, **options)[0], config, 1, 2, 5)
    for batch, same in zip(itertools.islice(run, 10, None), itertools.islice(resumed, 4), strict=True):
        assert_equal(batch, same)


# ---- prompts ----


def test_every_prompt_is_there_once_in_the_order_of_its_first_use():
    photos = [make_photo(number, prompt=prompt) for number, prompt in enumerate("baba")]
    class_photos = [make_photo(number, prompt=prompt) for number, prompt in enumerate("dad")]
    config = make_config(validation_prompt=["v", "a"])
    assert prompts_of(photos, class_photos, config) == ["b", "a", "d", "v", ""]
    assert prompts_of(photos, [], make_config()) == ["b", "a", ""]
    assert prompts_of([make_photo(0, prompt="")], [], config) == ["", "v", "a"]


def test_the_prompts_of_the_class_are_those_that_are_trained_on():
    photos = make_photos(range(2))
    base_model = {"prior_source": "base_model", "class_prompt": "a dog"}
    wanted = ["photo 0", "photo 1", "class of 0", "class of 1", ""]
    assert prompts_of(photos, [], make_config(with_prior_preservation=True, **base_model)) == wanted
    assert prompts_of(photos, [], make_config(**base_model)) == ["photo 0", "photo 1", ""]


PRIORS = {
    "images": {"with_prior_preservation": True, "class_prompt": "a dog"},
    "base_model": {"with_prior_preservation": True, "class_prompt": "a dog", "prior_source": "base_model"},
}


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_class_row_has_the_class_prompt_and_the_instance_row_its_own(batch_size, buckets, prior):
    classes = [make_photo(number, 192, 192) for number in CLASSES] if prior == "images" else []
    make = bucket_dataset if buckets else square_dataset
    dataset, prompts, config = make(class_photos=classes, train_batch_size=batch_size, **PRIORS[prior])
    for batch in batches_of(dataset, config, 12):
        numbers = [int(value) for value in ((batch.pixel_values[:, 0, 0, 0] + 1) * 127.5).round()]
        words = [prompts[row] for row in batch.prompt_rows]
        assert batch.num_instances == batch_size and len(words) == 2 * batch_size
        assert words[:batch_size] == [f"photo {number}" for number in numbers[:batch_size]]
        assert all(number < 100 for number in numbers[:batch_size])
        if prior == "images":
            assert words[batch_size:] == [f"photo {number}" for number in numbers[batch_size:]]
            assert all(number >= 100 for number in numbers[batch_size:])
        else:
            assert words[batch_size:] == [f"class of {number}" for number in numbers[batch_size:]]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("buckets", [False, True])
def test_with_the_base_model_as_prior_the_class_row_is_the_instance_row_but_for_its_prompt(batch_size, buckets):
    make = bucket_dataset if buckets else square_dataset
    options = {"random_flip": True, "caption_dropout_probability": 0.5, "train_batch_size": batch_size}
    dataset, prompts, config = make(**options, **PRIORS["base_model"])
    for batch in batches_of(dataset, config, 8):
        for name in ("pixel_values", "posterior_noise", "noise", "timesteps", "size_conditions"):
            rows = getattr(batch, name)
            assert torch.equal(rows[:batch_size], rows[batch_size:])
        assert all(prompts[row].startswith("class of") for row in batch.prompt_rows[batch_size:])


# ---- captions that are dropped ----


@pytest.mark.parametrize("prior", [None, *PRIORS])
@pytest.mark.parametrize("probability, share", [(0.0, 0), (0.3, 0.3), (1.0, 1)])
def test_captions_are_dropped_from_instance_rows_alone(probability, share, prior):
    classes = CLASSES if prior == "images" else []
    dataset, prompts, _ = make_dataset(
        classes=classes, caption_dropout_probability=probability, **PRIORS.get(prior, {})
    )
    samples = [dataset[k] for k in range(1000)]
    dropped = [prompts[instance.prompt_row] == "" for instance, *_ in samples]
    assert sum(dropped) / 1000 == pytest.approx(share, abs=0.05 if 0 < share < 1 else 0)
    assert all(prompts[row.prompt_row] for _, *class_rows in samples for row in class_rows)


def test_dropping_captions_changes_nothing_else():
    plain, dropping = make_dataset()[0], make_dataset(caption_dropout_probability=0.5)[0]
    for k in range(20):
        for row, other in zip(plain[k], dropping[k]):
            assert torch.equal(row.pixel_values, other.pixel_values) and row.noise_seed == other.noise_seed


# ---- sizes, flips and masks ----


def square_dataset(class_photos=(), **options):
    """Photos of one shape, larger than their crops, which were once larger still."""
    photos = [make_photo(i, 30, 40, original_size=(300 + i, 400 + i)) for i in INSTANCES]
    return dataset_of(photos, list(class_photos), **options)


@pytest.mark.parametrize("center_crop", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_every_row_has_its_own_sizes(batch_size, center_crop):
    """What SDXL is told is of the image in that row, also where it is a class image."""
    classes = [make_photo(i, 20, 16 + i - 100, original_size=(100, i)) for i in CLASSES]
    options = {"train_batch_size": batch_size, "center_crop": center_crop, "random_flip": True}
    dataset, _, config = square_dataset(class_photos=classes, **options)
    originals = {i: (300 + i, 400 + i) for i in INSTANCES} | {i: (100, i) for i in CLASSES}
    widths = {i: 40 for i in INSTANCES} | {i: i - 84 for i in CLASSES}
    for batch in batches_of(dataset, config, 20):
        for pixel_values, sizes in zip(batch.pixel_values, batch.size_conditions.tolist(), strict=True):
            number, top, left, mirrored = decode_mirrored(pixel_values)
            left = widths[number] - left - RESOLUTION if mirrored else left
            assert sizes == [*originals[number], top, left, RESOLUTION, RESOLUTION]


@pytest.mark.parametrize("kind", [0, 1])
def test_half_of_the_samples_are_mirrored(kind):
    plain, flipping = make_dataset()[0], make_dataset(random_flip=True)[0]
    mirrored = 0
    for k in range(400):
        *place, flipped = decode_mirrored(flipping[k][kind].pixel_values)
        assert tuple(place) == decode(plain[k][kind].pixel_values)  # all else stays
        assert flipping[k][kind].noise_seed == plain[k][kind].noise_seed
        mirrored += flipped
    assert 160 < mirrored < 240


def test_instances_and_class_images_are_mirrored_apart():
    dataset = make_dataset(random_flip=True)[0]
    flips = [[decode_mirrored(row.pixel_values)[3] for row in dataset[k]] for k in range(100)]
    assert 30 < sum(a == b for a, b in flips) < 70


def test_a_mirrored_crop_is_a_crop_of_the_mirrored_photo():
    """Its left edge is where diffusers' own example would have cropped the photo after it mirrored it."""
    photo = make_photo(7, 24, 40)
    dataset, _, _ = dataset_of([photo], [], random_flip=True)
    for k in range(40):
        row = dataset[k][0]
        top, left = row.size_conditions[2:4]
        pixels = photo.pixels[:, ::-1] if decode_mirrored(row.pixel_values)[3] else photo.pixels
        expected = pixels[top : top + RESOLUTION, left : left + RESOLUTION]
        assert np.array_equal(((row.pixel_values + 1) * 127.5).round().permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("unmasked_weight", [0.0, 0.25, 1.0, 3.0])
def test_the_mask_is_cropped_and_mirrored_with_its_photo(unmasked_weight):
    """The mask is as white as the column's number, which the third channel holds too."""
    mask = np.tile(np.arange(40, dtype=np.uint8) * 6, (24, 1))
    dataset, _, _ = dataset_of([make_photo(1, mask=mask)], [], random_flip=True, unmasked_weight=unmasked_weight)
    for k in range(30):
        row = dataset[k][0]
        inside = (row.pixel_values[2:] + 1) * 127.5 * 6 / 255
        torch.testing.assert_close(row.loss_weights, inside + unmasked_weight * (1 - inside))


def test_without_masks_there_are_no_loss_weights():
    dataset, _, config = make_dataset(train_batch_size=2)
    assert all(batch.loss_weights is None for batch in batches_of(dataset, config, 5))


@pytest.mark.parametrize("prior", [None, *PRIORS])
def test_rows_without_a_mask_weigh_one_everywhere(prior):
    photos = [make_photo(1, mask=np.full((24, 40), 51, np.uint8)), make_photo(2)]
    classes = make_photos(CLASSES) if prior == "images" else []
    dataset, _, config = dataset_of(photos, classes, train_batch_size=2, **PRIORS.get(prior, {}))
    for batch in batches_of(dataset, config, 10):
        numbers = [int(value) for value in ((batch.pixel_values[:, 0, 0, 0] + 1) * 127.5).round()]
        masked = [number == 1 and row < batch.num_instances for row, number in enumerate(numbers)]
        assert batch.loss_weights.shape == (len(numbers), 1, RESOLUTION, RESOLUTION)
        for weights, is_masked in zip(batch.loss_weights, masked):
            torch.testing.assert_close(weights, torch.full_like(weights, 0.2 if is_masked else 1))


# ---- repeats and passes ----


@pytest.mark.parametrize("repeats", [1, 2, 7])
def test_every_pass_shows_every_photo_so_many_times(repeats):
    dataset, _, config = make_dataset(repeats=repeats)
    length = samples_per_pass(dataset.photos, config)
    assert length == 5 * repeats
    numbers = [number for number, _, _ in draws(dataset, 0, 4 * length)]
    for first in range(0, len(numbers), length):
        assert set(Counter(numbers[first : first + length]).values()) == {repeats}
    for first in range(0, len(numbers), 5):  # and is never far away
        assert len(set(numbers[first : first + 5])) == 5


# ---- buckets ----

BUCKET_SIZES = [(128, 256), (192, 192), (140, 256), (200, 192), (192, 220), (256, 130), (128, 256)]


def bucket_dataset(class_photos=(), sizes=BUCKET_SIZES, **options):
    """Photos for the three buckets of 192: (128, 256), (192, 192), (256, 128)."""
    photos = [make_photo(i, *size, original_size=(3 * size[0], 3 * size[1])) for i, size in enumerate(sizes)]
    return dataset_of(photos, list(class_photos), **{"resolution": 192, "aspect_ratio_buckets": True} | options)


def test_without_buckets_all_shapes_are_square():
    dataset, _, config = bucket_dataset(sizes=[(192, 220), (220, 192)], aspect_ratio_buckets=False)
    assert {batch.pixel_values.shape for batch in batches_of(dataset, config, 5)} == {(1, 3, 192, 192)}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
@pytest.mark.parametrize("repeats", [1, 3])
def test_every_batch_is_of_one_bucket_and_every_pass_shows_every_photo(batch_size, repeats):
    dataset, _, config = bucket_dataset(train_batch_size=batch_size, repeats=repeats)
    counts = Counter(shape_of(photo.original_size, config) for photo in dataset.photos)
    assert counts == {(128, 256): 3, (192, 192): 3, (256, 128): 1}
    length = samples_per_pass(dataset.photos, config)
    assert length == sum(batch_size * math.ceil(count * repeats / batch_size) for count in counts.values())
    batches = batches_of(dataset, config, 3 * length // batch_size)
    for first in range(0, len(batches), length // batch_size):
        seen = Counter()
        for batch in batches[first : first + length // batch_size]:
            for pixel_values, sizes in zip(batch.pixel_values, batch.size_conditions.tolist()):
                number = decode(pixel_values)[0]
                seen[number] += 1
                assert tuple(sizes[4:]) == tuple(pixel_values.shape[1:]) == dataset.crops.shapes[number]
                assert tuple(sizes[:2]) == dataset.photos[number].original_size
        assert set(seen) == set(range(7)) and sum(seen.values()) == length
        assert min(seen.values()) == repeats  # what fills a last batch comes on top
        for shape, count in counts.items():
            same_shape = [seen[number] for number in seen if dataset.crops.shapes[number] == shape]
            assert sum(same_shape) - count * repeats < batch_size
            assert max(same_shape) - min(same_shape) <= math.ceil(batch_size / count)


def test_the_order_of_buckets_is_mixed_and_differs_between_passes():
    dataset, _, config = bucket_dataset()
    shapes = [tuple(batch.pixel_values.shape[2:]) for batch in batches_of(dataset, config, 10 * 7)]
    passes = {tuple(shapes[first : first + 7]) for first in range(0, len(shapes), 7)}
    assert len(passes) > 5


def test_photos_of_one_bucket_come_as_they_would_without_buckets():
    options = {"resolution": 64, "center_crop": True}
    one = bucket_dataset(sizes=[(64, 64)] * 5, **options)[0]
    other = bucket_dataset(sizes=[(64, 64)] * 5, aspect_ratio_buckets=False, **options)[0]
    assert draws(one, 0, 20) == draws(other, 0, 20)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("center_crop", [False, True])
def test_class_images_take_the_shape_of_their_batch(batch_size, center_crop):
    """A square class image covers each bucket, and is cropped to it; it keeps its own original size."""
    classes = [make_photo(i, 100 + i, 100, original_size=(100 + i, 100)) for i in (0, 60)]
    options = {"train_batch_size": batch_size, "center_crop": center_crop, "image_interpolation_mode": "nearest"}
    dataset, _, config = bucket_dataset(class_photos=classes, **options)
    shapes = set()
    for batch in batches_of(dataset, config, 12):
        shape = tuple(batch.pixel_values.shape[2:])
        shapes.add(shape)
        for pixel_values, sizes in list(zip(batch.pixel_values, batch.size_conditions.tolist()))[batch_size:]:
            number, *corner = ((pixel_values[:, 0, 0] + 1) * 127.5).round().int().tolist()
            original = (100 + number, 100)
            resized = cover(original, shape)
            assert min(np.subtract(resized, shape)) == 0
            assert tuple(sizes[:2]) == original and tuple(sizes[4:]) == shape
            top, left = sizes[2:4]
            assert 0 <= top <= resized[0] - shape[0] and 0 <= left <= resized[1] - shape[1]
            if center_crop:
                assert (top, left) == ((resized[0] - shape[0]) // 2, (resized[1] - shape[1]) // 2)
            expected = (top * original[0] / resized[0], left * original[1] / resized[1])
            assert corner == pytest.approx(expected, abs=1)  # the pixels say which part of the image they are
    assert len(shapes) == 3


# ---- crops that stay ----


def test_crops_that_are_to_be_encoded_once_are_drawn_once():
    dataset = make_dataset(cache_latents="on")[0]
    corners = {}
    for kind in (0, 1):
        for number, top, left in draws(dataset, kind, 60):
            corners.setdefault(number, set()).add((top, left))
    assert set(corners) == {*INSTANCES, *CLASSES}
    assert all(len(places) == 1 for places in corners.values())
    assert len(set.union(*corners.values())) > 4  # each photo has its own


@pytest.mark.parametrize("options", [{"center_crop": True}, {"cache_latents": "on"}])
@pytest.mark.parametrize("random_flip", [False, True])
def test_fixed_crops_are_all_that_samples_show(options, random_flip):
    classes = [make_photo(i, 192, 192) for i in CLASSES]
    dataset, prompts, config = bucket_dataset(class_photos=classes, random_flip=random_flip, **options)
    crops = dataset.crops.fixed()
    assert len(crops) == len(set(crops)) == (7 + 3 * 3) * (2 if random_flip else 1)
    moments = {crop: torch.tensor(number) for number, crop in enumerate(crops)}
    dataset = DreamBoothDataset(dataset.crops, prompts, moments, config)
    rows = [row for k in range(500) for row in dataset[k]]
    assert all(row.pixel_values is None for row in rows)
    assert {row.moments.item() for row in rows} == set(range(len(crops)))


def test_photos_of_their_crop_s_size_have_fixed_crops():
    config = make_config()
    assert len(Crops([make_photo(0, 16, 16), make_photo(1, 16, 16)], [], config).fixed()) == 2
    assert Crops([make_photo(0, 16, 16), make_photo(1, 16, 17)], [], config).fixed() is None
    assert Crops([make_photo(0, 16, 16)], make_photos(CLASSES), config).fixed() is None
