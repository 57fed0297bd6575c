"""What the user is told: the progress bar, metrics.jsonl, the trackers, and the closing line."""

import functools
import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from dreambooth.config import TrainingConfig, UserError, public_options
from dreambooth.curves import draw_curves
from dreambooth.data import DreamBoothDataset
from dreambooth.training import StepReport, is_sound, read_reports

logger = logging.getLogger(__name__)

PROJECT = "dreambooth-kronecker"
METRICS_NAME = "metrics.jsonl"
CURVES_NAME = "training.png"


@contextmanager
def warn_only(consequence: str) -> Iterator[None]:
    """Turn an error into one warning that begins with its consequence: training matters more than what is inside."""
    try:
        yield
    except Exception as error:
        logger.warning("%s: %s: %s", consequence, type(error).__name__, error)


# ---- progress ----


class Progress:
    """The progress bar with loss and learning rate, metrics.jsonl, the trackers, and the time since it began.

    Steps are told of once they are read, several together, since reading waits for the device.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        dataset: DreamBoothDataset,
        config: TrainingConfig,
        first_step: int,
        total_steps: int,
    ):
        self.accelerator, self.dataset, self.config = accelerator, dataset, config
        self.first_step, self.total_steps = first_step, total_steps
        self.began, self.working = time.monotonic(), 0.0
        self.unread: dict[int, StepReport] = {}
        self.skipped = 0
        self.bar = tqdm(
            total=total_steps, initial=first_step, desc="Training", unit="step", disable=not accelerator.is_main_process
        )
        self.metrics, self.disk_failed = open(os.devnull, "w"), False
        if accelerator.is_main_process:
            self.metrics = _open_metrics(Path(config.output_dir) / METRICS_NAME, first_step)
            start_trackers(accelerator, config, first_step)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def steps(self, reports: Iterator[StepReport]) -> Iterator[int]:
        """Number the steps that are left to train, and read them every `logging_steps` and after the last.

        What the caller does between steps is not counted as their time.
        """
        for step in range(self.first_step + 1, self.total_steps + 1):
            began = time.monotonic()
            self.unread[step] = next(reports)
            self.working += time.monotonic() - began
            if step % self.config.logging_steps == 0 or step == self.total_steps:
                self.read()
            self.bar.update()
            yield step

    def read(self) -> None:
        """Wait for the steps that are not read yet, and tell of each: before anything is made of what they trained.

        Their `step_time`, seconds, is the mean over them: a single step is not waited for. All processes have to read
        at the same steps. Raises UserError, on all alike, where a step's loss or gradients were not finite.
        """
        began = time.monotonic()
        steps, rows = list(self.unread), read_reports(list(self.unread.values())) if self.unread else []
        self.working += time.monotonic() - began
        for step, values in zip(steps, rows):
            self._tell(step, {**values, "step_time": round(self.working / len(steps), 4)})
        self.unread.clear()
        self.working = 0.0
        for step, values in zip(steps, rows):
            if not is_sound(values, self.accelerator):
                self._tolerate(step, values)

    def _tell(self, step: int, values: dict[str, float]) -> None:
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", lr=f"{values['learning_rate']:.2e}", refresh=False)
        self._note(_json_line({"step": step, **values}))
        log_values(self.accelerator, values, step)

    def _note(self, line: str) -> None:
        """Append to metrics.jsonl. Where the disk is full lines wait for room, with one warning."""
        try:
            self.metrics.write(line)
            self.metrics.flush()
        except OSError as error:
            if not self.disk_failed:
                logger.warning("%s was not written, training goes on: %s", METRICS_NAME, error)
            self.disk_failed = True

    def _tolerate(self, step: int, values: dict[str, float]) -> None:
        """Warn of a step that was skipped, since it was not finite; raise UserError where there are too many."""
        self.skipped += 1
        files = ", ".join(map(str, self.dataset.paths_of_step(step, self.accelerator.num_processes)))
        what = (
            f"step {step} is not finite: its loss is {values['loss']:g}, the norm of its gradients "
            f"{values['grad_norm']:g}; it trained on {files}"
        )
        if self.skipped <= self.config.skip_nonfinite:
            logger.warning("%s; it was skipped, as %d of --skip_nonfinite", what, self.skipped)
            return
        self.bar.close()
        raise UserError(f"{what}. Nothing that came of it was saved. {what_to_try(self.config)}")

    def say_closing_line(self, groups: Mapping[str, Sequence[nn.Parameter]], path: Path) -> None:
        """Tell what was trained, how long it took, and where the file is."""
        factors = [factor for group in groups.values() for factor in group]
        steps = self.total_steps - self.first_step
        self.bar.clear()
        print(
            closing_line(factors, steps, self.seconds, compile_seconds(self.config), path, self.accelerator.device),
            flush=True,
        )

    def close(self) -> None:
        self.bar.close()
        with suppress(OSError):  # `_note` has told of a full disk
            self.metrics.close()
        _each_tracker(self.accelerator, lambda tracker: tracker.finish())
        self.accelerator.trackers.clear()
        self.accelerator.wait_for_everyone()  # a rank that leaves while another still works can hang at its exit
        self.accelerator.end_training()


def what_to_try(config: TrainingConfig) -> str:
    """Return what may keep losses finite that these options leave to do."""
    advice = [f"a lower --learning_rate than {config.learning_rate:g}"]
    if config.mixed_precision == "fp16" or config.base_precision == "fp16":
        advice.append("--mixed_precision bf16, whose range is that of fp32, instead of fp16")
    if config.vae_precision != "fp32" or config.pretrained_vae_model_name_or_path:
        advice.append(
            "--vae_precision fp32, or --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix, where the "
            "VAE's latents overflow"
        )
    if config.snr_gamma is None:
        advice.append("--snr_gamma 5")
    advice.append("--skip_nonfinite N, which passes over up to N such steps")
    return f"Try {'; '.join(advice)}. Where the first step already fails, the base model's weights may be damaged"


# ---- metrics.jsonl and its picture ----


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a metrics.jsonl; what a crash left half-written is not among them."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _open_metrics(path: Path, first_step: int) -> IO[str]:
    """Open metrics.jsonl for the steps after `first_step`; what a run left that got further is dropped."""
    kept = [row for row in read_metrics(path) if row["step"] <= first_step]
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(map(_json_line, kept)), encoding="utf-8")
    os.replace(unfinished, path)
    return path.open("a", encoding="utf-8")


def _json_line(values: dict[str, Any]) -> str:
    """One line of JSON, which knows no NaN and no infinity: null stands for both."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite) + "\n"


