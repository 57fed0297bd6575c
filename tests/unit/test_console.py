"""What programs print where not every character can be printed."""

import io
import os
import subprocess
import sys

import pytest

from dreambooth.console import print_anything
from dreambooth.errors import UserError, readable_errors
from tests.conftest import ROOT

ENCODINGS = pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])


def printed(encoding: str, monkeypatch, act) -> list[str]:
    """What act() prints to standard output and error, which are strict as Python makes them."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n") for _ in range(2)]
    with monkeypatch.context() as patch:
        for name, stream in zip(("stdout", "stderr"), streams):
            patch.setattr(sys, name, stream)
        act()
    for stream in streams:
        stream.flush()
    return [stream.buffer.getvalue().decode(encoding) for stream in streams]


@ENCODINGS
def test_what_an_encoding_lacks_has_a_stand_in(encoding, monkeypatch):
    def act():
        print_anything()
        print("W + A ⊗ B of 犬 and ü in caf\udce9")

    said, _ = printed(encoding, monkeypatch, act)
    product, dog, u = ("⊗" if encoding == "utf-8" else "x", "犬" if encoding == "utf-8" else r"\u72ac", "ü")
    u = r"\xfc" if encoding == "ascii" else u
    assert said == f"W + A {product} B of {dog} and {u} in caf\\udce9\n"


@ENCODINGS
def test_an_error_is_printed_whatever_it_names(encoding, monkeypatch):
    def act():
        with pytest.raises(SystemExit) as end, readable_errors():
            raise UserError("--output_dir Hündchen/犬/\udcff is a file")
        assert end.value.code == 2

    assert printed(encoding, monkeypatch, act)[1].startswith("error: --output_dir H")


def test_streams_that_are_missing_or_not_files_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    print_anything()


PROGRAMS = [
    "train_dreambooth_kronecker.py", "train_dreambooth_kronecker_sdxl.py", "methods/train.py lora sd",
    "scripts/generate.py", "scripts/merge.py", "scripts/evaluate.py",
    "scripts/interpret.py", "scripts/make_masks.py",
]  # fmt: skip


def test_every_program_says_in_ascii_and_without_unix_how_it_is_called():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "tests/without_unix.py", *(f"{words} --help" for words in PROGRAMS)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=100)
    assert result.returncode == 0, result.stderr.decode()
    said = result.stdout.decode("ascii")
    assert said.count("usage:") == len(PROGRAMS) and "W + scale * (A x B)" in said and "\\u" not in said
