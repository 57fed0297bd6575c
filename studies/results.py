"""What the folder of a sweep holds: one record for each cell, whether it is finished or not.

Everything is read from the run folders: their names say what varies, studies/cells.py says what is in them. Nothing
here imports torch.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from dreambooth.errors import UserError
from dreambooth.layout import CONFIG_NAME, METRICS_NAME, checkpoint_step, list_checkpoints
from dreambooth.report.metrics import read_metrics
from kron_formats.files import reason
from studies.cells import LOG_NAME, STOPPED, Ending, read_ending, read_summary
from studies.checkpoints import SCORES, scores_path
from studies.grid import CELL_NAME

DONE, FAILED, UNFINISHED = "done", "failed", "unfinished"
BASE, ADAPTED = "base", "adapted"  # models of scripts/evaluate.py
LACKING = "-"  # stands for the entry of a cell that lacks an axis, which is of another grid in the same folder
IMAGES, CLASS = "images", "class"  # the folder of what it draws, and the prompt of class images


@dataclass(frozen=True)
class Measure:
    """A number by which cells are compared."""

    name: str
    label: str
    higher_is_better: bool = True


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("dino", "DINO, likeness to the photos"),
        Measure("clip_i", "CLIP-I, likeness to the photos"),
        Measure("clip_t", "CLIP-T, truth to the prompt"),
        Measure("diversity", "diversity of a prompt's images"),
        Measure("lpips_diversity", "LPIPS diversity of a prompt's images"),
        Measure("class_diversity", "diversity of class images"),
        Measure("class_drift", "class drift: rise of the class images' DINO to the photos", False),
        Measure("class_distance", "DINO distance of class images to the base model's", False),
        Measure("drift", "squared change of the prediction for class images", False),
        Measure("other_distance", "DINO distance of other prompts' images to the base model's", False),
        Measure("other_leakage", "leakage: rise of other prompts' images' DINO to the photos", False),
        Measure("other_clip_t", "change of CLIP-T on other prompts"),
        Measure("held_out", "denoising loss on held-out photos", False),
        Measure("held_out_masked", "denoising loss on held-out photos, inside their masks", False),
        Measure("loss", "loss, mean of the last tenth of the steps", False),
        Measure("file_size", "size of the result, bytes", False),
        Measure("seconds", "seconds of training", False),
        Measure("peak_memory", "peak memory, bytes", False),
        Measure("parameters", "trained parameters", False),
    )
}
COSTS = ("parameters", "file_size", "seconds", "peak_memory")
OF_TRAINING = ("loss", *COSTS)  # scores that need no evaluation, and that checkpoints lack


@dataclass(frozen=True)
class Record:
    """A cell of a sweep."""

    cell: str  # the name of its folder
    labels: Mapping[str, str]  # axis -> entry
    state: str
    reason: str  # why it is not done
    scores: Mapping[str, float] = field(default_factory=dict)  # by measure; all finite
    base: Mapping[str, float] = field(default_factory=dict)  # the base model's on the same prompts and seeds
    photos: Mapping[str, float] = field(default_factory=dict)  # of the photos, compared with each other
    prompts: Sequence[Mapping[str, Any]] = ()  # the adapted model's scores of each prompt
    options: Mapping[str, Any] = field(default_factory=dict)  # of the training, from its config.yaml
    summary: Mapping[str, Any] = field(default_factory=dict)  # dreambooth/report/summary.py
    ending: Ending | None = None
    metrics: Sequence[Mapping[str, Any]] = ()
    checkpoints: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # steps -> scores of what they trained
    step: int | None = None  # of the checkpoint that this record is of; None for the run and its result


def read_sweep(sweep: Path) -> list[Record]:
    """Return the cells of a sweep, in the order of their entries, numbers by their value.

    Raises UserError if the folder is not a sweep, or one of its files is damaged.
    """
    if not sweep.is_dir():
        raise UserError(f"{sweep} is not a folder; give the --output_dir of scripts/sweep.sh")
    folders = [path for path in sweep.iterdir() if CELL_NAME.fullmatch(path.name) and path.is_dir()]
    if not folders:
        raise UserError(
            f"{sweep} is not a sweep: none of its folders is a cell, named AXIS=ENTRY; "
            "give the --output_dir of scripts/sweep.sh"
        )
    records = [read_cell(folder) for folder in folders]
    axes = axes_of(records)
    return sorted(records, key=lambda record: [label_key(record.labels.get(axis, "")) for axis in axes])


def axes_of(records: Sequence[Record]) -> dict[str, list[str]]:
    """Return {axis: its entries in their order}. Cells of several grids in one folder may lack some of the axes."""
    names = sorted({tuple(record.labels) for record in records}, key=lambda axes: (-len(axes), axes))
    axes = dict.fromkeys(axis for labels in names for axis in labels)
    return {axis: sorted({r.labels[axis] for r in records if axis in r.labels}, key=label_key) for axis in axes}


def label_key(label: str) -> tuple:
    """Return what sorts entries as people do: numbers by value, 4-16 before 16-4."""
    if (number := as_number(label)) is not None:
        return (0, number)
    return (1, *((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"\d+|\D+", label)))


def as_number(label: str) -> float | None:
    """Return the number that an entry is, None if it is not a finite one."""
    try:
        number = float(label)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def axis_numbers(labels: Sequence[str]) -> dict[str, float] | None:
    """Return the number of each entry of an axis; None if they are not numbers, or all the same one.

    Factor shapes, 2-32 and 4-16, are ordered by the first of their numbers if these differ.
    """
    if all(re.fullmatch(r"\d+(-\d+)+", label) for label in labels):
        numbers = {label: float(label.partition("-")[0]) for label in labels}
    else:
        numbers = {label: number for label in labels if (number := as_number(label)) is not None}
    distinct = len(numbers) == len(labels) == len({*numbers.values()})
    return numbers if distinct and len(labels) > 1 else None


def entry_of(record: Record, axis: str) -> str:
    """Return a record's entry of an axis."""
    return record.labels.get(axis, LACKING)


