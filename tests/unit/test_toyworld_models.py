"""How the toy world's models are built: small, with a token for every word; SDXL's start as Stable Diffusion's."""

import random

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from kron_adapter import inject_kronecker, remove_kronecker
from tests.conftest import ROOT
from toyworld.base_models import build_base, place_reserved_words, take_over
from toyworld.pictures import sample
from toyworld.world import RESERVED, caption, named_characters

MODELS = ROOT / "toyworld" / "models"


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(MODELS / "vae", dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(MODELS / "clip")


def test_the_models_are_small_and_hold_safetensors_only():
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for kind, limit in (("sd", 16.5e6), ("sdxl", 19e6), ("vae", 4e6), ("clip", 3e6), ("dino", 2e6)):
        assert sum(path.stat().st_size for path in files if path.is_relative_to(MODELS / kind)) < limit


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_base_model_has_never_met_the_reserved_words(kind):
    """Their embeddings are still those that were placed, and no name's."""
    pipeline = DiffusionPipeline.from_pretrained(MODELS / kind, dtype=torch.float32)
    embedding = pipeline.text_encoder.get_input_embeddings()
    before = embedding.weight.detach().clone()
    place_reserved_words(pipeline.tokenizer, embedding)
    torch.testing.assert_close(embedding.weight, before, rtol=0, atol=1e-2)


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


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_factors_of_many_shapes_fit_the_base_models(kind, vae):
    unet = build_base(kind, vae, MODELS / "clip").unet
    for a1, a2 in ((4, 64), (8, 64), (64, 8), (16, 16)):
        assert len(inject_kronecker(unet, a1, a2)) >= 32
        remove_kronecker(unet)


def test_the_wide_model_has_the_features_of_real_ones_wherever_it_has_attention(vae):
    unet = build_base("sd-wide", vae, MODELS / "clip").unet
    layers = inject_kronecker(unet, 4, 64)
    assert {layer.out_features for layer in layers.values()} == {320}
    assert {layer.in_features for layer in layers.values()} == {320, 128}  # and the text states
    assert any("down_blocks" in name for name in layers) and any("up_blocks" in name for name in layers)


def test_reserved_words_lie_among_the_names_and_differ_from_all(vae, tokenizer):
    embedding = build_base("sd", vae, MODELS / "clip").text_encoder.get_input_embeddings()
    place_reserved_words(tokenizer, embedding)
    words = [*RESERVED, *named_characters()]
    vectors = embedding.weight[[tokenizer(word).input_ids[1] for word in words]].detach()
    cosines = torch.nn.functional.cosine_similarity(vectors[: len(RESERVED), None], vectors[None], dim=-1)
    assert cosines.fill_diagonal_(0).max() < 0.9
    lengths = vectors.norm(dim=1)
    assert lengths[len(RESERVED) :].min() < lengths[: len(RESERVED)].min()
    assert lengths[: len(RESERVED)].max() < 1.5 * lengths[len(RESERVED) :].mean()


@torch.no_grad()
def test_sdxls_unet_begins_as_stable_diffusions(vae):
    pipelines = [build_base(kind, vae, MODELS / "clip") for kind in ("sd", "sdxl")]
    take_over(pipelines[1], pipelines[0])
    sd, sdxl = (pipeline.unet for pipeline in pipelines)
    torch.nn.init.zeros_(sdxl.add_embedding.linear_2.weight)  # of sizes and pooled texts, which sd does not see
    torch.nn.init.zeros_(sdxl.add_embedding.linear_2.bias)
    latents, timesteps, text = torch.randn(2, 8, 16, 16), torch.tensor([5, 900]), torch.randn(2, 77, 128)
    more = {"text_embeds": torch.randn(2, 128), "time_ids": torch.randn(2, 6)}
    both_texts = torch.cat([text, torch.randn(2, 77, 128)], dim=-1)
    expected = sd(latents, timesteps, text).sample
    actual = sdxl(latents, timesteps, both_texts, added_cond_kwargs=more).sample
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sdxls_text_encoders_say_the_same_at_another_scale(vae, tokenizer):
    encoder = build_base("sdxl", vae, MODELS / "clip").text_encoder_2
    tokens = tokenizer(["a photo of a red robot on a beach"], return_tensors="pt")
    scaled = encoder(**tokens, output_hidden_states=True)
    original = CLIPTextModelWithProjection.from_pretrained(MODELS / "clip", dtype=torch.float32)
    torch.testing.assert_close(scaled.text_embeds, original(**tokens).text_embeds, rtol=1e-4, atol=1e-4)
    assert 0.5 < scaled.hidden_states[-2].std() < 2
    assert original(**tokens, output_hidden_states=True).hidden_states[-2].std() > 10
