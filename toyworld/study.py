"""Compare ways to personalise a base model of the toy world: Kronecker factors of several shapes, and peft's LoRA.

    python -m toyworld.study --output_dir outputs/study

Every method trains on every subject's photos with every learning rate and several seeds, in the training loop of the
scripts, the base model's own prediction as prior; then it draws the subject's evaluation prompts, and the evaluators
score what it drew. Writes OUTPUT_DIR/runs.jsonl, one line a run (runs that are there are not repeated, so methods can
be given learning rates of their own in commands of their own), and tables.md, means over subjects and seeds with the
spread over seeds, and DINO for each subject; prints the tables.
"""

import argparse
import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from tqdm import tqdm

from dreambooth.drawing.draw import draw_images
from dreambooth.drawing.pipelines import load_adapted_pipeline, prepare_drawing
from dreambooth.families.sd import SD
from dreambooth.families.sdxl import SDXL
from dreambooth.kronecker import KRONECKER
from dreambooth.method import Method
from dreambooth.options.base_model import AdaptedModelOptions
from dreambooth.options.training import TrainingConfig, config_class
from dreambooth.scoring.embeddings import Evaluators, load_evaluators
from dreambooth.scoring.measures import score_images, score_prior
from dreambooth.scoring.subject import read_subject_photos
from dreambooth.train import train
from methods.lora import LORA
from methods.readers import READERS
from toyworld.subjects import SUBJECTS, prompts, save_photos

MODELS = Path(__file__).resolve().parent / "models"
SUBJECTS_COMPARED = ("robot", "dog", "teapot", "cat")
IMAGES = 4  # for each prompt
CLASS_IMAGES = 16
DRAWING = {"num_inference_steps": 20, "guidance_scale": 3.0, "height": 64, "width": 64, "negative_prompt": ""}


# ---- the methods ----

FAMILIES = {family.name: family for family in (SD, SDXL)}


@dataclass(frozen=True)
class Row:
    """A row of the study: a method with options of its own."""

    method: Method
    options: dict[str, Any]


# The toy UNets' layers have 64 and 128 features. (2, 32) and (8, 8) divide them about as (4, 64) and (16, 16) divide
# the 320 to 1280 of the real ones: B no smaller than A.
METHODS = {
    "Kronecker (2, 32)": Row(KRONECKER, {"kron_a1": 2, "kron_a2": 32}),
    "Kronecker (8, 8)": Row(KRONECKER, {"kron_a1": 8, "kron_a2": 8}),
    "Kronecker (4, 64)": Row(KRONECKER, {"kron_a1": 4, "kron_a2": 64}),
    "Kronecker (16, 16)": Row(KRONECKER, {"kron_a1": 16, "kron_a2": 16}),
    "LoRA r=1": Row(LORA, {"rank": 1}),
    "LoRA r=4": Row(LORA, {"rank": 4}),
}


# ---- one run ----


def personalise(row: Row, options: argparse.Namespace, **given) -> tuple[Path, int]:
    """Train a method as the scripts do; return its result and the number of parameters that it saved."""
    config = config_class(TrainingConfig, row.method.options)(**configure(options), **row.options, **given)
    train(FAMILIES[options.family], row.method, config)
    path = Path(config.output_dir) / row.method.weights_name
    with safe_open(path, "pt") as file:
        tensors = [file.get_slice(key).get_shape() for key in file.keys()]
    return path, sum(math.prod(shape) for shape in tensors if shape)


