"""Time whole training runs, from start to saved file: this project's script and diffusers' own take turns.

    python benchmarks/training_run.py --diffusers_script diffusers/examples/dreambooth/train_dreambooth_lora.py
    python benchmarks/training_run.py --kind sdxl --diffusers_script .../train_dreambooth_lora_sdxl.py

diffusers' script is not part of this project: it is in diffusers' repository, and needs torchvision. Both get the same
base model, photos, class images, steps, batch, precision and seed, with prior preservation, and adapt the same layers:
ours with its default factors (4, 64), theirs with rank 4. Without --pretrained_model_name_or_path the base model is
small, with random weights: most of the time is then what the scripts do around the model. The class images are drawn
beforehand, by a run of ours that is not timed; with --draw_class_images each run draws its own.

Prints a table of wall time, processor time and peak resident memory of the training process, as median (first to third
quartile), and theirs / ours of each round. Writes it, and all measurements, to training_run-KIND.md and .json in
--output_dir.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.runs import measure
from benchmarks.timing import interleave, machine, parser, ratios, spread, write_results
from dreambooth.errors import readable_errors
from dreambooth.options.paths import path_argument
from toyworld.tiny_pipeline import build_pipeline

OURS = {"sd": "train_dreambooth_kronecker.py", "sdxl": "train_dreambooth_kronecker_sdxl.py"}
MEASURES = ("wall time, s", "processor time, s", "peak memory, MiB")


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        runs = prepare(arguments, Path(folder))
        found = interleave(runs, arguments.rounds, warm_up=1)
    ours, theirs = (list(zip(*found[name])) for name in runs)
    rows = [
        [measure, spread(own, 1), spread(other, 1), spread(ratios(other, own))]
        for measure, own, other in zip(MEASURES, ours, theirs)
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = {"no": "fp32"}.get(arguments.mixed_precision, arguments.mixed_precision)
    drawn = "drawn by the run" if arguments.draw_class_images else "given"
    caption = (
        f"A run of {arguments.max_train_steps} steps, batch {arguments.train_batch_size}, {arguments.resolution} px, "
    )
    caption += f"{precision}, {arguments.num_class_images} class images {drawn}, from start to file; {machine(device)}."
    measurements = {name: [dict(zip(MEASURES, run)) for run in found[name]] for name in found}
    write_results(
        arguments, f"training_run-{arguments.kind}", caption, ["", *runs, "theirs / ours"], rows, measurements
    )


def parse() -> argparse.Namespace:
    options = parser(__doc__, rounds=5)
    options.add_argument(
        "--diffusers_script", type=path_argument, required=True, help="Path of diffusers' training script."
    )
    options.add_argument("--kind", choices=list(OURS), default="sd", help="Family of the base model and the scripts.")
    options.add_argument("--pretrained_model_name_or_path", help="Base model (default: a small one, random weights).")
    options.add_argument("--instance_data_dir", type=path_argument, default=ROOT / "toyworld" / "photos" / "dog")
    options.add_argument("--resolution", type=int, default=64, help="Side of the training images, px.")
    options.add_argument("--max_train_steps", type=int, default=100, help="Optimizer steps.")
    options.add_argument("--train_batch_size", type=int, default=1, help="Instance images per step.")
    options.add_argument("--num_class_images", type=int, default=8)
    options.add_argument("--draw_class_images", action="store_true", help="Time the drawing of class images too.")
    options.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    arguments = options.parse_args()
    if not arguments.diffusers_script.is_file():
        options.error(f"--diffusers_script {arguments.diffusers_script}: there is no such file")
    return arguments


def prepare(arguments: argparse.Namespace, folder: Path) -> dict[str, Callable[[], tuple[float, float, float]]]:
    """Return name -> function that makes a run, in a folder of its own, and returns its MEASURES."""
    base_model = arguments.pretrained_model_name_or_path
    if base_model is None:
        base_model = folder / "base-model"
        build_pipeline(arguments.kind).save_pretrained(base_model)
    elif Path(base_model).is_dir():  # a relative path: the runs have a working folder of their own
        base_model = Path(base_model).resolve()
    flags = {
        "pretrained_model_name_or_path": base_model,
        "instance_data_dir": arguments.instance_data_dir,
        "instance_prompt": "a photo of sks dog",
        "class_prompt": "a photo of dog",
        "num_class_images": arguments.num_class_images,
        "resolution": arguments.resolution,
        "train_batch_size": arguments.train_batch_size,
        "max_train_steps": arguments.max_train_steps,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "seed": 0,
    }
    ours, theirs = ROOT / OURS[arguments.kind], arguments.diffusers_script.resolve()

    def run(script: Path, **options) -> tuple[float, float, float]:
        with tempfile.TemporaryDirectory(dir=folder) as output:
            command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
            command += ["--mixed_precision", arguments.mixed_precision, str(script), "--with_prior_preservation"]
            class_images = Path(output if arguments.draw_class_images else folder) / "class-images"
            folders = {"class_data_dir": class_images, "output_dir": Path(output) / "result"}
            for name, value in {**flags, **folders, **options}.items():
                command += [f"--{name}", str(value)]
            return measure(command, folder / f"{script.stem}.log")

    if not arguments.draw_class_images:
        run(ours, max_train_steps=1)
    return {ours.name: lambda: run(ours), f"diffusers' {theirs.name}": lambda: run(theirs)}


if __name__ == "__main__":
    with readable_errors():
        main()
