"""The cast: twelve classes of characters as drawings.

A character stands in a square from -1 to 1, x to the right and y down, with its feet at y = 1. Its materials are roles
("body", "accent", "emblem", "ink", ...) which its look turns into colours, or fixed RGB triples.
"""

from functools import cache

import numpy as np

from toyworld.faces import BLACK, EMBLEMS, EYES, GLASS, WHITE
from toyworld.shapes import FLAT, Sketch, arc, offset

METAL = (176, 184, 196)
WOOD = (150, 98, 58)
PINK = (244, 142, 150)
BEAK = (246, 152, 40)
GOLD = (250, 204, 70)


class Character(Sketch):
    """A sketch that knows the eyes and the emblem of its character, and whether its limbs are up."""

    def __init__(self, eyes, emblem, up):
        super().__init__(line=0.05, relief=0.1, materials=["body"])  # the pattern lies on the first material
        self._eyes, self._emblem, self.up = EYES[eyes], EMBLEMS[emblem], up

    def eyes(self, x, y, gap, r, ink="ink"):
        self._eyes(self, x, y, gap, r, ink)

    def emblem(self, x, y, r, role="emblem"):
        """role: "emblem" on the body, "badge" on the accent"""
        points = r * self._emblem + (x, y)
        self.shape(offset(points, 0.055), f"{role} rim", **FLAT)
        self.shape(points, role, **FLAT)

    def smile(self, x, y, r):
        self.stroke(arc(160, 20, 5) * (r, 0.7 * r) + (x, y), 0.055, "ink", **FLAT)


# -- the classes


def robot(s):
    lift = -0.45 if s.up else 0.35
    for side in (-1, 1):
        s.stroke([(side * 0.5, 0.1), (side * 0.78, 0.15 + 0.3 * lift), (side * 0.82, 0.1 + lift)], 0.17, METAL)
        s.ellipse(side * 0.82, 0.12 + lift, 0.15, 0.15, "accent")
        s.box(side * 0.28 - 0.15, 0.6, side * 0.28 + 0.15, 0.92, METAL, r=0.04)
        s.box(side * 0.3 - 0.24, 0.8, side * 0.3 + 0.24, 1.0, "accent", r=0.09)
    s.stroke([(0, -0.7), (0, -0.86)], 0.08, METAL)
    s.ellipse(0, -0.9, 0.11, 0.11, "accent")
    s.box(-0.14, -0.2, 0.14, 0.05, METAL, r=0.02)
    s.box(-0.7, -0.6, 0.7, -0.34, "accent", r=0.08)
    s.box(-0.56, -0.76, 0.56, -0.12, "body", r=0.14)
    s.box(-0.54, -0.02, 0.54, 0.68, "body", r=0.12)
    s.eyes(0, -0.48, 0.25, 0.17)
    s.smile(0, -0.26, 0.13)
    s.emblem(0, 0.33, 0.22)


def teapot(s):
    s.stroke([(-0.55, -0.1), (-0.9, -0.15), (-0.93, 0.3), (-0.55, 0.55)], 0.16, "accent")
    s.smooth([(0.45, 0.05), (0.65, 0), (0.76, -0.3), (0.97, -0.36), (0.93, -0.1), (0.82, 0.35), (0.5, 0.65)], "accent")
    s.box(-0.4, 0.8, 0.4, 1.0, "accent", r=0.08)
    s.ellipse(0, 0.28, 0.7, 0.62, "body")
    s.ellipse(0, -0.72, 0.12, 0.12, "accent")
    s.smooth([(-0.42, -0.28), (-0.3, -0.5), (0, -0.6), (0.3, -0.5), (0.42, -0.28), (0, -0.22)], "accent")
    s.eyes(0, 0.08, 0.26, 0.16)
    s.smile(0, 0.2, 0.1)
    s.emblem(0, 0.57, 0.2)


def car(s):
    s.smooth([(-0.94, 0.2), (-0.68, 0.04), (-0.52, -0.42), (-0.1, -0.56), (0.3, -0.46), (0.55, 0.0), (0.88, 0.14),
              (0.96, 0.62), (0.5, 0.7), (-0.6, 0.7), (-0.96, 0.6)], "body")  # fmt: skip
    s.smooth([(-0.44, 0.04), (-0.38, -0.34), (-0.05, -0.42), (0.22, -0.34), (0.4, 0.04), (0, 0.08)], GLASS, relief=0)
    s.eyes(-0.01, -0.13, 0.19, 0.15, ink=BLACK)
    s.ellipse(0.86, 0.3, 0.1, 0.13, GOLD)
    s.box(-0.97, 0.22, -0.86, 0.44, PINK, r=0.05)
    for side in (-1, 1):
        s.box(side * 0.86 - 0.14, 0.5, side * 0.86 + 0.14, 0.68, "accent", r=0.08)
    for x in (-0.52, 0.54):
        s.ellipse(x, 0.7, 0.3, 0.3, BLACK)
        s.ellipse(x, 0.7, 0.15, 0.15, "accent", line=0.03)
    s.emblem(0.02, 0.38, 0.2)


