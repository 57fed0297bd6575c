"""Scores and embeddings, against plain loops over torch's cosine_similarity and transformers' own models."""

import json
import math
from itertools import combinations, product
from statistics import fmean

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipConfig,
    ViTConfig,
    ViTMAEConfig,
    ViTModel,
    pipeline,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from dreambooth.drawing.draw import draw_images
from dreambooth.errors import UserError
from dreambooth.scoring.embeddings import (
    distinct_cosine,
    load_evaluators,
    paired_cosine,
    pairwise_cosine,
    pairwise_diversity,
)
from dreambooth.scoring.measures import Scores, score_images, score_others, score_photos, score_prior
from dreambooth.scoring.subject import (
    name_subject,
    prompt_lines,
    read_prompts,
    read_subject_photos,
    warn_of_trained_photos,
)
from tests.conftest import ROOT
from tests.safety import add_safety_checker

CPU = torch.device("cpu")
PHOTOS = sorted((ROOT / "toyworld" / "photos" / "dog").glob("*.png"))
ROBOTS = sorted((ROOT / "toyworld" / "photos" / "robot").glob("*.png"))
TEXTS = ["a dog in the snow", "a purple dog on top of green grass with sunflowers around it " * 3, "dog"]


def images_of(paths):
    return [Image.open(path).convert("RGB") for path in paths]


@pytest.fixture(scope="module")
def evaluators(tiny_clip, tiny_dino):
    return load_evaluators(str(tiny_clip), str(tiny_dino), CPU, batch_size=2)


@pytest.fixture
def a():
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def b():
    return 3 * torch.randn(5, 7, generator=torch.Generator().manual_seed(1))


# ---- cosines ----


def test_cosines_are_those_of_a_plain_loop(a, b):
    loop = torch.tensor([[cosine_similarity(x, y, dim=0) for y in b[:3]] for x in a])
    torch.testing.assert_close(pairwise_cosine(a, b[:3]), loop)
    torch.testing.assert_close(paired_cosine(a, b), cosine_similarity(a, b))
    pairs = [cosine_similarity(x, y, dim=0) for x, y in combinations(a, 2)]
    assert len(pairs) == 10
    torch.testing.assert_close(distinct_cosine(a), torch.stack(pairs))
    assert math.isclose(pairwise_diversity(a), 1 - fmean(map(float, pairs)), abs_tol=1e-6)


def test_diversity_is_0_for_what_is_alike_and_none_for_one(a):
    assert abs(pairwise_diversity(a[:1].repeat(4, 1))) < 1e-6
    assert pairwise_diversity(a[:1]) is None
    assert abs(pairwise_diversity(torch.eye(3)) - 1) < 1e-6
    assert abs(pairwise_diversity(torch.tensor([[1.0, 0], [-1, 0]])) - 2) < 1e-6


# ---- evaluators ----


def assert_directions(ours, theirs):
    """The same up to length, and ours of length 1."""
    torch.testing.assert_close(ours, theirs / theirs.norm(dim=-1, keepdim=True), atol=2e-6, rtol=0)


def test_clip_s_embeddings_are_those_of_its_own_forward_pass(evaluators, tiny_clip):
    model, tokenizer = CLIPModel.from_pretrained(tiny_clip), AutoTokenizer.from_pretrained(tiny_clip)
    processor = AutoImageProcessor.from_pretrained(tiny_clip)
    images = images_of(PHOTOS[:3])
    images[1] = images[1].crop((0, 0, 128, 90))  # CLIP crops by itself
    for image, ours in zip(images, evaluators.clip_images(images)):
        tokens = tokenizer("dog", return_tensors="pt")
        with torch.no_grad():
            theirs = model(**tokens, **processor(image, return_tensors="pt")).image_embeds
        assert_directions(ours[None], theirs)
    for text, ours in zip(TEXTS, evaluators.clip_texts(TEXTS)):
        tokens = tokenizer(text, truncation=True, return_tensors="pt")
        with torch.no_grad():
            theirs = model(**tokens, **processor(images[0], return_tensors="pt")).text_embeds
        assert_directions(ours[None], theirs)
    ours = evaluators.clip_images(images) @ evaluators.clip_texts(TEXTS).T
    assert ours.std() > 0.01  # or nothing is tested


