"""Which sample shows which photo, and on which device: stateless functions of the seed and the sample's number."""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from dreambooth.data.photos import Photo
from dreambooth.data.sizes import Size, shape_of
from dreambooth.options.data import DataOptions
from dreambooth.options.steps import BatchOptions
from dreambooth.seeds import Stream, generator_of

# ---- photos to samples ----


def samples_per_pass(photos: Sequence[Photo], config: DataOptions) -> int:
    """Return the number of samples in a pass over the photos: with buckets, so many that batches are full.

    Every photo of the subject that has the most samples occurs `repeats` times, and those of others more often, since
    all subjects have equally many samples.
    """
    folders = numbers_by_folder(photos)
    shapes = [shape_of(photo.original_size, config) for photo in photos]
    return len(folders) * max(own_pass([shapes[number] for number in own], config) for own in folders.values())


def own_pass(shapes: Iterable[Size], config: DataOptions) -> int:
    """Return the number of samples in which a subject's photos, of these shapes, occur `repeats` times."""
    unit = batch_unit(config)
    return sum(math.ceil(count * config.repeats / unit) * unit for count in Counter(shapes).values())


def numbers_by_folder(photos: Sequence[Photo]) -> dict[str, list[int]]:
    """Return the numbers of the photos in each subject's or class's folder, in the order of the folders."""
    numbers: dict[str, list[int]] = {}
    for number, photo in enumerate(photos):
        numbers.setdefault(photo.folder, []).append(number)
    return numbers


def whose_turn(k: int, turns: Sequence[str], unit: int) -> tuple[str, int]:
    """Return which of several owners sample k belongs to, and how many samples before it are the owner's too.

    Owners take turns of `unit` samples, in the order of `turns`, again and again.
    """
    turn, place = divmod(k, unit)
    rounds, position = divmod(turn, len(turns))
    owner = turns[position]
    before = rounds * turns.count(owner) + turns[:position].count(owner)
    return owner, before * unit + place


def place_in_passes(k: int, turns: Sequence[str], unit: int, lengths: Mapping[str, int]) -> tuple[str, int, int]:
    """Return the owner of sample k, the number of its pass, which no other owner's pass has, and the place in it.

    A pass of an owner has `lengths[owner]` samples.
    """
    owner, own_k = whose_turn(k, turns, unit)
    pass_number, place = divmod(own_k, lengths[owner])
    return owner, pass_number * len(turns) + turns.index(owner), place


def batch_unit(config: DataOptions) -> int:
    """Return how many consecutive samples must have one shape."""
    return config.train_batch_size if config.aspect_ratio_buckets else 1


@functools.lru_cache(maxsize=64)  # called for every sample of a pass; subjects take turns
def order_of_pass(seed: int, number: int, shapes: tuple[Size, ...], repeats: int, unit: int) -> tuple[int, ...]:
    """Return the photos of one subject in their order in pass `number`, by their numbers; `shapes` are their shapes.

    Each run of `unit` samples has one shape. If a shape's photos do not fill its last run, the run is filled up with
    the first photos of that shape in this pass.
    """
    queues: dict[Size, list[int]] = {}
    for part in range(repeats):
        for photo in generator_of(seed, Stream.INSTANCE_ORDER, number * repeats + part).permutation(len(shapes)):
            queues.setdefault(shapes[photo], []).append(int(photo))
    runs = {shape: _runs(queue, unit) for shape, queue in sorted(queues.items())}
    turns = [shape for shape in runs for _ in range(0, len(queues[shape]), unit)]
    turns = [turns[i] for i in generator_of(seed, Stream.BUCKET_ORDER, number).permutation(len(turns))]
    return tuple(photo for shape in turns for photo in next(runs[shape]))


def _runs(queue: list[int], unit: int) -> Iterator[list[int]]:
    """Yield a queue in runs of `unit`, the last one filled up from the beginning."""
    for first in range(0, len(queue), unit):
        yield [queue[i % len(queue)] for i in range(first, first + unit)]


# ---- samples to devices ----


def samples_of_step(step: int, config: BatchOptions, num_ranks: int) -> range:
    """Return the samples k of optimizer step `step`, counted from 1, on all devices together."""
    count = config.train_batch_size * config.gradient_accumulation_steps * num_ranks
    return range((step - 1) * count, step * count)


class GlobalSampler:
    """Yields this device's share of the samples without end, as lists of `batch_size` numbers k.

    Each optimizer step uses the samples of `samples_of_step`, however they are split over devices and accumulation.
    Every list starts at a multiple of the batch size, as buckets require.
    """

    def __init__(self, batch_size: int, accumulation: int, rank: int, num_ranks: int, first_step: int):
        self.batch_size, self.rank, self.num_ranks = batch_size, rank, num_ranks
        self.first_forward = first_step * accumulation

    def __iter__(self) -> Iterator[list[int]]:
        forward = self.first_forward
        while True:
            first = (forward * self.num_ranks + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
            forward += 1