def entries_of(records: Sequence[Record], axis: str) -> list[str]:
    """Return the entries that records have of an axis, in their order; those that lack it come last."""
    return sorted(
        {entry_of(record, axis) for record in records}, key=lambda label: (label == LACKING, label_key(label))
    )


def labelled(record: Record, axes: Sequence[str]) -> str:
    """Return a record's entries of some axes in words: "shape 2-32, rank 4"; of a single axis the entry alone."""
    if len(axes) == 1:
        return entry_of(record, axes[0])
    return ", ".join(f"{axis} {record.labels[axis]}" for axis in axes if axis in record.labels) or "all"


def grouped(records: Sequence[Record], axes: Sequence[str]) -> dict[str, list[Record]]:
    """Return {their entries of some axes, in words: records}, in the order of the records' entries."""
    groups: dict[str, list[Record]] = {}
    ordered = sorted(records, key=lambda record: [label_key(record.labels.get(axis, "")) for axis in axes])
    for record in ordered:
        groups.setdefault(labelled(record, axes), []).append(record)
    return groups


def values(records: Sequence[Record], measure: str) -> list[float]:
    """Return the records' scores by a measure, of those that have one."""
    return [record.scores[measure] for record in records if measure in record.scores]


# ---- one cell ----


def read_cell(folder: Path) -> Record:
    """Return what is in the folder of a cell. Raises UserError, naming the file, if one of them is damaged."""
    labels = dict(part.split("=", 1) for part in folder.name.split(","))
    ending, summary = read_ending(folder), read_summary(folder)
    metrics = read_metrics(folder / METRICS_NAME)
    options = _options(folder / CONFIG_NAME)
    read = _scores(folder / SCORES)
    scores = read["scores"] | _training_scores(summary or {}, metrics)
    checkpoints = _checkpoint_scores(folder)
    state, why = _state(folder, ending, summary, metrics, options, [*checkpoints])
    for step, found in {**checkpoints, None: scores}.items():
        if not_finite := [name for name, score in found.items() if not math.isfinite(score)]:
            at = "" if step is None else f" at step {step}"
            state, why = FAILED, f"{', '.join(not_finite)}{at}: not a finite number"
    if state != DONE:
        scores, checkpoints = {}, {}
    return Record(
        folder.name,
        labels,
        state,
        why,
        scores,
        read["base"],
        read["photos"],
        read["prompts"],
        options,
        summary or {},
        ending,
        metrics,
        checkpoints,
    )


