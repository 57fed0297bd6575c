"""Untrusted adapter files: a file is read as a whole adapter, or refused by KroneckerError with its name and the
reason; with no other error, no memory that its size does not justify, and nothing in it run."""

import json
import os
import pickle
import re
import resource
import runpy
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from kron_formats.changes import StoredFactors
from kron_formats.errors import KroneckerError
from kron_formats.inspection import inspect
from kron_formats.matching import match_layers
from kron_formats.reading import read_adapter
from tests.conftest import ROOT

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
OTHER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "I8": torch.int8, "F64": torch.float64, "BOOL": torch.bool}
LEEWAY = 2**29  # bytes of address space that reading a small file may take


def build(entries, metadata=None, body=None, names=None):
    """The bytes of a safetensors file of [(name, dtype, shape, content)], whatever it may claim."""
    header, start = [], 0
    if metadata is not None:
        header.append(("__metadata__", metadata))
    for name, dtype, shape, content in entries:
        header.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(content)]}))
        start += len(content)
    # By hand, since JSON of a dictionary cannot have a name twice
    text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in header) + "}"
    body = b"".join(content for *_, content in entries) if body is None else body
    return struct.pack("<Q", len(text.encode())) + text.encode() + body


def tensor(name, *shape, dtype="F32", value=0.1):
    values = torch.full(shape, value, dtype=DTYPES[dtype])
    return name, dtype, list(shape), bytes(values.flatten().view(torch.uint8).numpy())


def lokr(layer=LAYER, a=(4, 8), b=(8, 4)):
    return [tensor(f"{layer}.lokr_w1", *a), tensor(f"{layer}.lokr_w2", *b), tensor(f"{layer}.alpha", value=1.0)]


def low_rank(*shapes, layer=LAYER):
    names = ("lokr_w1", "lokr_w2_a", "lokr_w2_b")
    return [tensor(f"{layer}.{name}", *shape) for name, shape in zip(names, shapes)]


def lora(layer=LAYER, r=2):
    return [
        tensor(f"{layer}.lora_down.weight", r, 32),
        tensor(f"{layer}.lora_up.weight", 32, r),
        tensor(f"{layer}.alpha"),
    ]


def replaced(name, *shape, **how):
    """A good adapter with one tensor in another's place."""
    return [tensor(f"{LAYER}.{name}", *shape, **how), *(entry for entry in lokr() if entry[0] != f"{LAYER}.{name}")]


WHOLE = build(lokr())
OWN = {"kronecker.layers": "1", "kronecker.a1": "4", "kronecker.a2": "8", "kronecker.targets": '["to_q"]'}
HUGE = [(f"{LAYER}.lokr_w1", "F32", [50000, 50000], b""), (f"{LAYER}.lokr_w2", "F32", [1, 1], bytes(4))]
# One tensor as 4 x 8 and as 8 x 4: safetensors believes the last
TWICE = build([*lokr(), (f"{LAYER}.lokr_w1", "F32", [8, 4], b"")], body=b"".join(content for *_, content in lokr()))
TWICE = TWICE.replace(b"[260, 260]", b"[0, 128]  ")
LIAR = b'{"%s.lokr_w1":{"dtype":"F32","shape":[50000,50000],"data_offsets":[0,10000000000]}}' % LAYER.encode()


def own(**values):
    return build(lokr(), OWN | {f"kronecker.{key}": value for key, value in values.items()})


def of_diffusers(**config):
    return build(lokr("unet.mid_block.to_q"), {"lora_adapter_metadata": json.dumps(config)})


