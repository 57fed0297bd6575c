"""Checkpoints to resume from, each complete or absent.

A checkpoint is a folder checkpoint-N: the training state as safetensors and JSON, the options, what decides the run's
result, the result so far, and manifest.json, written last, with the size and the checksum of every other file.

The state may be larger than the host's memory: it is written, verified and read tensor by tensor.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dreambooth.errors import SaveError, UserError
from dreambooth.layout import (
    CONFIG_NAME,
    MANIFEST_NAME,
    METRICS_NAME,
    RUN_NAME,
    STATE_NAME,
    TENSORS_NAME,
    checkpoint_path,
    checkpoint_step,
    list_checkpoints,
)
from dreambooth.loop.optimizers import state_bytes
from dreambooth.loop.state import TrainingState
from dreambooth.method import trained_parameters
from dreambooth.options.output import OutputOptions
from dreambooth.options.training import TrainingConfig
from dreambooth.options.yaml_file import save_config
from dreambooth.output.result import result_sizes, write_average, write_result, write_result_so_far
from dreambooth.runtime.ranks import on_main
from kron_formats.files import flush
from kron_formats.streaming import file_digest, pending, stream_tensors

logger = logging.getLogger(__name__)

NEEDED = (TENSORS_NAME, STATE_NAME, CONFIG_NAME, RUN_NAME)  # to resume; the result so far is there too


# ---- finding one ----


def latest_checkpoint(output: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None. Warns of every incomplete one that is newer."""
    for path in reversed(list_checkpoints(output)):
        try:
            verify_checkpoint(path)
            return path
        except UserError as error:
            logger.warning("Skipped: %s", error)
    return None


def verify_checkpoint(path: Path) -> None:
    """Raise UserError, naming the file, if a checkpoint is not exactly what was written."""
    try:
        manifest = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
        if missing := set(NEEDED) - set(manifest):
            raise ValueError(f"it does not list {', '.join(sorted(missing))}")
        if elsewhere := [name for name in manifest if not _is_inside(name)]:
            raise ValueError(f"it lists {elsewhere[0]!r}, which is not the path of a file in it")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a complete checkpoint: {MANIFEST_NAME}: {error}") from error
    for name in manifest:
        try:
            size = (path / name).stat().st_size
            if manifest[name]["bytes"] != size:
                raise ValueError(f"it has {size:,} bytes instead of {manifest[name]['bytes']}")
            if manifest[name]["sha256"] != file_digest(path / name):
                raise ValueError("its checksum differs from the one in the manifest")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is not a complete checkpoint: {name}: {error}") from error


def _is_inside(name: str) -> bool:
    """Whether a manifest's name is a relative POSIX path that stays in its folder, on every system."""
    parts = PurePosixPath(name).parts
    return "/".join(parts) == name != "" and ".." not in parts and not name.startswith("/") and not {*name} & {*"\\:"}


# ---- saving ----


