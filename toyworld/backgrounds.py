"""The places: ten backgrounds as drawings, each in many variants.

A place fills the square from 0 to 1, x to the right and y down; anything outside is cut off. Characters stand between
y = 0.8 and y = 0.95, so all places have their ground there.
"""

import random
from functools import cache

import numpy as np

from toyworld.shapes import Sketch, spline

WHITE = (250, 250, 246)
CLOUD = (240, 246, 252)


def mix(a, b, share):
    """Return the colour a with `share` of b in it."""
    return tuple(round(p + share * (q - p)) for p, q in zip(a, b))


def wash(s, top, bottom, start, stop, bands=14):
    """Add a vertical gradient over the full width."""
    edges = np.linspace(start, stop, bands + 1)
    for i in range(bands):
        low = edges[i + 1] + 0.02  # no gaps between bands when hand-drawn styles wobble
        s.area([(-0.1, edges[i]), (1.1, edges[i]), (1.1, low), (-0.1, low)], mix(top, bottom, i / (bands - 1)))


def ground(s, heights, material, outlined=True):
    """Add land below a smooth skyline of evenly spaced heights."""
    x = np.linspace(-0.15, 1.15, len(heights))
    points = spline([*zip(x, heights), (1.3, 1.2), (-0.3, 1.2)], closed=True)
    if outlined:
        s.shape(points, material)
    else:
        s.area(points, material)


def clouds(s, rng, count, material=CLOUD):
    for _ in range(count):
        x, y, r = rng.random(), rng.uniform(0.08, 0.28), rng.uniform(0.04, 0.07)
        for dx, dy, size in ((-1.2, 0.3, 0.8), (1.2, 0.35, 0.75), (0, 0, 1.1)):
            s.ellipse(x + dx * r, y + dy * r, 1.3 * size * r, size * r, material, line=0)


def dots(s, rng, count, top, bottom, radius, material):
    for _ in range(count):
        r = radius * rng.uniform(0.6, 1.2)
        s.ellipse(rng.random(), rng.uniform(top, bottom), r, r, material, line=0)


def snowy_fir(s, x, foot, height, green):
    s.shape([(x - 0.012, foot), (x + 0.012, foot), (x + 0.012, foot - 0.2 * height), (x - 0.012, foot - 0.2 * height)],
            (104, 76, 58))  # fmt: skip
    for tier in range(3):
        low, wide = foot - height * (0.12 + 0.26 * tier), height * (0.3 - 0.07 * tier)
        middle, top = low - 0.2 * height, low - 0.42 * height
        s.shape([(x - wide, low), (x, top), (x + wide, low)], green)
        s.shape([(x - 0.55 * wide, middle), (x, top), (x + 0.55 * wide, middle)], WHITE, line=0)


def scattered(rng, count):
    """Return `count` places across the picture from left to right, each within a strip of its own."""
    return [(i + rng.uniform(0.15, 0.85)) / count for i in range(count)]


# -- the places


def beach(s, rng):
    wash(s, (92, 178, 236), (206, 236, 246), 0, 0.42)
    s.ellipse(rng.uniform(0.1, 0.9), 0.14, 0.08, 0.08, (255, 232, 120))
    wash(s, (28, 128, 178), (94, 204, 208), 0.4, 0.66, bands=4)
    boat = rng.uniform(0.1, 0.9)
    s.shape([(boat - 0.05, 0.43), (boat + 0.05, 0.43), (boat + 0.03, 0.46), (boat - 0.03, 0.46)], (190, 70, 60))
    s.shape([(boat, 0.42), (boat, 0.28), (boat + 0.06, 0.41)], WHITE)
    shore = [0.66 + rng.uniform(-0.03, 0.03) for _ in range(6)]
    ground(s, [y - 0.03 for y in shore], WHITE, outlined=False)
    ground(s, shore, (242, 214, 152))
    side = rng.choice((0.08, 0.92))
    lean = 0.04 if side < 0.5 else -0.04
    s.stroke([(side, 0.8), (side + lean / 2, 0.5), (side + lean, 0.3)], 0.035, (140, 98, 62))
    for dx, dy in ((-0.2, 0.05), (0.2, 0.05), (-0.14, -0.1), (0.14, -0.1), (0.0, 0.14)):
        s.stroke([(side + lean, 0.3), (side + lean + 0.6 * dx, 0.27 + 0.4 * dy), (side + lean + dx, 0.32 + dy)], 0.04,
                 (64, 150, 74))  # fmt: skip
    dots(s, rng, 6, 0.75, 0.98, 0.012, (214, 172, 108))


def snow(s, rng):
    wash(s, (150, 178, 212), (226, 234, 244), 0, 0.6)
    ground(s, [rng.uniform(0.5, 0.6) for _ in range(5)], (212, 224, 240))
    for x in scattered(rng, 4):
        snowy_fir(s, x, rng.uniform(0.6, 0.68), rng.uniform(0.28, 0.44), (70, 112, 104))
    ground(s, [rng.uniform(0.63, 0.7) for _ in range(5)], (246, 249, 254))
    ground(s, [rng.uniform(0.84, 0.92) for _ in range(4)], (228, 237, 248), outlined=False)
    dots(s, rng, 22, 0.0, 0.7, 0.012, WHITE)


