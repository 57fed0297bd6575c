"""What the shipped models of the toy world can do: draw what is asked for, keep details, and tell characters apart."""

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from dreambooth.scoring.embeddings import load_evaluators
from tests.conftest import ROOT
from toyworld.pictures import render_batch, sample
from toyworld.train_base import described, draw
from toyworld.train_evaluators import build_clip, build_dino, retrieval, triples
from toyworld.train_vae import psnr

MODELS = ROOT / "toyworld" / "models"


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(MODELS / "clip")


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_base_model_draws_what_it_is_asked_for(kind):
    pipeline = DiffusionPipeline.from_pretrained(MODELS / kind, dtype=torch.float32)
    evaluators = load_evaluators(str(MODELS / "clip"), str(MODELS / "dino"), torch.device("cpu"))
    prompts = described()
    likeness = evaluators.clip_images(draw(pipeline, prompts)) @ evaluators.clip_texts(prompts).T
    right = (likeness.argmax(1) == torch.arange(len(prompts))).sum()
    assert right >= 26  # of 32; by chance it would be one


def test_the_autoencoder_keeps_the_details():
    vae = AutoencoderKL.from_pretrained(MODELS / "vae", dtype=torch.float32)
    assert psnr(vae, render_batch([sample("held out", i) for i in range(64)]).pixels) >= 29


def test_clip_finds_the_caption_of_a_picture(tokenizer):
    assert retrieval(CLIPModel.from_pretrained(MODELS / "clip", dtype=torch.float32), tokenizer) >= 0.8


def test_dino_tells_characters_from_scenes():
    dino = ViTModel.from_pretrained(MODELS / "dino", dtype=torch.float32, add_pooling_layer=False)
    assert triples(dino) >= 0.85


def test_untrained_evaluators_would_fail(tokenizer, monkeypatch):
    monkeypatch.setattr("toyworld.train_evaluators.HELD_OUT", 256)  # a quarter: they are far from passing
    torch.manual_seed(0)
    assert retrieval(build_clip().eval(), tokenizer) < 0.2
    assert triples(build_dino().eval()) < 0.7