def test_dino_s_embeddings_are_the_first_tokens_of_transformers_pipeline(evaluators, tiny_dino):
    extract = pipeline(
        "image-feature-extraction",
        model=ViTModel.from_pretrained(tiny_dino, add_pooling_layer=False),
        image_processor=AutoImageProcessor.from_pretrained(tiny_dino),
    )
    images = images_of(PHOTOS)
    theirs = torch.tensor([extract(image)[0][0] for image in images])
    assert theirs.shape == (6, 64)
    assert_directions(evaluators.dino_images(images), theirs)
    assert pairwise_diversity(theirs) > 0.01


@pytest.mark.parametrize("size", [(200, 128), (128, 200)])
def test_dino_sees_the_central_square(evaluators, size):
    photo = images_of(PHOTOS[:1])[0]
    framed = Image.new("RGB", size, "red")
    framed.paste(photo, ((size[0] - 128) // 2, (size[1] - 128) // 2))
    torch.testing.assert_close(evaluators.dino_images([framed]), evaluators.dino_images([photo]))


def test_embeddings_do_not_depend_on_the_batch(evaluators, tiny_clip, tiny_dino):
    whole, images = load_evaluators(str(tiny_clip), str(tiny_dino), CPU, batch_size=16), images_of(PHOTOS[:5])
    torch.testing.assert_close(evaluators.clip_images(images), whole.clip_images(images))
    torch.testing.assert_close(evaluators.dino_images(images), whole.dino_images(images))
    torch.testing.assert_close(evaluators.clip_texts(TEXTS), whole.clip_texts(TEXTS))


DINO_V2 = {"image_size": 56, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
DINO_V2_MODELS = [
    Dinov2Model(Dinov2Config(**DINO_V2)),
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO_V2, num_register_tokens=4)),
]


@pytest.mark.parametrize("model", DINO_V2_MODELS, ids=lambda model: model.config.model_type)
def test_dino_v2_s_embeddings_are_its_class_token_after_its_own_crop(model, tiny_clip, tmp_path):
    """As facebook/dinov2-small is, it has position embeddings for another size than its processor makes."""
    model.eval().save_pretrained(tmp_path)
    processor = BitImageProcessorPil(size={"shortest_edge": 48}, crop_size=40, image_mean=[0.4] * 3)
    processor.save_pretrained(tmp_path)
    images = images_of(PHOTOS[:2])
    images[1] = images[1].crop((0, 0, 128, 90))
    evaluators = load_evaluators(str(tiny_clip), str(tmp_path), CPU)
    for image, ours in zip(images, evaluators.dino_images(images)):
        with torch.no_grad():
            theirs = model(**processor(image, return_tensors="pt"))
        assert_directions(ours[None], theirs.pooler_output)
    assert evaluators.dino_images(images)[0] @ evaluators.dino_images(images)[1] < 1 - 1e-6


def test_processors_as_the_hub_has_them_will_do(tiny_clip, tiny_dino, tmp_path):
    """facebook/dino-vits16 and openai/clip-vit-base-patch32 were saved long ago: in other words, and for 224 px."""
    shared = {"do_resize": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": 64}
    kinds = {
        "dino": (tiny_dino, {"feature_extractor_type": "ViTFeatureExtractor", "resample": 2}),
        "clip": (tiny_clip, {"feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "crop_size": 64}),
    }
    for kind, (folder, words) in kinds.items():
        copy = copy_without(folder, "preprocessor_config.json", tmp_path / kind)
        (copy / "preprocessor_config.json").write_text(json.dumps(shared | words))
    evaluators, (photo,) = load_evaluators(str(tmp_path / "clip"), str(tmp_path / "dino"), CPU), images_of(PHOTOS[:1])
    for processor, resample in ((evaluators.dino_processor, 2), (evaluators.clip_processor, 3)):
        scaled = torch.tensor(np.asarray(photo.resize((64, 64), resample))).permute(2, 0, 1) / 255
        torch.testing.assert_close(processor([photo], return_tensors="pt").pixel_values[0], (scaled - 0.5) / 0.25)


def copy_without(folder, name, target):
    target.mkdir()
    for path in folder.iterdir():
        if path.name != name:
            (target / path.name).write_bytes(path.read_bytes())
    return target


def test_what_is_not_an_evaluator_is_refused_by_name(tiny_clip, tiny_dino, tiny_sd, tmp_path):
    def refusal(clip, dino):
        with pytest.raises(UserError) as error:
            load_evaluators(str(clip), str(dino), CPU)
        assert "\n" not in str(error.value)
        return str(error.value)

    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nowhere", tmp_path / "empty", tiny_sd, tiny_clip / "config.json"):
        assert refusal(folder, tiny_dino).startswith(f"--clip_model {folder} is not a CLIP model: ")
        assert refusal(tiny_clip, folder).startswith(f"--dino_model {folder} is not a DINO model: ")
    assert "its config.json says clip, expected vit or" in refusal(tiny_clip, tiny_clip)
    assert refusal(tiny_dino, tiny_dino).startswith(f"--clip_model {tiny_dino} is not a CLIP model: ")
    for name in ("preprocessor_config.json", "model.safetensors", "config.json"):
        damaged = copy_without(tiny_dino, name, tmp_path / f"dino-{name}")
        assert refusal(tiny_clip, damaged).startswith(f"--dino_model {damaged} is not a DINO model: ")


def test_a_model_of_another_kind_is_refused_by_its_name(tiny_clip, tiny_dino, tmp_path):
    def refused(flag, config, word):
        folder = tmp_path / word
        config.save_pretrained(folder)  # nothing else: the kind is known before anything is loaded
        with pytest.raises(UserError, match=f"{flag} {folder} is not .*: .* says {word}, "):
            load_evaluators(*(str(folder if flag == name else other) for name, other in evaluators.items()), CPU)

    evaluators = {"--clip_model": tiny_clip, "--dino_model": tiny_dino}
    refused("--clip_model", SiglipConfig(), "siglip")
    refused("--dino_model", ViTMAEConfig(), "vit_mae")
    refused("--dino_model", ViTConfig(architectures=["ViTForImageClassification"]), "ViTForImageClassification")


def test_a_processor_that_does_not_fit_its_model_is_refused(tiny_clip, tiny_dino, tmp_path):
    misfit = copy_without(tiny_dino, "preprocessor_config.json", tmp_path / "dino")
    ViTImageProcessorPil(size=32).save_pretrained(misfit)
    with pytest.raises(UserError, match=f"--dino_model {misfit} is not a DINO model: .*32"):
        load_evaluators(str(tiny_clip), str(misfit), CPU)


def test_an_evaluator_that_lacks_weights_is_refused(tiny_clip, tiny_dino, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_dino / "model.safetensors")
    del weights["layernorm.weight"]
    damaged = copy_without(tiny_dino, "model.safetensors", tmp_path / "dino")
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="is not a DINO model: its weights lack layernorm.weight"):
        load_evaluators(str(tiny_clip), str(damaged), CPU)


# ---- scores ----


def cosines(pairs):
    return fmean(float(cosine_similarity(x, y, dim=0)) for x, y in pairs)


def test_scores_are_the_paper_s_means(evaluators):
    photos, rows, texts = images_of(PHOTOS[:2]), [images_of(ROBOTS[:3]), images_of(ROBOTS[3:])], TEXTS[:2]
    scores = score_images(rows, photos, texts, evaluators)
    for row, text, score in zip(rows, texts, scores.by_prompt):
        clip, dino = evaluators.clip_images(row), evaluators.dino_images(row)
        words = evaluators.clip_texts([text])[0]
        assert math.isclose(score.clip_i, cosines(product(clip, evaluators.clip_images(photos))), abs_tol=1e-6)
        assert math.isclose(score.dino, cosines(product(dino, evaluators.dino_images(photos))), abs_tol=1e-6)
        assert math.isclose(score.clip_t, cosines((image, words) for image in clip), abs_tol=1e-6)
        assert math.isclose(score.diversity, 1 - cosines(combinations(dino, 2)), abs_tol=1e-6)
    for name in ("clip_i", "dino", "clip_t", "diversity"):
        assert math.isclose(getattr(scores, name), fmean(getattr(score, name) for score in scores.by_prompt))
    assert scores.by_prompt[0] != scores.by_prompt[1]


def test_every_prompt_weighs_the_same_and_one_image_has_no_diversity(evaluators):
    photos, rows = images_of(PHOTOS), [images_of(ROBOTS[:3]), images_of(ROBOTS[3:4])]
    scores = score_images(rows, photos, TEXTS[:2], evaluators)
    several, one = scores.by_prompt
    assert one.diversity is None and scores.diversity == several.diversity
    assert math.isclose(scores.dino, (several.dino + one.dino) / 2)
    assert score_images(rows[1:], photos, TEXTS[:1], evaluators).diversity is None


def test_images_that_are_the_photo_score_1(evaluators):
    photo = images_of(PHOTOS[:1])
    scores = score_images([photo * 3], photo, ["a dog"], evaluators)
    assert abs(scores.clip_i - 1) < 1e-5 and abs(scores.dino - 1) < 1e-5 and abs(scores.diversity) < 1e-5
    assert isinstance(scores.by_prompt[0], Scores) and scores.clip_t < 0.99


def test_photos_are_compared_with_each_other_not_with_themselves(evaluators):
    photos = images_of(PHOTOS[:3])
    own = score_photos(photos, evaluators)
    assert math.isclose(own.clip_i, cosines(combinations(evaluators.clip_images(photos), 2)), abs_tol=1e-6)
    assert math.isclose(own.dino, cosines(combinations(evaluators.dino_images(photos), 2)), abs_tol=1e-6)
    assert score_photos(photos[:1], evaluators).dino is None


def test_other_prompts_drift_from_the_base_model_and_leak_the_subject(evaluators):
    photos, texts = images_of(PHOTOS[:2]), TEXTS[:2]
    before, after = [images_of(ROBOTS[:2]), images_of(ROBOTS[2:4])], [images_of(ROBOTS[:2]), images_of(PHOTOS[2:4])]
    drift = score_others(before, after, photos, texts, evaluators)
    assert abs(drift.by_prompt[0].distance) < 1e-6
    assert drift.by_prompt[0].clip_t_before == drift.by_prompt[0].clip_t_after
    dino, old, new = (evaluators.dino_images(images) for images in (photos, before[1], after[1]))
    clip, words = evaluators.clip_images(after[1]), evaluators.clip_texts(texts[1:])
    changed = drift.by_prompt[1]
    assert math.isclose(changed.distance, 1 - cosines(zip(old, new)), abs_tol=1e-6) and changed.distance > 0.01
    assert math.isclose(changed.clip_t_after, cosines(product(clip, words)), abs_tol=1e-6)
    assert math.isclose(changed.similarity_before, cosines(product(old, dino)), abs_tol=1e-6)
    assert math.isclose(changed.similarity_after, cosines(product(new, dino)), abs_tol=1e-6)
    for name in ("distance", "clip_t_before", "clip_t_after", "similarity_before", "similarity_after"):
        assert math.isclose(getattr(drift, name), fmean(getattr(row, name) for row in drift.by_prompt))


def test_the_prior_drifts_towards_the_photos(evaluators):
    photos, before = images_of(PHOTOS), images_of(ROBOTS)
    still = score_prior(before, before, photos, evaluators)
    assert abs(still.distance) < 1e-6 and still.similarity_before == still.similarity_after
    dino, old, new = (evaluators.dino_images(images) for images in (photos, before, photos))
    drift = score_prior(before, photos, photos, evaluators)
    assert math.isclose(drift.similarity_before, cosines(product(old, dino)), abs_tol=1e-6)
    assert math.isclose(drift.similarity_after, cosines(product(new, dino)), abs_tol=1e-6)
    assert math.isclose(drift.diversity_before, 1 - cosines(combinations(old, 2)), abs_tol=1e-6)
    assert math.isclose(drift.diversity_after, 1 - cosines(combinations(new, 2)), abs_tol=1e-6)
    assert math.isclose(drift.distance, 1 - cosines(zip(old, new)), abs_tol=1e-6) and drift.distance > 0.01


# ---- prompts, photos, images ----


def test_prompt_files_hold_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# a comment with {}\n\n  a {} in the snow \na red {}, {braced}\n", encoding="utf-8")
    assert read_prompts(str(path)) == ["a {} in the snow", "a red {}, {braced}"]
    assert name_subject(read_prompts(str(path)), "sks dog")[1] == "a red sks dog, {braced}"
    for content in (b"", b"# none\n\n", "Hündchen {}".encode("latin-1")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"--prompts {path}: "):
            read_prompts(str(path))


@pytest.mark.parametrize("name", ["objects", "live_subjects"])
def test_the_bundled_prompts_are_the_dreambooth_dataset_s(name):
    path = ROOT / "configs" / "prompts" / f"{name}.txt"
    prompts = read_prompts(str(path))
    assert len(prompts) == len(set(prompts)) == 25 and all(prompt.count("{}") == 1 for prompt in prompts)
    assert "CC BY 4.0" in path.read_text() and "Nataniel Ruiz" in path.read_text()
    original = ROOT.parent / "shared" / "data" / "dreambench" / "prompts_and_classes.txt"
    if original.exists():
        parts = original.read_text().split("Live Subject Prompts")
        for prompt in prompts:
            assert f"'{prompt.replace('{}', '{0} {1}')}'.format" in parts[name == "live_subjects"]


def test_the_bundled_other_prompts_name_no_subject():
    prompts = prompt_lines(str(ROOT / "configs" / "prompts" / "other.txt")).values()
    assert len(set(prompts)) == 8 and not any("{}" in prompt for prompt in prompts)


def test_subject_photos_are_read_whole_in_the_order_of_their_names(tmp_path):
    for name, size in {"b.png": (30, 20), "a.jpg": (10, 40)}.items():
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("no photo")
    assert [photo.size for photo in read_subject_photos(str(tmp_path))] == [(10, 40), (30, 20)]
    for folder in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(UserError, match=f"--instance_data_dir {folder}: there is no"):
            read_subject_photos(str(folder))
        (tmp_path / "empty").mkdir(exist_ok=True)


def test_an_image_depends_on_its_seed_not_on_the_batch(tiny_sd):
    from diffusers import StableDiffusionPipeline

    sd = StableDiffusionPipeline.from_pretrained(tiny_sd)
    sd.set_progress_bar_config(disable=True)
    options = {"prompt": "a dog", "height": 64, "width": 64, "num_inference_steps": 2}
    three = draw_images(sd, range(3, 6), 2, **options)
    (alone,) = draw_images(sd, [5], 4, **options)
    assert len(three) == 3 and draw_images(sd, [], 2, **options) == []

    def difference(left, right):
        left, right = (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int() for image in (left, right))
        return (left - right).abs().max()

    assert difference(three[2], alone) <= 1 < difference(three[1], alone)


@pytest.mark.parametrize("threshold, rejected", [(-2.0, True), (2.0, False)])
def test_images_that_a_safety_checker_rejects_are_black_and_others_as_without_it(threshold, rejected, tiny_sd):
    from diffusers import StableDiffusionPipeline

    sd = StableDiffusionPipeline.from_pretrained(tiny_sd)
    options = {"prompt": "a dog", "height": 64, "width": 64, "num_inference_steps": 2}
    plain = draw_images(sd, [0, 1, 2], 2, **options)
    add_safety_checker(sd, threshold)
    checked = draw_images(sd, [0, 1, 2], 2, **options)
    black = Image.new("RGB", (64, 64))
    assert black not in plain and checked == ([black] * 3 if rejected else plain)


def test_an_adapter_that_was_trained_on_the_held_out_photos_is_warned_of(caplog):
    files = {"kept.safetensors": '{"holdout": 2}', "old.safetensors": "{}", "bare.safetensors": "", "odd": "[1"}
    warn_of_trained_photos({name: {"config": config} for name, config in files.items()}, 2)
    (record,) = caplog.records
    assert "--holdout 2: old.safetensors was trained with --holdout 0" in record.getMessage()
