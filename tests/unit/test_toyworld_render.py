"""The drawn world: pictures, captions and subjects mean what training on them relies on."""

import hashlib
import random
import subprocess
import sys
from dataclasses import fields, replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth.scoring.subject import prompt_lines
from tests.conftest import ROOT
from toyworld.backgrounds import BACKGROUNDS, VARIANTS, background
from toyworld.objects import CLASSES, EMBLEMS, EYES, character
from toyworld.render import POSES, covering_pairs, render, render_with_mask
from toyworld.subjects import (
    BUNDLED,
    ONE_SHOT,
    SUBJECTS,
    held_out_scenes,
    photo_scenes,
    prompts,
    questions,
    save_held_out,
    save_photos,
)
from toyworld.world import (
    COLOURS,
    PATTERNS,
    PLACES,
    RESERVED,
    STYLES,
    Look,
    Scene,
    caption,
    named_characters,
    recolour,
    sample_look,
    sample_scene,
)

DETAILS = dict(body=COLOURS, accent=COLOURS, pattern=PATTERNS, emblem=EMBLEMS, eyes=EYES)
LOOK = Look("robot", "red", "blue", "plain", "star", "round")
SCENE = Scene("studio", 0)
PHOTOS = Path(__file__).parents[2] / "toyworld" / "photos"


def pixels(look, scene, size=64):
    return np.asarray(render(look, scene, size), float)


def mask(look, scene):
    return np.asarray(render_with_mask(look, scene)[1], float) / 255


def samples(count, seed=0, **look):
    rng = random.Random(seed)
    return [(sample_look(rng, **look), sample_scene(rng)) for _ in range(count)]


def captions(count, **look):
    rng = random.Random(1)
    return [(pair, caption(*pair, rng)) for pair in samples(count, **look)]


def words(text):
    return text.replace(",", "").split()


# -- pictures


def test_a_seed_fixes_the_world_in_another_process_too():
    program = (
        "import random, hashlib; from toyworld.render import render; from toyworld.world import *\n"
        "rng = random.Random(3); digest = hashlib.sha256()\n"
        "for _ in range(20):\n"
        "    look, scene = sample_look(rng), sample_scene(rng)\n"
        "    digest.update(render(look, scene).tobytes() + caption(look, scene, rng).encode())\n"
        "print(digest.hexdigest())"
    )
    run = [sys.executable, "-c", program]
    root = Path(__file__).parents[2]
    first, second = (subprocess.run(run, cwd=root, capture_output=True, text=True, check=True) for _ in range(2))
    assert first.stdout == second.stdout
    assert len({render(*pair).tobytes() for pair in samples(50)}) == 50


@pytest.mark.parametrize("size", [64, 96, 128])
def test_pictures_have_the_size_asked_for_and_show_the_same(size):
    image, where = render_with_mask(LOOK, SCENE, size)
    assert (image.mode, image.size) == ("RGB", (size, size)) and (where.mode, where.size) == ("L", (size, size))
    small = np.asarray(image.resize((32, 32), Image.Resampling.BOX), float)
    assert np.abs(small - np.asarray(render(LOOK, SCENE, 64).reduce(2), float)).mean() < 3


def test_material_indices_fit_into_their_bits():
    for kind, eyes, up in product(CLASSES, EYES, (False, True)):
        assert len(character(kind, eyes, "star", up).materials) <= 16
    for name, variant in product(BACKGROUNDS, range(0, VARIANTS, 4)):
        assert len(background(name, variant).materials) <= 32


def test_samples_cover_all_there_is():
    looks, scenes = zip(*samples(2000))
    for name, options in (DETAILS | {"kind": CLASSES}).items():
        assert {getattr(look, name) for look in looks} == set(options)
    for name, options in dict(background=BACKGROUNDS, style=STYLES, pose=POSES, variant=range(VARIANTS)).items():
        assert {getattr(scene, name) for scene in scenes} == set(options)
    assert 0.4 < np.mean([bool(look.name) for look in looks]) < 0.6
    assert all(look.body != look.accent for look in looks)


