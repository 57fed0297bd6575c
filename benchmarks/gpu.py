"""Run all that needs a GPU, in under ten minutes, and write one JSON file and one table.

    benchmarks/gpu.sh                        # on a machine with one NVIDIA GPU: an H100, or another with 80 GB
    benchmarks/gpu.sh --wheels wheels        # installs the packages that the machine lacks from a folder, offline
    benchmarks/gpu.sh --dry_run              # the same in little on a CPU, to see that it runs

It uses Python (or $PYTHON) and torch as they are there. Other packages are those of requirements.txt, and pytest; one
in another version is named and used.

The parts are the tests in tests/gpu; a training step of SDXL at 1024 px and of SD 1.5 at 512 px for several adapters,
eager and compiled (unet_step.py); the four SDXL recipes within the memory of their names (recipes.py); and drawing with
an adapter merged and beside the weights (drawing.py). Models have their real sizes and random weights. Each part is a
process of its own that is ended when its time is over. One that fails is a line of the table and stops no other.

Writes OUTPUT_DIR/gpu.json with the machine, the versions and every number, gpu.md with the table, and logs/ with what
the parts said. Both files are written anew after each part. The exit code is 1 if anything failed, and 2 if a package
or the GPU is missing, before anything runs.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import packages
from dreambooth.errors import UserError, readable_errors
from dreambooth.options.paths import check_folder, path_argument

if TYPE_CHECKING:  # it needs packages that have to be looked for first
    from benchmarks.gpu_parts import Part, Row

UNUSED = {"datasets", "tensorboard", "wandb"}  # of requirements.txt: nothing here reads a dataset or reports
ON_CPU = {"KRON_GPU_TESTS": "cpu"}  # see tests/gpu/conftest.py
TIME = 570.0  # s, of ten minutes, until the last part is ended
TARGET = "packages"
COLUMNS = (
    "Step: ms of one training step, and allocated memory at its peak. Recipe: seconds of a step, and the peaks of the "
    "whole run. Medians, quartiles in parentheses; ratios to the part's first line are of the same round."
)


def main() -> None:
    began = time.monotonic()
    arguments = parse()
    found = prepare(arguments)
    from benchmarks.gpu_parts import parts

    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=roomiest()) as scratch:
        for part in chosen(parts(Path(scratch), arguments.dry_run), arguments.parts):
            remaining = TIME - (time.monotonic() - began)
            results[part.name] = run_part(part, Path(scratch) / "parts", remaining, arguments)
            found["seconds"] = round(time.monotonic() - began, 1)
            write(found, results, arguments.output_dir)
    print((arguments.output_dir / "gpu.md").read_text(encoding="utf-8"))
    failed = [name for name, result in results.items() if any(row["failed"] for row in result["rows"])]
    if failed:
        print(f"failed: {'; '.join(failed)}; see {arguments.output_dir / 'logs'}", file=sys.stderr)
        sys.exit(1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=path_argument, default=Path("outputs/gpu"), help="Folder for the results.")
    parser.add_argument("--wheels", type=path_argument, help="Folder of wheels to install missing packages from.")
    parser.add_argument("--dry_run", action="store_true", help="Run in little on a CPU. Its figures mean nothing.")
    parser.add_argument(
        "--parts",
        nargs="+",
        default=[""],
        metavar="WORD",
        help="Run the parts whose names contain one of these alone, for example compiled (default: all).",
    )
    arguments = parser.parse_args()
    arguments.output_dir = arguments.output_dir.absolute()
    return arguments


def chosen(parts: "list[Part]", words: list[str]) -> "list[Part]":
    """Return the parts whose names contain one of the words. Raises UserError if none does."""
    found = [part for part in parts if any(word in part.name for word in words)]
    if not found:
        names = "; ".join(part.name for part in parts)
        raise UserError(f"--parts {' '.join(words)}: no part is called so; there are: {names}")
    return found


# ---- what there is ----


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the machine and the versions. Raises UserError if something is missing that nothing here can install."""
    check_folder(str(arguments.output_dir), "--output_dir")
    pinned = packages.pins(ROOT / "requirements.txt")
    needed = [*(pinned.keys() - UNUSED), "pytest"]
    if not packages.versions([packages.GIVEN]):
        raise UserError(f"{sys.executable} has no torch, which has to be there: set PYTHON to a Python that has it")
    if arguments.wheels:
        packages.install(needed, arguments.wheels, arguments.output_dir / TARGET)
    if missing := packages.missing(needed):
        raise UserError(
            f"{sys.executable} lacks {', '.join(missing)}: install them, or give a folder of wheels with --wheels DIR"
        )
    if other := packages.differences(pinned):
        said = (f"{name} {version} instead of {pinned[name]}" for name, version in sorted(other.items()))
        print(f"Not the versions of requirements.txt: {', '.join(said)}", flush=True)
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        raise UserError("there is no CUDA device that torch can use; --dry_run runs in little on a CPU")
    return {
        "gpu": graphics_card(),
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "packages": packages.versions(sorted(needed)),
        "not_as_pinned": other,
        "dry_run": arguments.dry_run,
    }


