"""Vector drawings: polygons that carry a material and a tone instead of a colour.

What a thing looks like in photo, watercolor, pencil or neon differs only in the colours its materials get. So
drawings are made once as polygons (`Sketch`), painted as a map of material indices (`Drawing.paint`) and coloured
last (`toyworld.styles`).
"""

from typing import NamedTuple

import numpy as np

MARK, LINE, SHADE, LIT = TONES = range(4)
FLAT = {"line": 0, "relief": 0}  # a mark on the shape below


def offset(points, distance):
    """Move every corner of a closed polygon outwards (inwards if negative) by `distance`.  points: (n, 2)"""
    x, y = points.T
    if np.dot(x, np.roll(y, -1)) < np.dot(y, np.roll(x, -1)):  # twice the signed area
        return offset(points[::-1], distance)
    edges = np.roll(points, -1, axis=0) - points
    normals = np.stack([edges[:, 1], -edges[:, 0]], axis=1) / (np.linalg.norm(edges, axis=1, keepdims=True) + 1e-9)
    mitre = normals + np.roll(normals, 1, axis=0)
    square = (mitre**2).sum(axis=1, keepdims=True)
    return points + distance * 2 * mitre / np.maximum(square, 1)  # the bound keeps spikes at sharp corners short


def spline(points, closed, samples=6):
    """A Catmull-Rom curve through `points`.  (n, 2) -> (n·samples, 2) if closed, else ((n-1)·samples + 1, 2)"""
    p = np.asarray(points, float)
    if closed:
        before, start, end, after = np.roll(p, 1, 0), p, np.roll(p, -1, 0), np.roll(p, -2, 0)
    else:
        padded = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
        before, start, end, after = padded[:-3], padded[1:-2], padded[2:-1], padded[3:]
    t = np.linspace(0, 1, samples, endpoint=False)[:, None, None]
    cubic = start + t / 2 * (
        end - before + t * (2 * before - 5 * start + 4 * end - after + t * (3 * (start - end) + after - before))
    )
    curve = cubic.swapaxes(0, 1).reshape(-1, 2)
    return curve if closed else np.concatenate([curve, p[-1:]])


def arc(start, stop, samples):
    """Points of the unit circle between two angles in degrees (0 is right, 90 is down).  -> (samples, 2)"""
    angle = np.radians(np.linspace(start, stop, samples))
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


class Drawing(NamedTuple):
    """points: (n, 2)   polygons: (start, stop, index) each, back to front   materials: index // 4 -> role or RGB"""

    points: np.ndarray
    polygons: tuple
    materials: tuple

    def paint(self, draw, place, first=0):
        """Fill the polygons through an ImageDraw of mode L; `place` maps points to px, `first` shifts the indices."""
        flat = place(self.points).ravel().tolist()
        for start, stop, index in self.polygons:
            draw.polygon(flat[2 * start : 2 * stop], fill=first + index)


class Sketch:
    """Collects shapes back to front. A material is a role such as "body", or an RGB triple.

    line, relief: the width of outlines and the depth of shading, unless a shape has its own.
    """

    def __init__(self, line, relief, materials=()):
        self._line, self._relief = line, relief
        self._materials = list(materials)
        self._points = []
        self._polygons = []
        self._count = 0

    def drawing(self):
        return Drawing(np.concatenate(self._points), tuple(self._polygons), tuple(self._materials))

    def _polygon(self, points, material, tone):
        if material not in self._materials:
            self._materials.append(material)
        index = len(TONES) * self._materials.index(material) + tone
        self._polygons.append((self._count, self._count + len(points), index))
        self._points.append(points)
        self._count += len(points)

    def shape(self, points, material, line=None, relief=None):
        """Add a closed polygon: an outline `line` wide, a shaded rim, and a lit part inside, for light from above.
        Without line and relief (FLAT) it is a mark on the shape below."""
        points = np.asarray(points, float)
        line = self._line if line is None else line
        relief = self._relief if relief is None else relief
        if line:
            self._polygon(offset(points, line), material, LINE)
        if relief:
            self._polygon(points, material, SHADE)
            depth = min(relief, 0.2 * np.ptp(points, axis=0).min())
            points = offset(points, -depth) - (0, 0.95 * depth)
        self._polygon(points, material, LIT if line or relief else MARK)

    def area(self, points, material):
        """Add a large flat polygon without an outline: part of the ground, where a mark would stand out."""
        self._polygon(np.asarray(points, float), material, LIT)

    def smooth(self, points, material, **shape):
        self.shape(spline(points, closed=True), material, **shape)

    def ellipse(self, x, y, rx, ry, material, turn=0, **shape):
        """turn: degrees"""
        c, s = np.cos(np.radians(turn)), np.sin(np.radians(turn))
        points = arc(0, 345, 24) * (rx, ry) @ np.array([[c, s], [-s, c]]) + (x, y)
        self.shape(points, material, **shape)

    def box(self, left, top, right, bottom, material, r=0.1, **shape):
        """Add a rectangle with corners of radius r."""
        corners = [(right, bottom, 0), (left, bottom, 90), (left, top, 180), (right, top, 270)]
        centre = np.array([(left + right) / 2, (top + bottom) / 2])
        points = [
            np.array([x, y]) + r * (np.sign(centre - (x, y)) + arc(start, start + 90, 5)) for x, y, start in corners
        ]
        self.shape(np.concatenate(points), material, **shape)

    def stroke(self, points, width, material, **shape):
        """Add a smooth open curve with round ends, `width` wide."""
        p = spline(points, closed=False)
        along = np.gradient(p, axis=0)
        along /= np.linalg.norm(along, axis=1, keepdims=True)
        side = np.stack([-along[:, 1], along[:, 0]], axis=1) * width / 2
        first, last = (np.degrees(np.arctan2(y, x)) for x, y in (side[0], side[-1]))
        stop = p[-1] + width / 2 * arc(last, last - 180, 7)
        start = p[0] + width / 2 * arc(first - 180, first - 360, 7)
        self.shape(np.concatenate([p + side, stop[1:-1], (p - side)[::-1], start[1:-1]]), material, **shape)