def test_the_sheet_shows_every_class_background_and_style():
    looks, scenes, _ = zip(*covering_pairs(60, seed=0))
    assert {look.kind for look in looks} == set(CLASSES)
    assert {scene.style for scene in scenes} == set(STYLES)
    assert {(scene.background, scene.style == "photo") for scene in scenes} == set(product(BACKGROUNDS, (True, False)))


def test_classes_have_different_silhouettes():
    masks = {kind: mask(replace(LOOK, kind=kind), SCENE) for kind in CLASSES}
    for a, b in combinations(masks.values(), 2):
        assert np.minimum(a, b).sum() / np.maximum(a, b).sum() < 0.85


@pytest.mark.parametrize("kind", CLASSES)
def test_every_detail_of_a_look_shows(kind):
    """Two looks that differ in one field differ by at least as much as 6 px from black to white."""
    for name, values in DETAILS.items():
        images = [pixels(replace(LOOK, kind=kind, **{name: value}), SCENE) for value in values]
        for a, b in combinations(images, 2):
            assert np.abs(a - b).sum() / (3 * 255) > 6, name


@pytest.mark.parametrize("style", STYLES)
def test_backgrounds_differ_in_every_style(style):
    """The mean of some variants, 8 x 8 px small, tells which background another variant is of."""

    def thumbnail(name, variant):
        return np.asarray(render(LOOK, Scene(name, variant, style)).reduce(8), float)

    means = {name: np.mean([thumbnail(name, v) for v in range(6)], axis=0) for name in BACKGROUNDS}
    for name, variant in product(BACKGROUNDS, range(6, 10)):
        picture = thumbnail(name, variant)
        assert min(means, key=lambda other: np.abs(means[other] - picture).sum()) == name


def test_styles_differ_in_every_background():
    for name in BACKGROUNDS:
        images = [pixels(LOOK, Scene(name, 0, style)) for style in STYLES]
        for a, b in combinations(images, 2):
            assert np.abs(a - b).mean() > 20


@pytest.mark.parametrize("kind", CLASSES)
def test_the_mask_covers_the_subject_and_nothing_else(kind):
    scene = Scene("grass", 1, pose="jumping", x=0.45)
    look, other = replace(LOOK, kind=kind), replace(LOOK, kind=kind, body="yellow", accent="pink", eyes="dots")
    where = mask(look, scene)
    changed = np.abs(pixels(look, scene) - pixels(other, scene)).max(axis=2) > 2
    assert not changed[where == 0].any()
    assert changed[where == 1].mean() > 0.4  # but metal, glass and white stay
    assert 0.1 < where.mean() < 0.5


def test_characters_stay_in_the_picture():
    outside = [np.concatenate([m[0], m[:, 0], m[:, -1]]).mean() for m in (mask(*pair) for pair in samples(200))]
    assert np.mean(outside) < 0.01


def test_position_scale_and_flip_move_the_character():
    def centre_and_area(scene):
        where = mask(replace(LOOK, kind="duck"), scene)
        return np.argwhere(where > 0.5).mean(axis=0) / 64, where.mean()

    (y, x), area = centre_and_area(SCENE)
    (moved_y, moved_x), _ = centre_and_area(replace(SCENE, x=0.6, y=0.85))
    np.testing.assert_allclose([moved_x - x, moved_y - y], [0.1, -0.05], atol=0.01)
    assert centre_and_area(replace(SCENE, scale=0.35))[1] == pytest.approx(area / 4, rel=0.05)
    flipped, plain = (mask(replace(LOOK, kind="duck"), replace(SCENE, flip=flip)) for flip in (True, False))
    assert np.abs(flipped[:, ::-1] - plain).mean() < 0.01 < np.abs(flipped - plain).mean()


# -- captions