def graphics_card() -> str | None:
    """Return the GPU's name, driver and memory, asked without making a context on it; None without nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def roomiest() -> Path:
    """Return a folder for 7 GB: memory if it has room, which is read and written fastest, else the disk."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > 2**34 else Path(tempfile.gettempdir())


# ---- running parts ----


def run_part(part: "Part", folder: Path, remaining: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a part and return its seconds, its rows, and what it measured. Never raises: an error is a row."""
    from benchmarks.gpu_parts import Row
    from benchmarks.runs import last_error

    print(f"{part.name} ...", flush=True)
    began = time.monotonic()
    own, logs = folder / part.name.replace(" ", "-"), arguments.output_dir / "logs"
    for made in (own, logs):
        made.mkdir(parents=True, exist_ok=True)
    try:
        seconds = min(part.seconds, remaining)
        if seconds <= 0:
            raise UserError("error: not begun, since the time for all parts was over")
        run_program(part, own, logs / f"{own.name}.log", seconds, arguments)
        rows = part.read(own)
    except Exception as error:  # whatever it is, the other parts are worth running
        rows = [*rows_so_far(part, own), Row("", result=last_error(f"{type(error).__name__}: {error}"), failed=True)]
    except SystemExit as end:  # of a program that runs in this process
        rows = [Row("", result=f"it ended with exit code {end.code}", failed=True)]
    measured = [json.loads(path.read_text(encoding="utf-8")) for path in own.glob("*.json")]
    return {
        "seconds": round(time.monotonic() - began, 1),
        "rows": [asdict(row) for row in rows],
        "measured": measured,
    }


def rows_so_far(part: "Part", folder: Path) -> "list[Row]":
    """Return the rows of a part that was interrupted: the tests write those that they have."""
    with contextlib.suppress(Exception):
        return part.read(folder)
    return []


def run_program(part: "Part", folder: Path, log: Path, seconds: float, arguments: argparse.Namespace) -> None:
    """Run a part's program, in this process if it is a dry run and it is not the tests. Raises what stops it."""
    from benchmarks.gpu_parts import JUNIT
    from benchmarks.runs import run_within

    if part.program == "pytest":
        words = ["-m", "pytest", *part.words, f"--junitxml={folder / JUNIT}"]
        run_within(seconds, [sys.executable, *words], log, environment(arguments), accepted=(0, 1))  # 1: tests failed
        return
    words = [*part.words, *([] if part.program == "random_models" else ["--output_dir", str(folder)])]
    if not arguments.dry_run:
        command = [sys.executable, str(ROOT / "benchmarks" / f"{part.program}.py"), *words]
        return run_within(seconds, command, log, environment(arguments))
    with (
        log.open("w", encoding="utf-8") as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        mock.patch.object(sys, "argv", [part.program, *words]),
    ):
        importlib.import_module(f"benchmarks.{part.program}").main()


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the environment of a part: with the packages that were installed here, and without the Hub."""
    found = [str(arguments.output_dir / TARGET) if arguments.wheels else "", os.environ.get("PYTHONPATH", "")]
    path = {"PYTHONPATH": os.pathsep.join(filter(None, found))}
    return {**os.environ, **path, "HF_HUB_OFFLINE": "1", **(ON_CPU if arguments.dry_run else {})}


# ---- writing ----


def write(found: dict[str, Any], results: dict[str, Any], output: Path) -> None:
    """Write both files."""
    from benchmarks.gpu_parts import HEADER, Row, cells
    from dreambooth.markdown import table

    text = json.dumps({"machine": found, "parts": results}, indent=1)
    (output / "gpu.json").write_text(text, encoding="utf-8")
    rows = [cells(name, Row(**row)) for name, result in results.items() for row in result["rows"]]
    machine = found["gpu"] or "no NVIDIA GPU"
    caption = f"{machine}; PyTorch {found['packages']['torch']}, Python {found['python']}; {found['seconds']:.0f} s."
    if found["dry_run"]:
        caption += " A dry run: these figures mean nothing."
    (output / "gpu.md").write_text(f"{caption}\n\n{table(HEADER, rows)}\n\n{COLUMNS}\n", encoding="utf-8")


if __name__ == "__main__":
    with readable_errors():
        main()
