"""Long prompts: their chunks, their embeddings in training and drawing, and the warning if they are cut."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from dreambooth.base_model.cache import text_identity
from dreambooth.base_model.source import load_tokenizers
from dreambooth.data.sources import own_captions, prompt_sources
from dreambooth.drawing.draw import draw_images
from dreambooth.drawing.prompts import embedding_arguments
from dreambooth.errors import UserError
from dreambooth.families.sd import SD
from dreambooth.families.sdxl import SDXL
from dreambooth.options.checking import check_options
from dreambooth.report.card import save_card
from dreambooth.tokens import split_prompt, subject_words, warn_of_cut_prompts
from tests.conftest import ROOT
from toyworld.tiny_pipeline import build_tokenizer
from train_dreambooth_kronecker import Config

LONG = " ".join(["a photo of a street with many people and cars"] * 2) + " now"  # 75 letters, of a token each
DOG, CAR = f"{LONG} sks dog", f"{LONG} red car"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def model(request):
    """A family with a pipeline of it."""
    base = request.getfixturevalue(f"tiny_{request.param}")
    if request.param == "sd":
        pipeline = StableDiffusionPipeline.from_pretrained(base)
        pipeline.tokenizer.pad_token = "!"  # as Stable Diffusion 2 pads
        return SimpleNamespace(family=SD, pipeline=pipeline, encoders=["text_encoder"], tokenizers=["tokenizer"])
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    return SimpleNamespace(family=SDXL, pipeline=pipeline, encoders=SDXL.text_encoders, tokenizers=SDXL.tokenizers)


@pytest.fixture
def config(tiny_sd, tmp_path) -> Config:
    return Config(
        pretrained_model_name_or_path=str(tiny_sd),
        instance_data_dir="photos",
        instance_prompt="a photo of sks dog",
        output_dir=str(tmp_path),
    )


def theirs(model, prompts, **options):
    """Embeddings by the pipeline's own encode_prompt, under the names of its arguments."""
    encoded = model.pipeline.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, **options)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return {name: tensor for name, tensor in zip(names, encoded) if tensor is not None}


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---- chunks ----


@pytest.mark.parametrize("prompt", ["", "sks dog", "a,b  c\nd", "x" * 75, "x" * 76, LONG, DOG, "犬" * 40, "x" * 400])
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_one_chunk_is_what_the_tokenizer_makes_of_a_prompt(prompt, pad):
    tokenizer = build_tokenizer(pad_token=pad)
    whole = tokenizer(prompt, truncation=True, max_length=77).input_ids
    split = split_prompt(prompt, tokenizer, 75)
    assert [[tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id] for chunk in split.chunks] == [whole]
    assert split.length == len(tokenizer(prompt).input_ids) - 2
    assert bool(split.rest) == (split.length > 75)


@pytest.mark.parametrize(
    "words, lengths",
    [
        ((70, 5, 3), [75, 3]),
        ((70, 6, 3), [70, 9]),  # the word of 6 moves to the next chunk whole
        ((70, 75), [70, 75]),
        ((70, 76), [75, 71]),  # no chunk has room for it
        ((70, 70, 10), [70, 75]),  # the last chunk is filled, with half a word
        ((75, 75, 1), [75, 75]),
        ((10, 300), [75, 75]),
    ],
)
def test_words_stay_whole_where_the_next_chunk_has_room(words, lengths, tokenizer):
    prompt = " ".join("abcdefghij"[number] * length for number, length in enumerate(words))
    split = split_prompt(prompt, tokenizer, 150)
    assert [len(chunk) for chunk in split.chunks] == lengths
    assert sum(split.chunks, []) == tokenizer(prompt).input_ids[1:-1][: sum(lengths)]
    assert split.length == sum(words)


def test_punctuation_moves_with_its_word_and_the_rest_begins_with_a_whole_word(tokenizer):
    split = split_prompt("x" * 72 + " dog, cat", tokenizer, 150)
    assert [len(chunk) for chunk in split.chunks] == [72, 7]
    assert split_prompt("x" * 73 + " Dog, in  Snow", tokenizer, 75).rest == "Dog, in  Snow"


def test_chunks_of_a_real_vocabulary_are_the_tokenizer_s_tokens_in_order():
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "toyworld" / "models" / "sd", subfolder="tokenizer")
    prompt = "A photo, of an Unbelievable étrange-dog 漢字 it's 123 (snow)! " * 8
    split = split_prompt(prompt, tokenizer, 600)
    assert sum(split.chunks, []) == tokenizer(prompt).input_ids[1:-1] and len(split.chunks) > 3
    for before, after in zip(split.chunks, split.chunks[1:]):
        assert tokenizer.decode(before[-1:] + after[:1]).count(" ") == 1, "a chunk ends with a word"