def check_room(state: TrainingState, total_steps: int, config: TrainingConfig) -> None:
    """Raise SaveError if the disk has no room for a checkpoint and the result. Called before training.

    With --checkpoints_total_limit the older ones are still there while one is written.
    """
    so_far, result = result_sizes(state, config)
    trained = trained_parameters(state.attached)
    weights, number = sum(parameter.nbytes for parameter in trained) * (2 if state.average else 1), 1
    checkpoint = weights + state_bytes(trained, config) + so_far
    if limit := config.checkpoints_total_limit:
        there = len(list_checkpoints(Path(config.output_dir)))
        number = max(1, min(limit + 1, total_steps // config.checkpointing_steps) - there)
    needed, free = number * checkpoint + result, shutil.disk_usage(config.output_dir).free
    if free < needed:
        what = "a checkpoint" if number == 1 else f"{number} checkpoints (--checkpoints_total_limit {limit})"
        raise SaveError(
            f"--output_dir {config.output_dir} has {free / 2**20:,.0f} MiB free; {what} and the result need "
            f"{needed / 2**20:,.0f} MiB. Free some space, or choose another folder"
        )


def save_checkpoint(
    accelerator: Accelerator,
    state: TrainingState,
    weights_name: str,
    run: Mapping[str, Any],
    config: TrainingConfig,
    step: int,
    stopping: bool,
) -> None:
    """Write checkpoint-STEP, then remove the oldest ones above the limit. All processes must call this.

    `run` is what `identify_run` returned. If the checkpoint cannot be written, nothing else changes: raises SaveError,
    or, with --on_save_error continue and unless the run is `stopping`, logs a warning.
    """
    output = Path(config.output_dir)
    path = checkpoint_path(output, step)

    def write() -> None:
        with saving(path), _unfinished(path) as (folder, digests):
            digests |= write_state(folder, state.state_dict() | {"step": step})
            digests[RUN_NAME] = _write(folder / RUN_NAME, _json(run))
            write_result_so_far(folder, weights_name, state, step, config)
            save_config(config, folder / CONFIG_NAME)
        logger.info("Saved %s", path)
        with saving(path):
            tidy_checkpoints(output, step, config)

    try:
        on_main(accelerator, write)
    except SaveError as error:
        if config.on_save_error == "stop" or stopping:
            raise
        logger.warning("%s\nTraining continues (--on_save_error continue)", error)


@contextmanager
def _unfinished(final: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield a temporary folder for a checkpoint's files; at the end complete it and give it its `final` name.

    Also yields a dict for the checksums, name -> SHA-256, of what was written; those that it lacks are of what is on
    the disk. Completing the folder writes the manifest, flushes everything to the disk and verifies it. An earlier
    checkpoint of that name stays until the renaming.
    """
    output, folder, replaced = final.parent, final.with_suffix(".tmp"), final.with_suffix(".old.tmp")
    _clear_unfinished(output)
    folder.mkdir()
    try:
        digests: dict[str, str] = {}
        yield folder, digests
        manifest, paths = {}, sorted(folder.rglob("*"))
        for path in paths:
            flush(path)
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                digest = digests.get(name) or file_digest(path)
                manifest[name] = {"bytes": path.stat().st_size, "sha256": digest}
        _write(folder / MANIFEST_NAME, _json(manifest))
        flush(folder / MANIFEST_NAME)
        flush(folder)
        verify_checkpoint(folder)
        if (output / METRICS_NAME).exists():
            flush(output / METRICS_NAME)  # a resumed run continues it from this step
        if final.exists():
            os.rename(final, replaced)
        os.rename(folder, final)
        flush(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def tidy_checkpoints(output: Path, step: int, config: OutputOptions) -> None:
    """Remove the oldest checkpoints above the limit, and what an interruption left half-written or half-removed.

    The checkpoint of `step` is complete. Later ones, left by a run that was resumed from before them, do not count.
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


def _write(path: Path, content: bytes) -> str:
    """Write a file; return the SHA-256 of what it should hold."""
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def save_result(
    accelerator: Accelerator, state: TrainingState, weights_name: str, step: int, config: TrainingConfig
) -> Path:
    """Write the result to the output folder and return its path. All processes must call this.

    Raises SaveError if it cannot be written.
    """
    path = Path(config.output_dir) / weights_name

    def write() -> None:
        with saving(path):
            write_result(path, state, step, config)
            write_average(path.parent, weights_name, state, step, config)

    on_main(accelerator, write)
    return path


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn an error of writing `path` into a SaveError that says how much space is free and what is still safe."""
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
    return f"{free}; {safe[-1]} is still there, to resume from with --resume_from_checkpoint latest"


# ---- loading ----


def load_checkpoint(path: Path, state: TrainingState) -> int:
    """Restore the training state of a checkpoint; return the number of optimizer steps before it.

    Learning rates and other optimizer options keep the present run's values, which differ from the checkpoint's only
    with --allow_config_change. Raises UserError if the state does not fit.
    """
    try:
        saved = read_state(path)
        state.load_state_dict(saved)
    except Exception as error:
        raise UserError(
            f"--resume_from_checkpoint {path} cannot be resumed here: {type(error).__name__}: {error}"
        ) from error
    logger.info("Resuming from %s", path)
    return saved["step"]


def saved_step(path: Path) -> int:
    """Return the number of optimizer steps before a complete checkpoint, whatever its folder is called."""
    return dict(json.loads((path / STATE_NAME).read_bytes())["dict"])["step"]


def write_state(folder: Path, tree: Any) -> dict[str, str]:
    """Write nested dicts and lists of tensors and plain values as two files; return name -> SHA-256 of each."""
    tensors, rest = _split(tree)
    return {
        TENSORS_NAME: stream_tensors(
            folder / TENSORS_NAME, {name: pending(tensor) for name, tensor in tensors.items()}, {}
        ),
        STATE_NAME: _write(folder / STATE_NAME, _json(rest)),
    }


def read_state(folder: Path) -> Any:
    """Return what `write_state` wrote, except that tuples come back as lists.

    The tensors are parts of the file, mapped into memory: each is read when it is copied to its place.
    """
    with safe_open(folder / TENSORS_NAME, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return _join(tensors, json.loads((folder / STATE_NAME).read_bytes()))


def _split(tree: Any, path: str = "") -> tuple[dict[str, Tensor], Any]:
    """Return the tensors in nested dicts and lists, {path: tensor}, and the rest as JSON, with paths for tensors.

    Dicts become lists of pairs, since an optimizer's state has integer keys, which JSON would turn into strings.
    """
    if isinstance(tree, Tensor):
        return {path: tree.detach()}, {"tensor": path}
    if isinstance(tree, dict):
        parts = {key: _split(value, f"{path}/{key}") for key, value in tree.items()}
        tensors = {name: tensor for found, _ in parts.values() for name, tensor in found.items()}
        return tensors, {"dict": [[key, rest] for key, (_, rest) in parts.items()]}
    if isinstance(tree, (list, tuple)):
        parts = [_split(value, f"{path}/{index}") for index, value in enumerate(tree)]
        return {name: tensor for found, _ in parts for name, tensor in found.items()}, [rest for _, rest in parts]
    return {}, tree


def _join(tensors: dict[str, Tensor], rest: Any) -> Any:
    """Return the tree with its tensors: the inverse of `_split`, except that tuples come back as lists."""
    if isinstance(rest, dict):
        if "tensor" in rest:
            return tensors[rest["tensor"]]
        return {key: _join(tensors, value) for key, value in rest["dict"]}
    return [_join(tensors, value) for value in rest] if isinstance(rest, list) else rest
