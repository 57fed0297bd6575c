"""What several methods cannot be trained with, each for a reason of its own."""

from dreambooth.errors import UserError
from dreambooth.options.base_model import FrozenModelOptions
from dreambooth.options.subjects import SubjectOptions
from dreambooth.runtime.ranks import splits_models


def refuse_base_precision(method: str, why: str, config: FrozenModelOptions) -> None:
    """Raise UserError if the base model is not to be held in fp32."""
    if config.base_precision not in (None, "fp32"):
        raise UserError(
            f"--base_precision {config.base_precision} does not work with {method}: {why}. Leave it out; "
            "--mixed_precision is the precision of the computation"
        )


def refuse_fsdp(method: str, why: str) -> None:
    """Raise UserError if accelerate launch was told to use FSDP."""
    if splits_models():
        raise UserError(
            f"{method} does not work with FSDP, which accelerate launch was told to use: {why}. Use --multi_gpu "
            "(configs/accelerate/multi_gpu.yaml)"
        )


def refuse_several(flag: str, config: SubjectOptions) -> None:
    """Raise UserError if there are several subjects for one word, that of `flag`."""
    if (count := len(config.all_subjects)) > 1:
        raise UserError(
            f"--subjects names {count} subjects, but --{flag} is one word: train a file for each subject; "
            "scripts/generate.py --adapter takes several files"
        )


def refuse_compile(method: str, why: str, config: FrozenModelOptions) -> None:
    """Raise UserError if the base model is to be compiled."""
    if config.compile:
        raise UserError(f"--compile is refused with {method}: {why}. Leave it out")
