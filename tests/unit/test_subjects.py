"""Several subjects in one training: how they are described and refused, read, sampled and scored."""

import dataclasses
import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from dreambooth.base_model.prompts import PromptStates
from dreambooth.contrast import check_contrast
from dreambooth.data.crops import Crops
from dreambooth.data.dataset import DreamBoothDataset, class_prompts_of, instance_prompts_of, prompts_of
from dreambooth.data.folder import NoPhotosError
from dreambooth.data.order import GlobalSampler, order_of_pass, samples_per_pass, whose_turn
from dreambooth.data.photos import Photo, read_class_photos, read_instance_photos
from dreambooth.data.pixels import Pixels
from dreambooth.data.sources import prompt_sources
from dreambooth.drawing import class_images
from dreambooth.drawing.class_images import ensure_class_images
from dreambooth.errors import UserError
from dreambooth.families.sd import SD
from dreambooth.kronecker import KRONECKER
from dreambooth.options.checking import check_options
from dreambooth.options.evaluation import EvaluationOptions
from dreambooth.options.kronecker import KroneckerOptions
from dreambooth.options.parsing import read_options
from dreambooth.options.subjects import Subject
from dreambooth.options.training import TrainingConfig, config_class
from dreambooth.options.yaml_file import save_config, shared_yaml
from dreambooth.scoring.measures import score_mixing
from dreambooth.scoring.prompts import ADAPTED, name_together
from dreambooth.tokens import words_of_subjects
from kron_adapter import KroneckerLinear, start_from_contrast
from methods.custom_diffusion import CUSTOM_DIFFUSION
from methods.textual_inversion import TEXTUAL_INVERSION
from toyworld.tiny_pipeline import build_pipeline, build_tokenizer

Config = config_class(KroneckerOptions, TrainingConfig)
DOG = {"instance_prompt": "a photo of sks dog", "class_prompt": "a photo of dog"}
HOUND = {"instance_prompt": "a photo of zwx dog", "class_prompt": "a photo of dog"}
ROBOT = {"instance_prompt": "a photo of ohwx robot", "class_prompt": "a photo of robot"}
TWO = {"robot": ROBOT, "dog": DOG}
THREE = {**TWO, "hound": HOUND}
REQUIRED = {"pretrained_model_name_or_path": "base", "instance_data_dir": "photos", "resolution": 16}
PRIOR = {"with_prior_preservation": True, "class_data_dir": "class"}
BY_MODEL = {"with_prior_preservation": True, "prior_source": "base_model"}


def make_config(subjects=TWO, **options):
    return Config(**{**REQUIRED, "subjects": subjects, **options})


# ---- how they are described ----


def test_a_file_and_a_config_file_describe_the_same_subjects_in_any_order(tmp_path):
    lines = "\n".join(f"{name}: {{instance_prompt: {p['instance_prompt']}}}" for name, p in TWO.items())
    (tmp_path / "subjects.yaml").write_text(lines)
    nested = [f"  {line}" for line in reversed(lines.splitlines())]
    (tmp_path / "config.yaml").write_text("\n".join(["instance_data_dir: photos", "subjects:", *nested]))
    flags = ["--pretrained_model_name_or_path", "base"]
    by_flag = read_options(Config, "", [*flags, "--instance_data_dir=photos", f"--subjects={tmp_path}/subjects.yaml"])
    by_config = read_options(Config, "", [*flags, f"--config={tmp_path}/config.yaml"])
    assert by_flag == by_config
    assert (
        by_flag.all_subjects
        == by_config.all_subjects
        == (
            Subject("dog", "a photo of sks dog", None),
            Subject("robot", "a photo of ohwx robot", None),
        )
    )


def test_a_run_s_config_reads_back_and_names_no_file(tmp_path):
    config = make_config({**TWO, "ein Hündchen 🐶": {"instance_prompt": 'a "b": {c}, #d', "class_prompt": None}})
    save_config(config, tmp_path / "config.yaml")
    assert read_options(Config, "", ["--config", str(tmp_path / "config.yaml")]) == config
    assert "a photo of ohwx robot" in shared_yaml(config)


