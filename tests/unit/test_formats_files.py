"""Opening what others made, and writing a file whole or not at all."""

import os
import socket
import subprocess
import sys

import pytest

from kron_formats import files
from kron_formats.errors import KroneckerError
from kron_formats.files import check_regular, printable, read_json, read_text, whole_file
from tests.conftest import ROOT


def test_importing_what_needs_no_torch_does_not_import_it():
    code = "import sys, kron_formats.errors, kron_formats.families, kron_formats.files; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# ---- writing ----


def test_a_file_gets_its_name_once_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("earlier")
    with whole_file(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "earlier" and unfinished.parent == tmp_path
        assert list(tmp_path.glob(files.UNFINISHED)) == [unfinished]
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("begun", [False, True])
def test_a_failure_leaves_the_earlier_file_and_nothing_else(error, begun, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("earlier")
    with pytest.raises(error), whole_file(path) as unfinished:
        if begun:
            unfinished.write_text("new")
        raise error("No space left on device")
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with whole_file(path) as first, whole_file(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("durable", [False, True])
def test_a_durable_file_is_on_the_disk_before_it_has_its_name_and_the_name_after(durable, tmp_path, monkeypatch):
    path, done = tmp_path / "a.txt", []
    monkeypatch.setattr(files, "flush", lambda flushed: done.append((flushed, path.exists())))
    with whole_file(path, durable=durable) as unfinished:
        unfinished.write_text("new")
    assert done == ([(unfinished, False), (tmp_path, True)] if durable else [])


def test_a_relative_path_is_written_and_flushed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with whole_file("a.txt", durable=True) as unfinished:
        unfinished.write_text("new")
    assert os.listdir() == ["a.txt"]


# ---- reading ----


def test_a_text_is_read_without_its_byte_order_mark_up_to_a_size(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffé".encode())
    assert read_text(path, 5) == "é"
    with pytest.raises(ValueError, match="5 bytes; at most 4 are read"):
        read_text(path, 4)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError):
        read_text(path, 5)


def test_what_may_never_end_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the paths of sockets are short
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        for path in ("pipe", "socket", "/dev/zero", "."):
            with pytest.raises(OSError, match="not a regular file"):
                read_text(path, 100)
    with pytest.raises(FileNotFoundError):
        check_regular("nowhere")
    with pytest.raises(ValueError):
        check_regular("a\0b")


def test_a_json_file_beyond_a_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_JSON", 10)
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "a.json").write_text('{"a": 100000}')
    with pytest.raises(KroneckerError, match="a.json cannot be read: .* at most 10"):
        read_json(tmp_path / "a.json")


def test_untrusted_text_is_shown_on_one_line():
    assert printable("dög\x1b[2J\n\udcff") == r"dög\x1b[2J\n\udcff"
    assert printable("a" * 9, longest=5) == "aaaaa... (9 characters)" and printable("a" * 5, longest=5) == "a" * 5
