"""New words in tokenizers and text encoders: what is refused, how prompts are read, and that nothing else changes."""

from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from dreambooth.data.rare_words import rare_words
from dreambooth.errors import UserError
from dreambooth.families.sd import SD
from dreambooth.families.sdxl import SDXL
from dreambooth.method import Host
from dreambooth.options.subjects import Subject
from dreambooth.options.training import TrainingConfig, config_class
from dreambooth.tokens import chunk_tokens, split_prompt, words_in
from dreambooth.words import add_word, explain_new, has_word
from methods.custom_diffusion import CUSTOM_DIFFUSION
from methods.textual_inversion import TEXTUAL_INVERSION
from methods.words import attach_word
from toyworld.tiny_pipeline import build_tokenizer


@pytest.fixture
def tokenizers():
    return {"text_encoder": build_tokenizer(), "text_encoder_2": build_tokenizer(pad_token="!")}


def text_encoder(tokenizer, eos):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPTextConfig(vocab_size=len(tokenizer), eos_token_id=eos, projection_dim=8, **sizes)
    return CLIPTextModelWithProjection(config).eval()


# ---- tokens ----


def test_a_word_of_several_tokens_is_read_as_all_of_them_and_counted_so(tokenizers):
    tokenizer = tokenizers["text_encoder"]
    first = add_word("<dog>", 3, tokenizers)["text_encoder"]
    tokens = [first, first + 1, first + 2]
    split = split_prompt("a <dog>, a <DOG>s", tokenizer, 75)
    (a, comma, s) = (tokenizer(text, add_special_tokens=False).input_ids[0] for text in ("a", ",", "s"))
    assert split.chunks == [[a, *tokens, comma, a, *tokens, s]] and split.length == 10
    assert split_prompt("<dog> " * 26, tokenizer, 75).rest == "<dog> "
    (batch,) = chunk_tokens(tokenizer, ["<dog>"], 75)
    assert batch.input_ids[0, :5].tolist() == [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]


def test_all_tokens_of_a_word_are_in_one_chunk(tokenizers):
    tokenizer = tokenizers["text_encoder"]
    add_word("<dog>", 3, tokenizers)
    split = split_prompt("x " * 73 + "<dog>", tokenizer, 150)
    assert [len(chunk) for chunk in split.chunks] == [73, 3]


@pytest.mark.parametrize(
    "text, said",
    [
        ("a", "already, as a</w>"),
        ("A", "already, as a</w>"),  # which is read in small letters
        ("<|endoftext|>", "already, as <|endoftext|>"),
        ("", "empty"),
        (" <dog>", "spaces"),
        ("<a dog>", "spaces"),
        ("<cat>", "already, as <cat>"),
        ("<Cat>", "already, as <cat>"),
        ("x<cat>", "overlaps <cat>"),
        ("cat", "overlaps <cat>"),
    ],
)
def test_a_word_that_is_not_new_everywhere_is_refused(text, said, tokenizers):
    add_word("<cat>", 2, {"text_encoder_2": tokenizers["text_encoder_2"]})
    assert said in (explain_new(text, 1, tokenizers) or "")
    assert explain_new("<dog>", 2, tokenizers) is None


def test_a_word_whose_further_tokens_are_taken_is_refused(tokenizers):
    tokenizers["text_encoder"].add_tokens(["<dog>_1"])
    assert "<dog>_1" in (explain_new("<dog>", 2, tokenizers) or "")


def test_words_in_brackets_stay_whole_for_warnings():
    assert words_in("A photo of <New-1> dog's") == ["a", "photo", "of", "<new-1>", "dog", "s"]
    subject = Subject("", "photo of a <dog> dog", "photo of a dog")
    assert rare_words([], subject) == {"<dog>"}  # or the prior would be said to keep it from being learnt