def dog(s):
    tail = -0.2 if s.up else 0.15
    s.stroke([(0.4, 0.75), (0.72, 0.6), (0.8, 0.3 + tail)], 0.15, "body")
    s.smooth([(-0.3, 0.0), (0.3, 0.0), (0.5, 0.6), (0.52, 0.98), (-0.52, 0.98), (-0.5, 0.6)], "body")
    for side in (-1, 1):
        s.ellipse(side * 0.3, 0.92, 0.2, 0.11, "accent")
    s.smooth([(-0.52, -0.5), (-0.36, -0.82), (0, -0.92), (0.36, -0.82), (0.52, -0.5), (0.46, -0.12), (0, 0.08),
              (-0.46, -0.12)], "body")  # fmt: skip
    for side in (-1, 1):
        drop = -0.22 if s.up else 0
        s.smooth([(side * 0.34, -0.84), (side * 0.62, -0.86 + drop), (side * 0.8, -0.4 + 1.5 * drop),
                  (side * 0.7, -0.02 + 1.5 * drop), (side * 0.55, -0.2 + drop)], "accent")  # fmt: skip
    s.ellipse(0, -0.03, 0.1, 0.17, PINK, relief=0)
    s.ellipse(0, -0.17, 0.27, 0.2, WHITE)
    s.ellipse(0, -0.26, 0.13, 0.1, BLACK, **FLAT)
    s.eyes(0, -0.52, 0.24, 0.16)
    s.emblem(0, 0.47, 0.21)


def cat(s):
    tip = -0.25 if s.up else 0.1
    s.stroke([(0.3, 0.88), (0.78, 0.85), (0.68, 0.35), (0.86, 0.0 + tip)], 0.14, "accent")
    s.smooth([(-0.26, 0.0), (0.26, 0.0), (0.42, 0.6), (0.42, 0.98), (-0.42, 0.98), (-0.42, 0.6)], "body")
    for side in (-1, 1):
        s.ellipse(side * 0.2, 0.93, 0.17, 0.1, "accent")
        s.shape([(side * 0.62, -0.98), (side * 0.58, -0.38), (side * 0.1, -0.68)], "body")
        s.shape([(side * 0.53, -0.8), (side * 0.5, -0.5), (side * 0.26, -0.66)], PINK, **FLAT)
    s.smooth([(-0.64, -0.3), (-0.5, -0.62), (0, -0.72), (0.5, -0.62), (0.64, -0.3), (0.42, 0.0), (0, 0.08),
              (-0.42, 0.0)], "body")  # fmt: skip
    for side in (-1, 1):
        for rise in (-0.08, 0.08):
            s.stroke([(side * 0.32, -0.12 + rise / 2), (side * 0.86, -0.14 + 1.6 * rise)], 0.035, "ink", **FLAT)
    s.ellipse(0, -0.15, 0.08, 0.055, PINK, line=0.03, relief=0)
    s.smile(-0.08, -0.09, 0.08)
    s.smile(0.08, -0.09, 0.08)
    s.eyes(0, -0.37, 0.28, 0.17)
    s.emblem(0, 0.45, 0.21)


def clock(s):
    for side in (-1, 1):
        s.stroke([(side * 0.4, 0.75), (side * 0.56, 0.96)], 0.14, METAL)
        s.smooth([(side * 0.16, -0.72), (side * 0.3, -0.96), (side * 0.62, -0.9), (side * 0.76, -0.62),
                  (side * 0.6, -0.46)], "accent")  # fmt: skip
    s.box(-0.08, -0.94, 0.08, -0.5, METAL, r=0.04)
    s.ellipse(0, 0.14, 0.8, 0.8, "body")
    s.ellipse(0, 0.14, 0.64, 0.64, WHITE, relief=0)
    for angle in range(0, 360, 30):
        inner, outer = arc(angle, angle, 1) * 0.52 + (0, 0.14), arc(angle, angle, 1) * 0.58 + (0, 0.14)
        s.stroke([inner[0], outer[0]], 0.055, BLACK, **FLAT)
    for tip in [(0.0, -0.4), (0.24, -0.14)] if s.up else [(0.3, -0.3), (-0.24, -0.18)]:
        s.stroke([(0, 0.02), tip], 0.08, "accent", line=0.03, relief=0)
    s.eyes(0, 0.15, 0.26, 0.15, ink=BLACK)
    s.emblem(0, 0.51, 0.2)