def test_the_plain_caption_is_complete():
    look, scene = replace(LOOK, pattern="stripes"), Scene("beach", 0)
    assert caption(look, scene) == "a photo of a striped red robot on a beach"
    assert caption(replace(look, body="orange"), replace(scene, style="pencil sketch", pose="jumping", flip=True)) == (
        "a pencil sketch of a jumping striped orange robot facing left on a beach"
    )
    assert caption(replace(look, name="zorvik"), scene) == "a photo of zorvik robot on a beach"
    assert (
        caption(recolour(replace(look, name="zorvik"), "green"), scene) == "a photo of a green zorvik robot on a beach"
    )


def test_captions_tell_the_truth_and_most_of_it():
    told = {"colour": [], "background": []}
    for (look, scene), text in captions(2000):
        said = words(text)
        assert look.kind in said and not (set(CLASSES) - {look.kind}) & set(said)
        assert set(said) & set(COLOURS) <= {look.body, look.accent}
        assert ("facing" in said) == scene.flip
        assert {"watercolor", "pencil", "neon"} & set(said) == set(scene.style.split()[:1]) - {"photo"}
        places = {name for name in BACKGROUNDS if name.split()[0] in said}
        assert places <= {scene.background}
        told["background"].append(bool(places))
        if not look.name:
            told["colour"].append(look.body in said)
    assert 0.75 < np.mean(told["colour"]) < 0.95 and 0.75 < np.mean(told["background"]) < 0.95


def test_captions_vary_and_include_the_class_prompt():
    rng = random.Random(0)
    texts = [caption(LOOK, SCENE, rng) for _ in range(500)]
    assert len(set(texts)) > 50
    assert "a photo of a robot" in texts


def test_captions_never_tell_emblem_or_eyes():
    assert not {word for _, text in captions(2000) for word in words(text)} & (set(EMBLEMS) | set(EYES))


def test_reserved_tokens_stay_free():
    assert "sks" in RESERVED
    said = {word for _, text in captions(5000) for word in words(text)} | set(named_characters())
    assert not said & set(RESERVED)


# -- named characters


def test_every_name_has_a_look_of_its_own():
    characters = named_characters()
    assert len(characters) == 480
    assert all(name == look.name for name, look in characters.items())
    assert len({replace(look, name="") for look in characters.values()}) == len(characters)
    assert {kind: sum(look.kind == kind for look in characters.values()) for kind in CLASSES} == dict.fromkeys(
        CLASSES, 40
    )


def test_names_are_no_other_words():
    vocabulary = {word for _, text in captions(5000, named=0) for word in words(text)}
    assert not vocabulary & set(named_characters())


def test_names_and_looks_are_those_that_the_models_learned():
    looks = list(named_characters().values())
    assert looks[0] == Look("robot", "yellow", "teal", "plain", "drop", "round", "rulum")
    assert looks[1] == Look("teapot", "gray", "yellow", "stripes", "heart", "dots", "zorzan")
    assert hashlib.sha256(repr(looks).encode()).hexdigest()[:16] == "e2f6f1c9c2217d0f"


def test_a_name_stands_before_its_class_and_for_its_colours():
    for (look, _), text in captions(1000, named=1):
        said = words(text)
        assert said[said.index(look.kind) - 1] == look.name
        assert look.recoloured == (look.body != named_characters()[look.name].body)
        if look.recoloured:
            assert said[said.index(look.kind) - 2] == look.body


def test_recolouring_keeps_everything_else():
    for name in SUBJECTS:
        for colour in COLOURS:
            look = recolour(SUBJECTS[name], colour)
            assert look.body == colour != look.accent
            kept = {field.name for field in fields(Look)} - {"body", "accent", "recoloured"}
            assert all(getattr(look, field) == getattr(SUBJECTS[name], field) for field in kept)


# -- subjects


def test_subjects_are_new_to_a_model_of_this_world():
    known = {replace(look, name="") for look in named_characters().values()}
    assert len(set(SUBJECTS.values())) == len(SUBJECTS) >= 8
    assert not known & set(SUBJECTS.values())
    assert set(SUBJECTS) & set(BUNDLED) == set(BUNDLED) and set(BUNDLED) & set(ONE_SHOT)


