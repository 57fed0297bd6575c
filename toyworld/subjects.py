"""Eleven characters to personalise on: their photos, and prompts that ask for more than the photos show.

    python -m toyworld.subjects --output_dir toyworld/photos                    # the bundled ones
    python -m toyworld.subjects --output_dir photos --subjects cat boot         # others
    python -m toyworld.subjects --output_dir photos --subjects dog --held_out 16

Writes OUTPUT_DIR/SUBJECT/00.png, 01.png, ... at 128 px. No subject is a named character, and no caption tells its
emblem or eyes: a model has to learn them from the photos. Photos show six of the ten places; the questions are set in
the other four, in other styles and other colours. Held-out photos, for scoring, show the subject itself in those four:
OUTPUT_DIR/SUBJECT-held-out/00.png, ..., with masks of the character, 00.mask.png, ...
"""

import argparse
from dataclasses import replace
from pathlib import Path

from PIL import Image

from dreambooth.errors import UserError, readable_errors
from dreambooth.options.paths import path_argument
from toyworld.backgrounds import BACKGROUNDS, VARIANTS
from toyworld.render import POSES, render, render_with_mask
from toyworld.world import STYLES, Look, Scene, caption, recolour

PHOTO_SIZE = 128  # px; a training at 64 scales them down

SUBJECTS = {
    "robot": Look("robot", "teal", "orange", "dots", "heart", "cyclops"),
    "dog": Look("dog", "green", "pink", "plain", "bolt", "glasses"),
    "teapot": Look("teapot", "purple", "yellow", "stripes", "moon", "sleepy"),
    "cat": Look("cat", "orange", "blue", "stripes", "star", "happy"),
    "backpack": Look("backpack", "yellow", "purple", "dots", "clover", "round"),
    "boot": Look("boot", "blue", "red", "plain", "cross", "cyclops"),
    "car": Look("car", "brown", "pink", "stripes", "diamond", "dots"),
    "octopus": Look("octopus", "gray", "green", "dots", "drop", "glasses"),
    "duck": Look("duck", "black", "teal", "plain", "heart", "sleepy"),
    "mug": Look("mug", "red", "blue", "stripes", "clover", "happy"),
    "poodle": Look("dog", "purple", "yellow", "dots", "star", "happy"),  # a second dog
}
ONE_SHOT = ("duck", "mug")
RECOLOURINGS = ("blue", "yellow", "red", "green", "purple")
BUNDLED = ("robot", "dog", "duck")

# How the character stands in each photo: pose, scale, x, y
POSITIONS = (
    ("standing", 0.76, 0.5, 0.93),
    ("standing", 0.66, 0.44, 0.89),
    ("leaning", 0.7, 0.5, 0.91),
    ("standing", 0.72, 0.56, 0.94),
    ("jumping", 0.72, 0.48, 0.93),
    ("squashed", 0.74, 0.52, 0.9),
)


def photo_scenes(name: str) -> list[Scene]:
    """Return the scenes of a subject's photos: six, or one if it is one-shot."""
    places = _places(name)
    scenes = [
        Scene(place, variant, pose=pose, scale=scale, x=x, y=y)
        for variant, (place, (pose, scale, x, y)) in enumerate(zip(places, POSITIONS))
    ]
    return scenes[:1] if name in ONE_SHOT else scenes


def held_out_scenes(name: str, count: int) -> list[Scene]:
    """Return scenes of a subject in places that no photo shows: the first 16 are all their pairs with a pose."""
    unseen, poses = _places(name)[len(POSITIONS) :], list(POSES)
    return [
        Scene(
            unseen[i % len(unseen)],
            # Not an arrangement in which questions are set
            variant=len(BACKGROUNDS) + i % (VARIANTS - len(BACKGROUNDS)),
            pose=poses[(i + i // len(unseen)) % len(poses)],
            scale=_between(0.62, 0.78, 0.618 * i),
            x=_between(0.44, 0.56, 0.755 * i),
            y=_between(0.88, 0.94, 0.570 * i),
        )
        for i in range(count)
    ]


def _between(low: float, high: float, turns: float) -> float:
    """Return a number from `low` to `high`, where the fraction of `turns` says."""
    return low + (high - low) * (turns % 1)


def questions(name: str) -> list[tuple[Look, Scene]]:
    """Return what to ask a model that has learned a subject, as the looks and scenes of the answers.

    Ten (look, scene): four unseen places, three unseen styles, three recolourings.
    """
    look, unseen = SUBJECTS[name], _places(name)[len(POSITIONS) :]
    scenes = [Scene(place, variant) for variant, place in enumerate(unseen, start=len(POSITIONS))]
    styled = [replace(scene, style=style) for scene, style in zip(scenes, list(STYLES)[1:])]
    colours = [colour for colour in RECOLOURINGS if colour not in (look.body, look.accent)]
    recoloured = [(recolour(look, colour), scene) for scene, colour in zip(scenes[1:], colours)]
    return [*((look, scene) for scene in scenes + styled), *recoloured]


def prompts(name: str, token: str = "sks") -> list[str]:
    """Return the questions in words, with `token` for the subject: "a photo of sks robot in the desert", ..."""
    return [caption(replace(look, name=token), scene) for look, scene in questions(name)]


def _places(name: str) -> list[str]:
    """Return all places, the photographed ones first; which those are differs between subjects."""
    places, turn = list(BACKGROUNDS), 3 * list(SUBJECTS).index(name) % len(BACKGROUNDS)
    return places[turn:] + places[:turn]


def save_photos(name: str, folder: Path) -> None:
    """Write the photos of a subject as <folder>/00.png, ..., a few KB each."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(photo_scenes(name)):
        _save_photo(render(SUBJECTS[name], scene, PHOTO_SIZE), folder / f"{i:02d}.png")


def save_held_out(name: str, count: int, folder: Path) -> None:
    """Write held-out photos of a subject as <folder>/00.png, ..., and masks of the character, 00.mask.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(held_out_scenes(name, count)):
        photo, mask = render_with_mask(SUBJECTS[name], scene, PHOTO_SIZE)
        _save_photo(photo, folder / f"{i:02d}.png")
        mask.save(folder / f"{i:02d}.mask.png", optimize=True)


def _save_photo(photo: Image.Image, path: Path) -> None:
    photo.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=path_argument, required=True)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=BUNDLED)
    parser.add_argument("--held_out", type=int, default=0, help="held-out photos of each subject; default: 0")
    args = parser.parse_args()
    if args.held_out < 0:
        raise UserError(f"--held_out is {args.held_out}; it must be at least 0")
    for name in args.subjects:
        save_photos(name, args.output_dir / name)
        if args.held_out:
            save_held_out(name, args.held_out, args.output_dir / f"{name}-held-out")


if __name__ == "__main__":
    with readable_errors():
        main()