def _state(
    folder: Path,
    ending: Ending | None,
    summary: Any,
    metrics: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    scored: Sequence[int],
) -> tuple[str, str]:
    """Return the state of a cell, and why it is not done."""
    if summary is not None and ((folder / SCORES).exists() or (ending is not None and ending.exit_code == 0)):
        return DONE, ""
    if ending is not None and ending.exit_code not in (0, STOPPED):
        return FAILED, f"exit code {ending.exit_code}: {ending.last_line}"
    if summary is not None:
        so_far = f"; scored so far: checkpoints {', '.join(map(str, scored))}" if scored else ", not scored yet"
        return UNFINISHED, f"trained{so_far}"
    if metrics:
        of = f" of {options['max_train_steps']}" if "max_train_steps" in options else ""
        return UNFINISHED, f"stopped or running, after step {metrics[-1]['step']}{of}"
    return UNFINISHED, "begun" if (folder / LOG_NAME).exists() else "not begun"


def _options(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    if not isinstance(options, dict):
        raise UserError(f"{path} is not a run's config.yaml: it has no options")
    return options


def _training_scores(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what training itself says of a run."""
    scores = {name: float(summary[name]) for name in COSTS if summary.get(name) is not None}
    losses = [row["loss"] for row in metrics if row.get("loss") is not None]
    if losses:
        scores["loss"] = fmean(losses[-max(1, len(losses) // 10) :])
    return scores


def _checkpoint_scores(folder: Path) -> dict[int, dict[str, float]]:
    """Return the scores of a cell's checkpoints, by their steps."""
    steps = (checkpoint_step(path) for path in list_checkpoints(folder / SCORES.parent))
    return {step: _scores(path)["scores"] for step in steps if (path := folder / scores_path(step)).exists()}


def _scores(path: Path) -> dict[str, Any]:
    """Return the numbers in the scores.json of scripts/evaluate.py, all empty if there is no file."""
    if not path.exists():
        return {"scores": {}, "base": {}, "photos": {}, "prompts": ()}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        adapted, base = report["models"][ADAPTED], report["models"][BASE]
        scores = _of_model(adapted)
        if prior := report["prior"]:
            scores["class_drift"] = prior["similarity_after"] - prior["similarity_before"]
            drifts = {"class_distance": prior["distance"], "drift": prior.get("drift")}
            scores |= _numbers({"class_diversity": prior["diversity_after"], **drifts})
        if others := report.get("other_prompts"):
            scores["other_distance"] = others["distance"]
            scores["other_leakage"] = others["similarity_after"] - others["similarity_before"]
            scores["other_clip_t"] = others["clip_t_after"] - others["clip_t_before"]
        return {
            "scores": scores,
            "base": _of_model(base),
            "photos": _numbers(report["photos"]),
            "prompts": adapted["by_prompt"],
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else reason(error)
        raise UserError(
            f"{path} is not a file of scores: {why}. Delete it, and start the sweep again to have the cell scored anew"
        ) from error


def _of_model(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return a model's measures, those of held-out photos included."""
    losses = scores.get("denoising") or {}
    return _numbers({**scores, "held_out": losses.get("whole"), "held_out_masked": losses.get("masked")})


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return the measures that have a value."""
    return {name: float(scores[name]) for name in MEASURES if scores.get(name) is not None}


# ---- pictures ----


def pictures(sweep: Path, record: Record, model: str = ADAPTED) -> dict[str, Path]:
    """Return {prompt's number, or "class": the first image} of what scripts/evaluate.py has drawn for a cell."""
    found: dict[str, tuple[int, Path]] = {}
    for path in (sweep / record.cell / scores_path(record.step).parent / IMAGES / model).glob("*.png"):
        prompt, _, seed = path.stem.partition("-")
        if seed.isdecimal() and (prompt.isdecimal() or prompt == CLASS):
            found[prompt] = min(found.get(prompt, (int(seed), path)), (int(seed), path))
    return {prompt: path for prompt, (_, path) in sorted(found.items())}
