"""Renders as tensors: what the models of the toy world learn from."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from toyworld.render import render_with_mask
from toyworld.world import Look, Scene, sample_look, sample_scene


@dataclass(frozen=True)
class Pictures:
    """pixels: (n, 3, size, size) in [-1, 1], channels last    masks: (n, 1, size, size), 1 inside the character"""

    pixels: Tensor
    masks: Tensor


def sample(stream: str, number: int) -> tuple[Look, Scene]:
    """Return a random look in a random scene, the same for the same stream and number."""
    rng = random.Random(f"{stream} {number}")
    return sample_look(rng), sample_scene(rng)


def render_batch(pairs: Sequence[tuple[Look, Scene]], size: int = 64) -> Pictures:
    rendered = [render_with_mask(look, scene, size) for look, scene in pairs]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image, _ in rendered])).permute(0, 3, 1, 2)
    masks = torch.from_numpy(np.stack([np.asarray(mask) for _, mask in rendered]))[:, None]
    return Pictures(pixels / 127.5 - 1, masks / 255)
