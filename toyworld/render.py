"""Draw a character in a scene.

    python -m toyworld.render --sheet sheet.png            # 60 random scenes with their captions
    python -m toyworld.render --sheet sheet.png --seed 7   # others

A picture is drawn `SUPERSAMPLING` times as large as asked for, as two maps of material indices (ground and figure),
coloured by its style, and scaled down. The same look, scene and size always give the same picture.
"""

import argparse
import random
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from dreambooth.errors import readable_errors
from toyworld.backgrounds import BACKGROUNDS, background
from toyworld.objects import CLASSES, character, pattern
from toyworld.shapes import TONES, Drawing
from toyworld.styles import STYLES
from toyworld.world import COLOURS, Look, Scene, caption, sample_look, sample_scene

SUPERSAMPLING = 4
FIGURE, PATTERN = 128, 64  # bits of the material map: part of the character; under its pattern
IS_FIGURE = [0] * FIGURE + [255] * (256 - FIGURE)

# Tilt in degrees, lift above the ground as a share of the height, width and height as factors, limbs raised
POSES = {
    "standing": (0, 0, 1, 1, False),
    "leaning": (14, 0, 1, 1, False),
    "jumping": (-7, 0.14, 0.9, 0.94, True),
    "squashed": (0, 0, 1.1, 0.8, False),
}


def render(look: Look, scene: Scene, size: int = 64) -> Image.Image:
    """Return the picture of `look` in `scene`: an RGB image, size x size px."""
    return render_with_mask(look, scene, size)[0]


def render_with_mask(look: Look, scene: Scene, size: int = 64) -> tuple[Image.Image, Image.Image]:
    """Return the picture and where its character is.

    An RGB image, and an L image (255 inside the character, 0 outside, in between at its edge), both size x size px.
    """
    style = STYLES[scene.style]
    place, figure = background(scene.background, scene.variant), _paint_figure(look, scene, size)
    ground = _paint(place, size, lambda points: _wobble(points, scene))
    mask = figure.point(IS_FIGURE).reduce(SUPERSAMPLING)
    picture = style.finish(
        _coloured(ground, _palette(style.ground(np.array(place.materials, np.float32)))),
        _coloured(figure, _figure_palette(look, scene)),
        np.asarray(mask, np.float32)[..., None] / 255,
        _shadow(scene, size),
    )
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)), mask


# -- maps of materials: L images, SUPERSAMPLING * size px high and wide


def _paint(drawing: Drawing, size: int, place: Callable[[np.ndarray], np.ndarray], first: int = 0) -> Image.Image:
    """Return a drawing as a map of material indices. `place` maps points of the drawing to fractions of the picture."""
    pixels = size * SUPERSAMPLING
    image = Image.new("L", (pixels, pixels))
    drawing.paint(ImageDraw.Draw(image), lambda points: place(points) * pixels, first)
    return image


def _paint_figure(look: Look, scene: Scene, size: int) -> Image.Image:
    tilt, lift, width, height, up = POSES[scene.pose]
    side = -1 if scene.flip else 1
    c, s = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    matrix = np.array([[side * width * c, width * s], [-side * height * s, height * c]]) * scene.scale / 2
    feet = scene.x, scene.y - lift * scene.scale

    def place(points):
        return _wobble((points - (0, 1)) @ matrix + feet, scene)

    figure = _paint(character(look.kind, look.eyes, look.emblem, up), size, place, FIGURE)
    marks = pattern(look.pattern)
    return figure if marks is None else ImageChops.add(figure, _paint(marks, size, place, PATTERN))


def _wobble(points: np.ndarray, scene: Scene) -> np.ndarray:
    """Let lines stray as a hand's do.  points: (n, 2), fractions of the picture"""
    wobble = STYLES[scene.style].wobble
    return points + wobble * np.sin(points[:, ::-1] * 23 + scene.variant) if wobble else points


# -- colours


def _coloured(painted: Image.Image, palette: np.ndarray) -> np.ndarray:
    """painted: L image    palette: (256, 3) uint8    ->    float (size, size, 3)"""
    painted = painted.copy()
    painted.putpalette(palette.tobytes())
    return np.asarray(painted.convert("RGB").reduce(SUPERSAMPLING), np.float32)