def test_without_subjects_there_is_one_where_the_options_say():
    config = Config(**REQUIRED, instance_prompt="a photo of sks dog")
    assert config.all_subjects == (Subject("", "a photo of sks dog", None),)
    assert config.all_subjects[0].class_folder == "" and config.instance_prompts == "a photo of sks dog"


@pytest.mark.parametrize(
    "subjects, options, words",
    [
        ({}, {}, "--subjects names no subject"),
        ({"dog": "a photo"}, {}, "--subjects dog: .*a photo"),
        ({"dog": {}}, {}, "--subjects dog has no instance_prompt"),
        ({"dog": {"instance_prompt": "  "}}, {}, "--subjects dog has no instance_prompt"),
        ({"dog": {"instance_prompt": ["a"]}}, {}, "--subjects dog: its instance_prompt .*a"),
        ({"dog": {**DOG, "prompt": "a"}}, {}, "--subjects dog: .*prompt"),
        ({"../dog": DOG}, {}, r"--subjects \.\./dog: .*--instance_data_dir"),
        ({"/dog": DOG}, {}, "--subjects /dog: .*--instance_data_dir"),
        ({"C:\\dog": DOG}, {}, "--subjects C:.*--instance_data_dir"),
        ({".": DOG}, {}, r"--subjects \.: .*--instance_data_dir"),
        ({"dog": DOG, "dog/": ROBOT}, {}, "--subjects: dog and dog are the same folder"),
        ({"a": DOG, "b": {"instance_prompt": "A photo  of SKS dog"}}, {}, "--subjects: a and b .*instance_prompt"),
        (TWO, {"instance_prompt": "sks"}, "--instance_prompt .*--subjects"),
        (TWO, {"class_prompt": "a dog", **BY_MODEL}, "--class_prompt .*--subjects"),
        (TWO, {"instance_data_dir": None, "dataset_name": "dogs"}, "--subjects .*--dataset_name"),
        (TWO, {"score_checkpoints": True, "holdout": 1}, "--score_checkpoints .*--subjects"),
        ({**TWO, "a": {"instance_prompt": "x"}}, BY_MODEL, "--subjects a .*class_prompt.*--with_prior_preservation"),
        ({**TWO, "a": {"instance_prompt": "x"}}, {"kron_init": "contrast"}, "--subjects a .*class_prompt.*contrast"),
        ({"a": DOG, "b": {**ROBOT, "class_prompt": "a photo of dog!"}}, PRIOR, "class_prompt of b: .*class-?.*folder"),
        ({"a": {**DOG, "class_prompt": "?"}}, PRIOR, "class_prompt of a: .*letters"),
        (None, {}, "--instance_prompt.*--subjects"),
    ],
)
def test_subjects_that_are_not_told_apart_or_in_full_are_refused(subjects, options, words):
    with pytest.raises(UserError, match=words):
        check_options(make_config(subjects, **options))


@pytest.mark.parametrize("options", [{}, PRIOR, BY_MODEL, {"kron_init": "contrast"}, {"holdout": 1}])
def test_the_rest_is_fine(options):
    check_options(make_config(THREE, **options))
    check_options(make_config({"dog": DOG}, **options))


@pytest.mark.parametrize(
    "method, words",
    [
        (TEXTUAL_INVERSION, {"placeholder_token": "<pet>", "initializer_token": "dog"}),
        (CUSTOM_DIFFUSION, {"modifier_token": "<pet>"}),
    ],
    ids=["textual inversion", "custom diffusion"],
)
def test_a_new_word_is_for_one_subject(method, words):
    host = SimpleNamespace(tokenizers={}, denoiser=build_pipeline("sd").unet)
    config = config_class(method.options, TrainingConfig)(**{**REQUIRED, "subjects": TWO, **words})
    with pytest.raises(UserError, match=f"--subjects names 2 .*--{next(iter(words))}"):
        method.check(host, [], config)


