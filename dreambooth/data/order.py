"""Which sample shows which photo, and which device gets it: functions of the seed and a number, without memory."""

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from dreambooth.data.photos import Photo
from dreambooth.data.sizes import Size, shape_of
from dreambooth.options.training import TrainingConfig
from dreambooth.seeds import Stream, generator_of

# ---- random numbers ----


# ---- the order of photos ----


def samples_per_pass(photos: Sequence[Photo], config: TrainingConfig) -> int:
    """Return the samples in which every photo occurs `repeats` times, and with buckets, every batch is full."""
    counts = Counter(shape_of(photo.original_size, config) for photo in photos)
    unit = batch_unit(config)
    return sum(math.ceil(count * config.repeats / unit) * unit for count in counts.values())


def batch_unit(config: TrainingConfig) -> int:
    """Return how many samples in a row have to be of one shape."""
    return config.train_batch_size if config.aspect_ratio_buckets else 1


@functools.lru_cache(maxsize=4)  # every sample of a pass asks for it
def order_of_pass(seed: int, number: int, shapes: tuple[Size, ...], repeats: int, unit: int) -> tuple[int, ...]:
    """Return the photos of a pass in their order, by number; `shapes` are the photos' own.

    Each run of `unit` samples is of one shape. Where a shape's photos do not fill its last run, its first ones of this
    pass occur once more.
    """
    queues: dict[Size, list[int]] = {}
    for part in range(repeats):
        for photo in generator_of(seed, Stream.INSTANCE_ORDER, number * repeats + part).permutation(len(shapes)):
            queues.setdefault(shapes[photo], []).append(int(photo))
    runs = {shape: _runs(queue, unit) for shape, queue in sorted(queues.items())}
    turns = [shape for shape in runs for _ in range(math.ceil(len(queues[shape]) / unit))]
    turns = [turns[i] for i in generator_of(seed, Stream.BUCKET_ORDER, number).permutation(len(turns))]
    return tuple(photo for shape in turns for photo in next(runs[shape]))


def _runs(queue: list[int], unit: int) -> Iterator[list[int]]:
    for first in range(0, len(queue), unit):
        yield [queue[i % len(queue)] for i in range(first, first + unit)]


# ---- samples to devices ----


def samples_of_step(step: int, config: TrainingConfig, num_ranks: int) -> range:
    """Return the samples k that optimizer step `step` uses on all devices together, the first step being 1."""
    count = config.train_batch_size * config.gradient_accumulation_steps * num_ranks
    return range((step - 1) * count, step * count)


class GlobalSampler:
    """Yields, without end, this device's share of the samples: lists of `batch_size` numbers k.

    Each optimizer step uses those of `samples_of_step`, whatever the split over devices and accumulation.
    Every list begins at a multiple of the batch size, as buckets need it.
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