def backpack(s):
    s.stroke([(-0.2, -0.72), (-0.16, -0.95), (0.16, -0.95), (0.2, -0.72)], 0.1, "accent")
    for side in (-1, 1):
        s.box(side * 0.7 - 0.16, 0.1, side * 0.7 + 0.16, 0.82, "accent", r=0.12)
    s.smooth([(-0.62, 0.9), (-0.66, 0.0), (-0.56, -0.58), (-0.2, -0.82), (0.2, -0.82), (0.56, -0.58), (0.66, 0.0),
              (0.62, 0.9), (0, 0.98)], "body")  # fmt: skip
    s.stroke([(-0.5, -0.08), (0, 0.0), (0.5, -0.08)], 0.05, GOLD, line=0.02, relief=0)
    s.box(-0.46, 0.22, 0.46, 0.86, "accent", r=0.14)
    s.stroke([(-0.3, 0.34), (0.3, 0.34)], 0.045, GOLD, line=0.015, relief=0)
    s.eyes(0, -0.42, 0.26, 0.17)
    s.smile(0, -0.24, 0.12)
    s.emblem(0, 0.6, 0.19, role="badge")


def mug(s):
    if not s.up:
        for x in (-0.3, 0.0, 0.3):
            s.stroke([(x - 0.14, -0.62), (x - 0.06, -0.76), (x - 0.16, -0.86), (x - 0.1, -0.98)], 0.07, WHITE,
                     line=0.02, relief=0)  # fmt: skip
    s.stroke([(0.4, -0.2), (0.86, -0.22), (0.9, 0.5), (0.4, 0.6)], 0.17, "accent")
    s.smooth([(-0.72, -0.5), (-0.15, -0.42), (0.42, -0.5), (0.42, 0.5), (0.34, 0.92), (-0.15, 0.99), (-0.64, 0.92),
              (-0.72, 0.5)], "body")  # fmt: skip
    s.ellipse(-0.15, -0.46, 0.6, 0.17, "accent", relief=0)
    s.ellipse(-0.15, -0.44, 0.46, 0.1, (94, 56, 36), **FLAT)
    s.eyes(-0.15, 0.0, 0.25, 0.17)
    s.smile(-0.15, 0.18, 0.12)
    s.emblem(-0.15, 0.58, 0.23)


def boot(s):
    s.smooth([(-0.52, -0.8), (0.26, -0.8), (0.28, -0.1), (0.4, 0.22), (0.82, 0.36), (0.96, 0.78), (0.2, 0.86),
              (-0.56, 0.82), (-0.5, 0.1)], "body")  # fmt: skip
    s.smooth([(0.46, 0.26), (0.8, 0.34), (0.97, 0.76), (0.6, 0.82)], "accent")
    s.smooth([(-0.62, 0.76), (0.0, 0.78), (1.0, 0.74), (1.0, 0.98), (0.1, 0.98), (0.0, 0.9), (-0.1, 0.99),
              (-0.62, 0.99)], BLACK)  # fmt: skip
    s.box(-0.62, -0.98, 0.36, -0.7, "accent", r=0.12)
    for y in (-0.04, 0.1, 0.24):
        s.stroke([(0.12, y + 0.04), (0.4 + 0.3 * y, y - 0.02)], 0.07, WHITE, line=0.03, relief=0)
    s.eyes(-0.12, -0.42, 0.21, 0.16)
    s.smile(-0.12, -0.24, 0.1)
    s.emblem(-0.2, 0.4, 0.23)


def duck(s):
    s.smooth([(-0.98, 0.02), (-0.72, 0.3), (-0.2, 0.22), (0.3, 0.1), (0.7, 0.4), (0.6, 0.85), (0.1, 0.99), (-0.4, 0.97),
              (-0.8, 0.7)], "body")  # fmt: skip
    s.ellipse(0.24, -0.34, 0.54, 0.52, "body")
    s.smooth([(0.1, -0.86), (0.0, -1.0), (0.24, -0.94), (0.36, -1.0), (0.34, -0.84)], "body")
    s.smooth([(0.54, -0.24), (0.78, -0.36), (0.99, -0.22), (0.94, -0.06), (0.6, 0.0)], BEAK)
    s.stroke([(0.62, -0.15), (0.9, -0.16)], 0.04, (150, 80, 30), **FLAT)
    wing = -0.3 if s.up else 0.0
    s.smooth([(0.26, 0.5), (-0.1, 0.34 + wing / 2), (-0.66, 0.36 + wing), (-0.6, 0.62 + wing / 2), (-0.3, 0.8),
              (0.1, 0.8)], "accent")  # fmt: skip
    s.eyes(0.32, -0.46, 0.22, 0.16)
    s.emblem(-0.12, 0.57, 0.2, role="badge")