@pytest.mark.parametrize("name", SUBJECTS)
def test_questions_ask_for_what_no_photo_shows(name):
    photos = photo_scenes(name)
    assert len(photos) == (1 if name in ONE_SHOT else 6)
    assert len({scene.background for scene in photos}) == len(photos)
    asked = questions(name)
    assert not {scene.background for scene in photos} & {scene.background for _, scene in asked}
    assert {scene.style for scene in photos} == {"photo"}
    assert {scene.style for _, scene in asked} == set(STYLES)
    assert len({look.body for look, _ in asked}) == 4
    assert len(set(prompts(name))) == len(asked) == 10
    assert all(f"sks {SUBJECTS[name].kind}" in prompt for prompt in prompts(name))
    assert prompts(name, "ohwx") == [prompt.replace("sks", "ohwx") for prompt in prompts(name)]


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_photos_are_what_the_command_writes(name, tmp_path):
    save_photos(name, tmp_path)
    written, bundled = (sorted(folder.glob("*")) for folder in (tmp_path, PHOTOS / name))
    assert [path.name for path in written] == [path.name for path in bundled] != []
    for ours, theirs in zip(written, bundled):
        a, b = (np.asarray(Image.open(path).convert("RGB"), float) for path in (ours, theirs))
        assert a.shape == b.shape == (128, 128, 3)
        assert np.abs(a - b).mean() < 1
        assert theirs.stat().st_size < 10_000


@pytest.mark.parametrize("name", SUBJECTS)
def test_held_out_photos_are_in_places_that_no_photo_shows_and_not_the_questions_own(name):
    scenes = held_out_scenes(name, 40)
    assert len(set(scenes)) == 40 and held_out_scenes(name, 7) == scenes[:7]
    assert not {scene.background for scene in scenes} & {scene.background for scene in photo_scenes(name)}
    asked = {(scene.background, scene.variant) for _, scene in questions(name)}
    assert not {(scene.background, scene.variant) for scene in scenes} & asked
    assert {scene.style for scene in scenes} == {"photo"}
    assert len({(scene.background, scene.pose) for scene in scenes[:16]}) == 16 == 4 * len(POSES)


def test_held_out_photos_have_the_mask_of_their_character(tmp_path):
    save_held_out("cat", 2, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00.mask.png", "00.png", "01.mask.png", "01.png"]
    for number, scene in enumerate(held_out_scenes("cat", 2)):
        photo = np.asarray(Image.open(tmp_path / f"{number:02d}.png").convert("RGB"), float)
        inside = np.asarray(Image.open(tmp_path / f"{number:02d}.mask.png"), float) / 255
        assert inside.shape == (128, 128) and 0.1 < inside.mean() < 0.5
        # Another character in the same scene differs inside the mask alone
        other = pixels(replace(SUBJECTS["cat"], body="white", accent="gray", pattern="dots"), scene, 128)
        assert np.abs(photo - other)[inside == 0].mean() < 2 < np.abs(photo - other)[inside == 1].mean()


@pytest.mark.parametrize("name", ["dog", "robot", "teapot", "cat", "duck", "mug"])
def test_the_prompt_files_ask_a_subject_s_questions(name):
    asked = [prompt.replace(f"sks {SUBJECTS[name].kind}", "{}") for prompt in prompts(name)]
    assert list(prompt_lines(ROOT / "configs" / "prompts" / f"toyworld_{name}.txt").values()) == asked


def test_other_prompts_say_what_captions_say_and_name_none_of_these_subjects():
    others = prompt_lines(ROOT / "configs" / "prompts" / "toyworld_other.txt").values()
    media, places = (sum(phrases.values(), ()) for phrases in (STYLES, PLACES))
    for prompt in others:
        words = prompt.split()
        (kind,) = set(CLASSES) & set(words)
        assert kind not in ("dog", "robot", "teapot", "cat") and set(COLOURS) & set(words)
        assert prompt.startswith(media) and prompt.endswith(places)
    assert len(others) == 8
