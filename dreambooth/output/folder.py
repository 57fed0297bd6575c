"""The output folder: one run at a time, which checkpoint a run starts from, and what it clears before it starts."""

import errno
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout

from dreambooth.errors import UserError
from dreambooth.layout import (
    AVERAGE_NAME,
    CONFIG_NAME,
    LOCK_NAME,
    PHOTOS_NAME,
    SAMPLES_NAME,
    SUMMARY_NAME,
    TRACKERS_NAME,
    checkpoint_step,
    list_checkpoints,
    list_sheets,
    result_paths,
    sheet_step,
)
from dreambooth.method import Method
from dreambooth.options.output import OutputOptions
from dreambooth.options.steps import BatchOptions
from dreambooth.options.training import TrainingConfig
from dreambooth.options.yaml_file import save_config
from dreambooth.output.best import drop_best
from dreambooth.output.checkpoint import latest_checkpoint, saved_step, tidy_checkpoints, verify_checkpoint
from dreambooth.output.identity import refuse_other_options
from dreambooth.output.result import result_step
from dreambooth.runtime.ranks import on_main
from kron_formats.files import UNFINISHED, remove

logger = logging.getLogger(__name__)

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what file systems say that have none


# ---- one run at a time ----


@contextmanager
def hold_folder(config: OutputOptions, accelerator: Accelerator) -> Iterator[None]:
    """Create and lock the output folder for the time of this context. Raises UserError if another run holds it.

    The lock is the operating system's and ends with the process, however that ends. Folders that were created here and
    are still empty at the end are removed, so a refused run leaves nothing behind.
    """
    output = Path(config.output_dir)
    with ExitStack() as stack:

        def hold() -> None:
            stack.enter_context(_made(output))
            stack.enter_context(_locked(output))

        on_main(accelerator, hold)
        yield


@contextmanager
def _made(output: Path) -> Iterator[None]:
    missing = [path for path in (output, *output.parents) if not path.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"--output_dir {output} is a file") from None
    except OSError as error:
        raise UserError(f"--output_dir {output} cannot be created: {error}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # stops at the first folder that is not empty
            for path in missing:
                path.rmdir()


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    path = output / LOCK_NAME
    # Children that are forked do not inherit it. A file system without locks gets no substitute: that would outlive a
    # process that is killed.
    lock = FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False, on_acquired=_sign)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"--output_dir {output} is in use by another run{_holder(path)}: wait until it ends, or choose another "
            "folder"
        ) from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise UserError(f"--output_dir {output} cannot be written to: {error}") from error
        logger.warning("%s cannot be locked (%s): do not start a second run in it", output, error)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes it once it is closed
            path.unlink()
        lock.release()


def _sign(lock: int) -> None:
    """Write this process and host into the lock file, an open descriptor, behind the byte that Windows locks."""
    os.ftruncate(lock, 0)
    os.write(lock, b"\n" + json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())