MALFORMED = {  # kind: content, words of the refusal
    "no bytes": (b"", "not a readable safetensors file"),
    "four bytes": (WHOLE[:4], "not a readable safetensors file"),
    "length alone": (WHOLE[:8], "not a readable safetensors file"),
    "header cut": (WHOLE[:60], "not a readable safetensors file"),
    "body cut": (WHOLE[:-5], "not a readable safetensors file"),
    "more than the header says": (WHOLE + bytes(8), "not a readable safetensors file"),
    "header of 2^63 bytes": (struct.pack("<Q", 2**63) + WHOLE[8:], "not a readable safetensors file"),
    "header of 90 MB in 1 KB": (struct.pack("<Q", 90 * 10**6) + WHOLE[8:], "not a readable safetensors file"),
    "10 GB claimed": (struct.pack("<Q", len(LIAR)) + LIAR + bytes(500), "not a readable safetensors file"),
    "10 GB claimed by a shape": (build(HUGE), "not a readable safetensors file"),
    "sides that overflow": (build([(f"{LAYER}.lokr_w1", "F32", [2**62, 2**62], b"")]), "not a readable"),
    "sides below zero": (build([(f"{LAYER}.lokr_w1", "F32", [-4, -8], bytes(128))]), "not a readable"),
    "sides of zero": (build([tensor(f"{LAYER}.lokr_w1", 0, 8), *lokr()[1:]]), r"is of the shape \(0, 8\)"),
    "side of 2^63 and none": (build([(f"{LAYER}.lokr_w1", "F32", [2**63, 0], b""), *lokr()[1:]]), "not a readable"),
    "200 sides": (build(replaced("lokr_w1", *[1] * 200)), "is of the shape"),
    "offsets that overlap": (WHOLE.replace(b"[128, 256]", b"[100, 228]"), "not a readable safetensors file"),
    "NaN": (build(replaced("lokr_w1", 4, 8, value=float("nan"))), "lokr_w1: its values are not all finite"),
    "infinity": (build(replaced("lokr_w2", 8, 4, value=float("inf"))), "lokr_w2: its values are not all finite"),
    "infinite alpha": (build(replaced("alpha", value=float("inf"))), "alpha: its values are not all finite"),
    "numbers beyond fp32": (build(replaced("lokr_w1", 4, 8, dtype="F64", value=1e300)), "not all finite"),
    "strength beyond fp32": (build([tensor(f"{LAYER}.lokr_w1", 4, 8, value=1e30), *low_rank((), (8, 1), (1, 4))[1:],
                                    tensor(f"{LAYER}.alpha", value=1e30)]), "not all finite at the strength"),
    "int8": (build(replaced("lokr_w1", 4, 8, dtype="I8", value=1)), "lokr_w1 is of type int8"),
    "bool": (build(replaced("lokr_w1", 4, 8, dtype="BOOL", value=1)), "lokr_w1 is of type bool"),
    "complex": (build([(f"{LAYER}.lokr_w1", "C64", [4, 8], bytes(256)), *lokr()[1:]]), "lokr_w1 is of type complex64"),
    "type that torch lacks": (build([(f"{LAYER}.lokr_w1", "F6_E2M3", [4, 8], bytes(24)), *lokr()[1:]]), "."),
    "type that there is not": (build([(f"{LAYER}.lokr_w1", "Q4_K", [4, 8], bytes(128))]), "not a readable"),
    "alpha of many numbers": (build(replaced("alpha", 3)), r"alpha is of the shape \(3,\)"),
    "A without B": (build(lokr()[:1]), "does not hold two full factors"),
    "alpha alone": (build(lokr()[2:]), "an alpha alone"),
    "half a product": (build(low_rank((4, 8), (8, 2), (2, 4))[:2]), "does not hold two full factors"),
    "product that does not go": (build(low_rank((4, 8), (8, 2), (3, 4))), r"\(8, 2\) times \(3, 4\) is not a product"),
    "product of 10 GB": (build(low_rank((4, 8), (50000, 1), (1, 50000))), "400000 to 200000 features: no layer is"),
    "half a LoRA": (build(lora()[:1]), "has only lora_down"),
    "LoRA that does not go": (build([*lora(r=2)[:1], *lora(r=3)[1:]]), "is not a product"),
    "factors and a LoRA in a layer": (build([*lokr(), *lora()[:2]]), "."),
    "layer under two names": (build([tensor("x.to_q.lora_down.weight", 2, 4), tensor("x.to_q.lora_A.weight", 2, 4)]),
                              "x.to_q is in it twice"),
    "name twice": (TWICE, "its header has lora_unet_mid_block.* twice"),
    "keys of a language model": (build([tensor("model.layers.0.self_attn.q_proj.weight", 4, 4)]), "have other names"),
    "keys of a whole checkpoint": (build([tensor("model.diffusion_model.out.2.weight", 4, 4)]), "a whole Stable"),
    "path upwards": (build(lokr("../../etc/passwd")), "no layer is called ../../etc/passwd"),
    "absolute path": (build(lokr("/etc/passwd")), "no layer is called /etc/passwd"),
    "NUL in a name": (build(lokr("lora\0unet")), r"no layer is called lora\\x00unet"),
    "terminal codes in a name": (build(lokr("\x1b[2J")), r"no layer is called \\x1b\[2J"),
    "terminal codes in a key": (build([tensor("\x1b[2J\n", 1, 1)]), r"the word '\\x1b\[2J\\n'"),
    "name of 100,000 characters": (build(lokr("a" * 100_000)), r"no layer is called a{80}\.\.\. \(100000 characters\)"),
    "no name": (build([tensor(".lokr_w1", 4, 8), tensor(".lokr_w2", 8, 4)]), "no layer is called"),
    "metadata that are numbers": (build(lokr(), {"step": 7}), "not a readable safetensors file"),
    "metadata that are a list": (build(lokr(), ["step"]), "not a readable safetensors file"),
    "header that is no UTF-8": (WHOLE.replace(LAYER.encode()[:4], b"\xff\xfe\xff\xfe"), "not a readable"),
    "header nested too deep": (struct.pack("<Q", 99999) + b"[" * 99999, "not a readable safetensors file"),
    "numbers of other writings in our metadata": (own(a1="²"), "the metadata a1 is ²"),
    "number of 5000 digits in our metadata": (own(layers="9" * 5000), "the metadata layers is 999"),
    "number below zero in our metadata": (own(a2="-8"), "the metadata a2 is -8"),
    "our factors are no JSON": (own(factors="{"), "the metadata factors is not JSON"),
    "our factors are a list": (own(factors="[1]"), "the metadata factors is not a JSON object"),
    "our factors are text": (own(factors='{"x": ["4", null]}'), "the metadata factors is"),
    "our targets nested too deep": (own(targets="[" * 100_000), r"the metadata targets is \[{80}\.\.\."),
    "rows in an order that there is not": (own(rows="sideways"), "the metadata rows is sideways"),
    "a later version of our format": (own(format_version="2"), "the metadata format_version is 2"),
    "our targets are numbers": (own(targets="[1]"), r"the metadata targets is \[1\]"),
    "not the factors that our metadata say": (own(a1="8", a2="4"), r"metadata says \(8, 4\)"),
    "diffusers' configuration is no JSON": (build(lokr(), {"lora_adapter_metadata": "{r"}), "is not JSON"),
    "rank of zero": (of_diffusers(r=0, alpha=1), "peft's configuration has the rank 0"),
    "rank that is text": (of_diffusers(r="4", alpha=1), "peft's configuration has 'r' '4'"),
    "alpha that is no number": (of_diffusers(r=4, alpha=float("nan")), "peft's configuration has 'alpha' nan"),
    "patterns that run for years": (of_diffusers(r=4, alpha=1, rank_pattern={"(a+)+$": 1}), r"\(a\+\)\+\$, which is"),
    "patterns that are a list": (of_diffusers(r=4, alpha=1, rank_pattern=[1]), "which is not a table"),
    "pickle": (pickle.dumps({"a": 1}), "it is perhaps a pickle"),
    "pickle of PyTorch": ("torch", "it is a zip archive, as PyTorch's pickles are; --allow_pickle"),
    "pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html>Access to this model is restricted</html>", "perhaps a web page"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(64), "a GGUF file"),
}  # fmt: skip


