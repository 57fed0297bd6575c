"""What a run writes: adapter, checkpoints and logs; and what it uploads to the Hub."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from dreambooth.errors import UserError
from dreambooth.options.field import option

TRACKERS = ("tensorboard", "wandb", "trackio")  # also the names of their packages


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Output and checkpoints."""

    output_dir: str = option(
        "Folder for the adapter, checkpoints, samples and logs.",
        "kronecker-dreambooth-model",
        decides_result=False,
        path=True,
    )
    overwrite_output_dir: bool = option(
        "Replace the results of an earlier run in output_dir.", False, decides_result=False
    )
    save_precision: Literal["fp32", "fp16", "bf16"] = option(
        "Precision of the adapter file.", "fp32", decides_result=False
    )
    no_metadata: bool = option(
        "Leave out of the adapter file what tools do not need: prompts, options, the base model's name, thumbnail.",
        False,
        decides_result=False,
    )
    checkpointing_steps: int = option(
        "Save a checkpoint every this many optimizer steps.", 500, at_least=1, decides_result=False
    )
    checkpoints_total_limit: int | None = option(
        "Keep only this many checkpoints, the newest. Default: all.", None, at_least=1, decides_result=False
    )
    resume_from_checkpoint: str | None = option(
        "Checkpoint folder to continue from, or 'latest' for the newest complete one in output_dir.",
        None,
        decides_result=False,
        path=True,
    )
    allow_config_change: bool = option(
        "Resume even if options or photos changed in a way that changes the result.", False, decides_result=False
    )
    on_save_error: Literal["stop", "continue"] = option(
        "What to do if a checkpoint cannot be written, for example if the disk is full.", "stop", decides_result=False
    )

    def check(self) -> None:
        if self.allow_config_change and self.resume_from_checkpoint is None:
            raise UserError("--allow_config_change needs --resume_from_checkpoint")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Logs and the Hub."""

    report_to: list[str] = option(
        "Where to log: one or more of tensorboard, wandb and trackio, or none.",
        ["tensorboard"],
        choices=(*TRACKERS, "none"),
        decides_result=False,
    )
    logging_steps: int = option(
        "Read losses from the device every this many optimizer steps. Every step is logged either way.",
        10,
        at_least=1,
        decides_result=False,
    )
    logging_dir: str = option(
        "Folder for TensorBoard's and wandb's files, inside output_dir unless it is an absolute path.",
        "logs",
        decides_result=False,
        path=True,
        needs={"report_to": ["tensorboard", "wandb"]},
    )
    tracker_project_name: str | None = option(
        "Project in wandb and trackio; folder in TensorBoard. Default: WANDB_PROJECT in wandb, else "
        "dreambooth-kronecker.",
        None,
        decides_result=False,
        needs={"report_to": TRACKERS},
    )
    tracker_run_name: str | None = option(
        "Name of the run in trackers. Default: one that the tracker makes up.",
        None,
        decides_result=False,
        needs={"report_to": TRACKERS},
    )
    tracker_group: str | None = option(
        "Group of the run in wandb and trackio. Default: none.",
        None,
        decides_result=False,
        needs={"report_to": ["wandb", "trackio"]},
    )
    push_to_hub: bool = option(
        "Upload the adapter and its model card to the Hub at the end.", False, decides_result=False
    )
    hub_model_id: str | None = option(
        "Repository on the Hub. Default: the name of output_dir.",
        None,
        decides_result=False,
        needs={"push_to_hub": [True]},
    )
    hub_token: str | None = option(
        "Token for the Hub; `hf auth login` is safer. Never written to any file.",
        None,
        decides_result=False,
        secret=True,
        needs={"push_to_hub": [True]},
    )

    def check(self) -> None:
        for name in ("tracker_project_name", "tracker_run_name"):
            if "/" in (value := getattr(self, name) or "") or value in (".", ".."):
                raise UserError(f"--{name} {value}: it names a folder too, so it must not be a path")
        if "none" in self.report_to:
            if len(self.report_to) > 1:
                raise UserError("--report_to none does not work with other trackers")
            return
        for name in self.report_to:
            try:
                version(name)
            except PackageNotFoundError:
                raise UserError(
                    f"--report_to {name} needs a package that is not installed: pip install {name}"
                ) from None
