"""Real runs in processes of their own, which can be killed, starved and disturbed."""

import json
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT, flags

COSTS = ("step_time", "seconds", "peak_memory")  # which differ between runs that are equal


@pytest.fixture(scope="session")
def nursery() -> multiprocessing.context.BaseContext:
    """A process that has imported the training script, to fork others from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tests.faults.child"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    context.Process(target=int).start()  # starts the server, which keeps this environment
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return context


class Run:
    """A run of the training script in a folder: where its files are, what it was told, and a way to start it."""

    def __init__(self, folder: Path, nursery, options: dict):
        self.folder, self.nursery, self.options = folder, nursery, options
        self.output, self.log = folder / "out", folder / "log.txt"
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, prepare: Callable[..., None] | None = None, *arguments, **options) -> BaseProcess:
        from tests.faults import child  # which imports the training script: not for every session of tests

        argv = flags({**self.options, **options})
        process = self.nursery.Process(target=child.train, args=(self.folder, argv, self.log, prepare, arguments))
        process.start()
        return process

    def run(self, prepare: Callable[..., None] | None = None, *arguments, **options) -> tuple[int, str]:
        """Start it and wait; return its exit code, that of a signal negative, and what it said."""
        said = len(self.said)
        process = self.start(prepare, *arguments, **options)
        process.join(120)
        assert process.exitcode is not None, f"the run hangs:\n{self.said[said:]}"
        return process.exitcode, self.said[said:]

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.output.glob("checkpoint-*"))

    def results(self) -> dict[str, bytes | list]:
        """Every byte that the run left, but for its logs, and what it cost in metrics.jsonl and summary.json."""
        found: dict[str, bytes | list] = {}
        for path in sorted(path for path in self.output.rglob("*") if path.is_file()):
            content = path.read_bytes()
            if path.name in ("metrics.jsonl", "summary.json"):
                rows = map(json.loads, content.splitlines() if path.suffix == ".jsonl" else [content])
                content = [{name: value for name, value in row.items() if name not in COSTS} for row in rows]
            found[path.relative_to(self.output).as_posix()] = content
        return found


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Three photos that are not square, so that crops are drawn, two of them with captions."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        Image.effect_mandelbrot((96, 80), (-2 + number, -1.5, 1, 1.5), 100).convert("RGB").save(
            folder / f"{number}.png"
        )
    (folder / "0.txt").write_text("sks dog in the grass")
    (folder / "2.txt").write_text("{instance_prompt}, asleep")
    return folder


@pytest.fixture
def start_run(tmp_path, nursery, tiny_sd, photos) -> Callable[..., Run]:
    """Return `start_run(name, **options)`: a run of six steps with a checkpoint every second, not started yet."""

    def make(name: str = "run", **options) -> Run:
        common = {
            "pretrained_model_name_or_path": tiny_sd,
            "instance_data_dir": photos,
            "instance_prompt": "a photo of sks dog",
            "output_dir": "out",
            "resolution": 64,
            "max_train_steps": 6,
            "checkpointing_steps": 2,
            "report_to": "none",
            "resume_from_checkpoint": "latest",
        }
        return Run(tmp_path / name, nursery, {**common, **options})

    return make
