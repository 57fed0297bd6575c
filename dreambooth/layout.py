"""Every name in the output folder.

OUTPUT_DIR/<method.weights_name>                    the result, for other tools: a file, or a folder with training.json
OUTPUT_DIR/<method.weights_name>.safetensors        a result that is a folder, also in one file
OUTPUT_DIR/checkpoint-N/                            after N optimizer steps: training_state.*, run.json, the result
OUTPUT_DIR/best/                                    with --score_checkpoints, the best result and score.json
OUTPUT_DIR/ema/                                     with --ema_decay, the average of the result; in checkpoints too
OUTPUT_DIR/samples/step-NNNNNN.png                  sheets of samples
OUTPUT_DIR/samples/index.html                       all of them to compare, and the scores of the photos
OUTPUT_DIR/photos.json                              with --score_photos: how photos fit prompts, and what was learned
OUTPUT_DIR/metrics.jsonl, training.png, logs/       losses, learning rate, gradient norm
OUTPUT_DIR/README.md, config.yaml                   the model card; all options
OUTPUT_DIR/summary.json                             of a finished run: parameters, time, memory, versions
OUTPUT_DIR/trackers.json                            which runs of wandb and trackio this one is
"""

import re
from pathlib import Path

CONFIG_NAME = "config.yaml"
CARD_NAME = "README.md"
SUMMARY_NAME = "summary.json"
TRACKERS_NAME = "trackers.json"
METRICS_NAME = "metrics.jsonl"
CURVES_NAME = "training.png"
LOCK_NAME = ".lock"
SAMPLES_NAME = "samples"
PAGE_NAME = "index.html"  # among the samples
PHOTOS_NAME = "photos.json"
TRAINING_NAME = "training.json"  # the metadata of a result that is a folder
BEST_NAME = "best"
AVERAGE_NAME = "ema"
SCORE_NAME = "score.json"
# In a checkpoint
TENSORS_NAME = "training_state.safetensors"
STATE_NAME = "training_state.json"
RUN_NAME = "run.json"
MANIFEST_NAME = "manifest.json"


def checkpoint_path(output: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` optimizer steps."""
    return output / f"checkpoint-{step}"


def checkpoint_step(path: Path) -> int:
    """Return the number of optimizer steps before a checkpoint."""
    return int(path.name.rpartition("-")[2])


def result_paths(output: Path, weights_name: str) -> list[Path]:
    """Return where a run's result may be: a file, or a folder and the same in one file."""
    path = output / weights_name
    return [path] if path.suffix else [path, path.with_suffix(".safetensors")]


def list_checkpoints(output: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first, complete or not."""
    found = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=checkpoint_step)


def sheet_path(output: Path, step: int) -> Path:
    """Return the file of the samples drawn after `step` optimizer steps."""
    return output / SAMPLES_NAME / f"step-{step:06d}.png"


def sheet_step(path: Path) -> int:
    """Return the number of optimizer steps before a sheet of samples."""
    return int(path.stem.rpartition("-")[2])


def list_sheets(output: Path) -> list[Path]:
    """Return the sheets of samples, oldest first."""
    return sorted((output / SAMPLES_NAME).glob("step-*.png"))
