"""The shapes that images are trained in: one square, or buckets of about its area. Sizes are (height, width), px."""

import functools
import math

from dreambooth.options.training import TrainingConfig

BUCKET_STEP = 64  # px
MAX_ASPECT = 2  # longer side by shorter side

Size = tuple[int, int]  # height, width, px


@functools.cache
def buckets(resolution: int) -> tuple[Size, ...]:
    """Return the buckets of a resolution: sides that are multiples of 64 px, area resolution² or the next below.

    512: (384, 640), (448, 576), (512, 512), (576, 448), (640, 384)
    """
    side, area = resolution // BUCKET_STEP, resolution**2 // BUCKET_STEP**2
    pairs = [(side, side)] + [(short, area // short) for short in range(1, side + 1)]
    pairs = {pair for short, long in pairs if long <= MAX_ASPECT * short for pair in ((short, long), (long, short))}
    return tuple((BUCKET_STEP * height, BUCKET_STEP * width) for height, width in sorted(pairs))


def shape_of(original_size: Size, config: TrainingConfig) -> Size:
    """Return the shape that a photo of this size is trained in: the square, or the bucket of the nearest aspect."""
    if not config.aspect_ratio_buckets:
        return config.resolution, config.resolution
    aspect = math.log(original_size[1] / original_size[0])
    return min(buckets(config.resolution), key=lambda shape: abs(math.log(shape[1] / shape[0]) - aspect))


def cover(size: Size, shape: Size) -> Size:
    """Return the smallest size with the aspect of `size` that a crop of `shape` fits in."""
    scale = max(wanted / side for side, wanted in zip(size, shape))
    height, width = (max(wanted, round(side * scale)) for side, wanted in zip(size, shape))
    return height, width


def instance_size(original_size: Size, config: TrainingConfig) -> Size:
    """Return the size that an instance photo is resized to: it covers the shape that it is trained in."""
    return cover(original_size, shape_of(original_size, config))


def class_size(original_size: Size, config: TrainingConfig) -> Size:
    """Return the size that a class photo is resized to.

    With buckets it is trained in the shape of whatever batch it falls into, and resized once more for it; so it is
    only made smaller here, and stays large enough for every bucket.
    """
    if not config.aspect_ratio_buckets:
        return instance_size(original_size, config)
    longest = max(max(shape) for shape in buckets(config.resolution))
    return original_size if min(original_size) <= longest else cover(original_size, (longest, longest))
