"""Progress: the bar with loss and learning rate, and the report of every step."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from tqdm.auto import tqdm

from dreambooth.data.dataset import DreamBoothDataset
from dreambooth.errors import UserError
from dreambooth.layout import METRICS_NAME
from dreambooth.loop.health import StepReport, is_sound, read_reports, what_to_try
from dreambooth.method import Attached, trained_parameters
from dreambooth.options.training import TrainingConfig
from dreambooth.report.closing import closing_line, compile_seconds
from dreambooth.report.metrics import MetricsFile
from dreambooth.report.trackers import finish_trackers, log_values, start_trackers

logger = logging.getLogger(__name__)


class Progress:
    """The progress bar, metrics.jsonl, the trackers, and the time since training began.

    Steps are reported several at a time, since reading their numbers waits for the device.
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
        self.metrics: MetricsFile | None = None
        if accelerator.is_main_process:
            self.metrics = MetricsFile(Path(config.output_dir) / METRICS_NAME, first_step)
            start_trackers(accelerator, config, first_step)

    @property
    def seconds(self) -> float:
        """The time since training began, s."""
        return time.monotonic() - self.began

    def steps(self, reports: Iterator[StepReport]) -> Iterator[int]:
        """Yield the number of each remaining step once it is enqueued; report every `logging_steps` and after the last.

        Time that the caller spends between steps does not count as theirs.
        """
        for step in range(self.first_step + 1, self.total_steps + 1):
            began = time.monotonic()
            self.unread[step] = next(reports)
            self.working += time.monotonic() - began
            if step % self.config.logging_steps == 0 or step == self.total_steps:
                self.settle_steps()
            self.bar.update()
            yield step

    def settle_steps(self) -> None:
        """Wait for the steps that are not reported yet, and report each. Called before their result is saved or drawn.

        Their `step_time`, seconds, is their mean, since single steps are not waited for. All processes must call this
        at the same steps. Raises UserError, on every process, if more steps than --skip_nonfinite were not finite.
        """
        began = time.monotonic()
        steps, rows = list(self.unread), read_reports(list(self.unread.values())) if self.unread else []
        self.working += time.monotonic() - began
        for step, values in zip(steps, rows):
            self._report(step, {**values, "step_time": round(self.working / len(steps), 4)})
        self.unread.clear()
        self.working = 0.0
        for step, values in zip(steps, rows):
            if not is_sound(values, self.accelerator):
                self._tolerate(step, values)

    def _report(self, step: int, values: dict[str, float]) -> None:
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", lr=f"{values['learning_rate']:.2e}", refresh=False)
        if self.metrics is not None:
            self.metrics.append({"step": step, **values})
        log_values(self.accelerator, values, step)

    def note(self, step: int, values: dict[str, float]) -> None:
        """Report more numbers of a step that was reported, in a line of their own."""
        if self.metrics is not None:
            self.metrics.append({"step": step, **values})
        log_values(self.accelerator, values, step)

    def _tolerate(self, step: int, values: dict[str, float]) -> None:
        """Warn of a skipped step, one that was not finite; raise UserError if there are more than --skip_nonfinite."""
        self.skipped += 1
        files = ", ".join(map(str, self.dataset.paths_of_step(step, self.accelerator.num_processes)))
        what = (
            f"step {step} is not finite: its loss is {values['loss']:g}, the norm of its gradients "
            f"{values['grad_norm']:g}; it trained on {files}"
        )
        if self.skipped <= (allowed := self.config.skip_nonfinite):
            logger.warning("%s; it was skipped, number %d of --skip_nonfinite %d", what, self.skipped, allowed)
            return
        self.bar.close()
        raise UserError(f"{what}. Its result was not saved. {what_to_try(self.config)}")

    def say_closing_line(self, attached: Attached, path: Path) -> None:
        """Print what was trained, how long it took, and where the result is."""
        parameters = trained_parameters(attached)
        steps = self.total_steps - self.first_step
        self.bar.clear()
        print(
            closing_line(parameters, steps, self.seconds, compile_seconds(self.config), path, self.accelerator.device),
            flush=True,
        )

    def close(self) -> None:
        """Close everything, once every process has come here."""
        self.bar.close()
        if self.metrics is not None:
            self.metrics.close()
        finish_trackers(self.accelerator)
        self.accelerator.wait_for_everyone()  # a process that exits while another still works can hang
        self.accelerator.end_training()