def grass(s, rng):
    wash(s, (104, 186, 244), (214, 240, 250), 0, 0.6)
    clouds(s, rng, 3)
    ground(s, [rng.uniform(0.48, 0.58) for _ in range(4)], (128, 194, 92))
    ground(s, [rng.uniform(0.6, 0.66) for _ in range(5)], (96, 176, 72))
    for _ in range(14):
        x, y = rng.random(), rng.uniform(0.7, 0.98)
        tuft = [(x - 0.025, y), (x - 0.02, y - 0.05), (x, y - 0.02), (x + 0.02, y - 0.06), (x + 0.025, y)]
        s.shape(tuft, (64, 142, 58), line=0)
    for colour in ((255, 240, 120), (250, 250, 246), (240, 120, 150)):
        dots(s, rng, 3, 0.7, 0.97, 0.018, colour)


def city(s, rng):
    wash(s, (16, 20, 54), (70, 58, 112), 0, 0.7)
    dots(s, rng, 10, 0.02, 0.3, 0.008, (255, 250, 210))
    s.ellipse(rng.uniform(0.1, 0.9), 0.13, 0.065, 0.065, (250, 240, 196), line=0)
    for x in scattered(rng, 6):
        top, wide = rng.uniform(0.16, 0.46), rng.uniform(0.07, 0.1)
        s.box(x - wide, top, x + wide, 0.8, rng.choice(((42, 44, 84), (56, 50, 92), (34, 38, 72))), r=0.005)
        for column in np.arange(x - wide + 0.025, x + wide - 0.03, 0.05):
            for y in np.arange(top + 0.04, 0.68, 0.07):
                if rng.random() < 0.6:
                    s.shape([(column, y), (column + 0.028, y), (column + 0.028, y + 0.036), (column, y + 0.036)],
                            (255, 214, 110), line=0)  # fmt: skip
    wash(s, (72, 72, 98), (50, 50, 76), 0.7, 1.0, bands=4)
    for x in np.arange(0.02, 1.1, 0.28) + rng.uniform(-0.1, 0.1):
        s.shape([(x, 0.93), (x + 0.15, 0.93), (x + 0.16, 0.96), (x, 0.96)], (232, 220, 170), line=0)


def floor(s, rng):
    wall = rng.choice(((232, 214, 190), (206, 222, 216), (220, 208, 226), (240, 226, 196)))
    wash(s, mix(wall, WHITE, 0.25), wall, 0, 0.6, bands=3)
    x = rng.choice((0.16, 0.84))
    s.box(x - 0.13, 0.1, x + 0.13, 0.42, WHITE, r=0.01)
    s.box(x - 0.1, 0.13, x + 0.1, 0.39, (158, 212, 242), r=0.005)
    s.box(x - 0.01, 0.12, x + 0.01, 0.4, WHITE, r=0.004, line=0)
    s.box(x - 0.11, 0.25, x + 0.11, 0.27, WHITE, r=0.004, line=0)
    s.box(-0.2, 0.57, 1.2, 0.64, WHITE, r=0.01)
    edges = np.linspace(-1.6, 2.6, 15)
    woods = [(190, 132, 80), (176, 118, 68), (202, 144, 92), (168, 110, 64)]
    for left, right in zip(edges[:-1], edges[1:]):  # planks that meet far behind the wall
        far = [0.5 + (v - 0.5) * 0.42 for v in (left, right)]
        s.shape([(far[0], 0.64), (far[1], 0.64), (right, 1.05), (left, 1.05)], rng.choice(woods))


def forest(s, rng):
    wash(s, (168, 208, 160), (208, 228, 170), 0, 0.7)
    for layer, trunk, leaves in ((0, (122, 130, 100), (104, 162, 104)), (1, (92, 66, 48), (44, 110, 62))):
        for x in scattered(rng, 5 - layer):
            s.box(x - 0.022 - 0.014 * layer, 0.1, x + 0.022 + 0.014 * layer, 0.72 + 0.04 * layer, trunk, r=0.005)
        for x in scattered(rng, 6):
            s.ellipse(x, 0.12 - 0.04 * layer, 0.15, rng.uniform(0.12, 0.2), leaves, relief=0.05)
    ground(s, [rng.uniform(0.66, 0.71) for _ in range(5)], (84, 118, 58))
    ground(s, [rng.uniform(0.8, 0.9) for _ in range(5)], (104, 134, 64), outlined=False)
    for x in scattered(rng, 2):
        s.box(x - 0.012, 0.73, x + 0.012, 0.79, WHITE, r=0.005)
        s.smooth([(x - 0.045, 0.745), (x, 0.685), (x + 0.045, 0.745)], (212, 64, 56))


