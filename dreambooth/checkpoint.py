"""The output folder: whose it is, and checkpoints to go on from."""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreambooth.adapters import WEIGHTS_NAME, adapter_state, load_adapter_state, save_weights
from dreambooth.config import TrainingConfig, UserError, save_config
from dreambooth.optimizers import evaluating

logger = logging.getLogger(__name__)

TENSORS_NAME = "training_state.safetensors"
STATE_NAME = "training_state.json"


# ---- the output folder ----


def find_start(config: TrainingConfig) -> Path | None:
    """Return the checkpoint to resume from, None to start from the beginning.

    Raises UserError where that checkpoint does not exist, and where the output folder holds another run's results.
    """
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output} is a file")
    if config.resume_from_checkpoint == "latest":
        if checkpoints := list_checkpoints(output):
            return checkpoints[-1]
        logger.info("--resume_from_checkpoint latest: %s holds no checkpoint; starting from the beginning", output)
    elif config.resume_from_checkpoint:
        return _existing_checkpoint(config.resume_from_checkpoint, output)
    results = [path.name for path in (*list_checkpoints(output), output / WEIGHTS_NAME) if path.exists()]
    if results and not config.overwrite_output_dir:
        raise UserError(
            f"--output_dir {output} holds the results of another run ({', '.join(results)}): choose another folder, "
            "go on with --resume_from_checkpoint latest, or replace them with --overwrite_output_dir"
        )
    return None


def _existing_checkpoint(name: str, output: Path) -> Path:
    for path in (Path(name), output / name):  # diffusers' examples take a bare checkpoint-500 too
        if (path / STATE_NAME).is_file():
            return path
    there = ", ".join(path.name for path in list_checkpoints(output)) or "none"
    raise UserError(f"--resume_from_checkpoint {name}: there is no such checkpoint; {output} holds: {there}")


def prepare_output(config: TrainingConfig, start: Path | None, accelerator: Accelerator) -> None:
    """Make the output folder and write config.yaml; with --overwrite_output_dir, clear what an earlier run left."""
    if not accelerator.is_main_process:
        return
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if start is None and config.overwrite_output_dir:
        for path in list_checkpoints(output):
            shutil.rmtree(path)
        (output / WEIGHTS_NAME).unlink(missing_ok=True)
        shutil.rmtree(output / "samples", ignore_errors=True)
    save_config(config, output / "config.yaml")


# ---- checkpoints ----


def list_checkpoints(output: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if (path / STATE_NAME).is_file()), key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """Return the optimizer steps that a checkpoint has behind it."""
    return int(path.name.rpartition("-")[2])


def save_checkpoint(
    accelerator: Accelerator,
    models: Mapping[str, nn.Module],
    optimizer: Any,
    lr_scheduler: Any,
    step: int,
    config: TrainingConfig,
) -> None:
    """Write checkpoint-STEP: the adapter file, and the training state beside it.

    It is written under another name and renamed when whole; only then do the oldest ones go.
    """
    if accelerator.is_main_process:
        output = Path(config.output_dir)
        final, unfinished = output / f"checkpoint-{step}", output / f"checkpoint-{step}.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        with evaluating(optimizer):
            save_weights(models, unfinished, step, config)
        tensors, rest = _split(
            {
                "factors": adapter_state(models),
                "optimizer": optimizer.state_dict(),
                "lr_scheduler": lr_scheduler.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
                "step": step,
            }
        )
        save_file(tensors, unfinished / TENSORS_NAME)
        (unfinished / STATE_NAME).write_text(json.dumps(rest))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(unfinished, final)
        logger.info("Saved %s", final)
        if config.checkpoints_total_limit:
            for path in list_checkpoints(output)[: -config.checkpoints_total_limit]:
                shutil.rmtree(path)
    accelerator.wait_for_everyone()


def load_checkpoint(
    path: Path, accelerator: Accelerator, models: Mapping[str, nn.Module], optimizer: Any, lr_scheduler: Any
) -> int:
    """Restore the training state of a checkpoint; return the optimizer steps it has behind it."""
    try:
        state = _join(load_file(path / TENSORS_NAME), json.loads((path / STATE_NAME).read_text()))
        load_adapter_state(models, state["factors"])
        optimizer.load_state_dict(state["optimizer"])
        lr_scheduler.load_state_dict(state["lr_scheduler"])
        if accelerator.scaler and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
    except Exception as error:
        raise UserError(f"--resume_from_checkpoint {path} cannot be resumed here: {error}") from error
    logger.info("Resuming from %s", path)
    return state["step"]


def _split(tree: Any, path: str = "") -> tuple[dict[str, Tensor], Any]:
    """Take the tensors out of nested dicts and lists: {path: tensor}, and the rest as JSON with the paths in place.

    Dicts become lists of pairs, since an optimizer's state has numbers as keys, which JSON would turn into strings.
    """
    if isinstance(tree, Tensor):
        return {path: tree.detach().cpu().contiguous()}, {"tensor": path}
    if isinstance(tree, dict):
        parts = {key: _split(value, f"{path}/{key}") for key, value in tree.items()}
        tensors = {name: tensor for found, _ in parts.values() for name, tensor in found.items()}
        return tensors, {"dict": [[key, rest] for key, (_, rest) in parts.items()]}
    if isinstance(tree, (list, tuple)):
        parts = [_split(value, f"{path}/{index}") for index, value in enumerate(tree)]
        return {name: tensor for found, _ in parts for name, tensor in found.items()}, [rest for _, rest in parts]
    return {}, tree


def _join(tensors: dict[str, Tensor], rest: Any) -> Any:
    """Put the tensors back: the inverse of `_split`, but for tuples, which come back as lists."""
    if isinstance(rest, dict):
        if "tensor" in rest:
            return tensors[rest["tensor"]]
        return {key: _join(tensors, value) for key, value in rest["dict"]}
    return [_join(tensors, value) for value in rest] if isinstance(rest, list) else rest