@pytest.fixture
def little_memory():
    """Reading may take no more address space than LEEWAY: what claims more than it is fails otherwise."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LEEWAY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def write(path, content):
    if content == "torch":
        torch.save({f"{LAYER}.lokr_w1": torch.ones(2, 2)}, path)
    else:
        path.write_bytes(content)
    return path


def test_the_files_that_the_malformed_ones_are_made_of_are_whole(tmp_path):
    for entries in (lokr(), low_rank((4, 8), (8, 2), (2, 4)), lora(), [*lokr(), *lokr(OTHER)]):
        file = read_adapter(write(tmp_path / "a.safetensors", build(entries)))
        assert len(match_layers(file, Model()).layers) == len(entries) // 3 and all(
            layer.size == (32, 32) for layer in file.layers.values()
        )
    assert read_adapter(write(tmp_path / "a.safetensors", own())).layout.targets == ("to_q",)
    assert read_adapter(write(tmp_path / "a.safetensors", of_diffusers(r=4, alpha=2))).layers["unet.mid_block.to_q"]


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_file_is_refused_by_name(tmp_path, little_memory, kind):
    content, words = MALFORMED[kind]
    path = write(tmp_path / "untrusted.safetensors", content)
    with pytest.raises(KroneckerError, match=words) as error:
        read_adapter(path)
    assert str(path) in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_there_are_enough_kinds():
    assert len(MALFORMED) + len(PLACES) >= 70


# ---- places ----

PLACES = {
    "nowhere": (lambda path: None, "there is no adapter file"),
    "folder": (Path.mkdir, "there is no adapter in the folder"),
    "link to itself": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "link to nowhere": (lambda path: path.symlink_to("gone"), "there is no adapter file"),
    "pipe": (os.mkfifo, "it is not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is not a regular file"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_what_is_no_file_is_refused_by_name(tmp_path, kind):
    make, words = PLACES[kind]
    make(tmp_path / "untrusted.safetensors")
    with pytest.raises(KroneckerError, match=words) as error:
        read_adapter(tmp_path / "untrusted.safetensors")
    assert str(tmp_path / "untrusted.safetensors") in str(error.value)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"])
def test_names_that_no_file_can_have_are_refused(name):
    with pytest.raises(KroneckerError, match="cannot be read"):
        read_adapter(name)


@pytest.mark.parametrize("content", [b"\xff", b"[]", b"[" * 100_000, b"{}", None], ids=str)
def test_what_lies_beside_peft_s_tensors_is_read_or_refused(tmp_path, content):
    write(tmp_path / "adapter_model.safetensors", build(lokr("base_model.model.mid_block.to_q")))
    config = tmp_path / "adapter_config.json"
    os.mkfifo(config) if content is None else config.write_bytes(content)
    with pytest.raises(KroneckerError, match="strength.* is unknown"):
        read_adapter(tmp_path)


# ---- pickles: the paper's .bin files, if asked for ----


class Malice:
    """Its pickle leaves a file behind where it is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def reference(**tensors):
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
    return {f"{key}.down.weight": torch.ones(8, 4), f"{key}.up.weight": torch.ones(8, 16)} | tensors