def load(options: argparse.Namespace, adapters: Sequence[Path] = ()) -> DiffusionPipeline:
    """Return the base model with adapters, ready to draw."""
    config = AdaptedModelOptions(pretrained_model_name_or_path=options.base, adapter=[str(path) for path in adapters])
    pipeline = load_adapted_pipeline(config, READERS)
    prepare_drawing(pipeline, READERS, config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(frozen=True)
class Drawn:
    """A row of images for each evaluation prompt, and images of the class."""

    rows: list[list[Image.Image]]
    class_images: list[Image.Image]


def draw_all(
    pipeline: DiffusionPipeline, subject: str, images: int = IMAGES, class_images: int = CLASS_IMAGES
) -> Drawn:
    rows = [draw_images(pipeline, range(images), images, prompt=prompt, **DRAWING) for prompt in prompts(subject)]
    class_prompt = f"a photo of a {SUBJECTS[subject].kind}"
    return Drawn(rows, draw_images(pipeline, range(class_images), class_images, prompt=class_prompt, **DRAWING))


def score(
    drawn: Drawn, before: Drawn, photos: Sequence[Image.Image], subject: str, evaluators: Evaluators
) -> dict[str, float]:
    """Return the scores of what a model drew; `before` is what the base model drew."""
    texts = [prompt.replace("sks ", "") for prompt in prompts(subject)]
    scores = asdict(score_images(drawn.rows, photos, texts, evaluators))
    scores.pop("by_prompt")
    prior = score_prior(before.class_images, drawn.class_images, photos, evaluators)
    return scores | {"prior_similarity": prior.similarity_after, "prior_diversity": prior.diversity_after}


# ---- the study ----


COLUMNS = {
    "dino": "DINO",
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "diversity": "diversity",
    "prior_similarity": "class: DINO to the photos",
    "prior_diversity": "class: diversity",
}
BASE = "base model"


def run_all(options: argparse.Namespace, evaluators: Evaluators, log: Path) -> list[dict]:
    """Do the runs that `log` lacks, adding a line for each; return all."""
    runs = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(run["method"], run["learning_rate"], run["subject"], run["seed"]) for run in runs}
    wanted = [(BASE, 0.0), *itertools.product(options.methods, options.learning_rates)]
    for subject in tqdm(options.subjects, desc="subjects"):
        folder = options.output_dir / "photos" / subject
        save_photos(subject, folder)
        photos = read_subject_photos(str(folder))
        before = draw_all(load(options), subject)
        for seed, (method, learning_rate) in itertools.product(options.seeds, wanted):
            if (method, learning_rate, subject, seed) in done:
                continue
            drawn, parameters = before, 0
            if method != BASE:
                kind, output = SUBJECTS[subject].kind, options.output_dir / "run"
                path, parameters = personalise(
                    METHODS[method],
                    options,
                    instance_data_dir=str(folder),
                    instance_prompt=f"a photo of sks {kind}",
                    class_prompt=f"a photo of {kind}",
                    learning_rate=learning_rate,
                    seed=seed,
                    output_dir=str(output),
                )
                drawn = draw_all(load(options, [path]), subject)
                shutil.rmtree(output)
            scores = score(drawn, before, photos, subject, evaluators)
            run = {"method": method, "learning_rate": learning_rate, "subject": subject, "seed": seed}
            runs.append({**run, "parameters": parameters, **scores})
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(runs[-1]) + "\n")
    return runs


def configure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of training that all runs share."""
    return {
        "pretrained_model_name_or_path": options.base,
        "with_prior_preservation": True,
        "prior_source": "base_model",
        "resolution": 64,
        "center_crop": True,
        "train_batch_size": options.train_batch_size,
        "max_train_steps": options.max_train_steps,
        "checkpointing_steps": options.max_train_steps + 1,
        "overwrite_output_dir": True,
        "report_to": ["none"],
    }


def table(runs: list[dict]) -> str:
    """Return all scores: means over subjects and seeds, ± the standard deviation of the seeds' means."""
    head = "| | parameters | learning rate | " + " | ".join(COLUMNS.values()) + " |"
    return _lines(head, runs, lambda mine: [_mean_and_spread(mine, name) for name in COLUMNS])


def subjects_table(runs: list[dict]) -> str:
    """Return DINO for each subject: means over seeds, ± their standard deviation."""
    subjects = list(dict.fromkeys(run["subject"] for run in runs))
    head = "| DINO | parameters | learning rate | " + " | ".join(subjects) + " |"

    def cells(mine: list[dict]) -> list[str]:
        return [_mean_and_spread([run for run in mine if run["subject"] == subject], "dino") for subject in subjects]

    return _lines(head, runs, cells)


def _lines(head: str, runs: list[dict], cells_of: Callable[[list[dict]], list[str]]) -> str:
    """A line for each method and learning rate, with what `cells_of` makes of its runs."""
    lines = [head, "| --- |" + " ---: |" * (head.count("|") - 2)]
    for method, learning_rate in sorted({(run["method"], run["learning_rate"]) for run in runs}, key=_row):
        mine = [run for run in runs if (run["method"], run["learning_rate"]) == (method, learning_rate)]
        cells = [method, f"{mine[0]['parameters']:,}", f"{learning_rate:g}", *cells_of(mine)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _row(entry: tuple[str, float]) -> tuple[int, float]:
    method, learning_rate = entry
    return [BASE, *METHODS].index(method), learning_rate


def _mean_and_spread(runs: list[dict], name: str) -> str:
    if not runs:
        return ""
    seeds = sorted({run["seed"] for run in runs})
    by_seed = [fmean(run[name] for run in runs if run["seed"] == seed) for seed in seeds]
    spread = f" ± {stdev(by_seed):.3f}" if len(by_seed) > 1 else ""
    return f"{fmean(by_seed):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--family", choices=FAMILIES, default="sd", help="of the base model; default: sd")
    parser.add_argument("--base", help="base model; default: the toy world's of the family")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS_COMPARED))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max_train_steps", type=int, default=300, help="optimizer steps; default: 300")
    parser.add_argument("--train_batch_size", type=int, default=4, help="photos in a step; default: 4")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-2], help="default: 1e-2")
    options = parser.parse_args()
    options.base = options.base or str(MODELS / options.family)
    evaluators = load_evaluators(str(MODELS / "clip"), str(MODELS / "dino"), torch.device("cpu"))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    runs = run_all(options, evaluators, options.output_dir / "runs.jsonl")
    text = f"{table(runs)}\n\n{subjects_table(runs)}"
    (options.output_dir / "tables.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