def house(s):
    s.box(0.3, -0.9, 0.6, -0.3, (176, 92, 76), r=0.02)
    s.box(0.26, -0.98, 0.64, -0.84, (140, 72, 62), r=0.03)
    s.shape([(-0.72, -0.2), (0, -0.7), (0.72, -0.2), (0.72, 0.98), (-0.72, 0.98)], "body")
    s.shape([(-0.98, -0.08), (-0.9, -0.22), (0, -0.98), (0.9, -0.22), (0.98, -0.08), (0.86, 0.04), (0, -0.68),
             (-0.86, 0.04)], "accent")  # fmt: skip
    for side in (-1, 1):
        s.box(side * 0.38 - 0.23, 0.0, side * 0.38 + 0.23, 0.46, WHITE, r=0.05, relief=0)
    s.box(-0.2, 0.52, 0.2, 0.98, WOOD, r=0.12)
    s.ellipse(0.1, 0.78, 0.04, 0.04, GOLD, **FLAT)
    s.eyes(0, 0.23, 0.38, 0.17, ink=BLACK)
    s.emblem(0, -0.28, 0.2)


def octopus(s):
    reach = -0.28 if s.up else 0.0
    for side in (-1, 1):
        s.stroke([(side * 0.3, 0.3), (side * 0.62, 0.44), (side * 0.84, 0.4 + reach),
                  (side * 0.88, 0.16 + 1.6 * reach)], 0.17, "body")  # fmt: skip
        s.stroke([(side * 0.28, 0.4), (side * 0.5, 0.74), (side * 0.74, 0.8), (side * 0.9, 0.66)], 0.18, "body")
        s.stroke([(side * 0.12, 0.4), (side * 0.18, 0.8), (side * 0.36, 0.94), (side * 0.54, 0.92)], 0.18, "body")
        for x, y in ((0.62, 0.8), (0.28, 0.9), (0.7, 0.45 + 0.6 * reach)):
            s.ellipse(side * x, y, 0.05, 0.05, "accent", **FLAT)
    s.smooth([(-0.62, -0.3), (-0.5, -0.76), (0, -0.98), (0.5, -0.76), (0.62, -0.3), (0.42, 0.2), (0.36, 0.5),
              (-0.36, 0.5), (-0.42, 0.2)], "body")  # fmt: skip
    for side in (-1, 1):
        s.smooth([(0, 0.36), (side * 0.26, 0.22), (side * 0.28, 0.52)], "accent")
        s.ellipse(side * 0.4, 0.02, 0.09, 0.06, PINK, **FLAT)
    s.ellipse(0, 0.37, 0.09, 0.09, "accent", line=0.03)
    s.eyes(0, -0.12, 0.24, 0.18)
    s.smile(0, 0.07, 0.12)
    s.emblem(0, -0.58, 0.22)


CLASSES = {
    draw.__name__: draw for draw in (robot, teapot, car, dog, cat, clock, backpack, mug, boot, duck, house, octopus)
}


@cache
def character(kind, eyes, emblem, up):
    """The drawing of a class with these eyes and this emblem; `up`: limbs, or what serves as limbs, raised."""
    sketch = Character(eyes, emblem, up)
    CLASSES[kind](sketch)
    return sketch.drawing()


@cache
def pattern(name):
    """Stripes or dots over the square of a character; None if plain."""
    sketch = Sketch(**FLAT)
    if name == "plain":
        return None
    if name == "stripes":
        for x in np.arange(-2.2, 2.2, 0.36):
            sketch.shape([(x, -1.2), (x + 0.17, -1.2), (x + 0.77, 1.2), (x + 0.6, 1.2)], "body")
    if name == "dots":
        for row, y in enumerate(np.arange(-0.95, 1.1, 0.29)):
            for x in np.arange(-1.1, 1.2, 0.36) + 0.18 * (row % 2):
                sketch.ellipse(x, y, 0.085, 0.085, "body")
    return sketch.drawing()
