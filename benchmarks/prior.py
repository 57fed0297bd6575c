"""Time a training step by what holds the class: class images, the base model's own prediction, or nothing.

    python benchmarks/prior.py                                           # the toy world's model
    python benchmarks/prior.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --resolution 512 --train_batch_size 1 --mixed_precision bf16

LoRA with class images is what most recipes train. An adapter of the cross-attention's keys and values that starts from
the contrast of prompts leaves the class alone by itself (docs/adapter.md), so it may also be trained without a prior.

Whole runs take turns. A step's time is (time of a run of the longer --steps - time of the shorter) / their difference,
so that start, class images, loading and saving cancel. Prints a table of milliseconds per step, as median (first to
third quartile), and the rounds' own ratios to LoRA. Writes it, and all measurements, to prior.md and .json in
--output_dir.
"""

import argparse
import functools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.public_scripts import Command, Flags, launch, step_cost
from benchmarks.timing import interleave, machine, parser, ratios, spread, write_results
from dreambooth.errors import readable_errors
from dreambooth.options.paths import path_argument


@dataclass(frozen=True)
class Adapter:
    """What is trained, and by which script."""

    script: tuple[str, ...]
    flags: Flags


OURS = ("train_dreambooth_kronecker.py",)
ADAPTERS = {
    "LoRA r=4": Adapter(("methods/train.py", "lora", "sd"), {"rank": 4}),
    "Kronecker (4, 64)": Adapter(OURS, {}),
    "contrast, K and V alone": Adapter(OURS, {"kron_targets": ("attn2.to_k", "attn2.to_v"), "kron_init": "contrast"}),
}
WAYS = [  # the first is what the others are compared with
    ("LoRA r=4", "class images"),
    ("Kronecker (4, 64)", "class images"),
    ("contrast, K and V alone", "class images"),
    ("contrast, K and V alone", "the base model's prediction"),
    ("contrast, K and V alone", "nothing"),
]


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        commands = {way: command(*way, Path(folder), arguments) for way in WAYS}
        ways = {", ".join(way): functools.partial(step_cost, commands[way], arguments, Path(folder)) for way in WAYS}
        found = interleave(ways, arguments.rounds, warm_up=1)  # which draws the class images
    times = {way: [milliseconds for milliseconds, _ in costs] for way, costs in found.items()}
    first = next(iter(times.values()))
    rows = [[*way, spread(own, 1), spread(ratios(own, first))] for way, own in zip(WAYS, times.values())]
    precision = {"no": "fp32"}.get(arguments.mixed_precision, arguments.mixed_precision)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    caption = f"A step of training, {arguments.clock} time, {arguments.train_batch_size} photos a step, "
    caption += f"{arguments.resolution} px, {precision}; {machine(device)}."
    write_results(arguments, "prior", caption, ["", "the class is held by", "ms", "time / LoRA"], rows, times)


def parse() -> argparse.Namespace:
    options = parser(__doc__, rounds=5)
    options.add_argument("--pretrained_model_name_or_path", default=str(ROOT / "toyworld" / "models" / "sd"))
    options.add_argument("--instance_data_dir", type=path_argument, default=ROOT / "toyworld" / "photos" / "dog")
    options.add_argument("--steps", type=int, nargs=2, default=[10, 60], help="Steps of the two runs.")
    options.add_argument("--resolution", type=int, default=64, help="Side of the training images, px.")
    options.add_argument("--train_batch_size", type=int, default=4, help="Photos per step; a prior adds as many.")
    options.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    arguments = options.parse_args()
    if not 0 < arguments.steps[0] < arguments.steps[1]:
        options.error("--steps needs two numbers, the smaller first")
    return arguments


def command(adapter: str, prior: str, folder: Path, arguments: argparse.Namespace) -> Command:
    """Return the command that trains an adapter with a prior. Class images are kept in `folder`."""
    base_model = Path(arguments.pretrained_model_name_or_path)
    script, *words = ADAPTERS[adapter].script
    priors: dict[str, Flags] = {
        "class images": {"class_data_dir": folder / "class-images", "num_class_images": 8},
        "the base model's prediction": {"prior_source": "base_model"},
    }
    held = {"with_prior_preservation": None, **priors[prior]} if prior in priors else {}
    flags = {
        "pretrained_model_name_or_path": base_model.resolve() if base_model.is_dir() else base_model,
        "instance_data_dir": arguments.instance_data_dir.resolve(),
        "instance_prompt": "a photo of sks dog",
        "class_prompt": "a photo of dog",
        "resolution": arguments.resolution,
        "center_crop": None,
        "train_batch_size": arguments.train_batch_size,
        "learning_rate": 1e-4,
        "seed": 0,
        "report_to": "none",
    }
    given = {**flags, **ADAPTERS[adapter].flags, **held}
    return Command(launch([str(ROOT / script), *words], given, arguments.mixed_precision))


if __name__ == "__main__":
    with readable_errors():
        main()