# ---- text encoders ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_word_begins_as_its_initialiser_and_other_prompts_keep_their_bits(dtype, tokenizers):
    tokenizer = tokenizers["text_encoder"]
    model = text_encoder(tokenizer, tokenizer.eos_token_id).to(dtype)

    def read(prompt):
        tokens = tokenizer(prompt, padding="max_length", max_length=8, return_tensors="pt")
        return model(tokens.input_ids)

    plain = {prompt: read(prompt).last_hidden_state for prompt in ("a b", "c d e", "")}
    learned = attach_word("<dog>", 1, "b", Host(SD, {"text_encoder": model}, {"text_encoder": tokenizer}))
    assert torch.equal(read("a <dog>").last_hidden_state, plain["a b"])
    with torch.no_grad():
        learned.parameters[0].add_(1)
    assert not torch.equal(read("a <dog>").last_hidden_state, plain["a b"])
    assert all(torch.equal(read(prompt).last_hidden_state, hidden) for prompt, hidden in plain.items())
    with learned.without():
        assert torch.equal(read("a <dog>").last_hidden_state, plain["a b"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        name for name, p in model.named_parameters() if p is learned.parameters[0]
    ]
    assert learned.parameters[0].dtype == torch.float32 and model.dtype == dtype


def test_a_model_that_pools_at_the_highest_id_pools_where_the_prompt_ends(tokenizers):
    """As SDXL's second text encoder, saved with eos_token_id 2: a new word's id is the highest."""
    tokenizer = tokenizers["text_encoder_2"]
    model = text_encoder(tokenizer, eos=2)
    before = model(tokenizer("a b c", return_tensors="pt").input_ids).text_embeds
    attach_word("<dog>", 2, "b", Host(SDXL, {"text_encoder_2": model}, {"text_encoder_2": tokenizer}))
    after = model(tokenizer("a <dog> c", return_tensors="pt").input_ids).text_embeds
    assert torch.equal(after, before)


def test_a_table_may_have_more_rows_than_its_tokenizer_has_tokens(tokenizers):
    """And tokens may have been added before."""
    tokenizer = tokenizers["text_encoder"]
    tokenizer.add_tokens(["<cat>"])
    model = text_encoder(list(range(600)), tokenizer.eos_token_id)
    assert len(tokenizer) < 600
    table = model.get_input_embeddings().weight
    learned = attach_word("<dog>", 1, "b", Host(SD, {"text_encoder": model}, {"text_encoder": tokenizer}))
    ids = tokenizer("<cat><dog>", add_special_tokens=False, return_tensors="pt").input_ids
    rows = model.get_input_embeddings()(ids)[0]
    assert torch.equal(rows, torch.stack([table[ids[0, 0]], learned.parameters[0][0]]))


# ---- what a run refuses ----


def checked(method, tokenizers, prompts=(), **options):
    """Have a method check a run on photos with these prompts: (prompt, class prompt)."""
    config = config_class(method.options, TrainingConfig)(
        pretrained_model_name_or_path="x", instance_data_dir="y", **options
    )
    photos = [
        SimpleNamespace(path=SimpleNamespace(name=f"{number}.jpg"), prompt=prompt, class_prompt=class_prompt)
        for number, (prompt, class_prompt) in enumerate(prompts)
    ]
    unet = torch.nn.ModuleDict(
        {"block": torch.nn.ModuleDict({"attn2": torch.nn.ModuleDict({"to_k": torch.nn.Linear(1, 1)})})}
    )
    method.check(Host(SD, {"unet": unet}, tokenizers), photos, config)


INVERSION = {"instance_prompt": "a photo of a <dog>", "placeholder_token": "<dog>", "initializer_token": "d"}
DIFFUSION = {"instance_prompt": "photo of a <new1> dog", "modifier_token": "<new1>", "initializer_token": "d"}
PRIOR = {"with_prior_preservation": True, "prior_source": "base_model", "class_prompt": "photo of a dog"}


@pytest.mark.parametrize(
    "method, change, prompts, said",
    [
        (TEXTUAL_INVERSION, {"placeholder_token": "d"}, [], "--placeholder_token d: the tokenizer of the text_encoder"),
        (TEXTUAL_INVERSION, {"placeholder_token": "a dog"}, [], "--placeholder_token a dog"),
        (TEXTUAL_INVERSION, {"placeholder_token": ""}, [], "--placeholder_token : it is empty"),
        (TEXTUAL_INVERSION, {"placeholder_token": "clip_l"}, [], "--placeholder_token clip_l"),
        (TEXTUAL_INVERSION, {"placeholder_token": "<d.og>"}, [], "--placeholder_token <d.og>"),
        (TEXTUAL_INVERSION, {"placeholder_token": "<Dog>"}, [], "--placeholder_token <Dog>: the tokenizer reads it as"),
        (TEXTUAL_INVERSION, {"initializer_token": "dog"}, [], "--initializer_token dog: "),
        (TEXTUAL_INVERSION, {"initializer_token": "dog"}, [], "3 tokens: d o g</w>"),
        (TEXTUAL_INVERSION, {"initializer_token": ""}, [], "--initializer_token : "),
        (TEXTUAL_INVERSION, {"initializer_token": "<|endoftext|>"}, [], "not a word"),
        (TEXTUAL_INVERSION, {"instance_prompt": "a photo of a dog"}, [], "--instance_prompt a photo of a dog"),
        (TEXTUAL_INVERSION, {}, [("a <dog>", None), ("a dog", None)], "1.jpg"),
        (TEXTUAL_INVERSION, PRIOR, [], "--with_prior_preservation"),
        (TEXTUAL_INVERSION, {**PRIOR, "prior_source": "images", "class_data_dir": "z"}, [], "zero"),
        (CUSTOM_DIFFUSION, {"modifier_token": "d"}, [], "--modifier_token d"),
        (CUSTOM_DIFFUSION, {"initializer_token": "ktn"}, [], "--initializer_token ktn"),
        (CUSTOM_DIFFUSION, {"instance_prompt": "a photo of a dog"}, [], "--instance_prompt a photo of a dog"),
        (CUSTOM_DIFFUSION, {}, [("a dog", None)], "0.jpg"),
        (CUSTOM_DIFFUSION, {**PRIOR, "class_prompt": "a <NEW1> dog"}, [], "--class_prompt a <NEW1> dog"),
        (CUSTOM_DIFFUSION, PRIOR, [("a <new1> dog", "a <new1> dog")], "class prompt of 0.jpg"),
        (CUSTOM_DIFFUSION, {"base_precision": "nf4"}, [], "--base_precision nf4"),
        (CUSTOM_DIFFUSION, {"compile": True}, [], "--compile"),
        (TEXTUAL_INVERSION, {"compile": True}, [], "--compile"),
        (CUSTOM_DIFFUSION, {"base_precision": "bf16", "modifier_token": None}, [], "--base_precision bf16"),
        (CUSTOM_DIFFUSION, {"freeze_model": "crossattn", "base_precision": "fp16"}, [], "--base_precision fp16"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_refused_before_weights_are_read(method, change, prompts, said, tokenizers):
    given = {**(INVERSION if method is TEXTUAL_INVERSION else DIFFUSION), **change}
    with pytest.raises(UserError) as error:
        checked(method, tokenizers, prompts, **given)
    assert said in str(error.value)


def test_what_can_be_learned_is_not_refused_and_tokenizers_know_the_word_afterwards(tokenizers):
    checked(CUSTOM_DIFFUSION, {}, **{**DIFFUSION, **PRIOR, "modifier_token": None, "base_precision": "fp32"})
    checked(CUSTOM_DIFFUSION, tokenizers, [("a <new1> dog", "a dog")], **DIFFUSION, **PRIOR)
    checked(TEXTUAL_INVERSION, tokenizers, [("a <dog>", None)], **INVERSION, num_vectors=3, base_precision="nf4")
    assert all(split_prompt("<dog>", tokenizer, 75).length == 3 for tokenizer in tokenizers.values())
    assert has_word("two <dog>s", "<dog>", tokenizers) and not has_word("two dogs", "<dog>", tokenizers)


def test_captions_of_class_images_with_the_word_are_refused(tokenizers, tmp_path):
    (tmp_path / "1.jpg").touch()
    (tmp_path / "1.txt").write_text("a photo of a <new1> dog")
    given = {**DIFFUSION, **PRIOR, "prior_source": "images", "class_data_dir": str(tmp_path)}
    with pytest.raises(UserError, match=r"caption of 1\.jpg"):
        checked(CUSTOM_DIFFUSION, tokenizers, **given)


def test_custom_diffusion_s_learning_rate_is_its_own():
    given = {"pretrained_model_name_or_path": "x", "instance_data_dir": "y", **DIFFUSION}
    assert config_class(CUSTOM_DIFFUSION.options, TrainingConfig)(**given).learning_rate == 1e-5
    assert config_class(CUSTOM_DIFFUSION.options, TrainingConfig)(**given, learning_rate=1.0).learning_rate == 1