# ---- embeddings ----


@torch.no_grad()
def test_one_chunk_is_encoded_as_the_pipeline_does(model):
    prompts = ["sks dog", DOG, ""]
    assert same(
        model.family.encode_prompts(model.pipeline, prompts), theirs(model, prompts, do_classifier_free_guidance=False)
    )


@torch.no_grad()
def test_each_chunk_is_encoded_by_itself_and_the_first_one_is_pooled(model):
    embeddings = model.family.encode_prompts(model.pipeline, [DOG], 225)
    for number, text in enumerate([LONG, "sks dog", ""]):
        chunk = theirs(model, [text], do_classifier_free_guidance=False)
        assert torch.equal(embeddings["prompt_embeds"][:, 77 * number : 77 * (number + 1)], chunk["prompt_embeds"])
        if number == 0 and "pooled_prompt_embeds" in chunk:
            assert torch.equal(embeddings["pooled_prompt_embeds"], chunk["pooled_prompt_embeds"])
    assert embeddings["prompt_embeds"].shape[1] == 3 * 77


@torch.no_grad()
def test_each_chunk_is_what_the_text_encoders_say_of_its_tokens(model):
    """The arithmetic by hand: marks of start and end around 75 tokens, padding; which layer; which embedding pooled."""
    layers = []
    for part, name in zip(model.encoders, model.tokenizers):
        tokenizer, encoder = getattr(model.pipeline, name), getattr(model.pipeline, part)
        letters = tokenizer("x" * 100).input_ids[1:-1]
        start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        rows = [[start, *letters[:75], end], [start, *letters[75:], end, *[pad] * 50]]
        outputs = [encoder(torch.tensor([row]), output_hidden_states=True) for row in rows]
        last = model.family is SD
        layers.append(torch.cat([out.last_hidden_state if last else out.hidden_states[-2] for out in outputs], dim=1))
    embeddings = model.family.encode_prompts(model.pipeline, ["x" * 100], 150)
    assert torch.equal(embeddings["prompt_embeds"], torch.cat(layers, dim=-1))
    if model.family is SDXL:
        assert torch.equal(embeddings["pooled_prompt_embeds"], outputs[0].text_embeds)


@torch.no_grad()
@pytest.mark.parametrize("length, differ", [(75, False), (150, True)])
def test_the_end_of_a_long_caption_counts_if_there_is_room_for_it(length, differ, model):
    dog, car = (model.family.encode_captions(model.pipeline, [text], length)["prompt_embeds"] for text in (DOG, CAR))
    assert torch.equal(dog, car) == (not differ)


def test_the_empty_caption_is_zero_where_the_base_model_was_trained_so(model):
    embeddings = model.family.encode_captions(model.pipeline, ["", "sks"], 150)
    for tensor in embeddings.values():
        assert (tensor[0].abs().max() == 0) == (model.family is SDXL) and tensor[1].abs().max() > 0


# ---- drawing ----


@torch.no_grad()
@pytest.mark.parametrize("negative", [None, "", "ugly"])
def test_what_is_drawn_is_encoded_as_the_pipeline_does(negative, model):
    arguments = embedding_arguments(model.pipeline, ["sks dog"], [negative], 75)
    options = {"do_classifier_free_guidance": True, "negative_prompt": None if negative is None else [negative]}
    assert same(arguments, theirs(model, ["sks dog"], **options))
    longer = embedding_arguments(model.pipeline, ["sks dog"], [negative], 150)
    assert {tensor.shape[1] for name, tensor in longer.items() if "pooled" not in name} == {154}


def test_images_of_long_prompts_differ_by_what_comes_last(model):
    model.pipeline.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 64, "num_inference_steps": 1, "negative_prompt": LONG + " bad"}
    (dog,), (car,) = (draw_images(model.pipeline, [0], 1, prompt=text, **options) for text in (DOG, CAR))
    assert dog == car
    options["max_token_length"] = 150
    (dog,), (car,) = (draw_images(model.pipeline, [0], 1, prompt=text, **options) for text in (DOG, CAR))
    assert dog != car
    assert draw_images(model.pipeline, [0], 1, prompt=[DOG], **options | {"negative_prompt": [LONG + " bad"]}) == [dog]


def test_pipelines_with_other_text_encoders_are_refused_by_name():
    pipeline = SimpleNamespace(components={"text_encoder": None, "text_encoder_3": None})
    with pytest.raises(UserError, match="--pretrained_model_name_or_path.*SDXL"):
        embedding_arguments(pipeline, ["a dog"], [None], 75)


# ---- the option ----


@pytest.mark.parametrize("length", [0, 74, 77, 100])
def test_only_multiples_of_75_are_lengths(length, config):
    with pytest.raises(UserError, match=f"--max_token_length is {length}"):
        check_options(dataclasses.replace(config, max_token_length=length))