def test_custom_diffusion_without_a_word_takes_several():
    host = SimpleNamespace(tokenizers={}, denoiser=build_pipeline("sd").unet)
    CUSTOM_DIFFUSION.check(host, [], config_class(CUSTOM_DIFFUSION.options, TrainingConfig)(**REQUIRED, subjects=TWO))


# ---- how they are read ----


@pytest.fixture
def folders(tmp_path):
    """Two photos of a dog, three of a robot and one of neither, each in a colour of its own."""
    for number, name in enumerate(
        ["dog/00.png", "dog/01.png", "robot/00.png", "robot/01.png", "robot/02.png", "x.png"]
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(tmp_path / name)
    return tmp_path


def test_each_photo_has_the_prompts_of_its_subject_unless_it_has_a_caption(folders, caplog):
    (folders / "robot" / "01.txt").write_text("{instance_prompt} in the snow")
    photos = read_instance_photos(make_config(instance_data_dir=str(folders), **BY_MODEL))
    assert [(photo.name, photo.prompt, photo.class_prompt) for photo in photos] == [
        ("dog/00.png", "a photo of sks dog", "a photo of dog"),
        ("dog/01.png", "a photo of sks dog", "a photo of dog"),
        ("robot/00.png", "a photo of ohwx robot", "a photo of robot"),
        ("robot/01.png", "a photo of ohwx robot in the snow", "a photo of robot"),
        ("robot/02.png", "a photo of ohwx robot", "a photo of robot"),
    ]
    assert [photo.pixels[0, 0, 0] for photo in photos] == [0, 40, 80, 120, 160]


def test_what_is_beside_the_subjects_is_named(folders, caplog):
    read_instance_photos(make_config({"dog": DOG}, instance_data_dir=str(folders)))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "x.png" in warning and "robot/" in warning.replace("\\", "/") and "--subjects" in warning
    assert "dog" not in warning.replace(str(folders), "")


def test_each_keeps_its_own_last_photos_out(folders):
    photos = read_instance_photos(make_config(instance_data_dir=str(folders), holdout=1))
    assert [photo.name for photo in photos] == ["dog/00.png", "robot/00.png", "robot/01.png"]


@pytest.mark.parametrize("there", [None, "notes.txt", "deeper/00.png"])
def test_a_subject_without_photos_is_refused_by_name(folders, there):
    if there:
        (folders / "cat" / there).parent.mkdir(parents=True)
        (folders / "cat" / there).write_bytes((folders / "x.png").read_bytes())
    cat = {"instance_prompt": "a photo of olis cat", "class_prompt": "a photo of cat"}
    with pytest.raises(UserError, match="--subjects, cat: --instance_data_dir .*cat.*"):
        read_instance_photos(make_config({**TWO, "cat": cat}, instance_data_dir=str(folders)))


def test_photos_in_subfolders_are_still_refused_without_subjects_which_are_named(folders):
    (folders / "x.png").unlink()
    with pytest.raises(UserError, match="--instance_data_dir.*dog.*--subjects"):
        read_instance_photos(Config(**{**REQUIRED, "instance_data_dir": str(folders)}, instance_prompt="sks"))


def test_captions_are_compared_with_the_word_of_their_own_subject(folders, caplog):
    for name in ("dog", "robot"):
        (folders / name / "00.txt").write_text("a photo of sks dog")
    read_instance_photos(make_config(instance_data_dir=str(folders)))
    warnings = [record.getMessage() for record in caplog.records if "Captions without" in record.getMessage()]
    assert len(warnings) == 1 and "ohwx" in warnings[0] and warnings[0].endswith("robot/00.png")


def test_prompts_say_whose_they_are():
    config = make_config(THREE, **BY_MODEL)
    named = dict(prompt_sources([photo_of("dog", 0), photo_of("robot", 1)], config))
    assert named["--subjects, instance_prompt of dog"] == "a photo of sks dog"
    assert named["--subjects, class_prompt of robot"] == "a photo of robot"
    assert "--subjects, instance_prompt of hound" not in named, "there is no photo of it"
    assert words_of_subjects(config.all_subjects).split() == ["sks", "zwx", "ohwx"]


# ---- which sample shows which ----

SUBJECTS = {"dog": DOG, "hound": HOUND, "robot": ROBOT}
COUNTS = {"dog": 2, "hound": 7, "robot": 3}


def photo_of(folder, number, width=16, prompt=None):
    """A photo whose pixels say its number."""
    pixels = np.full((16, width, 3), number, np.uint8)
    described = SUBJECTS.get(folder, DOG)
    return Photo(
        Path(f"{number}.png"),
        Pixels(pixels),
        prompt or described["instance_prompt"],
        described["class_prompt"],
        (16, width),
        folder=folder,
    )


def dataset_of(counts=COUNTS, class_counts=None, widths=(16,), **options):
    config = make_config({name: SUBJECTS[name] for name in counts}, **options)
    places = [(name, i) for name, count in counts.items() for i in range(count)]
    photos = [photo_of(name, k, widths[i % len(widths)]) for k, (name, i) in enumerate(places)]
    of_classes = [
        dataclasses.replace(photo_of("", 100 + i), prompt=f"class image of {folder}", folder=folder)
        for folder, count in (class_counts or {}).items()
        for i in range(count)
    ]
    crops = Crops(photos, of_classes, config)
    return DreamBoothDataset(crops, prompts_of(photos, of_classes, config), None, config), config


def shown(dataset, count, first=0):
    return [dataset.photos[dataset._photo_number(k)] for k in range(first, first + count)]


def test_turns_are_taken_and_counted():
    turns = [whose_turn(k, ["a", "b", "a"], 2) for k in range(8)]
    assert turns == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("a", 3), ("a", 4), ("a", 5)]
    assert [whose_turn(k, ["a"], 3) for k in range(7)] == [("a", k) for k in range(7)]


