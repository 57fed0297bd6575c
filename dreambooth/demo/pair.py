"""One seed drawn twice: by the base model, and with adapters whose strengths change from one drawing to the next."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from PIL import Image

from dreambooth.drawing.draw import draw_images
from dreambooth.drawing.pipelines import Adapter, Reader, set_strengths
from dreambooth.errors import UserError
from dreambooth.options.drawing import DemoOptions, PictureOptions

MOST_STEPS, MOST_LETTERS = 150, 2000
STRENGTHS, GUIDANCE, SEEDS = (-1.0, 2.0), (1.0, 20.0), (0, 2**53 - 1)  # a seed that JavaScript can hold
KEPT = 16  # images of the base model


@dataclass(frozen=True)
class Drawing:
    """What is asked for. It names no file and no model."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance: float
    strengths: tuple[float, ...]  # of each adapter

    def check(self, adapters: int) -> None:
        """Raise UserError, naming the field, if a value is of a wrong type, or out of range."""
        for name, text in (("Prompt", self.prompt), ("Negative prompt", self.negative_prompt)):
            if not isinstance(text, str) or len(text) > MOST_LETTERS:
                raise UserError(f"{name}: write a text of at most {MOST_LETTERS:,} letters")
        if len(self.strengths) != adapters:
            raise UserError(f"Strength: give {adapters}, one for each adapter")
        _check_number("Seed", self.seed, SEEDS, whole=True)
        _check_number("Steps", self.steps, (1, MOST_STEPS), whole=True)
        _check_number("Guidance", self.guidance, GUIDANCE)
        for strength in self.strengths:
            _check_number("Strength", strength, STRENGTHS)


def check_first(adapters: Sequence[Adapter], config: DemoOptions) -> None:
    """Raise UserError, naming the field, if the page would begin with a value out of range."""
    numbers = config.seed, config.num_inference_steps, config.guidance_scale
    strengths = tuple(adapter.scale for adapter in adapters)
    Drawing(config.prompt, config.negative_prompt, *numbers, strengths).check(len(adapters))


def _check_number(name: str, value: Any, between: tuple[float, float], whole: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    low, high = between
    if not number or not low <= value <= high or (whole and value != int(value)):
        raise UserError(f"{name}: choose a {'whole ' if whole else ''}number from {low:,g} to {high:,g}")


class Pair:
    """A pipeline with adapters, not merged, as `dreambooth/drawing/pipelines.py` loads it. Not for several threads."""

    def __init__(self, pipeline: Any, adapters: Sequence[Adapter], readers: Sequence[Reader], config: PictureOptions):
        self.pipeline, self.adapters, self.readers, self.config = pipeline, adapters, readers, config
        pipeline.set_progress_bar_config(disable=True)
        self._of_base = lru_cache(maxsize=KEPT)(self._draw)  # strengths do not change it

    def draw(self, drawing: Drawing) -> tuple[Image.Image, Image.Image]:
        """Return the base model's image, and the adapted one from the same seed.

        Raises UserError if a value is out of range, or the device has too little memory.
        """
        drawing.check(len(self.adapters))
        try:
            return self._of_base(replace(drawing, strengths=(0.0,) * len(self.adapters))), self._draw(drawing)
        except torch.OutOfMemoryError as error:
            raise UserError("the device is out of memory: start with --dtype fp16, or a smaller --height") from error

    def _draw(self, drawing: Drawing) -> Image.Image:
        set_strengths(self.pipeline, self.adapters, drawing.strengths, self.readers)
        config = replace(
            self.config,
            negative_prompt=drawing.negative_prompt,
            num_inference_steps=int(drawing.steps),
            guidance_scale=float(drawing.guidance),
        )
        (image,) = draw_images(
            self.pipeline, [int(drawing.seed)], 1, prompt=drawing.prompt, **config.common_arguments()
        )
        return image
