"""What tells characters of one class apart: their eyes and their emblems."""

import numpy as np

from toyworld.shapes import FLAT, arc

WHITE = (250, 250, 246)
BLACK = (34, 32, 42)
GLASS = (178, 222, 240)

# -- eyes: (x, y) is the middle between them, `gap` the distance of each from there, r its radius; ink shows on the face


def _ball(s, x, y, r):
    s.ellipse(x, y, r + 0.05, r + 0.05, BLACK, **FLAT)
    s.ellipse(x, y, r, r, WHITE, **FLAT)


def _pupil(s, x, y, r):
    s.ellipse(x, y, r, 1.1 * r, BLACK, **FLAT)


def round_eyes(s, x, y, gap, r, ink):
    for eye in (x - gap, x + gap):
        _ball(s, eye, y, r)
        _pupil(s, eye, y + 0.1 * r, 0.56 * r)
        s.ellipse(eye - 0.2 * r, y - 0.25 * r, 0.22 * r, 0.22 * r, WHITE, **FLAT)


def dot_eyes(s, x, y, gap, r, ink):
    for eye in (x - gap, x + gap):
        s.ellipse(eye, y, 0.62 * r, 0.85 * r, ink, **FLAT)


def happy_eyes(s, x, y, gap, r, ink):
    for eye in (x - gap, x + gap):
        s.stroke(arc(200, 340, 5) * (r, 1.1 * r) + (eye, y + 0.6 * r), 0.45 * r, ink, **FLAT)


def sleepy_eyes(s, x, y, gap, r, ink):
    for eye in (x - gap, x + gap):
        _ball(s, eye, y, r)
        _pupil(s, eye, y + 0.4 * r, 0.45 * r)
        s.shape(arc(175, 365, 12) * r + (eye, y), "accent", **FLAT)
        s.stroke([(eye - r, y), (eye, y + 0.05 * r), (eye + r, y)], 0.3 * r, BLACK, **FLAT)


def glasses(s, x, y, gap, r, ink):
    s.stroke([(x - gap, y), (x, y - 0.2 * r), (x + gap, y)], 0.4 * r, ink, **FLAT)
    for eye in (x - gap, x + gap):
        s.ellipse(eye, y, 1.25 * r, 1.25 * r, ink, **FLAT)
        s.ellipse(eye, y, 0.85 * r, 0.85 * r, GLASS, **FLAT)
        _pupil(s, eye, y + 0.1 * r, 0.38 * r)


def one_eye(s, x, y, gap, r, ink):
    _ball(s, x, y, 1.5 * r)
    s.ellipse(x, y + 0.1 * r, 0.9 * r, 0.9 * r, "accent", **FLAT)
    _pupil(s, x, y + 0.1 * r, 0.5 * r)
    s.ellipse(x - 0.4 * r, y - 0.4 * r, 0.3 * r, 0.3 * r, WHITE, **FLAT)


EYES = {
    "round": round_eyes,
    "dots": dot_eyes,
    "happy": happy_eyes,
    "sleepy": sleepy_eyes,
    "glasses": glasses,
    "cyclops": one_eye,
}


# -- emblems: outlines within the unit circle


def _star():
    return arc(-90, 234, 10) * np.tile([1.1, 0.5], 5)[:, None]


def _heart():
    t = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2], axis=1) / 15.5


def _clover():
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    r = 0.4 + 0.68 * np.sqrt(np.abs(np.sin(2 * t)))
    return np.stack([r * np.cos(t), r * np.sin(t)], axis=1)


def _cross():
    arm = np.array([(-0.33, -0.33), (-0.33, -1), (0.33, -1)])
    return np.concatenate([arm, arm[:, ::-1] * (-1, 1), -arm, arm[:, ::-1] * (1, -1)])


EMBLEMS = {
    "star": _star(),
    "heart": _heart(),
    "moon": np.concatenate([arc(40, 320, 16), (arc(290, 70, 12) * 0.75 + (0.42, 0))]),
    "bolt": np.array([(0.25, -1.1), (-0.75, 0.2), (-0.1, 0.2), (-0.3, 1.1), (0.75, -0.3), (0.08, -0.3)]),
    "clover": _clover(),
    "diamond": np.array([(0, -1.1), (0.85, 0), (0, 1.1), (-0.85, 0)]),
    "cross": _cross(),
    "drop": np.concatenate([[(0, -1.2)], arc(-30, 210, 14) * 0.85 + (0, 0.3)]),
}
