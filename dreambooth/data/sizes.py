"""The shapes of training images: a square, or buckets of about the same area. Sizes are (height, width), px."""

import functools
import math

from dreambooth.options.photos import BUCKET_STEP, PhotoOptions

MAX_ASPECT = 2  # longer side divided by shorter side

Size = tuple[int, int]  # height, width, px


@functools.cache
def buckets(resolution: int) -> tuple[Size, ...]:
    """Return the buckets of a resolution: sides are multiples of 64 px, area resolution² or just below.

    512: (384, 640), (448, 576), (512, 512), (576, 448), (640, 384)
    """
    side, area = resolution // BUCKET_STEP, resolution**2 // BUCKET_STEP**2
    pairs = [(side, side)] + [(short, area // short) for short in range(1, side + 1)]
    pairs = {pair for short, long in pairs if long <= MAX_ASPECT * short for pair in ((short, long), (long, short))}
    return tuple((BUCKET_STEP * height, BUCKET_STEP * width) for height, width in sorted(pairs))


def shape_of(original_size: Size, config: PhotoOptions) -> Size:
    """Return the training shape of a photo of this size: the square, or the bucket of the nearest aspect ratio."""
    if not config.aspect_ratio_buckets:
        return config.resolution, config.resolution
    aspect = math.log(original_size[1] / original_size[0])
    return min(buckets(config.resolution), key=lambda shape: abs(math.log(shape[1] / shape[0]) - aspect))


def cover(size: Size, shape: Size) -> Size:
    """Return the smallest size with the aspect ratio of `size` into which a crop of `shape` fits."""
    scale = max(wanted / side for side, wanted in zip(size, shape))
    height, width = (max(wanted, round(side * scale)) for side, wanted in zip(size, shape))
    return height, width


def instance_size(original_size: Size, config: PhotoOptions) -> Size:
    """Return the size to which an instance photo is resized: it covers the photo's training shape."""
    return cover(original_size, shape_of(original_size, config))


def class_size(original_size: Size, config: PhotoOptions) -> Size:
    """Return the size to which a class photo is resized.

    With buckets, it is resized again to the shape of each batch that it occurs in. Here it is only made smaller, and
    stays large enough for every bucket.
    """
    if not config.aspect_ratio_buckets:
        return instance_size(original_size, config)
    longest = max(max(shape) for shape in buckets(config.resolution))
    return original_size if min(original_size) <= longest else cover(original_size, (longest, longest))
