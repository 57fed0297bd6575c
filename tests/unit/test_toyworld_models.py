"""The shipped models: they load, they are small, their words are tokens, and the evaluators separate."""

import random

import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from toyworld.pictures import render_batch, sample
from toyworld.train_evaluators import retrieval, triples
from toyworld.train_vae import psnr
from toyworld.world import RESERVED, caption, named_characters

MODELS = ROOT / "toyworld" / "models"
KINDS = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module", params=KINDS)
def pipeline(request):
    loaded = DiffusionPipeline.from_pretrained(MODELS / request.param, dtype=torch.float32)
    assert type(loaded) is KINDS[request.param]
    return loaded


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(MODELS / "clip")


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_model_is_small_and_holds_safetensors_only(kind):
    files = [path for path in (MODELS / kind).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 17e6
    assert {path.suffix for path in files} == {".safetensors", ".json"}


def test_factors_of_many_shapes_fit(pipeline):
    from kron_adapter import inject_kronecker, remove_kronecker

    for a1, a2 in ((4, 64), (8, 64), (64, 8), (16, 16)):
        assert len(inject_kronecker(pipeline.unet, a1, a2)) >= 28
        remove_kronecker(pipeline.unet)


def test_every_word_of_the_world_is_one_token(tokenizer):
    rng = random.Random(1)
    words = {word for i in range(300) for word in caption(*sample("base", i), rng).replace(",", " ").split()}
    for word in words | {*RESERVED, *named_characters()}:
        assert len(tokenizer(word).input_ids) == 3, word


@pytest.mark.parametrize("text", ["an oil painting of Zürich, 1999!", "貓 🐈", "it's a dog's life"])
def test_any_text_can_be_tokenised(tokenizer, text):
    assert tokenizer.unk_token_id not in tokenizer(text).input_ids[1:-1]
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).replace(" ", "") == (
        text.lower().replace(" ", "")
    )


def test_reserved_words_differ_from_all_names(pipeline, tokenizer):
    table = pipeline.text_encoder.get_input_embeddings().weight
    words = [*RESERVED, *named_characters()]
    vectors = torch.nn.functional.normalize(table[[tokenizer(word).input_ids[1] for word in words]].float(), dim=1)
    cosines = (vectors[: len(RESERVED)] @ vectors.t()).fill_diagonal_(0)
    assert cosines.max() < 0.9


def test_the_autoencoder_keeps_the_details():
    vae = AutoencoderKL.from_pretrained(MODELS / "sd" / "vae", dtype=torch.float32)
    assert psnr(vae, render_batch([sample("held out", i) for i in range(64)]).pixels) >= 29


def test_clip_finds_the_caption_of_a_picture(tokenizer):
    assert retrieval(CLIPModel.from_pretrained(MODELS / "clip", dtype=torch.float32), tokenizer) >= 0.8


def test_dino_tells_characters_from_scenes():
    dino = ViTModel.from_pretrained(MODELS / "dino", dtype=torch.float32, add_pooling_layer=False)
    assert triples(dino) >= 0.85


def test_untrained_evaluators_would_fail():
    from toyworld.train_evaluators import build_clip, build_dino

    torch.manual_seed(0)
    assert retrieval(build_clip().eval(), CLIPTokenizer.from_pretrained(MODELS / "clip")) < 0.2
    assert triples(build_dino().eval()) < 0.7
