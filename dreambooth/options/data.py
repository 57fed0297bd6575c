"""Groups of options that functions of the data room read together. They combine options and declare none."""

from dataclasses import dataclass

from dreambooth.options.drawing import PriorOptions
from dreambooth.options.photos import CacheOptions, PhotoOptions
from dreambooth.options.steps import BatchOptions, LossOptions


@dataclass(frozen=True, kw_only=True)
class ImageOptions(PhotoOptions, PriorOptions):
    """What it takes to read instance images and class images, with their prompts."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(PhotoOptions, CacheOptions, LossOptions, BatchOptions):
    """What decides which photo, crop and noise sample k consists of."""
