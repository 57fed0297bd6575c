"""Random streams: every random number in a run is a function of the seed, its purpose and an index."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What a random number is for. Streams are independent: another draw from one changes nothing in the others."""

    INSTANCE_ORDER = 0
    CLASS_ORDER = 1
    INSTANCE_CROP = 2
    CLASS_CROP = 3
    INSTANCE_NOISE = 4
    CLASS_NOISE = 5
    CLASS_IMAGE = 6
    VALIDATION = 7
    INSTANCE_FLIP = 8
    CLASS_FLIP = 9
    CAPTION_DROPOUT = 10
    BUCKET_ORDER = 11
    FACTORS = 12


def seed_of(seed: int, stream: Stream, index: int) -> int:
    """Return the 64-bit seed of draw `index` from a stream of the run with this seed."""
    return int(np.random.SeedSequence((seed, stream, index)).generate_state(1, np.uint64)[0])


def generator_of(seed: int, stream: Stream, index: int) -> np.random.Generator:
    """Return a generator for draw `index` from a stream of the run with this seed."""
    return np.random.default_rng(seed_of(seed, stream, index))


@contextmanager
def torch_seed(seed: int) -> Iterator[None]:
    """Inside this context torch's CPU generator starts at `seed`; afterwards it continues as if nothing was drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