def repacked(path, **how):
    """Write an archive of torch.save anew."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def test_a_pickle_of_tensors_is_read_if_asked_for(tmp_path):
    torch.save(OrderedDict(reference()), tmp_path / "a.bin")
    with pytest.raises(KroneckerError, match="--allow_pickle"):
        read_adapter(tmp_path / "a.bin")
    (layer,) = read_adapter(tmp_path / "a.bin", allow_pickle=True).layers.values()
    assert isinstance(layer, StoredFactors) and layer.transposed_rows and layer.size == (32, 128)


def test_no_pickle_runs_anything_even_if_asked_for(tmp_path, little_memory):
    harm, path = tmp_path / "harm", tmp_path / "a.bin"
    torch.save(reference(malice=Malice(harm)), path)
    claims = torch.zeros(1).expand(10**5, 10**5)
    for make, words in (
        (lambda: None, "holds something other than tensors"),
        (lambda: torch.save(["a list"], path), "is not a mapping of names to tensors"),
        (lambda: torch.save({"a": 1}, path), "is not a mapping of names to tensors"),
        (lambda: torch.save(reference(**{"x.up.weight": claims}), path), "claims larger tensors than it holds"),
        (lambda: torch.save(reference(**{"x.up.weight": torch.ones(2, 2, device="meta")}), path), "is not a mapping"),
        (lambda: (torch.save(reference(), path), repacked(path, compression=zipfile.ZIP_DEFLATED)), "it is compressed"),
        (lambda: torch.save(reference(), path, _use_new_zipfile_serialization=False), "not a readable"),
        (lambda: path.write_bytes(pickle.dumps(Malice(harm))), "it is perhaps a pickle"),
        (lambda: write(path, path.read_bytes()[:-30]), "not a readable|is damaged"),
    ):
        make()
        with pytest.raises(KroneckerError, match=words):
            read_adapter(path, allow_pickle=True)
        assert not harm.exists()


# ---- fuzzing ----

SEEDS = [
    build(
        [*lokr(), *lokr(OTHER)], {"kronecker.layers": "2", "kronecker.a1": "4", "kronecker.a2": "8", "ss_v2": "False"}
    ),
    build([*low_rank((4, 8), (8, 2), (2, 4)), tensor(f"{LAYER}.alpha", value=2.0)], {"kronecker.targets": '["to_q"]'}),
    build([*lora(), *lora(OTHER)]),
    of_diffusers(r=4, alpha=2, rank_pattern={"to_q": 8}),
    build([tensor(f"{LAYER}.kron_a", 4, 8), tensor(f"{LAYER}.kron_b", 8, 4)], {"kronecker.rows": "transposed"}),
]
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**65), 2**65), st.floats(), st.text(max_size=20), st.just([]), st.just({}),
    st.sampled_from(["F64", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I64", "BOOL", "C64", "../../x", "\0", "{}"]),
    st.lists(st.one_of(st.integers(-1, 64), st.integers(0, 2**64)), max_size=5),
)  # fmt: skip
FUZZ = settings(
    max_examples=1500, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@st.composite
def mutated_bytes(draw):
    """A whole file with some bytes changed, put in, or taken out."""
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 8))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["change", "flip", "cut", "insert", "remove"]))
        if kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "remove":
            del content[place : place + draw(st.integers(1, 9))]
        elif content:
            content[place] = draw(st.integers(0, 255)) if kind == "change" else content[place] ^ 1 << place % 8
    return bytes(content)


@st.composite
def mutated_header(draw):
    """A file whose header is JSON of the right length, with some of its entries changed."""
    content = draw(st.sampled_from(SEEDS))
    end = 8 + int.from_bytes(content[:8], "little")
    pairs = list(json.loads(content[8:end]).items())
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(pairs) - 1))
        name, entry = pairs[place]
        kind = draw(st.sampled_from(["name", "ending", "entry", "field", "number", "twice", "drop"]))
        if kind == "name":
            name = draw(st.text(max_size=30))
        elif kind == "ending":
            ending = draw(st.sampled_from(["lokr_w1", "lokr_w2_a", "lora_A.weight", "alpha", "kron_b", "up.weight"]))
            name = f"{name.partition('.')[0]}.{ending}"
        elif kind == "entry" or not isinstance(entry, dict) or not entry:
            entry = draw(VALUES)
        elif kind == "field":
            entry = entry | {draw(st.sampled_from(sorted(entry))): draw(VALUES)}
        elif kind == "number":
            lists = [key for key, value in entry.items() if isinstance(value, list) and value]
            for key in lists[:1]:
                numbers = list(entry[key])
                numbers[draw(st.integers(0, len(numbers) - 1))] = draw(st.integers(-2, 2**64))
                entry = entry | {key: numbers}
        elif kind == "twice":
            pairs.append((name, entry))
        pairs[place : place + 1] = [] if kind == "drop" and len(pairs) > 1 else [(name, entry)]
    text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in pairs) + "}"
    return struct.pack("<Q", len(text)) + text.encode() + content[end:]


class Model(nn.Module):
    """A UNet of the two layers that the whole files are for."""

    def __init__(self):
        super().__init__()
        attention = nn.ModuleDict({"to_q": nn.Linear(32, 32), "to_k": nn.Linear(32, 32)})
        block = nn.ModuleDict({"transformer_blocks": nn.ModuleList([nn.ModuleDict({"attn1": attention})])})
        self.mid_block = nn.ModuleDict({"attentions": nn.ModuleList([block])})


def read_whole_or_refuse(path):
    try:
        file = read_adapter(path)
    except KroneckerError as error:
        assert str(path) in str(error) and str(error).isprintable()
        return
    assert file.layers and all(layer.isfinite() for layer in file.layers.values())
    assert inspect(file).startswith(f"{path}: a ")
    try:
        matched = match_layers(file, Model()).layers
        assert matched and all(layer.isfinite() and layer.size == (32, 32) for layer in matched.values())
    except KroneckerError as error:
        assert str(path) in str(error)


@FUZZ
@given(content=mutated_bytes())
def test_mutated_bytes_are_read_whole_or_refused(tmp_path, little_memory, content):
    read_whole_or_refuse(write(tmp_path / "untrusted.safetensors", content))


@FUZZ
@given(content=mutated_header())
def test_mutated_headers_are_read_whole_or_refused(tmp_path, little_memory, content):
    read_whole_or_refuse(write(tmp_path / "untrusted.safetensors", content))


# ---- through the scripts ----


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run a script as the command line does, to its end with exit code 2; return what it says on stderr."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        assert exit.value.code == 2
        said = capsys.readouterr().err
        return said[said.index("error: ") :]

    return run


@pytest.mark.parametrize("kind", ["no bytes", "10 GB claimed", "NaN", "A without B", "path upwards", "pickle"])
def test_scripts_end_with_the_message_and_write_nothing(tmp_path, tiny_sd, run_script, kind):
    content, words = MALFORMED[kind]
    path, output = write(tmp_path / "untrusted.safetensors", content), tmp_path / "output"
    base = ("--pretrained_model_name_or_path", tiny_sd)
    for arguments in (
        ("convert.py", "--inspect", path),
        ("convert.py", path, "--to", "native", "--output", output, *base),
        ("generate.py", *base, "--adapter", path, "--prompt", "a dog", "--output_dir", output),
    ):
        assert re.search(words, run_script(*arguments))
    assert not output.exists()


@pytest.mark.parametrize("words, entries", [
    ("not in the model", lokr("lora_unet_double_blocks_0_img_attn_qkv")),
    ("the model's layer maps", lokr(a=(3, 8), b=(7, 4))),
])  # fmt: skip
def test_adapters_for_other_models_do_not_fit(tmp_path, tiny_sd, run_script, words, entries):
    path = write(tmp_path / "untrusted.safetensors", build(entries))
    said = run_script("generate.py", "--pretrained_model_name_or_path", tiny_sd, "--adapter", path, "--prompt", "a dog",
                      "--output_dir", tmp_path / "output")  # fmt: skip
    assert said.startswith(f"error: {path} does not fit this model: ") and words in said
