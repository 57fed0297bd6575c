"""Time a training step of each method in its public implementation and in this project, which take turns.

    git clone https://github.com/huggingface/diffusers peers/diffusers                  # measured: 58eb52c
    git clone https://github.com/mkshing/svdiff-pytorch peers/svdiff-pytorch            # measured: a78f69e
    pip install --no-deps --target peers/svdiff-packages diffusers==0.14.0 transformers==4.27.3 accelerate==0.18.0 \\
        tokenizers==0.13.3 huggingface_hub==0.25.2 "setuptools<80"
    python benchmarks/public_scripts.py --peers_dir peers

Nothing of these checkouts is part of this project, and they run as they are. diffusers' scripts run in this
environment, which needs torchvision; SVDiff's refuses every diffusers but 0.14.0, so it sees the packages above first.
Both sides get a copy of the base model in fp32, as diffusers' scripts demand; SVDiff's has the file layout of 2023.

Both train the same photos at the same rate, batch 1, fp32, without prior preservation: LoRA, DreamBooth and SVDiff with
the text encoder. A step's time is (time of a run of the longer --steps - time of the shorter) / their difference, so
that start, loading and saving cancel. Memory is the peak of resident memory of the longer run's training process.

Prints a table of both, as median (first to third quartile), and theirs / ours of each round, and
the error of a side that does not run. Writes it, and all measurements, to public_scripts.md and .json in --output_dir.
"""

import argparse
import functools
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.runs import RunFailed, last_error, measure
from benchmarks.timing import CLOCKS, interleave, machine, parser, ratios, spread, write_results
from dreambooth.errors import UserError, readable_errors
from dreambooth.options.paths import path_argument

Flags = Mapping[str, Any]  # name -> value or tuple of values; None: the flag alone

PROMPT = {"instance_prompt": "a photo of sks dog"}
WITH_TEXT = {**PROMPT, "train_text_encoder": None}
NEW_WORD = {"instance_prompt": "a photo of <new1> dog", "modifier_token": "<new1>", "initializer_token": "dog"}
WORD_FOR_NOUN = {"placeholder_token": "<dog>", "initializer_token": "dog"}
OLD_LAYERS = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # of the VAE, before 0.17


@dataclass(frozen=True)
class Pair:
    """A method's public script, and the flags that train the same in both."""

    script: str  # in --peers_dir
    learning_rate: float
    ours: Flags
    theirs: Flags
    photos: str = "instance_data_dir"  # what their script calls the folder
    packages: str | None = None  # folder in --peers_dir whose packages their script needs


@dataclass(frozen=True)
class Command:
    words: list[str]
    environment: Mapping[str, str] | None = None  # None: this process's own


PAIRS = {
    "lora": Pair("diffusers/examples/dreambooth/train_dreambooth_lora.py", 1e-4, WITH_TEXT, WITH_TEXT),
    "dreambooth": Pair("diffusers/examples/dreambooth/train_dreambooth.py", 2e-6, WITH_TEXT, WITH_TEXT),
    "svdiff": Pair("svdiff-pytorch/train_svdiff.py", 1e-3, WITH_TEXT, WITH_TEXT, packages="svdiff-packages"),
    "custom_diffusion": Pair(
        "diffusers/examples/custom_diffusion/train_custom_diffusion.py", 1e-5, NEW_WORD, {**NEW_WORD, "noaug": None}
    ),
    "textual_inversion": Pair(
        "diffusers/examples/textual_inversion/textual_inversion.py",
        5e-4,
        {**WORD_FOR_NOUN, "instance_prompt": "a photo of <dog>"},
        WORD_FOR_NOUN,  # its prompts are templates of its own
        photos="train_data_dir",
    ),
}


def main() -> None:
    arguments = parse()
    rows, measurements = [], {}
    with tempfile.TemporaryDirectory() as folder:
        base_models = prepare_base_models(arguments.pretrained_model_name_or_path, Path(folder))
        for name in arguments.methods:
            pair = PAIRS[name]
            sides = {
                "ours": our_command(name, pair, base_models[0], arguments),
                "theirs": their_command(pair, base_models[pair.packages is not None], arguments),
            }
            found, failed = compare(sides, arguments, Path(folder))
            rows.append(row(name, found, failed))
            measurements[name] = {"milliseconds, MiB": found, "failed": failed}
    first, last = arguments.steps
    caption = f"A step of training, {arguments.clock} time, from runs of {first} and {last} steps, "
    caption += f"{arguments.resolution} px, fp32, batch 1; {machine(torch.device('cpu'))}."
    for name, found in measurements.items():
        caption += "".join(f"\n\n{name}, {side}: {error}" for side, error in found["failed"].items())
    header = ["", "ours, ms", "theirs, ms", "theirs / ours", "ours, MiB", "theirs, MiB"]
    write_results(arguments, "public_scripts", caption, header, rows, measurements)