def test_cached_prompts_are_those_of_one_length(config):
    longer = dataclasses.replace(config, max_token_length=150)
    assert text_identity(SD, config, torch.float32) != text_identity(SD, longer, torch.float32)


@pytest.mark.parametrize("length", [75, 150])
def test_the_card_says_how_to_draw_with_long_prompts(length, config, tmp_path):
    description = SimpleNamespace(noun="adapter", summary="", usage="", contents=(), tags=())
    group = SimpleNamespace(learning_rate=1e-3, title="UNet")
    attached = SimpleNamespace(describe=lambda *_: description, groups=[group])
    save_card(tmp_path / "a.safetensors", attached, SD, 1, dataclasses.replace(config, max_token_length=length))
    assert ("--max_token_length 150" in (tmp_path / "README.md").read_text()) == (length == 150)


# ---- the warning ----


def warned(texts, tokenizers, length=75, subject="") -> str:
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("dreambooth.tokens")
    logger.addHandler(handler)
    try:
        warn_of_cut_prompts(texts, tokenizers, length, subject)
    finally:
        logger.removeHandler(handler)
    assert len(records) <= 1
    return records[0].getMessage() if records else ""


def test_each_text_that_is_cut_is_named_with_its_length_and_what_is_lost(tokenizer):
    texts = [("1.jpg", DOG), ("2.jpg", "sks dog"), ("3.jpg", DOG), ("--negative_prompt", CAR), ("4.jpg", "x" * 75)]
    text = warned(iter(texts), [tokenizer])
    lines = text.splitlines()
    assert "--max_token_length 75" in lines[0] and " 150" in lines[0]
    assert lines[1].strip() == "1.jpg, 3.jpg: 81 tokens, without 'sks dog'"
    assert lines[2].strip() == "--negative_prompt: 81 tokens, without 'red car'"
    assert len(lines) == 3
    assert warned(texts, [tokenizer], 150) == ""


def test_texts_that_lose_the_subject_s_own_words_come_first_and_say_so(tokenizer):
    text = warned([("1.jpg", CAR), ("2.jpg", f"sks {DOG}"), ("3.jpg", DOG)], [tokenizer], subject="sks")
    names = [line.split(":")[0].strip() for line in text.splitlines()[1:4]]
    assert names == ["3.jpg", "1.jpg", "2.jpg"]
    assert [line.count("'sks'") for line in text.splitlines()[1:4]] == [1, 0, 0]


def test_the_rare_word_is_what_the_class_prompt_lacks():
    assert subject_words("a photo of <sks> dog", "A photo of a dog") == "<sks>"
    assert subject_words("a photo of sks dog", None) == "a photo of sks dog"


def test_many_texts_are_counted(tokenizer):
    text = warned([(f"{number}.jpg", f"{number} {DOG}") for number in range(30)], [tokenizer])
    assert text.count(".jpg") == 20 and "10 more" in text


@pytest.mark.parametrize("base, count", [("tiny_sd", 1), ("tiny_sdxl", 2)])
def test_tokenizers_come_without_weights(base, count, request, config):
    config = dataclasses.replace(config, pretrained_model_name_or_path=str(request.getfixturevalue(base)))
    assert len(load_tokenizers(config)) == count


def test_prompts_are_named_by_where_they_come_from(config, tmp_path):
    def photo(name, prompt, class_prompt="a photo of dog"):
        return SimpleNamespace(path=tmp_path / name, name=name, folder="", prompt=prompt, class_prompt=class_prompt)

    prior = {"with_prior_preservation": True, "class_prompt": "a photo of dog"}
    config = dataclasses.replace(config, **prior, class_data_dir="class", validation_prompt=["v", "w"])
    photos = [photo("1.jpg", "one"), photo("2.jpg", config.instance_prompt), photo("3.jpg", "three", "a puppy")]
    named = dict(prompt_sources(photos, config))
    expected = {"1.jpg": "one", "3.jpg": "three", "--instance_prompt": config.instance_prompt}
    expected |= {"--class_prompt": "a photo of dog", "--prior_negative_prompt": ""}
    assert named == expected | {"--validation_prompt, number 1": "v", "--validation_prompt, number 2": "w"}
    assert "--instance_prompt" not in dict(prompt_sources(photos[:1], config)), "no photo is trained with it"
    by_model = dataclasses.replace(config, class_data_dir=None, prior_source="base_model")
    assert dict(prompt_sources(photos, by_model))["class prompt of 3.jpg"] == "a puppy"
    assert dict(own_captions([photo("c.png", "a photo of dog"), photo("d.png", "x")], ["a photo of dog"])) == {
        "d.png": "x"
    }
