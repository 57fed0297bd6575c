"""Files of options from strangers: read, or refused with exit code 2 and a message that names the file."""

import os
import string
from dataclasses import make_dataclass

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dreambooth.errors import UserError
from dreambooth.options.field import option
from dreambooth.options.parsing import parse_options
from dreambooth.options.yaml_file import flags_from_yaml
from scripts.generate import Config

NAMES = ["prompt", "seed", "resolution"]
OPTIONS = make_dataclass("OPTIONS", [(name, str, option("An option.", "")) for name in NAMES])
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]\n"
    for below, name in zip(string.ascii_lowercase, string.ascii_lowercase[1:12])
)

MALFORMED = {  # kind: content, words of the refusal
    "no bytes": (b"", "expected lines of the form"),
    "binary": (bytes(range(256)), "."),
    "UTF-16": ("seed: 1".encode("utf-16"), "."),
    "NUL": (b"seed: 1\0", "."),
    "a list": (b"- seed\n- 1", "expected lines of the form"),
    "a word": (b"seed", "expected lines of the form"),
    "tabs": (b"seed:\t1\n\tprompt: x", "cannot start any token|found character"),
    "name twice": (b"seed: 1\nseed: 2", "seed"),
    "name twice in a table": (b"prompt: {a: 1, a: 2}", r"\ba\b"),
    "a list for a name": (b"[seed]: 1", "unhashable"),
    "a name that there is not": (b"sede: 1", "sede"),
    "merged": (b"<<: {seed: 1}", "<<"),
    "billion laughs": (LAUGHS.replace("l:", "prompt:", 1).encode(), r"\ba\b.*\bk\b"),
    "billion laughs in an option": (b"prompt: {x: &a [1, 1], y: &b [*a, *a], z: [*b, *b]}", "prompt"),
    "a list of itself": (b"prompt: &a [*a]", "recursive"),
    "nested too deep": (b"prompt: " + b"[" * 20_000, "."),
    "tables nested too deep": (b"prompt: " + b"{a: " * 20_000, "."),
    "lists in a list": (b"prompt: [[a], [b]]", "prompt"),
    "unquoted colon": (b"prompt:\n- a dog: on the beach", "prompt"),
    "anchor that there is not": (b"seed: *nowhere", "undefined alias"),
    "two documents": (b"seed: 1\n---\nseed: 2", "expected a single document"),
    "character beyond Unicode": (rb'prompt: "\UFFFFFFFF"', "."),
    "half a character": (rb'prompt: "\ud800"', "prompt.*(ud800|x00)"),
    "NUL in an option": (rb'prompt: "a\0b"', "prompt.*(ud800|x00)"),
    "option in a list": (b"prompt: [a, --seed=5]", "prompt.*--seed=5"),
    "a megabyte": (b"prompt: " + b"a" * 2**20, "at most 262,144 are read"),
}
PLACES = {
    "nowhere": lambda path: None,
    "folder": os.mkdir,
    "link to itself": lambda path: path.symlink_to(path),
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_file_is_refused_by_name(tmp_path, kind):
    content, words = MALFORMED[kind]
    path = tmp_path / "stranger.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        flags_from_yaml(str(path), OPTIONS)
    assert str(error.value).startswith(f"--config {path}: ")


@pytest.mark.parametrize("kind", PLACES)
def test_what_is_no_file_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "stranger.yaml"
    PLACES[kind](path)
    with pytest.raises(UserError, match=f"--config {path}: "):
        flags_from_yaml(str(path), OPTIONS)


def test_nothing_in_a_file_is_run(tmp_path):
    path = tmp_path / "stranger.yaml"
    path.write_text(f'prompt: !!python/object/apply:os.mkdir ["{tmp_path / "harm"}"]')
    assert flags_from_yaml(str(path), OPTIONS) == ["--prompt", str(tmp_path / "harm")]
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("kind", ["binary", "name twice", "nested too deep", "a name that there is not"])
def test_the_exit_code_is_2(tmp_path, capsys, kind):
    path = tmp_path / "stranger.yaml"
    path.write_bytes(MALFORMED[kind][0])
    with pytest.raises(SystemExit) as exit:
        parse_options(Config, "", ["--config", str(path)])
    assert exit.value.code == 2 and f"--config {path}: " in capsys.readouterr().err


def test_there_are_enough_kinds():
    assert len(MALFORMED) + len(PLACES) >= 30


# ---- fuzzing ----

SEED = (
    b"# options\nprompt:\n- a photo of sks dog\n- &x 'in the: snow'\n- *x\nseed: 5\nresolution: {a: [1, 2], b: null}\n"
)
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20))
TREES = st.recursive(PLAIN, lambda tree: st.lists(tree, max_size=3) | st.dictionaries(PLAIN, tree, max_size=3))
FUZZ = settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def mutated(draw):
    content = bytearray(SEED)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, len(content)))
        inserted = draw(st.binary(max_size=4) | st.sampled_from([b"&a ", b"*x", b"!!", b"\t", b"- [", b"{", b": "]))
        content[place : place + draw(st.integers(0, 4))] = inserted
    return bytes(content)


def read_or_refuse(path):
    try:
        flags = flags_from_yaml(str(path), OPTIONS)
    except UserError as error:
        assert str(error).startswith(f"--config {path}: ")
    else:
        assert all(isinstance(flag, str) and flag.encode() and "\0" not in flag for flag in flags if flag)


@FUZZ
@given(content=mutated())
def test_mutated_files_are_read_or_refused(tmp_path, content):
    (tmp_path / "stranger.yaml").write_bytes(content)
    read_or_refuse(tmp_path / "stranger.yaml")


@FUZZ
@given(options=st.dictionaries(st.sampled_from([*NAMES, "other"]), TREES, max_size=4))
def test_options_of_any_type_are_read_or_refused(tmp_path, options):
    (tmp_path / "stranger.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    read_or_refuse(tmp_path / "stranger.yaml")