def _palette(tones: Sequence[np.ndarray]) -> np.ndarray:
    """Return the colours of four tones, (k, 3) each, in the order of material indices.  -> (4·k, 3) uint8"""
    return np.clip(np.stack(tones, axis=1), 0, 255).astype(np.uint8).reshape(-1, 3)


def _figure_palette(look: Look, scene: Scene) -> np.ndarray:
    """(256, 3): black around the character, its materials, its materials under the pattern"""
    drawing = character(look.kind, look.eyes, look.emblem, POSES[scene.pose][-1])
    style = STYLES[scene.style]
    roles = _roles(look, style.dark)
    plain = np.array([roles.get(material, material) for material in drawing.materials], np.float32)
    patterned = np.concatenate([[roles["pattern"]], plain[1:]])
    palette = np.zeros((256, 3), np.uint8)
    for first, tones in ((FIGURE, style.figure(plain)), (FIGURE + PATTERN, style.figure(patterned))):
        palette[first : first + len(TONES) * len(plain)] = _palette(tones)
    return palette


def _roles(look: Look, dark_fill: bool) -> dict[str, np.ndarray]:
    """{role: RGB}: what contrasts is light on dark and dark on light.  dark_fill: the style darkens every body"""
    body, accent = np.array(COLOURS[look.body]), np.array(COLOURS[look.accent])
    light, dark = np.array((255, 250, 236)), np.array((34, 32, 42))
    return {
        "body": body,
        "accent": accent,
        "emblem": accent,
        "emblem rim": dark if _brightness(accent) > 200 else light,
        "badge": body,
        "badge rim": dark if _brightness(body) > 200 else light,
        "ink": light if dark_fill or _brightness(body) < 90 else dark,
        "pattern": body * 0.72 if _brightness(body) > 180 else body + 0.6 * (light - body),
    }


def _brightness(colour: np.ndarray) -> float:
    return float(colour @ (0.3, 0.59, 0.11))


def _shadow(scene: Scene, size: int) -> np.ndarray:
    """Return how much light the character keeps from the ground, 0..1.  -> (size, size, 1)"""
    lift = POSES[scene.pose][1]
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    x = (line - scene.x) / (0.42 * scene.scale)
    y = (line - scene.y) / (0.1 * scene.scale)
    return ((1 - 2 * lift) * np.exp(-(y[:, None] ** 2) - x[None] ** 2))[..., None]


# -- the contact sheet


def covering_pairs(count: int, seed: int) -> Iterator[tuple[Look, Scene, random.Random]]:
    """Yield `count` random looks and scenes, in which classes, backgrounds and styles take turns."""
    rng = random.Random(seed)
    kinds, places, styles = list(CLASSES), list(BACKGROUNDS), list(STYLES)
    for i in range(count):
        look, scene = sample_look(rng), sample_scene(rng)
        while look.kind != kinds[i % len(kinds)]:
            look = sample_look(rng)
        style = "photo" if (i + i // 10) % 2 == 0 else styles[1 + (i + i // 10) // 2 % 3]
        yield look, replace(scene, background=places[i % len(places)], style=style), rng


def contact_sheet(
    pairs: Sequence[tuple[Image.Image, str]], columns: int = 10, size: int = 64, zoom: int = 2
) -> Image.Image:
    """Return pictures with their captions below, as one image.  pairs: (image, caption)    size: px of one picture"""
    tile, text_height = size * zoom, 56
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * (tile + 8) + 8, rows * (tile + text_height) + 8), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, (image, text) in enumerate(pairs):
        x, y = 8 + i % columns * (tile + 8), 8 + i // columns * (tile + text_height)
        sheet.paste(image.resize((tile, tile), Image.Resampling.LANCZOS), (x, y))
        draw.multiline_text((x, y + tile + 2), textwrap.fill(text, tile // 5), (40, 40, 40), font, spacing=1)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", required=True, help="the PNG to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=64, help="height and width of a picture in px")
    args = parser.parse_args()
    pairs = [
        (render(look, scene, args.size), caption(look, scene, rng))
        for look, scene, rng in covering_pairs(60, args.seed)
    ]
    contact_sheet(pairs, size=args.size).save(args.sheet)


if __name__ == "__main__":
    with readable_errors():
        main()
