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
]  # fmt: skip
# Linux without what Windows lacks, for this project's own imports, and the help of every program in it
WITHOUT_UNIX = """
import builtins, io, os, runpy, signal, sys, time
hidden, real = {"fcntl", "resource", "termios", "pwd", "grp", "pty", "tty"}, builtins.__import__
def without(name, globals=None, *rest):
    file = (globals or {}).get("__file__") or ""
    if name in hidden and file.startswith(root) and ".venv" not in file:
        raise ImportError(f"No module named {name}")
    return real(name, globals, *rest)
root, builtins.__import__ = os.getcwd(), without
del signal.SIGUSR1, signal.SIGUSR2, os.pread, os.fork, os.geteuid, os.O_DIRECTORY, os.statvfs, time.tzset
for words in map(str.split, sys.argv[1:]):
    sys.argv = [*words, "--help"]
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, words
"""


def test_every_program_says_in_ascii_and_without_unix_how_it_is_called():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", WITHOUT_UNIX, *PROGRAMS]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=100)
    assert result.returncode == 0, result.stderr.decode()
    said = result.stdout.decode("ascii")
    assert said.count("usage:") == len(PROGRAMS) and "W + scale * (A x B)" in said and "\\u" not in said
