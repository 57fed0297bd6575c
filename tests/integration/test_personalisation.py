"""The real question, asked of the toy world's base models: did it learn the subject, and keep the rest?

Trained through the scripts, drawn through the pipelines, scored by evaluators that never saw an adapter. What must not
pass for success is trained or broken here too.
"""

import hashlib
from dataclasses import dataclass
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
PRIOR = {"with_prior_preservation": True, "prior_source": "base_model", "class_prompt": "a photo of robot"}
DRAWING = {"num_inference_steps": 20, "guidance_scale": 3.0, "height": 64, "width": 64, "negative_prompt": ""}
RISE_OF_DINO, RISE_OF_CLIP_I, FALL_OF_CLIP_T = 0.15, 0.05, 0.05


@dataclass(frozen=True)
class Drawn:
    rows: list[list[Image.Image]]  # for each prompt
    class_images: list[Image.Image]


@dataclass(frozen=True)
class Result:
    scores: PromptScores
    prior: PriorDrift


@pytest.fixture(scope="module")
def evaluators():
    return load_evaluators(str(MODELS / "clip"), str(MODELS / "dino"), torch.device("cpu"))


@pytest.fixture(scope="module")
def photos():
    return read_subject_photos(str(PHOTOS))


@pytest.fixture(scope="module")
def examine(evaluators, photos, once):
    """Draw and score a base model with an adapter, or alone."""

    def draw(kind: str, adapter: Path | None) -> Drawn:
        def make() -> Drawn:
            config = AdaptedModelOptions(
                pretrained_model_name_or_path=str(MODELS / kind), adapter=[str(adapter)] if adapter else []
            )
            pipeline = load_adapted_pipeline(config, READERS)
            prepare_drawing(pipeline, READERS, config)
            pipeline.set_progress_bar_config(disable=True)
            rows = [draw_images(pipeline, range(2), 2, prompt=prompt, **DRAWING) for prompt in prompts("robot")]
            return Drawn(rows, draw_images(pipeline, range(8), 8, prompt="a photo of a robot", **DRAWING))

        return once(f"drawn {kind} {adapter}", make)

    def examined(kind: str, adapter: Path | None = None) -> Result:
        drawn, before = draw(kind, adapter), draw(kind, None)
        texts = [prompt.replace("sks ", "") for prompt in prompts("robot")]
        return Result(
            score_images(drawn.rows, photos, texts, evaluators),
            score_prior(before.class_images, drawn.class_images, photos, evaluators),
        )

    return examined


@pytest.fixture
def train(run_main, once, shared_folder):
    """Train on the photos of the robot; return the adapter file. Tests that ask for the same share it."""

    def trained(kind="sd", **options):
        name = f"{kind} {sorted(options.items())}"
        output = shared_folder / hashlib.sha256(name.encode()).hexdigest()[:16]

        def make() -> Path:
            defaults = {
                "pretrained_model_name_or_path": MODELS / kind,
                "instance_data_dir": PHOTOS,
                "instance_prompt": "a photo of sks robot",
                "resolution": 64,
                "center_crop": True,
                "kron_a1": 2,  # as in the quickstart
                "kron_a2": 32,
                "train_batch_size": 4,
                "max_train_steps": 200,
                "learning_rate": 1e-2,
                "output_dir": output,
                "report_to": "none",
            }
            run_main(SCRIPTS[kind], **defaults | options)
            return output / WEIGHTS

        return once(f"trained {name}", make)

    return trained


def learned(after: PromptScores, before: PromptScores) -> bool:
    """Whether images became clearly more like the subject, and stayed about as true to their prompts."""
    return (
        after.dino - before.dino > RISE_OF_DINO
        and after.clip_i - before.clip_i > RISE_OF_CLIP_I
        and before.clip_t - after.clip_t < FALL_OF_CLIP_T
    )


@pytest.mark.parametrize("kind", SCRIPTS)
def test_it_learns_the_subject_and_keeps_the_rest(kind, train, examine):
    result = examine(kind, train(kind, **PRIOR))
    assert learned(result.scores, examine(kind).scores)
    assert result.prior.diversity_after > 0.8 * result.prior.diversity_before


def test_without_a_prior_the_class_becomes_the_subject(train, examine):
    with_prior = examine("sd", train(**PRIOR)).prior
    without = examine("sd", train()).prior
    drift = without.similarity_after - without.similarity_before
    assert drift > 0.1
    assert with_prior.similarity_after - with_prior.similarity_before < 0.5 * drift
    assert without.diversity_after < with_prior.diversity_after


def test_prompts_paired_wrongly_teach_nothing_of_the_subject(train, examine):
    swapped = PRIOR | {"instance_prompt": "a photo of robot", "class_prompt": "a photo of sks robot"}
    assert not learned(examine("sd", train(**swapped)).scores, examine("sd").scores)


def test_a_zero_learning_rate_changes_nothing(train, examine):
    after = examine("sd", train(learning_rate=0.0, max_train_steps=5)).scores
    assert after == examine("sd").scores
    assert not learned(after, after)


def test_a_broken_adapter_is_told_from_a_good_one(train, examine, tmp_path):
    path = train(**PRIOR)
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("lokr_w2"):
            order = torch.randperm(tensor.numel(), generator=generator)
            tensors[name] = tensor.flatten()[order].view_as(tensor)
    broken = tmp_path / "broken.safetensors"
    save_file(tensors, broken)
    assert not learned(examine("sd", broken).scores, examine("sd").scores)
