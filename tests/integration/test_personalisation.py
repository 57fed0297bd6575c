"""The real question, asked of the toy world's base models: did it learn the subject, and keep the rest?

Trained through the scripts, drawn through the pipelines, scored by evaluators that never saw an adapter. What must not
pass for success is trained or broken here too.
"""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_dreambooth_kronecker
import train_dreambooth_kronecker_sdxl
from dreambooth.scoring.embeddings import load_evaluators
from dreambooth.scoring.measures import PriorDrift, PromptScores, score_images, score_prior
from dreambooth.scoring.subject import read_subject_photos
from tests.conftest import ROOT, WEIGHTS
from toyworld.study import draw_all, load
from toyworld.subjects import prompts

MODELS = ROOT / "toyworld" / "models"
PHOTOS = ROOT / "toyworld" / "photos" / "robot"
SCRIPTS = {"sd": train_dreambooth_kronecker, "sdxl": train_dreambooth_kronecker_sdxl}
PRIOR = {"with_prior_preservation": True, "prior_source": "base_model", "class_prompt": "a photo of robot"}
RISE_OF_DINO, RISE_OF_CLIP_I, FALL_OF_CLIP_T = 0.15, 0.05, 0.05


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
def examine(evaluators, photos):
    """Draw and score a base model with an adapter, or alone."""
    before = {}

    def examined(kind: str, adapter=None) -> Result:
        drawn = draw_all(load(str(MODELS / kind), [adapter] if adapter else []), "robot", images=2, class_images=8)
        before.setdefault(kind, drawn.class_images)
        texts = [prompt.replace("sks ", "") for prompt in prompts("robot")]
        return Result(
            score_images(drawn.rows, photos, texts, evaluators),
            score_prior(before[kind], drawn.class_images, photos, evaluators),
        )

    return examined


@pytest.fixture(scope="module")
def base(examine):
    return {kind: examine(kind) for kind in SCRIPTS}


@pytest.fixture(scope="module")
def trained_files():
    """What was trained once serves every test that asks for the same."""
    return {}


@pytest.fixture
def train(run_main, trained_files, tmp_path_factory):
    """Train on the photos of the robot; return the adapter file."""

    def trained(kind="sd", **options):
        key = (kind, *sorted(options.items()))
        if key not in trained_files:
            output = tmp_path_factory.mktemp("run")
            defaults = {
                "pretrained_model_name_or_path": MODELS / kind,
                "instance_data_dir": PHOTOS,
                "instance_prompt": "a photo of sks robot",
                "resolution": 64,
                "center_crop": True,
                "kron_a1": 2,  # as in the quickstart
                "kron_a2": 32,
                "train_batch_size": 4,
                "max_train_steps": 300,
                "learning_rate": 1e-2,
                "output_dir": output,
                "report_to": "none",
            }
            run_main(SCRIPTS[kind], **defaults | options)
            trained_files[key] = output / WEIGHTS
        return trained_files[key]

    return trained


def learned(after: PromptScores, before: PromptScores) -> bool:
    """Whether images became clearly more like the subject, and stayed about as true to their prompts."""
    return (
        after.dino - before.dino > RISE_OF_DINO
        and after.clip_i - before.clip_i > RISE_OF_CLIP_I
        and before.clip_t - after.clip_t < FALL_OF_CLIP_T
    )


@pytest.mark.parametrize("kind", SCRIPTS)
def test_it_learns_the_subject_and_keeps_the_rest(kind, train, examine, base):
    result = examine(kind, train(kind, **PRIOR))
    assert learned(result.scores, base[kind].scores)
    assert result.prior.diversity_after > 0.8 * result.prior.diversity_before


def test_without_a_prior_the_class_becomes_the_subject(train, examine, base):
    with_prior = examine("sd", train(**PRIOR)).prior
    without = examine("sd", train()).prior
    drift = without.similarity_after - without.similarity_before
    assert drift > 0.1
    assert with_prior.similarity_after - with_prior.similarity_before < 0.5 * drift
    assert without.diversity_after < with_prior.diversity_after


def test_prompts_paired_wrongly_teach_nothing_of_the_subject(train, examine, base):
    swapped = PRIOR | {"instance_prompt": "a photo of robot", "class_prompt": "a photo of sks robot"}
    assert not learned(examine("sd", train(**swapped)).scores, base["sd"].scores)


def test_a_zero_learning_rate_changes_nothing(train, examine, base):
    after = examine("sd", train(learning_rate=0.0, max_train_steps=5)).scores
    assert after == base["sd"].scores
    assert not learned(after, base["sd"].scores)


def test_a_broken_adapter_is_told_from_a_good_one(train, examine, base, tmp_path):
    path = train(**PRIOR)
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("lokr_w2"):
            order = torch.randperm(tensor.numel(), generator=generator)
            tensors[name] = tensor.flatten()[order].view_as(tensor)
    broken = tmp_path / "broken.safetensors"
    save_file(tensors, broken)
    assert not learned(examine("sd", broken).scores, base["sd"].scores)