def mountains(s, rng):
    wash(s, (116, 176, 230), (236, 232, 228), 0, 0.62)
    clouds(s, rng, 2)
    for x, wide in zip(scattered(rng, 3), (0.36, 0.42, 0.34)):
        top = rng.uniform(0.12, 0.24)
        s.shape([(x - wide, 0.68), (x, top), (x + wide, 0.68)], (124, 132, 158))
        s.area([(x, top), (x + wide, 0.68), (x + 0.1 * wide, 0.68), (x + 0.06, 0.42)], (98, 106, 134))
        cap = 0.34 * wide
        height = (0.68 - top) * 0.34
        s.shape([(x, top), (x + cap, top + height), (x + 0.3 * cap, top + 0.72 * height), (x, top + 1.1 * height),
                 (x - 0.4 * cap, top + 0.72 * height), (x - cap, top + height)], WHITE, line=0)  # fmt: skip
    ground(s, [rng.uniform(0.61, 0.67) for _ in range(5)], (120, 150, 104))
    ground(s, [rng.uniform(0.72, 0.78) for _ in range(5)], (156, 164, 118))
    for x in scattered(rng, 4):
        y, r = rng.uniform(0.76, 0.96), rng.uniform(0.025, 0.05)
        rock = [(x - r, y), (x - 0.6 * r, y - r), (x + 0.4 * r, y - 1.1 * r), (x + r, y)]
        s.smooth(rock, (138, 138, 144), relief=0.02)


def studio(s, rng):
    paper = rng.choice(((214, 214, 218), (236, 200, 190), (190, 214, 232), (232, 222, 180), (204, 192, 226)))
    wash(s, mix(paper, (70, 70, 90), 0.35), paper, 0, 0.68)
    wash(s, mix(paper, WHITE, 0.65), mix(paper, WHITE, 0.3), 0.66, 1.0, bands=5)
    for x, lean in ((0.04, 1), (0.96, -1)):
        s.stroke([(x, 0.7), (x, 0.16)], 0.016, (52, 52, 60))
        s.shape([(x - 0.06, 0.06), (x + 0.06, 0.06), (x + 0.06 + 0.05 * lean, 0.24), (x - 0.06 + 0.05 * lean, 0.24)],
                (52, 52, 60))  # fmt: skip
        s.ellipse(x + 0.05 * lean, 0.24, 0.065, 0.025, (255, 250, 220))


def desert(s, rng):
    wash(s, (244, 156, 92), (254, 222, 156), 0, 0.6)
    s.ellipse(rng.uniform(0.2, 0.8), 0.22, 0.11, 0.11, (255, 244, 190), line=0)
    ground(s, [rng.uniform(0.48, 0.6) for _ in range(4)], (222, 142, 82))
    for x in (rng.uniform(0.04, 0.2), rng.uniform(0.8, 0.96)):
        foot = rng.uniform(0.68, 0.76)
        for side in (-1, 1):
            tip = x + side * 0.08
            s.stroke([(x, foot - 0.12), (tip, foot - 0.13), (tip, foot - 0.24)], 0.04, (74, 138, 84))
        s.stroke([(x, foot), (x, foot - 0.36)], 0.06, (74, 138, 84))
    ground(s, [rng.uniform(0.64, 0.74) for _ in range(4)], (238, 178, 106))
    ground(s, [rng.uniform(0.82, 0.94) for _ in range(4)], (228, 160, 92))


def reef(s, rng):
    wash(s, (112, 214, 236), (20, 84, 158), 0, 0.85)
    for x in scattered(rng, 3):
        s.area([(x, -0.1), (x + 0.07, -0.1), (x - 0.06, 0.7), (x - 0.2, 0.7)], (106, 200, 230))
    for x in scattered(rng, 2):
        y = rng.uniform(0.12, 0.5)
        s.shape([(x - 0.03, y), (x - 0.09, y - 0.04), (x - 0.09, y + 0.04)], (255, 176, 60))
        s.ellipse(x, y, 0.055, 0.035, (255, 176, 60))
    for x in (rng.uniform(0.02, 0.14), rng.uniform(0.16, 0.26), rng.uniform(0.78, 0.86), rng.uniform(0.9, 0.98)):
        top = rng.uniform(0.36, 0.6)
        bend = [(x + 0.03 * (-1) ** i, y) for i, y in enumerate(np.linspace(0.85, top, 5))]
        s.stroke(bend, 0.045, (40, 146, 104))
    ground(s, [rng.uniform(0.74, 0.8) for _ in range(5)], (226, 208, 156))
    for x in scattered(rng, 3):
        s.ellipse(x, 0.84, 0.05, 0.045, rng.choice(((236, 110, 120), (180, 120, 200))), relief=0.02)
    dots(s, rng, 9, 0.05, 0.65, 0.016, (206, 240, 250))


BACKGROUNDS = {
    "beach": beach,
    "snow": snow,
    "grass": grass,
    "city": city,
    "wooden floor": floor,
    "forest": forest,
    "mountains": mountains,
    "studio": studio,
    "desert": desert,
    "reef": reef,
}
VARIANTS = 100


@cache
def background(name, variant):
    """Return the drawing of a place; `variant` in range(VARIANTS) arranges it."""
    sketch = Sketch(line=0.012, relief=0)
    BACKGROUNDS[name](sketch, random.Random(variant))
    return sketch.drawing()
