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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from peft import LoraConfig
from PIL import Image
from torch import nn
from tqdm import tqdm

import train_dreambooth_kronecker as sd
import train_dreambooth_kronecker_sdxl as sdxl
from dreambooth.config import TrainingConfig
from dreambooth.data import DreamBoothDataset, build_loader, prompts_of
from dreambooth.diffusion import build_noise_scheduler, build_sampler
from dreambooth.evaluation import draw_prompt, read_subject_photos, score_images, score_prior
from dreambooth.noise import noise_drawer
from dreambooth.optimizers import build_lr_scheduler, build_optimizer
from dreambooth.photos import read_instance_photos
from dreambooth.scores import Evaluators, load_evaluators
from dreambooth.text import prompt_encoder
from dreambooth.training import Denoiser, start_accelerator, train_steps
from dreambooth.vae import latent_source
from kron_adapter import ATTENTION_TARGETS, disable_kronecker, inject_kronecker, kronecker_parameters
from toyworld.subjects import SUBJECTS, prompts, save_photos

MODELS = Path(__file__).resolve().parent / "models"
SUBJECTS_COMPARED = ("robot", "dog", "teapot", "cat")
IMAGES = 4  # for each prompt
CLASS_IMAGES = 16
DRAWING = {"num_inference_steps": 20, "guidance_scale": 3.0, "height": 64, "width": 64, "negative_prompt": ""}


# ---- the methods ----


@dataclass(frozen=True)
class Adapter:
    """What trains, and how to be without it for a while."""

    parameters: list[nn.Parameter]
    without: Callable[[], AbstractContextManager]


def add_kronecker(unet: nn.Module, a1: int, a2: int) -> Adapter:
    inject_kronecker(unet, a1, a2)
    return Adapter(kronecker_parameters(unet), partial(disable_kronecker, unet))


def add_lora(unet: nn.Module, rank: int) -> Adapter:
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ATTENTION_TARGETS)))

    @contextmanager
    def without() -> Iterator[None]:
        unet.disable_adapters()
        try:
            yield
        finally:
            unet.enable_adapters()

    return Adapter([parameter for parameter in unet.parameters() if parameter.requires_grad], without)


# The toy UNets' layers have 64 and 128 features. (2, 32) and (8, 8) divide them about as (4, 64) and (16, 16) divide
# the 320 to 1280 of the real ones: B no smaller than A.
METHODS: dict[str, Callable[[nn.Module], Adapter]] = {
    "Kronecker (2, 32)": partial(add_kronecker, a1=2, a2=32),
    "Kronecker (8, 8)": partial(add_kronecker, a1=8, a2=8),
    "Kronecker (4, 64)": partial(add_kronecker, a1=4, a2=64),
    "Kronecker (16, 16)": partial(add_kronecker, a1=16, a2=16),
    "LoRA r=1": partial(add_lora, rank=1),
    "LoRA r=4": partial(add_lora, rank=4),
}


# ---- one run ----


def personalise(pipeline: DiffusionPipeline, method: str, config: TrainingConfig, accelerator: Accelerator) -> int:
    """Train a method on the photos of `config`, in place; return the number of parameters that trained."""
    family = sdxl if isinstance(pipeline, sdxl.Pipeline) else sd
    parts = dict(pipeline.components)
    photos = read_instance_photos(config)
    words = prompts_of(photos, [], config)
    dataset = DreamBoothDataset(photos, [], words, config)
    latents_of = latent_source(pipeline, dataset, config, accelerator)
    encode = prompt_encoder(family.encode_prompts, pipeline, words, config, accelerator)
    torch.manual_seed(config.seed)
    adapter = METHODS[method](pipeline.unet)
    optimizer = build_optimizer({"unet": adapter.parameters}, config, 1)
    lr_scheduler = build_lr_scheduler(optimizer, config, config.max_train_steps)
    optimizer = accelerator.prepare_optimizer(optimizer)
    denoiser = Denoiser(pipeline.unet, encode, family.unet_condition)
    noise_scheduler = build_noise_scheduler(pipeline.scheduler, config)
    batches = build_loader(dataset, noise_drawer(pipeline, noise_scheduler, config), config, 0, 1, 0)
    steps = train_steps(
        accelerator, denoiser, latents_of, noise_scheduler, adapter.without, batches, optimizer, lr_scheduler, config
    )
    for _ in zip(range(config.max_train_steps), steps):
        pass
    pipeline.register_modules(**parts)  # training let go of what it did not need
    return sum(parameter.numel() for parameter in adapter.parameters)


def load_base(base: str) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    pipeline.scheduler = build_sampler(pipeline.scheduler)
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
    rows = [draw_prompt(pipeline, prompt, range(images), images, **DRAWING) for prompt in prompts(subject)]
    class_prompt = f"a photo of a {SUBJECTS[subject].kind}"
    return Drawn(rows, draw_prompt(pipeline, class_prompt, range(class_images), class_images, **DRAWING))


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
    accelerator = None
    for subject in tqdm(options.subjects, desc="subjects"):
        folder = options.output_dir / "photos" / subject
        save_photos(subject, folder)
        photos = read_subject_photos(str(folder))
        pipeline = load_base(options.base)
        before = draw_all(pipeline, subject)
        for seed, (method, learning_rate) in itertools.product(options.seeds, wanted):
            if (method, learning_rate, subject, seed) in done:
                continue
            drawn, parameters = before, 0
            if method != BASE:
                config = configure(options, subject, folder, learning_rate, seed)
                accelerator = accelerator or start_accelerator(config)
                pipeline = load_base(options.base)
                parameters = personalise(pipeline, method, config, accelerator)
                drawn = draw_all(pipeline, subject)
            scores = score(drawn, before, photos, subject, evaluators)
            run = {"method": method, "learning_rate": learning_rate, "subject": subject, "seed": seed}
            runs.append({**run, "parameters": parameters, **scores})
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(runs[-1]) + "\n")
    return runs


def configure(
    options: argparse.Namespace, subject: str, photos: Path, learning_rate: float, seed: int
) -> TrainingConfig:
    kind = SUBJECTS[subject].kind
    return sd.Config(
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
        learning_rate=learning_rate,
        seed=seed,
        output_dir=str(options.output_dir),
        report_to=["none"],
    )


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
    parser.add_argument("--base", default=str(MODELS / "sd"), help="base model; default: the toy world's sd")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS_COMPARED))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max_train_steps", type=int, default=300, help="optimizer steps; default: 300")
    parser.add_argument("--train_batch_size", type=int, default=4, help="photos in a step; default: 4")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-2], help="default: 1e-2")
    options = parser.parse_args()
    evaluators = load_evaluators(str(MODELS / "clip"), str(MODELS / "dino"), torch.device("cpu"))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    runs = run_all(options, evaluators, options.output_dir / "runs.jsonl")
    text = f"{table(runs)}\n\n{subjects_table(runs)}"
    (options.output_dir / "tables.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
