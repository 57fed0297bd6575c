"""Systems other than Linux: what Windows and macOS lack or do otherwise."""

import ast
import errno
import json
import os
import pickle
import signal
import threading
from types import SimpleNamespace

import torch
from filelock import FileLock

from dreambooth.base_model.loading import free_memory
from dreambooth.drawing import pipelines
from dreambooth.layout import LOCK_NAME
from dreambooth.options.field import declarations
from dreambooth.options.training import TrainingConfig, config_class
from dreambooth.output.folder import hold_folder
from dreambooth.runtime import memory
from dreambooth.runtime.stopping import SIGNALS, Stop
from kron_formats import files
from methods.options import LoraOptions
from tests.faults.checkpoints import ALONE, make_config
from tests.unit.test_structure import sources

UNIX_MODULES = {"crypt", "fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
UNIX_NAMES = {
    "os": """chown chroot fchmod fchown fork forkpty getegid geteuid getgid getgroups getloadavg getpgid getpgrp getsid
        getuid killpg lchown mkfifo mknod nice posix_fadvise posix_fallocate pread preadv pwrite pwritev
        sched_getaffinity sched_setaffinity sendfile setegid seteuid setgid setsid setuid statvfs sync sysconf uname
        wait wait3 wait4 waitid O_CLOEXEC O_DIRECT O_DIRECTORY O_DSYNC O_NOFOLLOW O_NONBLOCK O_SYNC O_TMPFILE""",
    "signal": "SIGALRM SIGHUP SIGKILL SIGQUIT SIGUSR1 SIGUSR2 alarm pause pthread_kill setitimer sigwait",
    "time": "tzset pthread_getcpuclockid",
}
ALLOWED = {
    "dreambooth.runtime.memory": {"resource"},  # where it can be imported
    "benchmarks.runs": {"wait4", "killpg", "SIGKILL"},  # children of children, which only Unix counts and ends
    "studies.worker": {"SIGUSR1", "fcntl"},  # started by a shell script
}


def unix_only(tree: ast.AST) -> set[str]:
    """The names in a module that exist on Unix alone."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & UNIX_MODULES
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            found |= ({node.module} & UNIX_MODULES) | (names & {*UNIX_NAMES.get(node.module or "", "").split()})
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found |= {node.attr} & {*UNIX_NAMES.get(node.value.id, "").split()}
    return found


def nameless_encodings(tree: ast.AST) -> list[int]:
    """The lines that open a text file in whatever encoding the system has."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        of = getattr(getattr(node.func, "value", None), "id", "")
        method = node.func.attr if isinstance(node.func, ast.Attribute) and of not in ("os", "Image") else None
        builtin = getattr(node.func, "id", None)
        modes = [
            word.value
            for word in (*node.args, *(word.value for word in node.keywords))
            if isinstance(word, ast.Constant)
        ]
        if method in ("read_text", "write_text") or (
            "open" in (method, builtin) and not any("b" in str(m) for m in modes)
        ):
            lines.append(node.lineno)
    return lines


def test_nothing_is_used_that_only_unix_has():
    wrong = {}
    for module, path in sources():
        if found := unix_only(ast.parse(path.read_text(encoding="utf-8"))) - ALLOWED.get(module, set()):
            wrong[module] = found
    assert not wrong


def test_every_text_file_is_opened_with_an_encoding():
    found = {module: nameless_encodings(ast.parse(path.read_text(encoding="utf-8"))) for module, path in sources()}
    assert not {module: lines for module, lines in found.items() if lines}


def test_what_data_loader_workers_get_can_be_pickled(tmp_path):
    """Where processes are not forked, workers get the dataset and the options that way."""
    config = make_config(tmp_path)
    of_lora = config_class(LoraOptions, TrainingConfig)
    shared = {name: value for name, value in vars(config).items() if name in declarations(of_lora)}
    combined = of_lora(**shared, rank=3)
    for options in (config, combined):
        again = pickle.loads(pickle.dumps(options))
        assert vars(again) == vars(options) and isinstance(again, TrainingConfig)


def test_peak_memory_is_known_on_every_kind_of_device(monkeypatch):
    cpu = torch.device("cpu")
    assert 2**25 < memory.peak_memory(cpu) < 2**40
    monkeypatch.setattr(memory, "resource", None)
    assert 2**25 < memory.peak_memory(cpu) < 2**40
    counters = {
        "cuda": SimpleNamespace(max_memory_reserved=lambda device: 1),
        "xpu": SimpleNamespace(max_memory_reserved=lambda device: 2),
        "mps": SimpleNamespace(driver_allocated_memory=lambda: 3),
    }
    monkeypatch.setattr(torch, "get_device_module", lambda device: counters[device.type])
    assert [memory.peak_memory(torch.device(kind)) for kind in counters] == [1, 2, 3]


def test_memory_of_any_accelerator_is_given_back(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_device_module", lambda: SimpleNamespace(empty_cache=lambda: calls.append(1)))
    free_memory()
    assert calls


def test_adapters_are_merged_on_a_device_with_fp64(monkeypatch):
    places = {}
    for kind in ("cuda", "mps", "xpu"):
        pipeline = SimpleNamespace(device=torch.device(kind), scheduler=None, vae=torch.nn.Identity())
        pipeline.to = lambda device, of=pipeline, **how: setattr(of, "device", torch.device(device))
        monkeypatch.setattr(pipelines, "build_sampler", lambda scheduler: scheduler)
        monkeypatch.setattr(pipelines, "can_merge", lambda *_: True)
        monkeypatch.setattr(
            pipelines, "merge_adapters", lambda merged, _, kind=kind: places.update({kind: merged.device.type})
        )
        pipelines.prepare_drawing(pipeline, [], SimpleNamespace(dtype="fp32"))
        assert pipeline.device.type == kind
    assert places == {"cuda": "cuda", "mps": "cpu", "xpu": "cpu"}


def test_a_run_in_another_thread_leaves_signals_alone(tmp_path):
    problems = []

    def run():
        try:
            with Stop(make_config(tmp_path), ALONE):
                pass
        except ValueError as error:  # signal only works in main thread
            problems.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not problems


def test_the_signals_are_those_of_this_system():
    assert {signal.SIGTERM, signal.SIGINT} <= set(SIGNALS)
    names = {name for name in ("SIGUSR1", "SIGBREAK") if hasattr(signal, name)}
    assert {number.name for number in SIGNALS} == {"SIGTERM", "SIGINT", *names}


def test_windows_flushes_files_that_can_be_written_and_no_folders(tmp_path, monkeypatch):
    opened = []
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr(
        files,
        "os",
        SimpleNamespace(
            **{
                **vars(os),
                "name": "nt",
                "open": lambda path, flags: opened.append((path, flags)) or os.open(path, flags),
            }
        ),
    )
    files.flush(tmp_path)
    files.flush(tmp_path / "file")
    assert opened == [(tmp_path / "file", os.O_RDWR)]


def test_the_holder_of_a_lock_is_read_behind_its_first_byte(tmp_path):
    """Windows lets nobody read a byte that is locked."""
    with hold_folder(make_config(tmp_path / "out"), ALONE):
        content = (tmp_path / "out" / LOCK_NAME).read_bytes()
    assert content[:1] == b"\n" and json.loads(content[1:])["process"] == os.getpid()


def test_a_folder_on_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(self):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "_acquire", refuse)
    with hold_folder(make_config(tmp_path / "out"), ALONE):
        pass
    assert "cannot be locked" in caplog.text
