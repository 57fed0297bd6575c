"""All options of a training run except its method's.

A script combines both:  class Config(TrainingConfig, KroneckerOptions)
"""

from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.options.base_model import FrozenModelOptions
from dreambooth.options.data import DataOptions, ImageOptions
from dreambooth.options.drawing import SampleOptions
from dreambooth.options.output import OutputOptions, ReportOptions
from dreambooth.options.scores import ScoreOptions
from dreambooth.options.steps import OptimizerOptions, RuntimeOptions


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(
    FrozenModelOptions,
    ImageOptions,
    DataOptions,
    OptimizerOptions,
    RuntimeOptions,
    OutputOptions,
    SampleOptions,
    ScoreOptions,
    ReportOptions,
):
    """Options of every training run, with Stable Diffusion's defaults."""

    def check(self) -> None:
        for name in ("class_data_dir", "cache_latents_to_disk"):  # which are made if they do not exist
            folder = getattr(self, name)
            if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
                raise UserError(f"--{name} {folder} is a file; choose another folder")
        if self.score_checkpoints and self.subjects is not None:
            raise UserError(
                "--score_checkpoints scores one subject and does not work with --subjects; scripts/evaluate.py scores "
                "each of several"
            )
        if self.score_checkpoints and self.reference_dir is None:
            if not self.holdout:
                raise UserError(
                    "--score_checkpoints needs photos that are not trained on: --holdout or --reference_dir"
                )
            if self.dataset_name is not None:
                raise UserError("--score_checkpoints needs --reference_dir if the photos are from --dataset_name")
        if self.class_data_dir is None or self.instance_data_dir is None:
            return
        if Path(self.class_data_dir).resolve() == Path(self.instance_data_dir).resolve():
            raise UserError(
                "--class_data_dir and --instance_data_dir are the same folder; class images need a folder of their own"
            )


@dataclass(frozen=True, kw_only=True)
class SDXLTrainingConfig(TrainingConfig):
    """Options of every training run, with SDXL's defaults."""

    resolution: int = 1024


def config_class(*groups: type) -> type:
    """Return a class of options that combines groups: a method's options, and TrainingConfig or a subclass.

    If two groups have an option, its default is that of the first.
    """
    return make_dataclass("Config", [], bases=groups, frozen=True, kw_only=True, namespace={"__reduce__": _reduce})


def _reduce(config: TrainingConfig) -> tuple:
    """Return how pickle makes a config again elsewhere, where its class has no name to be imported by."""
    return _combine, (type(config).__bases__, vars(config))


def _combine(groups: tuple[type, ...], values: dict[str, Any]) -> Any:
    return config_class(*groups)(**values)
