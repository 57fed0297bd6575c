"""Checkpoints to go on from: whole or not there, each file known by its checksum.

A checkpoint is a folder checkpoint-N: the adapter, the training state as safetensors and JSON, the options, what
decides the run's result, and manifest.json, written last, with the size and the checksum of each.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from dreambooth.adapters import WEIGHTS_NAME, adapter_state, load_adapter_state, save_weights
from dreambooth.config import SaveError, TrainingConfig, UserError, save_config
from dreambooth.identity import RUN_NAME
from dreambooth.optimizers import evaluating, load_optimizer_state
from dreambooth.ranks import on_main
from dreambooth.report import METRICS_NAME
from kron_formats.writing import flush

logger = logging.getLogger(__name__)

TENSORS_NAME = "training_state.safetensors"
STATE_NAME = "training_state.json"
CONFIG_NAME = "config.yaml"
MANIFEST_NAME = "manifest.json"
FILES = (WEIGHTS_NAME, TENSORS_NAME, STATE_NAME, CONFIG_NAME, RUN_NAME)


# ---- which ones there are ----


def list_checkpoints(output: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first, whether they are whole or not."""
    found = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """Return the optimizer steps that a checkpoint has behind it."""
    return int(path.name.rpartition("-")[2])


def latest_checkpoint(output: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, None where there is none. Broken ones are named in warnings."""
    for path in reversed(list_checkpoints(output)):
        try:
            verify_checkpoint(path)
            return path
        except UserError as error:
            logger.warning("Passed over: %s", error)
    return None


def verify_checkpoint(path: Path) -> None:
    """Raise UserError, naming the file, where a checkpoint is not as it was written."""
    try:
        manifest = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
        strangers = set(FILES).symmetric_difference(manifest)
        if strangers:
            raise ValueError(f"it does not tell of {', '.join(sorted(strangers))}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no whole checkpoint: {MANIFEST_NAME}: {error}") from error
    for name in FILES:
        try:
            size = (path / name).stat().st_size
            if manifest[name]["bytes"] != size:
                raise ValueError(f"it has {size:,} bytes instead of {manifest[name]['bytes']}")
            if manifest[name]["sha256"] != hashlib.sha256((path / name).read_bytes()).hexdigest():
                raise ValueError("its content is not what was written")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is no whole checkpoint: {name}: {error}") from error


# ---- saving ----


def check_room(models: Mapping[str, nn.Module], config: TrainingConfig) -> None:
    """Raise SaveError where the disk has no room for a checkpoint and the result, before there is something to save."""
    factors = [factor for state in adapter_state(models).values() for factor in state.values()]
    needed = 5 * sum(factor.nbytes for factor in factors)  # two adapters; factors again, and an optimizer's two means
    free = shutil.disk_usage(config.output_dir).free
    if free < needed:
        raise SaveError(
            f"--output_dir {config.output_dir} has {free / 2**20:,.0f} MiB free; a checkpoint and the adapter take "
            f"{needed / 2**20:,.0f} MiB. Make room, or choose another folder"
        )


def save_checkpoint(
    accelerator: Accelerator,
    models: Mapping[str, nn.Module],
    optimizer: Any,
    lr_scheduler: Any,
    run: Mapping[str, Any],
    config: TrainingConfig,
    step: int,
    stopping: bool,
) -> None:
    """Write checkpoint-STEP, and only then remove the oldest ones; all processes have to call this.

    `run` is what `describe_run` returned. Raises SaveError where it cannot be written, with nothing else changed; with
    --on_save_error continue, and unless the run stops here, that is a warning.
    """

    def write() -> None:
        state = {
            "factors": adapter_state(models),
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": lr_scheduler.state_dict(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            "step": step,
        }
        tensors, rest = _split(state)
        contents = {TENSORS_NAME: save(tensors), STATE_NAME: _json(rest), RUN_NAME: _json(run)}
        output = Path(config.output_dir)
        with saving(output / f"checkpoint-{step}"), evaluating(optimizer):
            _write(output / f"checkpoint-{step}", contents, models, step, config)
            tidy_checkpoints(output, step, config)

    try:
        on_main(accelerator, write)
    except SaveError as error:
        if config.on_save_error == "stop" or stopping:
            raise
        logger.warning("%s\nTraining goes on (--on_save_error continue)", error)


def _write(
    final: Path, contents: Mapping[str, bytes], models: Mapping[str, nn.Module], step: int, config: TrainingConfig
) -> None:
    """Write a checkpoint beside its final name, flushed to the disk and verified, then rename it."""
    output, unfinished, replaced = final.parent, final.with_suffix(".tmp"), final.with_suffix(".old.tmp")
    _clear_unfinished(output)
    unfinished.mkdir()
    try:
        save_weights(models, unfinished, step, config)
        save_config(config, unfinished / CONFIG_NAME)
        for name, content in contents.items():
            (unfinished / name).write_bytes(content)
        contents = {name: contents.get(name) or (unfinished / name).read_bytes() for name in FILES}
        manifest = {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        }
        for name in FILES:
            flush(unfinished / name)
        (unfinished / MANIFEST_NAME).write_bytes(_json(manifest))
        flush(unfinished / MANIFEST_NAME)
        flush(unfinished)
        verify_checkpoint(unfinished)
        if (output / METRICS_NAME).exists():
            flush(output / METRICS_NAME)  # a resumed run takes up its lines where the checkpoint is
        if final.exists():
            os.rename(final, replaced)
        os.rename(unfinished, final)
        flush(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    logger.info("Saved %s", final)


def tidy_checkpoints(output: Path, step: int, config: TrainingConfig) -> None:
    """Remove what was cut off half-written or half-removed, and the oldest checkpoints above the limit.

    The checkpoint of `step` is whole. Later ones, of a run that was resumed before them, do not count.
    """
    if config.checkpoints_total_limit:
        behind = [path for path in list_checkpoints(output) if checkpoint_step(path) <= step]
        for path in behind[: -config.checkpoints_total_limit]:
            os.rename(path, path.with_suffix(".tmp"))
    _clear_unfinished(output)


def _clear_unfinished(output: Path) -> None:
    for path in output.glob("checkpoint-*.tmp"):
        shutil.rmtree(path)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode()


def save_result(
    accelerator: Accelerator, models: Mapping[str, nn.Module], optimizer: Any, step: int, config: TrainingConfig
) -> Path:
    """Write the adapter to the output folder and return its path; all processes have to call this.

    Raises SaveError where it cannot be written.
    """
    path = Path(config.output_dir) / WEIGHTS_NAME

    def write() -> None:
        with saving(path), evaluating(optimizer):
            save_weights(models, path.parent, step, config)

    on_main(accelerator, write)
    return path


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn an error of the disk into a SaveError that says how much room there is and what is still safe."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SaveError(f"{path} could not be saved: {error}; {_situation(path)}") from error


def _situation(path: Path) -> str:
    try:
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        free = f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free in {folder}"
        safe = [checkpoint.name for checkpoint in list_checkpoints(path.parent)]
    except OSError:
        return "its folder cannot be read either"
    if not safe:
        return f"{free}; there is no earlier checkpoint"
    return f"{free}; {safe[-1]} is still there, to go on from with --resume_from_checkpoint latest"


# ---- loading ----


def load_checkpoint(
    path: Path, accelerator: Accelerator, models: Mapping[str, nn.Module], optimizer: Any, lr_scheduler: Any
) -> int:
    """Restore the training state of a checkpoint; return the optimizer steps it has behind it.

    Learning rates and the optimizer's other options stay those of the present run, which are the checkpoint's unless
    --allow_config_change let others pass.
    """
    try:
        state = _join(load((path / TENSORS_NAME).read_bytes()), json.loads((path / STATE_NAME).read_bytes()))
        load_adapter_state(models, state["factors"])
        load_optimizer_state(optimizer, lr_scheduler, state["optimizer"], state["lr_scheduler"])
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
