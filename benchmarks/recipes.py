"""Train with a recipe in as much GPU memory as its name says, and find what it needs.

    python benchmarks/random_models.py sdxl outputs/random-sdxl
    python benchmarks/recipes.py configs/sdxl-8gb.yaml --pretrained_model_name_or_path outputs/random-sdxl

The recipe's own training runs, with all its options but the base model and the number of steps: random weights need as
much memory as others. PyTorch may use what the recipe's name says, less what CUDA itself takes here. If that does not
suffice, the recipe runs again without a limit. A CPU has no limit, and compiles nothing.

Prints a table of the recipe's peak memory from start to file, allocated and reserved, GiB, whether it fits, and the
time of a step, which has the first steps left out. Writes it, and all measurements, to recipe-NAME.md and .json in
--output_dir.
"""

import argparse
import gc
import re
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_dreambooth_kronecker_sdxl as sdxl
from benchmarks.timing import machine, spread, write_results
from dreambooth.base_model.loading import free_memory
from dreambooth.errors import UserError, readable_errors
from dreambooth.layout import METRICS_NAME
from dreambooth.options.paths import path_argument
from dreambooth.report.metrics import read_metrics
from dreambooth.runtime.memory import WORDS, peak_memory

GIB = 2**30
FIRST = 2  # steps that count for memory alone: the allocator and, with --compile, the compiler are still at work


@dataclass(frozen=True)
class Need:
    """What a run of a recipe took."""

    allocated: int  # bytes, as the next
    reserved: int
    step_seconds: list[float]


def main() -> None:
    arguments = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gib = int(re.findall(r"-(\d+)gb", arguments.recipe.stem)[0])
    limit = limit_memory(gib * GIB) if device.type == "cuda" else None
    problem = None
    try:
        need = train(arguments, device)
    except UserError as error:
        if limit is None or not any(word in str(error).lower() for word in WORDS):
            raise
        problem = str(error).partition("\n")[0]
    if problem is not None:
        torch.cuda.set_per_process_memory_fraction(1.0)
        need = train(arguments, device)
    fits = f"does not fit: {problem}" if problem else "no limit" if limit is None else "fits"
    row = [f"{gib}", f"{need.allocated / GIB:.2f}", f"{need.reserved / GIB:.2f}", fits, spread(need.step_seconds, 3)]
    caption = f"{arguments.recipe.name}, {arguments.steps} steps of {arguments.resolution} px; {machine(device)}."
    measurements = {"gib": gib, "limit_bytes": limit, "problem": problem, **asdict(need)}
    header = ["GiB of the recipe", "allocated, GiB", "reserved, GiB", "result", "s / step"]
    write_results(arguments, f"recipe-{arguments.recipe.stem}", caption, header, [row], measurements)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=path_argument, help="A recipe with its GiB in its name: configs/sdxl-8gb.yaml.")
    parser.add_argument("--pretrained_model_name_or_path", type=path_argument, required=True, help="A pipeline folder.")
    parser.add_argument("--instance_data_dir", type=path_argument, default=ROOT / "toyworld" / "photos" / "dog")
    parser.add_argument("--steps", type=int, default=6, help="Optimizer steps.")
    parser.add_argument("--resolution", type=int, default=1024, help="Side of the training images, px.")
    parser.add_argument("--output_dir", type=path_argument, default=Path("outputs/benchmarks"))
    arguments = parser.parse_args()
    if not re.search(r"-\d+gb", arguments.recipe.stem) or not arguments.recipe.is_file():
        parser.error(f"{arguments.recipe} is not a recipe that says for how many GB it is")
    if not FIRST < arguments.steps:
        parser.error(f"--steps {arguments.steps}: the first {FIRST} are not timed; give more")
    return arguments


def limit_memory(size: int) -> int:
    """Leave PyTorch what a GPU of this many bytes would, and return how much that is.

    CUDA's own memory is what is in use here, on a GPU that nothing else uses.
    """
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    limit = size - (total - free - torch.cuda.memory_reserved())
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    return min(limit, total)


def train(arguments: argparse.Namespace, device: torch.device) -> Need:
    """Run the recipe's training and return what it took. Raises UserError."""
    gc.collect()
    free_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.object(sys, "argv", ["sdxl", *options(arguments, folder, device)]):
            sdxl.main()
        seconds = [row["step_time"] for row in read_metrics(Path(folder) / METRICS_NAME)]
    allocated = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory(device)
    return Need(allocated, peak_memory(device), seconds[FIRST:])


def options(arguments: argparse.Namespace, folder: str, device: torch.device) -> list[str]:
    """Return the command line of the recipe's training."""
    base, recipe = arguments.pretrained_model_name_or_path, yaml.safe_load(arguments.recipe.read_text(encoding="utf-8"))
    given = {
        "config": arguments.recipe,
        "pretrained_model_name_or_path": base,
        "instance_data_dir": arguments.instance_data_dir,
        "instance_prompt": "a photo of sks dog",
        "class_prompt": "a photo of dog",
        "mixed_precision": "bf16" if device.type == "cuda" else "no",
        "resolution": arguments.resolution,
        "max_train_steps": arguments.steps,
        "logging_steps": 1,
        "report_to": "none",
        "output_dir": folder,
    }
    if "pretrained_vae_model_name_or_path" in recipe:
        given["pretrained_vae_model_name_or_path"] = base / "vae"
    if device.type == "cpu":
        given["compile"] = False
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


if __name__ == "__main__":
    with readable_errors():
        main()