def parse() -> argparse.Namespace:
    options = parser(__doc__, rounds=5)
    options.add_argument("--peers_dir", type=path_argument, required=True, help="Folder with the checkouts.")
    options.add_argument("--methods", nargs="+", default=list(PAIRS), choices=list(PAIRS), metavar="NAME")
    options.add_argument("--steps", type=int, nargs=2, default=[10, 210], help="Steps of the two runs.")
    options.add_argument(
        "--pretrained_model_name_or_path", type=path_argument, default=ROOT / "toyworld" / "models" / "sd"
    )
    options.add_argument("--instance_data_dir", type=path_argument, default=ROOT / "toyworld" / "photos" / "dog")
    options.add_argument("--resolution", type=int, default=64, help="Side of the training images, px.")
    arguments = options.parse_args()
    if not 0 < arguments.steps[0] < arguments.steps[1]:
        options.error("--steps needs two numbers, the smaller first")
    return arguments


def prepare_base_models(source: Path, folder: Path) -> tuple[Path, Path]:
    """Return two copies of a base model in fp32: as it is saved today, and as diffusers 0.14 reads it."""
    today, old = folder / "base-model", folder / "base-model-2023"
    pipeline = StableDiffusionPipeline.from_pretrained(source, dtype=torch.float32)
    for copy in (today, old):
        pipeline.save_pretrained(copy)
    tokenizer = json.loads((old / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (old / "tokenizer" / "vocab.json").write_text(json.dumps(tokenizer["vocab"]), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]]
    (old / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    weights = old / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({old_name(name): tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    return today, old


def old_name(name: str) -> str:
    """Return what diffusers 0.14 calls a VAE's tensor."""
    for now, before in OLD_LAYERS.items():
        name = name.replace(f".attentions.0.{now}.", f".attentions.0.{before}.")
    return name


def compare(
    sides: Mapping[str, Command], arguments: argparse.Namespace, folder: Path
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, str]]:
    """Return what steps cost on each side that runs, and the errors of those that do not."""
    failed = {}
    for side, command in sides.items():  # once, before anything counts
        try:
            run(command, arguments.steps[0], folder)
        except RunFailed as error:
            failed[side] = last_error(str(error))
    ways = {
        side: functools.partial(step_cost, command, arguments, folder)
        for side, command in sides.items()
        if side not in failed
    }
    return interleave(ways, arguments.rounds, warm_up=0), failed


def our_command(name: str, pair: Pair, base_model: Path, arguments: argparse.Namespace) -> Command:
    """Return the command that trains a method here."""
    given = {**shared_flags(pair, base_model, arguments), "instance_data_dir": arguments.instance_data_dir}
    script = [str(ROOT / "methods" / "train.py"), name, "sd"]
    return Command(launch(script, {**given, **pair.ours, "report_to": "none"}))


def their_command(pair: Pair, base_model: Path, arguments: argparse.Namespace) -> Command:
    """Return the command that trains with the public script. Raises UserError if it is not there."""
    script = arguments.peers_dir.resolve() / pair.script
    if not script.is_file():
        raise UserError(f"--peers_dir {arguments.peers_dir} has no {pair.script}; --help says what belongs there")
    environment = dict(os.environ)
    if pair.packages:
        first = [str(arguments.peers_dir.resolve() / pair.packages), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, first))
    given = {**shared_flags(pair, base_model, arguments), pair.photos: arguments.instance_data_dir}
    return Command(launch([str(script)], {**given, **pair.theirs}), environment)


def shared_flags(pair: Pair, base_model: Path, arguments: argparse.Namespace) -> Flags:
    return {
        "pretrained_model_name_or_path": base_model,
        "resolution": arguments.resolution,
        "train_batch_size": 1,
        "learning_rate": pair.learning_rate,
        "lr_scheduler": "constant",
        "seed": 0,
    }


def launch(script: list[str], given: Flags, mixed_precision: str = "no") -> list[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    command += ["--mixed_precision", mixed_precision, *script]
    for name, value in given.items():
        values = [] if value is None else value if isinstance(value, tuple) else [value]
        command += [f"--{name}", *map(str, values)]
    return command


def run(command: Command, steps: int, folder: Path) -> tuple[float, float, float]:
    """Return wall time, processor time and peak memory of a run. Raises RunFailed."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        words = [*command.words, "--max_train_steps", str(steps), "--output_dir", str(Path(output) / "result")]
        return measure(words, folder / "run.log", command.environment)


def step_cost(command: Command, arguments: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Return milliseconds per step, and the peak of resident memory, MiB."""
    short, long = (run(command, steps, folder) for steps in arguments.steps)
    clock = list(CLOCKS).index(arguments.clock)
    return 1e3 * (long[clock] - short[clock]) / (arguments.steps[1] - arguments.steps[0]), long[2]


def row(name: str, found: Mapping[str, list[tuple[float, float]]], failed: Mapping[str, str]) -> list[str]:
    """Return a method's row of the table: the figures of each side that runs."""
    times, peaks = ({side: [cost[at] for cost in found[side]] for side in found} for at in (0, 1))
    cells = ["does not run" if side in failed else spread(times[side], 1) for side in ("ours", "theirs")]
    ratio = "" if failed else spread(ratios(times["theirs"], times["ours"]))
    return [name, *cells, ratio, *("" if side in failed else spread(peaks[side], 0) for side in ("ours", "theirs"))]


if __name__ == "__main__":
    with readable_errors():
        main()
