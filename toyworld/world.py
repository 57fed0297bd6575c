"""Who and what there is: looks, scenes, several hundred named characters, and captions for all of them.

The caption of a nameless look tells its colours and its pattern, never its emblem or eyes. A name in front of the class
("zorvik robot") fixes the whole look, as names do in real models: a rare token builds on that. `RESERVED` tokens never
occur in a caption and stay free for training on a subject.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random

from toyworld.backgrounds import BACKGROUNDS, VARIANTS
from toyworld.objects import CLASSES, EMBLEMS, EYES

COLOURS = {
    "red": (222, 52, 48),
    "orange": (246, 138, 32),
    "yellow": (252, 214, 50),
    "green": (62, 168, 72),
    "teal": (24, 176, 172),
    "blue": (46, 96, 218),
    "purple": (140, 72, 196),
    "pink": (250, 134, 184),
    "brown": (146, 92, 54),
    "white": (244, 244, 240),
    "gray": (144, 148, 156),
    "black": (56, 56, 66),
}
PATTERNS = {"plain": "", "stripes": "striped", "dots": "dotted"}
STYLES = {
    "photo": ("a photo of", "a picture of", "a snapshot of", "a photograph of"),
    "watercolor": ("a watercolor painting of", "a watercolor of", "a watercolor picture of"),
    "pencil sketch": ("a pencil sketch of", "a pencil drawing of", "a drawing in pencil of"),
    "neon": ("a neon picture of", "a neon sign of", "a glowing neon drawing of"),
}
PLACES = {
    "beach": ("on a beach", "on the beach", "at the beach", "on a sandy beach"),
    "snow": ("in the snow", "in snow", "on a snow field"),
    "grass": ("on the grass", "on fresh grass", "in the grass"),
    "city": ("in a city at night", "in the city at night", "on a city street at night"),
    "wooden floor": ("on a wooden floor", "on the wooden floor", "in a room with a wooden floor"),
    "forest": ("in a forest", "in the forest", "among the trees of a forest"),
    "mountains": ("in the mountains", "in front of mountains", "with mountains in the background"),
    "studio": ("in a studio", "in the studio", "in a photo studio"),
    "desert": ("in the desert", "in a desert", "in a hot desert"),
    "reef": ("on a coral reef", "under water on a reef", "at the reef"),
}
POSES = {"standing": "", "leaning": "leaning", "jumping": "jumping", "squashed": "squashed"}
NAMES_PER_CLASS = 40
RESERVED = ("sks", "ohwx", "zwx", "olis", "vrtx")


@dataclass(frozen=True)
class Look:
    """What a character looks like wherever it is.

    name: the made-up name in front of the class, empty if nameless
    recoloured: the body does not have the colour that the name stands for, so captions must say it
    """

    kind: str
    body: str
    accent: str
    pattern: str
    emblem: str
    eyes: str
    name: str = ""
    recoloured: bool = False


@dataclass(frozen=True)
class Scene:
    """Where a character is and how it is shown.

    variant: the arrangement of the background
    scale: height of the character as a fraction of the picture's
    x, y: the middle between its feet when it stands, as fractions of the picture, y down
    flip: the character is mirrored (the background is not)
    """

    background: str
    variant: int
    style: str = "photo"
    pose: str = "standing"
    scale: float = 0.7
    x: float = 0.5
    y: float = 0.9
    flip: bool = False


def sample_look(rng: Random, named: float = 0.5) -> Look:
    """Return a random look: a named character with probability `named`, now and then recoloured."""
    if rng.random() < named:
        look = rng.choice(list(named_characters().values()))
        return recolour(look, rng.choice(list(COLOURS))) if rng.random() < 0.15 else look
    body, accent = rng.sample(list(COLOURS), 2)
    return Look(
        kind=rng.choice(list(CLASSES)),
        body=body,
        accent=accent,
        pattern=rng.choice(list(PATTERNS)),
        emblem=rng.choice(list(EMBLEMS)),
        eyes=rng.choice(list(EYES)),
    )


def sample_scene(rng: Random) -> Scene:
    """Return a random scene: half of them are photos, half of the characters stand still."""
    return Scene(
        background=rng.choice(list(BACKGROUNDS)),
        variant=rng.randrange(VARIANTS),
        style=rng.choices(list(STYLES), weights=(3, 1, 1, 1))[0],
        pose=rng.choices(list(POSES), weights=(3, 1, 1, 1))[0],
        scale=rng.uniform(0.58, 0.78),
        x=rng.uniform(0.42, 0.58),
        y=rng.uniform(0.86, 0.95),
        flip=rng.random() < 0.15,
    )


def recolour(look: Look, body: str) -> Look:
    """Return the same character with another body colour; an accent of that colour takes the old one."""
    if body == look.body:
        return look
    accent = look.body if look.accent == body else look.accent
    return replace(look, body=body, accent=accent, recoloured=True)


# -- names


@cache
def named_characters() -> dict[str, Look]:
    """Return name -> look of NAMES_PER_CLASS made-up names for each class, the same on every machine and version."""
    syllables = [a + b for a in "bdfgklmnprtvz" for b in ("a", "e", "i", "o", "u", "or", "el")]
    endings = ("vik", "dox", "lum", "zan", "mip", "rog", "tesh", "bix", "nup", "fyl", "quo", "jat", "wen")
    names = sorted((a + b for a in syllables for b in endings), key=_digest)
    characters = {}  # nameless look -> named look: no two may look alike
    for name in names:
        kind = list(CLASSES)[len(characters) % len(CLASSES)]
        look = _look_of(name, kind)
        characters.setdefault(replace(look, name=""), look)
        if len(characters) == NAMES_PER_CLASS * len(CLASSES):
            break
    return {look.name: look for look in characters.values()}


def _look_of(name: str, kind: str) -> Look:
    body = _choose(name + " body", COLOURS)
    return Look(
        kind=kind,
        body=body,
        accent=_choose(name + " accent", [colour for colour in COLOURS if colour != body]),
        pattern=_choose(name + " pattern", PATTERNS),
        emblem=_choose(name + " emblem", EMBLEMS),
        eyes=_choose(name + " eyes", EYES),
        name=name,
    )


def _digest(text: str) -> int:  # random numbers may change between versions of Python, hashes do not
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _choose(key: str, options: Iterable[str]) -> str:
    options = list(options)
    return options[_digest(key) % len(options)]


# -- captions


def caption(look: Look, scene: Scene, rng: Random | None = None) -> str:
    """Return what a picture of `look` in `scene` shows, in words.

    Without rng it is plain and complete: "a photo of a striped red robot on a beach". With rng the wording varies, and
    pose, pattern, colour and place are sometimes left out: so a model learns that a short prompt leaves the rest open.
    Never left out are a style other than photo, the colour of a recoloured character, and that something is mirrored.
    """
    pick = rng.choice if rng else lambda options: options[0]
    says = (lambda share: rng.random() < share) if rng else lambda share: share > 0.5
    who = _noun_phrase(look, scene, pick, says)
    place = pick(PLACES[scene.background]) if says(0.85) else ""
    if scene.style != "photo" and says(0.25):
        return f"{who} {place}".strip() + f", {scene.style} style"
    medium = "" if scene.style == "photo" and says(0.25) else pick(STYLES[scene.style])
    return " ".join(filter(None, (medium, who, place)))


def _noun_phrase(look: Look, scene: Scene, pick: Callable[[Sequence[str]], str], says: Callable[[float], bool]) -> str:
    """pick: one of several options    says: whether to say something, given how often that is said"""
    words = [POSES[scene.pose]] if says(0.7) else []
    if not look.name and says(0.8):
        words.append(PATTERNS[look.pattern])
    if look.recoloured or (not look.name and says(0.85)):
        words.append(look.body)
    phrase = " ".join(filter(None, (*words, look.name, look.kind)))
    if not look.name or look.recoloured or says(0.4):
        phrase = f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"
    if not look.name and says(0.25):
        phrase += pick((" with {} details", " with {} parts", ", {} accents")).format(look.accent)
    return phrase + (" facing left" if scene.flip else "")
