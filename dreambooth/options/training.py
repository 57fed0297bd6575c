"""All options of a training run but its method's.

A script's own class names both:  class Config(TrainingConfig, KroneckerOptions)
"""

from dataclasses import dataclass, make_dataclass
from pathlib import Path

from dreambooth.errors import UserError
from dreambooth.options.base_model import FrozenModelOptions
from dreambooth.options.drawing import PriorOptions, SampleOptions
from dreambooth.options.output import OutputOptions, ReportOptions
from dreambooth.options.photos import CacheOptions, PhotoOptions
from dreambooth.options.steps import BatchOptions, LossOptions, OptimizerOptions, RuntimeOptions


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(
    FrozenModelOptions,
    PhotoOptions,
    CacheOptions,
    PriorOptions,
    LossOptions,
    BatchOptions,
    OptimizerOptions,
    RuntimeOptions,
    OutputOptions,
    SampleOptions,
    ReportOptions,
):
    """Options of every training run, with Stable Diffusion's defaults."""

    def check(self) -> None:
        if self.class_data_dir is None or self.instance_data_dir is None:
            return
        if Path(self.class_data_dir).resolve() == Path(self.instance_data_dir).resolve():
            raise UserError("--class_data_dir and --instance_data_dir are the same folder; class images need their own")


@dataclass(frozen=True, kw_only=True)
class SDXLTrainingConfig(TrainingConfig):
    """Options of every training run, with SDXL's defaults."""

    resolution: int = 1024


def config_class(*groups: type) -> type:
    """Return a class of options made of groups: TrainingConfig, or one below it, and a method's."""
    return make_dataclass("Config", [], bases=groups, frozen=True, kw_only=True)