def _holder(path: Path) -> str:
    """Return who holds a lock, in words; "" if its file does not say."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(1)
            holder = json.loads(file.read(1000))
        return f" (process {holder['process']} on {holder['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


# ---- where a run starts ----


def find_start(method: Method, config: TrainingConfig, accelerator: Accelerator) -> Path | None:
    """Return the checkpoint to resume from, or None to start from the beginning.

    It is complete, and of a run with the same options. Raises UserError if there is no such checkpoint, or if a run
    from the beginning would overwrite another run's results.
    """
    start = on_main(accelerator, lambda: _find_start(method, config))
    if start is not None:
        refuse_other_options(start, method, config, accelerator)
    return start


def _find_start(method: Method, config: OutputOptions) -> Path | None:
    output = Path(config.output_dir)
    if config.resume_from_checkpoint == "latest":
        if start := latest_checkpoint(output):
            return start
        if not list_checkpoints(output):
            logger.info("--resume_from_checkpoint latest: %s holds no checkpoint; starting from the beginning", output)
    elif config.resume_from_checkpoint:
        start = _existing_checkpoint(config.resume_from_checkpoint, output)
        verify_checkpoint(start)
        return start
    there = (*list_checkpoints(output), *result_paths(output, method.weights_name))
    results = [path.name for path in there if path.exists()]
    if results and not config.overwrite_output_dir:
        raise UserError(
            f"--output_dir {output} holds the results of another run ({', '.join(results)}): choose another folder, "
            "continue with --resume_from_checkpoint latest, or replace them with --overwrite_output_dir"
        )
    return None


def _existing_checkpoint(name: str, output: Path) -> Path:
    for path in (Path(name), output / name):  # diffusers' examples take a bare checkpoint-500 too
        if path.is_dir():
            return path
    there = ", ".join(path.name for path in list_checkpoints(output)) or "none"
    raise UserError(f"--resume_from_checkpoint {name}: there is no such checkpoint; {output} holds: {there}")


def check_start(
    start: Path | None, method: Method, total_steps: int, config: TrainingConfig, accelerator: Accelerator
) -> None:
    """Raise UserError if a run of `total_steps` cannot continue from `start`, or would lose what the folder holds.

    Steps that are only trained again, with the same options, are not lost: they come out the same. That is a warning.
    """
    if start is not None:
        on_main(accelerator, lambda: _check_start(start, method, total_steps, config))


def _check_start(start: Path, method: Method, total_steps: int, config: TrainingConfig) -> None:
    output, step = Path(config.output_dir), saved_step(start)
    begins = f"--resume_from_checkpoint {start} is at step {step}"
    if step > total_steps:
        raise UserError(
            f"{begins}, but this run ends after {total_steps} steps ({_length(config)}): train for more steps, name an "
            "earlier checkpoint, or begin anew in another --output_dir"
        )
    if step == total_steps:
        logger.info("%s, where this run ends: already trained, nothing is left but to write the result again", begins)
    if config.overwrite_output_dir:
        return
    # `latest` passes over later checkpoints only if they are damaged
    again = [] if config.resume_from_checkpoint == "latest" else [path.name for path in _not_before(start, output)]
    lost = again if config.allow_config_change or not _is_in(output, start) else []
    trained = result_step(output / method.weights_name)
    if trained > (total_steps if _is_in(output, start) else 0):
        lost = [*lost, f"{method.weights_name} of step {trained}"]
    if lost:
        raise UserError(
            f"{begins}, and this run, of {total_steps} steps ({_length(config)}), would replace what --output_dir "
            f"{output} holds ({', '.join(lost)}): continue with --resume_from_checkpoint latest and at least as many "
            "steps, choose another folder, or allow it with --overwrite_output_dir"
        )
    if again:
        logger.warning("%s: the steps after it are trained again, and replace %s", begins, ", ".join(again))


def _length(config: BatchOptions) -> str:
    """Return the option that says how many steps a run takes, as it is written on the command line."""
    if config.max_train_steps is None and config.num_train_epochs is not None:
        return f"--num_train_epochs {config.num_train_epochs}"
    return (
        "--max_train_steps by default"
        if config.max_train_steps is None
        else f"--max_train_steps {config.max_train_steps}"
    )


def _is_in(output: Path, start: Path) -> bool:
    return start.parent.resolve() == output.resolve()


def _not_before(start: Path | None, output: Path) -> list[Path]:
    """Return the checkpoints in the output folder that are neither `start` nor what led to it."""
    if start is None or not _is_in(output, start):
        return list_checkpoints(output)
    return [path for path in list_checkpoints(output) if checkpoint_step(path) > saved_step(start)]


# ---- what is cleared ----


def prepare_output(method: Method, config: TrainingConfig, start: Path | None, accelerator: Accelerator) -> None:
    """Write config.yaml, and remove samples and the best of later steps than the one that the run continues from.

    With --overwrite_output_dir, also remove the checkpoints that do not lead to that step, their result, and what
    trackers call that run.
    """
    output = Path(config.output_dir)

    def prepare() -> None:
        others = _not_before(start, output)
        if config.overwrite_output_dir and (others or start is None):
            for path in others:
                shutil.rmtree(path)
            for path in (*result_paths(output, method.weights_name), output / AVERAGE_NAME, output / TRACKERS_NAME):
                remove(path)
        cut_off = [*output.glob(UNFINISHED), *(output / SAMPLES_NAME).glob(UNFINISHED)]  # by a run that was killed
        for path in (output / SUMMARY_NAME, output / PHOTOS_NAME, *cut_off):  # those are of a finished run
            remove(path)
        first_step = saved_step(start) if start else 0
        drop_best(output, first_step)
        if start is not None and _is_in(output, start):
            tidy_checkpoints(output, first_step, config)
        for path in list_sheets(output):
            if sheet_step(path) > first_step or start is None:
                path.unlink()
        save_config(config, output / CONFIG_NAME)

    on_main(accelerator, prepare)
