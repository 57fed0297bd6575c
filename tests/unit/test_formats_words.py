"""New words in files: every layout that is read, what is written, and what is refused."""

from pathlib import Path

import pytest
import torch

from kron_formats.errors import KroneckerError
from kron_formats.words import (
    Word,
    explain_name,
    explain_word,
    is_word_key,
    is_words,
    read,
    word_metadata,
    word_tensors,
)

PATH = Path("folder/my-dog.safetensors")
ROWS = torch.arange(12.0).view(2, 6)


def test_a_word_of_one_text_encoder_is_its_own_name():
    tensors = word_tensors(Word("<dog>", {"text_encoder": ROWS}))
    assert tensors.keys() == {"<dog>"} and is_words(tensors.keys())
    word = read(PATH, tensors, {})
    assert word.text == "<dog>" and word.count == 2 and word.tokens == ("<dog>", "<dog>_1")
    assert torch.equal(word.vectors["text_encoder"], ROWS)


def test_a_word_of_two_text_encoders_has_comfyui_s_names_and_is_in_the_metadata():
    word = Word("<dog>", {"text_encoder": ROWS, "text_encoder_2": torch.ones(2, 8)})
    tensors = word_tensors(word)
    assert tensors.keys() == {"clip_l", "clip_g"} and is_words(tensors.keys())
    back = read(PATH, tensors, word_metadata(word))
    assert back.text == "<dog>" and all(torch.equal(back.vectors[name], word.vectors[name]) for name in word.vectors)
    assert read(PATH, tensors, {}).text == "my-dog"  # as others call it


@pytest.mark.parametrize(
    "key, text", [("<cat-toy>", "<cat-toy>"), ("emb_params", "my-dog"), ("*", "my-dog"), ("clip_l", "my-dog")]
)
def test_others_words_are_read(key, text):
    word = read(PATH, {key: torch.ones(6, dtype=torch.float16)}, {})
    assert word.text == text and word.vectors["text_encoder"].shape == (1, 6)
    assert word.vectors["text_encoder"].dtype == torch.float32


def test_words_are_told_from_weights():
    assert is_word_key("<new1>") and not is_word_key("down_blocks.0.attn2.to_k.weight") and not is_word_key("")
    assert not is_words([]) and not is_words(["<a>", "<b>"]) and not is_words(["<a>", "clip_l"])
    assert not is_words(["layer.lokr_w1"])


@pytest.mark.parametrize(
    "tensors, path, said",
    [
        ({"<a>": torch.ones(2, 6), "<b>": torch.ones(2, 6)}, PATH, "<a>, <b>"),
        ({"<a>": torch.ones(0, 6)}, PATH, "(0, 6)"),
        ({"<a>": torch.ones(1, 2, 6)}, PATH, "(1, 2, 6)"),
        ({"<a>": torch.tensor(1.0)}, PATH, "()"),
        ({"<a>": torch.ones(1, 2**13 + 1)}, PATH, "8193"),
        ({"<a>": torch.ones(76, 6)}, PATH, "76 vectors"),
        ({"<a>": torch.ones(2, 6, dtype=torch.int64)}, PATH, "int64"),
        ({"<a>": torch.full((1, 6), torch.nan)}, PATH, "finite"),
        ({"a word": torch.ones(1, 6)}, PATH, "'a word'"),
        ({"<a>\n": torch.ones(1, 6)}, PATH, r"'<a>\n'"),
        ({"emb_params": torch.ones(1, 6)}, Path("my dog.pt"), "rename it"),
        ({"clip_l": torch.ones(1, 6), "clip_g": torch.ones(2, 8)}, PATH, "{'text_encoder': 1, 'text_encoder_2': 2}"),
        ({"clip_l": torch.ones(1, 6), "clip_h": torch.ones(1, 8)}, PATH, "clip_h, clip_l"),
    ],
)
def test_what_is_not_a_word_is_refused(tensors, path, said):
    with pytest.raises(KroneckerError) as error:
        read(path, tensors, {})
    assert said in str(error.value) and str(path) in str(error.value)


def test_values_that_a_precision_cannot_hold_are_not_written():
    with pytest.raises(KroneckerError, match="<dog>"):
        word_tensors(Word("<dog>", {"text_encoder": torch.full((1, 6), 1e6)}), torch.float16)


def test_what_can_be_a_word():
    assert explain_word("<dog>") is None and explain_word("v1.5-dog") is None and explain_name("<dog>") is None
    assert all(map(explain_word, ["", " ", "a b", " <dog>", "<dog>\n", "<d\u200bog>", "x" * 65]))
    assert all(map(explain_name, ["", "a.b", "clip_l", "emb_params", "*"]))
