"""Which sample shows which photo, and on which device: stateless functions of the seed and the sample's number."""

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from dreambooth.data.photos import Photo
from dreambooth.data.sizes import Size, shape_of
from dreambooth.options.data import DataOptions
from dreambooth.options.steps import BatchOptions
from dreambooth.seeds import Stream, generator_of

# ---- photos to samples ----


def samples_per_pass(photos: Sequence[Photo], config: DataOptions) -> int:
    """Return the number of samples in which every photo occurs `repeats` times and, with buckets, batches are full."""
    counts = Counter(shape_of(photo.original_size, config) for photo in photos)
    unit = batch_unit(config)
    return sum(math.ceil(count * config.repeats / unit) * unit for count in counts.values())


def batch_unit(config: DataOptions) -> int:
    """Return how many consecutive samples must have one shape."""
    return config.train_batch_size if config.aspect_ratio_buckets else 1


@functools.lru_cache(maxsize=4)  # called for every sample of a pass
def order_of_pass(seed: int, number: int, shapes: tuple[Size, ...], repeats: int, unit: int) -> tuple[int, ...]:
    """Return the numbers of the photos of pass `number` in their order; `shapes` are the photos' shapes.

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
