"""The real question, asked of the toy world's base models: did it learn the subject, and keep the rest?

Trained through the scripts, drawn through the pipelines, scored by evaluators that never saw an adapter. What must not
pass for success is trained or broken here too.
"""

import functools
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train_dreambooth_kronecker
import train_dreambooth_kronecker_sdxl
from dreambooth.drawing.draw import draw_images
from dreambooth.drawing.pipelines import load_adapted_pipeline, prepare_drawing
from dreambooth.options.base_model import AdaptedModelOptions
from dreambooth.scoring.embeddings import load_evaluators
from dreambooth.scoring.measures import PriorDrift, PromptScores, score_images, score_prior
from dreambooth.scoring.subject import read_subject_photos
from methods.readers import READERS
from tests.conftest import ROOT, WEIGHTS
from toyworld.subjects import prompts

MODELS = ROOT / "toyworld" / "models"
PHOTOS = ROOT / "toyworld" / "photos" / "robot"
SCRIPTS = {"sd": train_dreambooth_kronecker, "sdxl": train_dreambooth_kronecker_sdxl}
PROMPTS = tuple(prompts("robot"))
PRIOR = {"with_prior_preservation": True, "prior_source": "base_model", "class_prompt": "a photo of robot"}
DRAWING = {"num_inference_steps": 20, "guidance_scale": 3.0, "height": 64, "width": 64, "negative_prompt": ""}
RISE_OF_DINO, RISE_OF_CLIP_I, FALL_OF_CLIP_T = 0.15, 0.05, 0.05


@pytest.fixture(scope="module")
def evaluators():
    return load_evaluators(str(MODELS / "clip"), str(MODELS / "dino"), torch.device("cpu"))


@pytest.fixture(scope="module")
def photos():
    return read_subject_photos(str(PHOTOS))


@pytest.fixture(scope="module")
def draw():
    """Draw images of each prompt with a base model and an adapter, or alone. Tests that ask for the same share them."""

    @functools.cache
    def drawn(kind: str, adapter: Path | None, prompts: tuple[str, ...], count: int) -> list[list[Image.Image]]:
        config = AdaptedModelOptions(
            pretrained_model_name_or_path=str(MODELS / kind), adapter=[str(adapter)] if adapter else []
        )
        pipeline = load_adapted_pipeline(config, READERS)
        prepare_drawing(pipeline, READERS, config)
        pipeline.set_progress_bar_config(disable=True)
        return [draw_images(pipeline, range(count), count, prompt=prompt, **DRAWING) for prompt in prompts]

    return drawn


@pytest.fixture(scope="module")
def score(draw, photos, evaluators):
    """Score what a base model draws of the subject with an adapter, or alone."""

    def scored(kind: str, adapter: Path | None = None) -> PromptScores:
        texts = [prompt.replace("sks ", "") for prompt in PROMPTS]
        return score_images(draw(kind, adapter, PROMPTS, 2), photos, texts, evaluators)

    return scored


@pytest.fixture(scope="module")
def drift(draw, photos, evaluators):
    """Measure how an adapter changes what the base model draws of the class."""

    def drifted(kind: str, adapter: Path) -> PriorDrift:
        before, after = (draw(kind, file, ("a photo of a robot",), 8)[0] for file in (None, adapter))
        return score_prior(before, after, photos, evaluators)

    return drifted


@pytest.fixture(scope="module")
def trained() -> dict[str, Path]:
    """The adapter files that `train` has made so far, by their options."""
    return {}


@pytest.fixture
def train(run_main, trained, tmp_path_factory):
    """Train on the photos of the robot; return the adapter file. Tests that ask for the same share it."""

    def run(kind="sd", **options) -> Path:
        name = f"{kind} {sorted(options.items())}"
        if name not in trained:
            output = tmp_path_factory.mktemp("trained")
            defaults = {
                "pretrained_model_name_or_path": MODELS / kind,
                "instance_data_dir": PHOTOS,
                "instance_prompt": "a photo of sks robot",
                "resolution": 64,
                "center_crop": True,
                "kron_a1": 2,
                "kron_a2": 32,
                "kron_init": "contrast",  # which learns in so few steps
                "train_batch_size": 4,
                "max_train_steps": 60,
                "learning_rate": 1e-2,
                "output_dir": output,
                "report_to": "none",
            }
            run_main(SCRIPTS[kind], **defaults | options)
            trained[name] = output / WEIGHTS
        return trained[name]

    return run


def learned(after: PromptScores, before: PromptScores) -> bool:
    """Whether images became clearly more like the subject, and stayed about as true to their prompts."""
    return (
        after.dino - before.dino > RISE_OF_DINO
        and after.clip_i - before.clip_i > RISE_OF_CLIP_I
        and before.clip_t - after.clip_t < FALL_OF_CLIP_T
    )


@pytest.mark.parametrize("kind", SCRIPTS)
def test_it_learns_the_subject_and_keeps_the_rest(kind, train, score, drift):
    adapter = train(kind, **PRIOR)
    assert learned(score(kind, adapter), score(kind))
    prior = drift(kind, adapter)
    assert prior.diversity_after > 0.8 * prior.diversity_before


def test_without_a_prior_the_class_becomes_the_subject(train, drift):
    everywhere = {"kron_init": "invariant", "max_train_steps": 200}  # contrast would change the subject alone
    with_prior, without = (drift("sd", train(**everywhere, **options)) for options in (PRIOR, {}))
    rise = without.similarity_after - without.similarity_before
    assert rise > 0.1
    assert with_prior.similarity_after - with_prior.similarity_before < 0.5 * rise
    assert without.diversity_after < with_prior.diversity_after


def test_prompts_paired_wrongly_teach_nothing_of_the_subject(train, score):
    swapped = PRIOR | {"instance_prompt": "a photo of robot", "class_prompt": "a photo of sks robot"}
    assert not learned(score("sd", train(**swapped)), score("sd"))


def test_a_zero_learning_rate_changes_nothing(train, draw):
    adapter = train(**PRIOR, learning_rate=0.0, max_train_steps=5)
    after, before = (draw("sd", file, PROMPTS[:1], 2) for file in (adapter, None))
    assert after == before


def test_what_has_not_changed_has_learned_nothing(score):
    assert not learned(score("sd"), score("sd"))


def test_a_broken_adapter_is_told_from_a_good_one(train, score, tmp_path):
    path = train(**PRIOR)
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("lokr_w2"):
            order = torch.randperm(tensor.numel(), generator=generator)
            tensors[name] = tensor.flatten()[order].view_as(tensor)
    broken = tmp_path / "broken.safetensors"
    save_file(tensors, broken)
    assert not learned(score("sd", broken), score("sd"))
