"""The folder of a sweep without its hours: run folders with plausible numbers, and pictures drawn by the toy world."""

import json
import math
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import yaml

from toyworld.render import render
from toyworld.subjects import SUBJECTS
from toyworld.world import Look, Scene

BASE = {"clip_i": 0.16, "dino": -0.03, "clip_t": 0.66, "diversity": 0.94}
PLACES = ("beach", "snow", "city")
PROMPTS = ("a photo of sks dog on a beach", "a photo of sks dog in the snow", "sks dog <b>in</b> a city & | more")


def cell_name(**labels) -> str:
    return ",".join(f"{axis}={label}" for axis, label in labels.items())


def likeness(shape: str, rate: float, seed: int = 0, subject: int = 0) -> float:
    """A DINO that peaks at a rate of its own for each shape, and falls off faster on the right."""
    peak = {"2-32": 0.01, "4-16": 0.014, "8-8": 0.02}[shape]
    height = {"2-32": 0.66, "4-16": 0.64, "8-8": 0.58}[shape]
    away = math.log2(rate / peak)
    noise = random.Random(f"{shape} {rate} {seed} {subject}").gauss(0, 0.012)
    return height - (0.035 if away < 0 else 0.06) * away**2 + noise + 0.03 * subject


def write_cell(sweep: Path, labels: dict, dino: float | None, rate: float, kron_a1: int = 2, pictures: int = 0) -> Path:
    """Write a finished run folder; without scores if `dino` is None. Return it."""
    folder = sweep / cell_name(**labels)
    folder.mkdir(parents=True)
    steps, parameters = 60, 13_000 + 700 * kron_a1**2
    options = {"learning_rate": rate, "kron_a1": kron_a1, "seed": int(labels.get("seed", 0)), "max_train_steps": steps}
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    noise = random.Random(folder.name)
    rows = [
        {"step": step, "loss": 0.2 + math.exp(-step * rate * 4) * 0.5 + noise.gauss(0, 0.03), "grad_norm": 1 / step}
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "method": "kronecker", "family": "sd", "result": "x.safetensors", "parameters": parameters, "steps": steps,
        "file_size": 3104 + 4 * parameters,
        "seconds": 50.0 + kron_a1, "peak_memory": 561393664, "device": "cpu, x86_64", "processes": 1,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    write_ending(folder, 0, "Wrote scores.json")
    if dino is not None:
        write_scores(folder, dino)
    if pictures:
        draw_pictures(folder / "evaluation", dino or 0.0, pictures)
    return folder


def write_checkpoints(folder: Path, likenesses: dict[int, float], pictures: int = 0) -> None:
    """Write scores of a run's checkpoints: step -> DINO."""
    for step, dino in likenesses.items():
        evaluation = folder / "evaluation" / f"checkpoint-{step}"
        write_scores(folder, dino, evaluation)
        if pictures:
            draw_pictures(evaluation, dino, pictures)


def write_ending(folder: Path, exit_code: int, last_line: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["python", "train_dreambooth_kronecker.py", "--output_dir", folder.name]
    ending = {"exit_code": exit_code, "last_line": last_line, "command": command, "began": 1.0, "seconds": 61.5}
    (folder / "sweep.json").write_text(json.dumps(ending))
    (folder / "sweep.log").write_text(f"$ ...\n{last_line}\n")


def write_scores(folder: Path, dino: float, evaluation: Path | None = None) -> None:
    evaluation = evaluation or folder / "evaluation"
    adapted = {"clip_i": 0.1 + 0.8 * dino, "dino": dino, "clip_t": 0.72 - 0.18 * dino, "diversity": 0.95 - 0.1 * dino}
    by_prompt = [{"prompt": prompt, "text": prompt, **adapted} for prompt in PROMPTS]
    losses = {"denoising": {"whole": 0.34 - 0.02 * dino, "masked": None}}
    models = {"base": {**BASE, "by_prompt": by_prompt}, "adapted": {**adapted, **losses, "by_prompt": by_prompt}}
    prior = {
        "similarity_before": -0.15, "similarity_after": -0.15 + 0.3 * max(dino, 0) ** 2, "distance": 0.4 * abs(dino),
        "diversity_before": 1.05, "diversity_after": 1.05 - 0.2 * dino,
        "drift": 0.02 * dino**2,
    }  # fmt: skip
    photos = {"clip_i": 0.776, "dino": 0.944}
    evaluation.mkdir(exist_ok=True, parents=True)
    report = {"settings": {}, "photos": photos, "models": models, "prior": prior}
    (evaluation / "scores.json").write_text(json.dumps(report))


def draw_pictures(evaluation: Path, dino: float, prompts: int) -> None:
    """Draw the dog in each place: the closer the likeness, the more it is the dog of the photos."""
    dog = SUBJECTS["dog"]
    colour = dog.body if dino > 0.5 else "gray" if dino > 0.3 else "brown"
    look: Look = replace(dog, body=colour)
    for model, shown in (("adapted", look), ("base", replace(dog, body="white"))):
        images = evaluation / "images" / model
        images.mkdir(parents=True)
        for number, place in list(enumerate(PLACES))[:prompts]:
            render(shown, Scene(place, 1, pose="standing", scale=0.7, x=0.5, y=0.9)).save(
                images / f"{number:02d}-0.png"
            )
        render(replace(shown, emblem="star"), Scene("forest", 2)).save(images / "class-0.png")


def write_sweep(
    sweep: Path,
    rates: Iterable[str] = ("0.0025", "0.005", "0.01", "0.02", "0.04", "0.08"),
    shapes: Iterable[str] = ("2-32", "4-16", "8-8"),
    seeds: Iterable[int] = (0, 1, 2),
    pictures: int = 0,
) -> Path:
    """Write a sweep over rates, shapes and seeds. One setting has failed, one cell was cut off, one has not begun."""
    for rate in rates:
        for shape in shapes:
            for seed in seeds:
                labels = {"learning_rate": rate, "shape": shape, "seed": seed}
                folder = sweep / cell_name(**labels)
                if (rate, shape) == ("0.08", "8-8"):
                    write_ending(folder, 2, "error: step 31 is not finite: its loss is nan | lower --learning_rate")
                elif (rate, shape, seed) == ("0.02", "2-32", 2):
                    folder.mkdir(parents=True)
                    (folder / "config.yaml").write_text("max_train_steps: 60\n")
                    (folder / "metrics.jsonl").write_text('{"step": 17, "loss": 0.3}\n')
                elif (rate, shape, seed) == ("0.04", "4-16", 2):
                    folder.mkdir(parents=True)
                else:
                    dino = likeness(shape, float(rate), seed)
                    write_cell(sweep, labels, dino, float(rate), int(shape.partition("-")[0]), pictures)
    (sweep / "shared").mkdir()
    return sweep
