"""OUTPUT_DIR/best: the result that denoises photos best that are not trained on."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth.errors import warn_only
from dreambooth.layout import BEST_NAME, SCORE_NAME, checkpoint_path
from dreambooth.options.output import OutputOptions
from kron_formats.files import write_text

logger = logging.getLogger(__name__)

LOSS = "held_out_loss"
RULE = "the lowest held_out_loss of all checkpoints and the final result; of equal ones the first"


def keep_best(losses: Mapping[int, float], weights_name: str, final: int | None, config: OutputOptions) -> None:
    """Bring OUTPUT_DIR/best up to date: the best result by RULE. Never raises: a failure is a warning.

    `losses` are those of all steps that were scored. `final` is the step of the final result, if it is saved: the run
    may end between two checkpoints.
    """
    output = Path(config.output_dir)
    with warn_only(f"{output / BEST_NAME} was not written"):
        for loss, step in sorted((loss, step) for step, loss in losses.items()):
            if read_best(output).get("step") == step:
                return
            source = (output if step == final else checkpoint_path(output, step)) / weights_name
            if source.exists():
                _replace(source, {"step": step, LOSS: loss, "rule": RULE}, output)
                return
            logger.warning("%s: the result of step %d, which is better, is not there any more", output, step)


def read_best(output: Path) -> dict[str, Any]:
    """Return the step, the loss and the rule of the result in OUTPUT_DIR/best; {} if there is none."""
    try:
        return dict(json.loads((output / BEST_NAME / SCORE_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def drop_best(output: Path, after: int) -> None:
    """Remove OUTPUT_DIR/best if it is of a later step: those are trained again, perhaps otherwise."""
    if (output / BEST_NAME).exists() and read_best(output).get("step", after + 1) > after:
        shutil.rmtree(output / BEST_NAME)


def _replace(source: Path, score: Mapping[str, Any], output: Path) -> None:
    best, unfinished = output / BEST_NAME, output / f"{BEST_NAME}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    copy = shutil.copytree if source.is_dir() else shutil.copyfile
    copy(source, unfinished / source.name)
    write_text(unfinished / SCORE_NAME, json.dumps(score, indent=1) + "\n")
    if best.exists():
        shutil.rmtree(best)
    unfinished.rename(best)