def save_curves(config: TrainingConfig) -> None:
    """Draw OUTPUT_DIR/metrics.jsonl as OUTPUT_DIR/training.png. Never raises: a failure is a warning."""
    output = Path(config.output_dir)
    with warn_only(f"{output / CURVES_NAME} was not drawn"):
        draw_curves(read_metrics(output / METRICS_NAME)).save(output / CURVES_NAME)


# ---- trackers: one that fails is let go, with one warning ----


def start_trackers(accelerator: Accelerator, config: TrainingConfig, first_step: int) -> None:
    """Start the trackers of --report_to, several side by side, and give them the options."""
    extra: dict[str, dict[str, Any]] = {
        # TensorBoard hides what an earlier run in this folder wrote for the steps that come now.
        "tensorboard": {"logging_dir": accelerator.logging_dir, "purge_step": first_step + 1 if first_step else 0},
        # Beside what it is told, wandb keeps the command line, where a token may stand.
        "wandb": {"settings": {"x_disable_meta": True}} if config.hub_token else {},
    }
    for name in map(str, accelerator.log_with):
        accelerator.trackers.append(LOGGER_TYPE_TO_CLASS[name](PROJECT, **extra.get(name, {})))
    options = _flat(public_options(config))
    _each_tracker(accelerator, lambda tracker: (tracker.start(), tracker.store_init_configuration(options)))


def log_values(accelerator: Accelerator, values: dict[str, float], step: int) -> None:
    """Send numbers to every tracker."""
    _each_tracker(accelerator, lambda tracker: tracker.log(values, step=step))


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Send a picture to every tracker."""
    _each_tracker(accelerator, functools.partial(_log_image, name=name, image=image, step=step))


def _log_image(tracker: GeneralTracker, name: str, image: Image.Image, step: int) -> None:
    if tracker.name == "tensorboard":
        tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
    elif tracker.name == "trackio":
        import trackio

        tracker.log({name: trackio.Image(image)}, step=step)
    else:
        tracker.log_images({name: [image]}, step=step)


def _each_tracker(accelerator: Accelerator, act: Callable[[GeneralTracker], Any]) -> None:
    for tracker in list(accelerator.trackers):
        accelerator.trackers.remove(tracker)
        with warn_only(f"--report_to {tracker.name} failed; training goes on without it"):
            act(tracker)
            accelerator.trackers.append(tracker)


def _flat(options: dict[str, Any]) -> dict[str, int | float | str]:
    """The options in the only types that every tracker takes."""
    return {name: value if isinstance(value, (int, float)) else json.dumps(value) for name, value in options.items()}


# ---- at the end ----


def closing_line(
    parameters: Iterable[nn.Parameter],
    steps: int,
    seconds: float,
    compiling: float,
    path: Path,
    device: torch.device,
) -> str:
    """Say what was trained, in all groups together, how long it took, how much of that was compiling, the peak memory,
    and where the file is."""
    count = sum(parameter.numel() for parameter in parameters)
    minutes, rest = divmod(round(seconds), 60)
    compiled = f", {compiling:.1f} s of it compiling" if compiling else ""
    return (
        f"Trained {count:,} parameters ({count * 4 / 2**20:.2f} MiB in fp32) for {steps} steps in {minutes} min "
        f"{rest} s{compiled}; peak memory {peak_memory(device) / 2**30:.2f} GiB on {device.type}; the adapter is {path}"
    )


def compile_seconds(config: TrainingConfig) -> float:
    """Return the time that --compile took so far, s, as torch.compile itself counts it; 0 without."""
    if not config.compile:
        return 0.0
    from torch._dynamo.utils import calculate_time_spent  # imported here: most runs do not compile

    return calculate_time_spent()["total_wall_time"]


def peak_memory(device: torch.device) -> int:
    """Return the most memory used so far, bytes: the device's on a GPU, the process's on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
