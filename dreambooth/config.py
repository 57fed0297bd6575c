"""Re-exports of what moved to `dreambooth.options` and `dreambooth.errors`."""

from dataclasses import dataclass

from dreambooth.errors import SaveError, UserError, readable_errors
from dreambooth.options.base_model import AdaptedModelOptions as AdaptedModelConfig
from dreambooth.options.field import option, public_options
from dreambooth.options.kronecker import KroneckerOptions
from dreambooth.options.output import TRACKERS
from dreambooth.options.steps import OPTIMIZERS
from dreambooth.options.training import TrainingConfig as _TrainingConfig
from dreambooth.options.yaml_file import save_config

__all__ = [
    "AdaptedModelConfig", "OPTIMIZERS", "SaveError", "TRACKERS", "TrainingConfig", "UserError", "option",
    "public_options", "readable_errors", "save_config",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(_TrainingConfig, KroneckerOptions):
    """All options of the Kronecker scripts."""
