"""The styles: which colours the materials of a drawing get, and what happens to the picture afterwards.

A style is a `Style`: colour rules for ground and figure, the wobble of its lines, and a finish. A finish takes the
layers of a picture as float arrays in 0..255 and returns the picture:

    ground: (size, size, 3)    figure: (size, size, 3), black around it    mask: (size, size, 1), 0..1
    shadow: (size, size, 1), 0..1, where the figure keeps light from the ground
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

PAPER = np.array([252, 249, 240], np.float32)
INK = np.array([30, 27, 40], np.float32)
GRAPHITE = np.array([58, 56, 62], np.float32)
NIGHT = np.array([17, 11, 36], np.float32)


def _mix(a, b, share):
    return a + share * (b - a)


def _blur(image, radius):
    """image: float (h, w, 3), radius in px"""
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), np.float32)


@cache
def _texture(size, grain):
    """Smooth noise in -1..1, (size, size, 1), with blotches of about `grain` 64ths of a picture. Always the same."""
    cells = max(64 // grain, 2)
    coarse = np.random.RandomState(grain).rand(cells, cells) * 255
    picture = Image.fromarray(coarse.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture, np.float32)[..., None] / 127.5 - 1


@cache
def _grid(size):
    """Coordinates of the px centres in -1..1.  -> x (1, size, 1), y (size, 1, 1)"""
    line = ((np.arange(size, dtype=np.float32) + 0.5) / size) * 2 - 1
    return line[None, :, None], line[:, None, None]


# -- colours: (k, 3) -> those of MARK, LINE, SHADE and LIT, (k, 3) each


def photo_figure(colours):
    return colours, _mix(colours * 0.38, INK, 0.3), _mix(colours * 0.74, INK, 0.08), colours


def photo_ground(colours):
    return colours, colours * 0.88, colours * 0.85, colours


def watercolor_figure(colours):
    line, shade = _mix(colours * 0.55, PAPER, 0.1), _mix(colours * 0.82, PAPER, 0.12)
    return _mix(colours, PAPER, 0.1), line, shade, _mix(colours, PAPER, 0.24)


def watercolor_ground(colours):
    lit = _mix(colours, PAPER, 0.45)
    return lit, _mix(colours * 0.8, PAPER, 0.3), _mix(colours * 0.9, PAPER, 0.4), lit


def pencil_figure(colours):
    tint = _mix(colours, colours.mean(axis=1, keepdims=True), 0.25)
    graphite = np.broadcast_to(GRAPHITE, colours.shape)
    return _mix(tint, PAPER, 0.15), graphite, _mix(tint, PAPER, 0.35), _mix(tint, PAPER, 0.55)


def pencil_ground(colours):
    tint = _mix(colours, colours.mean(axis=1, keepdims=True), 0.7)
    lit = _mix(tint, PAPER, 0.65)
    line = np.broadcast_to(_mix(GRAPHITE, PAPER, 0.3), colours.shape)
    return _mix(tint, PAPER, 0.4), line, _mix(tint, PAPER, 0.55), lit


def _vivid(colours):
    low, high = colours.min(axis=1, keepdims=True), colours.max(axis=1, keepdims=True)
    pure = (colours - 0.75 * low) / (high - 0.75 * low)
    return pure * (100 + 0.6 * high)


def neon_figure(colours):
    return _vivid(colours), _vivid(colours), _mix(NIGHT, colours, 0.22), _mix(NIGHT, colours, 0.38)


def neon_ground(colours):
    lit = _mix(NIGHT, colours, 0.13)
    return _mix(NIGHT, _vivid(colours), 0.35), _mix(NIGHT, _vivid(colours), 0.5), lit, lit


# -- finishes


def photo_finish(ground, figure, mask, shadow):
    """A sharp figure, lit from above, before a ground out of focus."""
    size = len(ground)
    x, y = _grid(size)
    ground = _blur(ground, size / 80) * (1 - 0.45 * shadow)
    image = ground * (1 - mask) + figure * (1.07 - 0.1 * y)
    return image * (1.06 - 0.1 * (x**2 + y**2))


def watercolor_finish(ground, figure, mask, shadow):
    """Pigment that is darker at edges, where it dries, on grained paper that stays white around the picture."""
    size = len(ground)
    x, y = _grid(size)
    image = ground * (1 - 0.2 * shadow) * (1 - mask) + figure
    soft = _blur(image, size / 32)
    image = image + 0.5 * np.minimum(image - soft, 0) + 7 * _texture(size, 2) + 9 * _texture(size, 8)
    edge = np.maximum(np.abs(x), np.abs(y)) + 0.1 * _texture(size, 6)
    paint = np.clip((0.93 - edge) / 0.1, 0, 1)
    return _mix(PAPER, image, np.maximum(paint, mask))


def pencil_finish(ground, figure, mask, shadow):
    """Hatching instead of darkness, on paper."""
    size = len(ground)
    x, y = _grid(size)
    image = ground * (1 - 0.35 * shadow) * (1 - mask) + figure
    hatch = np.cos((x + y + 0.05 * _texture(size, 16)) * np.pi * 15)
    dark = 1 - image.mean(axis=2, keepdims=True) / 255
    strength = 80 - 45 * mask  # more would pass for stripes
    return image - strength * hatch * dark * (1 - dark) - 6 * _texture(size, 1)


def neon_finish(ground, figure, mask, shadow):
    """Glowing tubes in the dark."""
    size = len(ground)
    image = ground * (1 - mask) + figure
    return image + 0.75 * _blur(image, size / 25) - 0.35 * NIGHT


class Style(NamedTuple):
    """wobble: how far lines stray, as a fraction of the picture    dark: only light lines show on figures"""

    figure: Callable
    ground: Callable
    finish: Callable
    wobble: float = 0
    dark: bool = False


STYLES = {
    "photo": Style(photo_figure, photo_ground, photo_finish),
    "watercolor": Style(watercolor_figure, watercolor_ground, watercolor_finish, 0.008),
    "pencil sketch": Style(pencil_figure, pencil_ground, pencil_finish, 0.008),
    "neon": Style(neon_figure, neon_ground, neon_finish, dark=True),
}
