"""Compare ways to personalise a base model of the toy world: Kronecker factors of several shapes, and peft's LoRA.

    python -m toyworld.study --output_dir outputs/study

Every method trains on every subject's photos, with every learning rate and seed, as the scripts train it, with the base
model's own prediction as prior. Its saved result then draws the subject's evaluation prompts, and the evaluators score
the images.

Writes OUTPUT_DIR/runs.jsonl, one line per run, and OUTPUT_DIR/tables.md: means over subjects and seeds with the spread
over seeds, and DINO for each subject. Prints the tables. Runs that runs.jsonl already holds are not repeated: a study
that was stopped continues with the same command, and methods can get different learning rates in separate commands.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import diffusers
import transformers
from diffusers import DiffusionPipeline
from PIL import Image

from dreambooth.drawing.draw import draw_images
from dreambooth.drawing.pipelines import load_adapted_pipeline, prepare_drawing
from dreambooth.errors import UserError, readable_errors
from dreambooth.families.sd import SD
from dreambooth.families.sdxl import SDXL
from dreambooth.family import Family
from dreambooth.kronecker import KRONECKER
from dreambooth.method import Method
from dreambooth.options.base_model import AdaptedModelOptions
from dreambooth.options.paths import path_argument
from dreambooth.options.training import TrainingConfig, config_class
from dreambooth.runtime.library_warnings import show_library_warnings
from dreambooth.scoring.embeddings import Evaluators, load_evaluators
from dreambooth.scoring.measures import score_images, score_prior
from dreambooth.scoring.subject import read_subject_photos
from dreambooth.train import train
from kron_formats.reading import read_adapter
from methods.lora import LORA
from methods.readers import READERS
from toyworld.fitting import device
from toyworld.subjects import SUBJECTS, prompts, save_photos

MODELS = Path(__file__).resolve().parent / "models"
SUBJECTS_COMPARED = ("robot", "dog", "teapot", "cat")
IMAGES = 4  # for each prompt
CLASS_IMAGES = 16
DRAWING = {"num_inference_steps": 20, "guidance_scale": 3.0, "height": 64, "width": 64, "negative_prompt": ""}


FAMILIES = {family.name: family for family in (SD, SDXL)}


# ---- the methods ----


@dataclass(frozen=True)
class Row:
    """A row of the study: a method and its options."""

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


class Run(NamedTuple):
    """What tells a run from the others of a study."""

    method: str
    learning_rate: float
    subject: str
    seed: int


def personalise(family: Family, row: Row, **options) -> Path:
    """Train a method as the scripts do; return the path of its result."""
    config = config_class(row.method.options, TrainingConfig)(**row.options, **options)
    train(family, row.method, config)
    return Path(config.output_dir) / row.method.weights_name


def load(base: str, adapters: Iterable[Path] = ()) -> DiffusionPipeline:
    """Return the base model with the adapters in these files, ready to draw."""
    config = AdaptedModelOptions(pretrained_model_name_or_path=base, adapter=[str(path) for path in adapters])
    pipeline = load_adapted_pipeline(config, READERS).to(device())
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
SETTINGS = ("family", "base", "max_train_steps", "train_batch_size")  # options that all runs of a study share


def run_all(options: argparse.Namespace, evaluators: Evaluators, log: Path) -> list[dict]:
    """Do the runs that `log` lacks, adding a line for each; return all that it then holds.

    Raises UserError if `log` holds runs with other settings: their scores cannot be compared.
    """
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    settings = {name: getattr(options, name) for name in SETTINGS}
    check_settings(records, settings, log)
    done = {Run(*(record[name] for name in Run._fields)) for record in records}
    rows = [(BASE, 0.0), *itertools.product(options.methods, options.learning_rates)]
    wanted = [
        Run(method, learning_rate, subject, seed)
        for subject, seed, (method, learning_rate) in itertools.product(options.subjects, options.seeds, rows)
    ]
    missing = [run for run in wanted if run not in done]
    numbers = itertools.count(1)
    for subject, runs in itertools.groupby(missing, key=lambda run: run.subject):
        folder = options.output_dir / "photos" / subject
        save_photos(subject, folder)
        photos = read_subject_photos(str(folder))
        before = draw_all(load(options.base), subject)
        for run in runs:
            print(f"Run {next(numbers)} of {len(missing)}: {' '.join(map(str, run))}", flush=True)
            drawn, parameters = (before, 0) if run.method == BASE else train_and_draw(run, folder, options)
            record = {**run._asdict(), **settings, "parameters": parameters}
            records.append(record | score(drawn, before, photos, subject, evaluators))
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(records[-1]) + "\n")
    return records


def check_settings(records: Sequence[dict], settings: dict[str, Any], log: Path) -> None:
    for record in records:
        for name, value in settings.items():
            if record.get(name) != value:
                raise UserError(
                    f"--{name} is {value}, but {log} holds runs with {record.get(name)}: choose another --output_dir"
                )


def train_and_draw(run: Run, photos: Path, options: argparse.Namespace) -> tuple[Drawn, int]:
    """Return what the saved result of a run draws, and the number of its parameters. The result is not kept."""
    kind = SUBJECTS[run.subject].kind
    with tempfile.TemporaryDirectory(prefix="study-") as folder:
        path = personalise(
            FAMILIES[options.family],
            METHODS[run.method],
            pretrained_model_name_or_path=options.base,
            instance_data_dir=str(photos),
            instance_prompt=f"a photo of sks {kind}",
            with_prior_preservation=True,
            prior_source="base_model",
            class_prompt=f"a photo of {kind}",
            resolution=64,
            center_crop=True,
            train_batch_size=options.train_batch_size,
            max_train_steps=options.max_train_steps,
            checkpointing_steps=options.max_train_steps + 1,  # none is needed
            learning_rate=run.learning_rate,
            seed=run.seed,
            output_dir=folder,
            report_to=["none"],
        )
        parameters = sum(entry.numel() for entry in read_adapter(path).layers.values())
        return draw_all(load(options.base, [path]), run.subject), parameters


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
    """Return a line for each method and learning rate, with the cells that `cells_of` returns for its runs."""
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
    parser.add_argument("--output_dir", type=path_argument, required=True)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS_COMPARED))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max_train_steps", type=int, default=300, help="optimizer steps; default: 300")
    parser.add_argument("--train_batch_size", type=int, default=4, help="photos in a step; default: 4")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-2], help="default: 1e-2")
    options = parser.parse_args()
    options.base = options.base or str(MODELS / options.family)
    show_library_warnings()
    for library in (transformers, diffusers):
        library.utils.logging.disable_progress_bar()
    evaluators = load_evaluators(str(MODELS / "clip"), str(MODELS / "dino"), device())
    options.output_dir.mkdir(parents=True, exist_ok=True)
    records = run_all(options, evaluators, options.output_dir / "runs.jsonl")
    text = f"{table(records)}\n\n{subjects_table(records)}"
    (options.output_dir / "tables.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    with readable_errors():
        main()
