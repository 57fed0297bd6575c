"""What the tests of faults start: the training script's main() in a process of its own, that can be killed.

The processes are forked from one that has imported everything, so that a start takes a second or two.
"""

import gc
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import train_dreambooth_kronecker as script
from dreambooth import kronecker  # noqa: F401  main() imports it, and `sd`
from dreambooth import train as training
from dreambooth.base_model.process import DiscreteProcess
from dreambooth.drawing import class_images
from dreambooth.errors import readable_errors
from dreambooth.families import sd  # noqa: F401

gc.collect()
gc.freeze()  # so that the collections of the children do not go through all modules again

Prepare = Callable[..., None]


def train(folder: Path, argv: list[str], log: Path, prepare: Prepare | None, arguments: tuple) -> None:
    """Run main() in `folder`, with what it says in the file `log`, after prepare(*arguments)."""
    os.setsid()  # a process group of its own, as a job has
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as where a user starts it
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.argv = ["train_dreambooth_kronecker.py", *argv]
    if prepare:
        prepare(*arguments)
    with readable_errors():
        script.main()


# ---- what can be prepared ----


def scramble_random_numbers() -> None:
    """Before training begins, put the global generators into a state that no other start of the run has."""

    def scrambled(*arguments):
        seed = int.from_bytes(os.urandom(4))
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return train_steps(*arguments)

    train_steps, training.train_steps = training.train_steps, scrambled


def after_step(step: int, act: Callable[..., None], *arguments) -> None:
    """Call act(*arguments) between step `step` and its checkpoint."""

    class Progress(training.Progress):
        def steps(self, reports):
            for number in super().steps(reports):
                if number == step:
                    act(*arguments)
                yield number

    training.Progress = Progress


def kill_at_change(number: int, output: str) -> None:
    """Kill this process just before it changes something in the output folder for the given time, from 1."""
    changes = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        if event == "open":
            concerns = isinstance(arguments[0], (str, os.PathLike)) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            concerns = event in changes
        if concerns and output in os.path.abspath(os.fspath(arguments[0])):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def signal_oneself(first: int, second: int | None = None, delay: float = 0.0, length: float = 60.0) -> None:
    """Get a signal, and a second one `delay` seconds later, while a step of `length` seconds goes on."""
    os.kill(os.getpid(), first)
    if second is not None:
        threading.Timer(delay, os.kill, (os.getpid(), second)).start()
        time.sleep(length)


def join(rank: int, ranks: int, port: int, split: bool, act: Callable[..., None] | None = None, *arguments) -> None:
    """Be one of several processes that train together, with FSDP if `split`; then prepare by act(*arguments)."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["ACCELERATE_USE_FSDP"] = str(split)
    record_what_is_seen(f"seen-{rank}.pt")
    if act:
        act(*arguments)


def record_what_is_seen(path: str) -> None:
    """Write the latents, noise and timesteps of every forward pass to a file."""
    seen, add_noise = [], DiscreteProcess.noise

    def recording(process, latents, noise, timesteps):
        seen.append((latents, noise, timesteps))
        torch.save(seen, path)
        return add_noise(process, latents, noise, timesteps)

    DiscreteProcess.noise = recording


def add_flags(*words: str) -> None:
    sys.argv += words


def limit_file_size(limit: int) -> None:
    """Let no file grow beyond `limit` bytes, which a write beyond it is told like a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def have_free(room: int) -> None:
    """Have a disk that says that it has `room` bytes free."""
    usage = shutil.disk_usage("/")
    shutil.disk_usage = lambda path: usage._replace(free=room)


def limit_memory(limit: int) -> None:
    """Let this process have no more than `limit` bytes beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + limit,) * 2)


def revoke_permissions(folder: str) -> None:
    """Make a folder read-only, for root too, who stops being root; the folders of tests are root's alone."""
    os.chmod(folder, 0o555)
    if os.geteuid() == 0:
        for parent in Path(folder).parents[:3]:
            parent.chmod(0o755)
        os.seteuid(65534)  # nobody


def remove_files(folder: str) -> None:
    for path in Path(folder).iterdir():
        path.unlink()


def stay(path: str) -> None:
    """Tell by a file that this place was reached, and stay there."""
    Path(path).touch()
    time.sleep(60)


def between_class_images(act: Callable[..., None], *arguments) -> None:
    """Call act(*arguments) before the second of the batches in which class images are drawn."""
    draw_batches = class_images.draw_batches

    def drawing(*given, **options):
        batches = draw_batches(*given, **options)
        yield next(batches)
        act(*arguments)
        yield from batches

    class_images.draw_batches = drawing