def test_subjects_have_equally_many_samples_however_many_photos():
    dataset, _ = dataset_of()
    for first in (0, 4, 1000):
        folders = Counter(photo.folder for photo in shown(dataset, 30, first))
        assert folders == {"dog": 10, "hound": 10, "robot": 10}
    occurs = Counter(photo.name for photo in shown(dataset, 3 * 42))  # 42: whole passes of each subject
    assert {name: occurs[name] for name in ("dog/0.png", "hound/2.png", "robot/9.png")} == {
        "dog/0.png": 21,
        "hound/2.png": 6,
        "robot/9.png": 14,
    }


def test_a_pass_shows_every_photo_of_the_subject_that_has_the_most():
    dataset, config = dataset_of(repeats=2)
    assert samples_per_pass(dataset.photos, config) == 3 * 7 * 2
    occurs = Counter(photo.name for photo in shown(dataset, 42))
    assert {occurs[f"hound/{number}.png"] for number in range(2, 9)} == {2}
    assert len(occurs) == 12 and min(occurs.values()) >= 2


def test_one_subject_has_the_samples_of_a_folder_without_subjects():
    """Those that a run of one subject always had: each pass a permutation of its own number."""
    several, _ = dataset_of({"hound": 7})
    config = Config(**REQUIRED, instance_prompt=HOUND["instance_prompt"])
    photos = [dataclasses.replace(photo, folder="") for photo in several.photos]
    alone = DreamBoothDataset(Crops(photos, [], config), prompts_of(photos, [], config), None, config)
    numbers = [alone._photo_number(k) for k in range(30)]
    assert numbers == [several._photo_number(k) for k in range(30)]
    assert numbers == [order_of_pass(0, k // 7, ((16, 16),) * 7, 1, 1)[k % 7] for k in range(30)]


def test_subjects_with_equally_many_photos_have_orders_of_their_own():
    dataset, _ = dataset_of({"dog": 5, "robot": 5})
    numbers = [dataset._photo_number(k) for k in range(40)]
    assert [number % 5 for number in numbers[::2]] != [number % 5 for number in numbers[1::2]]


def test_resumed_and_shared_out_samples_are_the_same():
    """All batches of a step together are those of one device, from whichever step they are asked for."""

    def shows(dataset, rank, num_ranks, first_step, steps):
        sampler = iter(GlobalSampler(2, 1, rank, num_ranks, first_step))
        return [[dataset._photo_number(k) for k in next(sampler)] for _ in range(steps)]

    whole = [dataset_of()[0]._photo_number(k) for k in range(40)]
    shares = [shows(dataset_of()[0], rank, 2, 3, 4) for rank in (0, 1)]
    assert [number for step in zip(*shares) for batch in step for number in batch] == whole[12:28]


def test_with_buckets_a_batch_has_one_shape_and_one_subject_and_all_have_equally_many():
    options = {"aspect_ratio_buckets": True, "resolution": 192, "train_batch_size": 4}
    dataset, config = dataset_of(widths=(16, 64), **options)
    assert len({*dataset.crops.shapes}) == 2
    unit, length = 4, samples_per_pass(dataset.photos, config)
    assert length == 3 * 8  # the hound's seven photos, four and three of a shape, fill two batches
    batches = [shown(dataset, unit, first) for first in range(0, length, unit)]
    assert all(len({(photo.folder, photo.original_size) for photo in batch}) == 1 for batch in batches)
    assert Counter(batch[0].folder for batch in batches) == {"dog": 2, "hound": 2, "robot": 2}


def test_the_class_row_is_of_the_subject_s_class_and_shared_classes_share_their_images():
    dataset, _ = dataset_of(class_counts={"a-photo-of-dog": 6, "a-photo-of-robot": 2}, **PRIOR)
    pairs = [(dataset._photo_number(k), dataset._class_photo_number(k)) for k in range(18)]
    of = [(dataset.photos[i].folder, dataset.class_photos[c].folder) for i, c in pairs]
    assert set(of) == {("dog", "a-photo-of-dog"), ("hound", "a-photo-of-dog"), ("robot", "a-photo-of-robot")}
    occurs = Counter(c for _, c in pairs)
    assert [occurs[c] for c in range(8)] == [2] * 6 + [3] * 2  # dog and hound see each once in six samples of theirs
    rows = dataset[2]
    prompts = list(dataset.prompt_row)
    assert [prompts[row.prompt_row] for row in rows] == [ROBOT["instance_prompt"], "class image of a-photo-of-robot"]


def test_the_model_s_own_prior_is_that_of_the_subject_s_class():
    dataset, _ = dataset_of(**BY_MODEL)
    prompts = list(dataset.prompt_row)
    for k, described in enumerate((DOG, HOUND, ROBOT)):
        assert [prompts[row.prompt_row] for row in dataset[k]] == [*described.values()]


# ---- class images ----


def test_every_class_has_a_folder_of_its_own_and_is_drawn_once(tmp_path, monkeypatch, caplog):
    drawn = []

    def draw(base, indices, subject, config):
        drawn.append((subject.class_prompt, len(indices)))
        yield [Image.new("RGB", (16, 16), (index, 0, 0)) for index in indices]

    monkeypatch.setattr(class_images, "_draw", draw)
    ranks = SimpleNamespace(process_index=0, num_processes=1, is_local_main_process=False, wait_for_everyone=int)
    config = make_config(THREE, **{**PRIOR, "class_data_dir": str(tmp_path)}, num_class_images=3)
    photos = ensure_class_images(SimpleNamespace(accelerator=ranks), config)
    assert drawn == [("a photo of dog", 3), ("a photo of robot", 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-photo-of-dog", "a-photo-of-robot"]
    assert Counter((photo.folder, photo.prompt) for photo in photos) == {
        ("a-photo-of-dog", "a photo of dog"): 3,
        ("a-photo-of-robot", "a photo of robot"): 3,
    }
    assert ensure_class_images(SimpleNamespace(accelerator=ranks), config)[5].name == photos[5].name
    assert len(drawn) == 2 and not [record for record in caplog.records if record.levelno == logging.WARNING]
    with pytest.raises(NoPhotosError, match="--class_data_dir"):
        (tmp_path / "a-photo-of-cat").mkdir()
        read_class_photos(Subject("cat", "x", "a photo of cat"), config)


# ---- the contrast of prompts ----


def test_every_subject_s_prompts_weigh_the_same():
    table = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["one", "two", "three", "none"]
    states = PromptStates(
        lambda rows: {"prompt_embeds": table[rows]},
        *(prompts, [["none"], ["three"]], [["one"], ["two", "two", "three"]], SD, torch.device("cpu")),
    )
    repeated = table[[0, 0, 0, 1, 1, 2]].flatten(0, 1)
    found = states.of_class()
    torch.testing.assert_close(found.T @ found / len(found), repeated.T @ repeated / len(repeated))
    assert all(map(torch.equal, states.of_instances(), table[[3, 2]]))


def test_the_rows_of_subjects_take_turns_and_each_tells_its_own_from_the_others():
    """Both subjects share what is rare, the strongest contrast with the class, and have directions of their own."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([[6.0, 3, 0, 1, 0, 0, 0, 0], [6.0, 0, 3, 1, 0, 0, 0, 0], [0.0, 0, 0, 1, 1, 0, 0, 0]])
    first, second, of_class = (torch.randn(60, 8, generator=generator) * scale for scale in scales)
    layer = KroneckerLinear(torch.nn.Linear(8, 8), 2, 8, name="attn2.to_k")
    start_from_contrast([layer], [first, second], of_class)
    answers = torch.stack([(states @ layer.A.detach().T).square().mean(0) for states in (first, second, of_class)])
    assert (answers[0, 0] > 4 * answers[1:, 0]).all() and (answers[1, 1] > 4 * answers[[0, 2], 1]).all()


def test_prompts_are_those_of_each_subject():
    photos = [photo_of("dog", 0), photo_of("robot", 1), photo_of("robot", 2, prompt="another")]
    assert instance_prompts_of(photos) == [[DOG["instance_prompt"]], [ROBOT["instance_prompt"], "another"]]
    assert class_prompts_of(photos, [], make_config(**BY_MODEL)) == [["a photo of dog"], ["a photo of robot"] * 2]
    assert class_prompts_of(photos, [], make_config(kron_init="contrast")) == [["a photo of dog"], ["a photo of robot"]]
    assert class_prompts_of(photos, [], make_config()) == [[], []]


@pytest.mark.parametrize("names, rows", [(["dog"], 1), (["dog", "robot"], 2), (["dog", "hound", "robot"], 4)])
def test_the_start_from_contrast_has_a_direction_for_each_subject(names, rows):
    config = make_config({name: SUBJECTS[name] for name in names}, kron_init="contrast", kron_targets=["attn2.to_k"])
    assert config.contrast_factors() == dict.fromkeys(["attn2.to_k", "attn2.to_v"], (rows, "d_in"))


def test_a_subject_without_a_contrast_is_named():
    plain = {**TWO, "robot": {"instance_prompt": "A photo of ROBOT", "class_prompt": "a photo of robot"}}
    config = make_config(plain, kron_init="contrast", kron_targets=["attn2.to_k"])
    pipeline = build_pipeline("sd")
    attached = SimpleNamespace(family=SD, models={"unet": pipeline.unet}, denoiser=pipeline.unet, tokenizers={})
    KRONECKER._inject_all(attached, config)
    photos = [photo_of("dog", 0), photo_of("robot", 1, prompt="A photo of ROBOT")]
    with pytest.raises(UserError, match="class_prompt of robot"):
        check_contrast(pipeline.unet, [build_tokenizer()], photos, config)


# ---- evaluation ----


def evaluation(subjects=TWO, **options):
    required = {"pretrained_model_name_or_path": "base", "prompt": ["a {}"], "instance_data_dir": "photos"}
    return EvaluationOptions(**{**required, "subjects": subjects, **options})


def test_each_subject_is_evaluated_as_if_it_were_alone():
    parts = evaluation(output_dir="out", class_data_dir="class", reference_dir="others").of_each_subject()
    assert list(parts) == ["dog", "robot"]
    robot = parts["robot"]
    assert (robot.instance_token, robot.class_noun, robot.prompt_of_class) == ("ohwx", "robot", "a photo of robot")
    paths = [robot.instance_data_dir, robot.reference_dir, robot.output_dir, robot.class_data_dir]
    assert [Path(path or "").as_posix() for path in paths] == [
        *("photos/robot", "others/robot", "out/robot", "class/a-photo-of-robot")
    ]
    alone = EvaluationOptions(pretrained_model_name_or_path="base", class_noun="dog", prompt=["a {}"])
    assert alone.of_each_subject() == {"": alone}


@pytest.mark.parametrize(
    "instance_prompt, class_prompt, expected",
    [
        ("a photo of sks dog", "a photo of dog", ("sks", "dog")),
        ("sks dog", "dog", ("sks", "dog")),
        ("a photo of a zwx vrtx toy dog, in snow", "a photo of a toy dog, in snow", ("zwx vrtx", "toy dog, in snow")),
        ("a photo of sks dog", None, None),
        ("a photo of dog sks", "a photo of dog", None),
        ("a photo of sks dog", "a picture of dog", None),
        ("a photo of dog", "a photo of dog", None),
    ],
)
def test_what_prompts_call_a_subject_is_what_its_class_lacks(instance_prompt, class_prompt, expected):
    subject = Subject("pet", instance_prompt, class_prompt)
    if expected:
        assert subject.token_and_noun() == expected
        return
    with pytest.raises(UserError, match="--subjects pet: .*instance_prompt"):
        subject.token_and_noun()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"class_noun": "dog"}, "--class_noun .*--subjects"),
        ({"instance_token": "sks"}, "--instance_token .*--subjects"),
        ({"class_prompt": "a dog"}, "--class_prompt .*--subjects"),
        ({"together": ["a dog and a robot"]}, "--together 'a dog and a robot' .*{dog}"),
        ({"together": ["a {dog} and a {cat}"]}, "--together .*{cat}.*dog, robot"),
        ({"subjects": {**TWO, "together": HOUND}, "together": ["{dog}"]}, "--subjects together.*--together"),
        ({"subjects": None}, "--class_noun"),
    ],
)
def test_evaluations_that_contradict_themselves_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        check_options(evaluation(**options))


def test_prompts_with_several_name_each():
    prompts = name_together(evaluation(together=["a photo of {robot} beside {dog}", "{dog}"]))
    assert prompts.drawn[ADAPTED] == ["a photo of ohwx robot beside sks dog", "sks dog"]
    assert prompts.texts == ["a photo of robot beside dog", "dog"]


class Colours:
    """An evaluator in whose embeddings a picture is the colour of its corner."""

    def clip_images(self, images):
        return torch.tensor([image.getpixel((0, 0)) for image in images]).float()

    dino_images = clip_images


def test_mixing_is_the_likeness_to_every_subject_s_photos():
    def pictures(*colours):
        return [Image.new("RGB", (4, 4), colour) for colour in colours]

    photos = {"dog": pictures((200, 10, 0), (100, 50, 0)), "robot": pictures((0, 0, 90))}
    images = {"dog": pictures((90, 0, 0), (0, 0, 10)), "together": pictures((5, 5, 5))}
    found = score_mixing(images, photos, Colours())
    assert list(found) == ["dog", "together"] and list(found["dog"]) == ["dog", "robot"]
    for name, row in found.items():
        for other, scores in row.items():
            pairs = [(a, b) for a in Colours().dino_images(images[name]) for b in Colours().dino_images(photos[other])]
            expected = torch.stack([cosine_similarity(a, b, dim=0) for a, b in pairs]).mean().item()
            assert scores.dino == pytest.approx(expected, abs=1e-6) == scores.clip_i
    own = score_mixing(photos, photos, Colours())
    a, b = Colours().dino_images(photos["dog"])
    assert own["dog"]["dog"].dino == pytest.approx(cosine_similarity(a, b, dim=0).item())  # not each with itself
    assert own["robot"]["robot"].dino is None
