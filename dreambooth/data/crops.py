"""Crops: the part of a photo that a row of a batch shows, a function of the seed and the sample's number."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dreambooth.data.images import resize
from dreambooth.data.photos import Photo
from dreambooth.data.sizes import Size, cover, shape_of
from dreambooth.options.data import DataOptions
from dreambooth.seeds import Stream, generator_of


@dataclass(frozen=True)
class Crop:
    """A part of a photo, as a row shows it: resized, cropped, then mirrored or not."""

    is_class: bool
    number: int  # of the photo, among the instance or the class photos
    resized: Size
    corner: tuple[int, int]  # (top, left) in the resized photo, px
    shape: Size
    mirrored: bool

    def size_conditions(self, original_size: Size) -> tuple[int, ...]:
        """Return original height, width, crop top, left, target height, width, px (arXiv 2307.01952, section 2.2).

        A mirrored crop counts as a crop of the mirrored photo, which is where its left edge is measured.
        """
        top, left = self.corner
        left = self.resized[1] - left - self.shape[1] if self.mirrored else left
        return (*original_size, top, left, *self.shape)

    def cut(self, pixels: np.ndarray, interpolation: str) -> np.ndarray:
        """Return this part of a photo's pixels (height, width, 3) or of its mask (height, width)."""
        top, left = self.corner
        height, width = self.shape
        pixels = resize(pixels, self.resized, interpolation)[top : top + height, left : left + width]
        return pixels[:, ::-1] if self.mirrored else pixels


def central_crop(original_size: Size, shape: Size) -> Crop:
    """Return the largest central part of a photo of this size that has the proportions of `shape`, as `shape`."""
    resized = cover(original_size, shape)
    top, left = ((side - wanted) // 2 for side, wanted in zip(resized, shape))
    return Crop(False, 0, resized, (top, left), shape, False)


def pixel_values(pixels: np.ndarray) -> Tensor:
    """Return what the VAE encodes, (3, height, width) fp32 in [-1, 1], of pixels (height, width, 3) uint8."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous().float() / 127.5 - 1


def share_inside(mask: np.ndarray) -> Tensor:
    """Return how far each pixel is inside a mask, (1, height, width) fp32 from 0 to 1, of (height, width) uint8."""
    return torch.from_numpy(mask.copy())[None].float() / 255


class Crops:
    """The crops of a run's photos: a different one for each sample, unless crops are fixed."""

    def __init__(self, photos: Sequence[Photo], class_photos: Sequence[Photo], config: DataOptions):
        self.photos, self.class_photos, self.config = photos, class_photos, config
        self.shapes = tuple(shape_of(photo.original_size, config) for photo in photos)
        self.frozen = config.cache_latents == "on"  # one random crop per photo for the whole run

    # ---- which ----

    def draw(self, is_class: bool, number: int, shape: Size, k: int) -> Crop:
        """Return the crop of photo `number` that sample k shows, in a shape (height, width), px."""
        stream = Stream.CLASS_FLIP if is_class else Stream.INSTANCE_FLIP
        mirrored = self.config.random_flip and bool(generator_of(self.config.seed, stream, k).random() < 0.5)
        return self._crop(is_class, number, shape, k, mirrored)

    def fixed(self) -> list[Crop] | None:
        """Return all crops of the run, or None if crops vary from sample to sample."""
        flips = (False, True) if self.config.random_flip else (False,)
        places = [(False, number, shape) for number, shape in enumerate(self.shapes)]
        places += [
            (True, number, shape) for number in range(len(self.class_photos)) for shape in sorted({*self.shapes})
        ]
        crops = [self._crop(*place, index=0, mirrored=mirrored) for place in places for mirrored in flips]
        varying = not (self.config.center_crop or self.frozen)
        return None if varying and any(crop.resized != crop.shape for crop in crops) else crops

    def still(self, number: int) -> Crop:
        """Return the crop that stands for instance photo `number`: its own if crops are fixed, else the central one."""
        crop = self._crop(False, number, self.shapes[number], index=0, mirrored=False)
        if self.fixed() is not None:
            return crop
        top, left = np.subtract(crop.resized, crop.shape) // 2
        return replace(crop, corner=(int(top), int(left)))

    def _crop(self, is_class: bool, number: int, shape: Size, index: int, mirrored: bool) -> Crop:
        """Return a crop of photo `number`, at random by `index` unless crops are fixed."""
        photo = (self.class_photos if is_class else self.photos)[number]
        stream = Stream.CLASS_CROP if is_class else Stream.INSTANCE_CROP
        resized = photo.size
        if is_class and self.config.aspect_ratio_buckets:
            resized = cover(resized, shape)
        spare = np.subtract(resized, shape)
        if self.config.center_crop:
            top, left = spare // 2
        else:
            generator = generator_of(self.config.seed, stream, number if self.frozen else index)
            top, left = generator.integers(0, spare + 1)
        return Crop(is_class, number, resized, (int(top), int(left)), shape, mirrored)

    # ---- what they show ----

    def photo(self, crop: Crop) -> Photo:
        """Return the photo that a crop is of."""
        return (self.class_photos if crop.is_class else self.photos)[crop.number]

    def pixels(self, crop: Crop) -> np.ndarray:
        """Return what a crop shows, (height, width, 3) uint8."""
        return crop.cut(self.photo(crop).pixels, self.config.image_interpolation_mode)

    def pixel_values(self, crop: Crop) -> Tensor:
        """Return what a crop shows, (3, height, width) fp32 in [-1, 1]."""
        return pixel_values(self.pixels(crop))

    def loss_weights(self, crop: Crop) -> Tensor | None:
        """Return the weight of the loss at every pixel (1, height, width), or None if the photo has no mask."""
        mask = self.photo(crop).mask
        if mask is None:
            return None
        inside = share_inside(crop.cut(mask, "bilinear"))
        return inside + self.config.unmasked_weight * (1 - inside)
