"""The options: one frozen dataclass, from a YAML file and the command line, and back to a YAML file."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, TypeVar

import torch
import yaml
from transformers import HfArgumentParser


class UserError(ValueError):
    """Something the user can mend. The message says what is wrong, where, and what to do."""


@contextmanager
def readable_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End the program with the message alone, exit code 1, on a UserError or one of `kinds`."""
    try:
        yield
    except (UserError, *kinds) as error:
        sys.exit(f"error: {error}")


def option(help: str, default=MISSING):
    """A field that becomes a flag. `help` says what it does, with its unit."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class AdaptedModelConfig:
    """What scripts need that take a base model and an adapter."""

    pretrained_model_name_or_path: str = option("Base model: a name on the Hub or a folder in diffusers' layout.")
    revision: str | None = option("Revision of the base model on the Hub.", None)
    variant: str | None = option("Variant of the base model's weight files, for example fp16.", None)
    adapter: str | None = option("Adapter file. Default: none, the base model alone.", None)
    adapter_scale: float = option("Strength of the adapter: 0 is the base model, 1 as trained.", 1.0)
    dtype: Literal["fp32", "fp16", "bf16"] = option("Precision of the model.", "fp32")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Every option of a training run. A field is the only place where a flag exists."""

    # Base model
    pretrained_model_name_or_path: str = option("Base model: a name on the Hub or a folder in diffusers' layout.")
    revision: str | None = option("Revision of the base model on the Hub.", None)
    variant: str | None = option("Variant of the base model's weight files, for example fp16.", None)

    # Instance images
    instance_data_dir: str = option("Folder with the photos of the subject.")
    instance_prompt: str = option('Prompt with a rare token and the class, for example "a photo of sks dog".')
    resolution: int = option("Side of the training images, px. A multiple of 8.", 512)
    center_crop: bool = option(
        "Crop images at their centre, instead of anew at random every time they are used.", False
    )
    image_interpolation_mode: Literal["lanczos", "bicubic", "bilinear", "box", "hamming", "nearest"] = option(
        "How images are resized.", "lanczos"
    )

    # Prior preservation
    with_prior_preservation: bool = option("Train on class images too, so that the class keeps its variety.", False)
    prior_loss_weight: float = option("Weight of the class images' loss.", 1.0)
    class_data_dir: str | None = option("Folder with the class images; missing ones are drawn by the base model.", None)
    class_prompt: str | None = option('Prompt of the class images, for example "a photo of dog".', None)
    num_class_images: int = option("Class images wanted; only those the folder lacks are drawn, images.", 100)
    sample_batch_size: int = option("Class images drawn at once on each device, images.", 4)
    prior_num_inference_steps: int = option("Denoising steps for a class image.", 25)
    prior_guidance_scale: float = option("Classifier-free guidance for class images.", 7.5)
    prior_negative_prompt: str = option("Negative prompt for class images.", "")

    # Kronecker adapter
    kron_a1: int = option("Rows of A. Divides every adapted layer's output features.", 4)
    kron_a2: int = option("Columns of A. Divides every adapted layer's input features.", 64)
    kron_factors: list[str] = option(
        "Factors of single projections, as to_k=8,64 to_v=8,64; in YAML {to_k: [8, 64]}.", []
    )
    kron_targets: list[str] = option(
        "Linear layers to adapt, by the end of their path.", ["to_q", "to_k", "to_v", "to_out.0"]
    )
    kron_init: Literal["invariant", "reference"] = option(
        "Initialisation of A: invariant serves all factor shapes at one learning rate; reference is the paper's own.",
        "invariant",
    )

    # Training
    output_dir: str = option("Folder for the adapter, checkpoints, samples and logs.", "kronecker-dreambooth-model")
    overwrite_output_dir: bool = option("Replace the results of an earlier run in output_dir.", False)
    seed: int = option("Seed of everything random: factors, order, crops, noise, timesteps, samples.", 0)
    train_batch_size: int = option("Instance images per device and forward pass, images.", 1)
    gradient_accumulation_steps: int = option("Forward passes per optimizer step.", 1)
    max_train_steps: int | None = option(
        "Optimizer steps to train. Default: what num_train_epochs makes, 500 where that is not given either.", None
    )
    num_train_epochs: int | None = option("Passes over the instance images, where max_train_steps is not given.", None)
    learning_rate: float = option("Learning rate, after warm-up.", 5e-4)
    scale_lr: bool = option("Multiply the learning rate by devices, accumulation and batch size.", False)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = option("Schedule of the learning rate.", "constant")
    lr_warmup_steps: int = option("Warm-up of the learning rate, optimizer steps. Ignored by 'constant'.", 0)
    lr_num_cycles: int = option("Restarts of the cosine_with_restarts schedule.", 1)
    lr_power: float = option("Power of the polynomial schedule.", 1.0)
    use_8bit_adam: bool = option("AdamW with 8-bit state from bitsandbytes.", False)
    adam_beta1: float = option("AdamW's beta 1.", 0.9)
    adam_beta2: float = option("AdamW's beta 2.", 0.999)
    adam_weight_decay: float = option("AdamW's weight decay.", 1e-2)
    adam_epsilon: float = option("AdamW's epsilon.", 1e-8)
    max_grad_norm: float = option("Gradients are clipped to this norm.", 1.0)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        "Precision of the frozen model and the activations; factors stay fp32. Default: accelerate's configuration.",
        None,
    )
    gradient_checkpointing: bool = option("Recompute activations in the backward pass: less memory, slower.", False)
    allow_tf32: bool = option("Allow TF32 matrix products on NVIDIA GPUs.", False)
    enable_xformers_memory_efficient_attention: bool = option("Use xformers' attention instead of PyTorch's.", False)
    dataloader_num_workers: int = option("Processes that prepare batches; 0 means the training process.", 0)

    # Checkpoints and samples
    checkpointing_steps: int = option("Save a checkpoint every so many optimizer steps.", 500)
    checkpoints_total_limit: int | None = option("Keep so many of the newest checkpoints. Default: all.", None)
    resume_from_checkpoint: str | None = option("Checkpoint folder to go on from, or 'latest'.", None)
    validation_prompt: list[str] = option("Prompts to draw while training; each is one row of the sheet.", [])
    num_validation_images: int = option("Images for each validation prompt, images.", 4)
    validation_epochs: int = option("Draw samples every so many passes over the instance images.", 50)
    validation_steps: int | None = option("Draw samples every so many optimizer steps instead.", None)
    validation_num_inference_steps: int = option("Denoising steps for a sample.", 25)
    validation_guidance_scale: float = option("Classifier-free guidance for samples.", 7.5)
    report_to: list[str] = option("Where to log: tensorboard, wandb, or none.", ["tensorboard"])
    logging_dir: str = option("Folder for TensorBoard's files, inside output_dir.", "logs")

    def factors_by_target(self) -> dict[str, tuple[int, int]]:
        """Return {"to_k": (8, 64)} from kron_factors. Raises UserError where an entry does not read."""
        factors = {}
        for entry in self.kron_factors:
            target, _, numbers = entry.partition("=")
            parts = numbers.split(",")
            if not target or len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
                raise UserError(f"--kron_factors {entry}: write PROJECTION=A1,A2, for example to_k=8,64")
            factors[target] = (int(parts[0]), int(parts[1]))
        return factors


C = TypeVar("C")


def parse_config(config_class: type[C], description: str, argv: Sequence[str] | None = None) -> C:
    """Return the options of a training run, checked against each other. See `parse_options`."""
    return parse_options(config_class, description, argv, check_config)


def parse_options(
    config_class: type[C],
    description: str,
    argv: Sequence[str] | None = None,
    check: Callable[[C], None] = lambda config: None,
) -> C:
    """Return the options from `--config FILE`, overridden by the command line. Touches nothing but that file.

    What does not parse or does not go together ends the program with exit code 2 and a message that names the flags.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--config")
    known, rest = first_look.parse_known_args(argv)

    parser = HfArgumentParser(
        config_class, description=description, allow_abbrev=False, formatter_class=_ManPageFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with options; the command line wins.")
    try:
        names = [option.name for option in fields(config_class)]
        flags = flags_from_yaml(known.config, names) if known.config is not None else []
        config, _, unknown = parser.parse_args_into_dataclasses(
            [*flags, *rest], look_for_args_file=False, return_remaining_strings=True
        )
        if unknown:
            source = f" (on the command line or in {known.config})" if known.config else ""
            raise UserError(f"unrecognized arguments: {' '.join(unknown)}{source}")
        check(config)
    except UserError as error:
        parser.error(str(error))
    return config


class _ManPageFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the module docstring's lines, and shows defaults."""


class _TextLoader(yaml.BaseLoader):
    """Hands on every value as it is written, so that 5e-4, no and true mean what they mean on a command line and one
    parser judges them all. Only a null that is not quoted is None."""


_TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_TextLoader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)


def flags_from_yaml(path: str, names: Sequence[str]) -> list[str]:
    """Return the flags that a YAML file of the options `names` stands for; a null means the default."""
    try:
        options = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_TextLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: {error}") from error
    if not isinstance(options, dict):
        raise UserError(f"--config {path}: expected lines of the form 'option: value'")
    if strangers := [str(name) for name in options if name not in names]:
        raise UserError(f"--config {path}: there is no option {', '.join(strangers)}")
    flags = []
    for name, value in options.items():
        if isinstance(value, dict):
            value = [f"{key}={','.join(map(str, e)) if isinstance(e, list) else e}" for key, e in value.items()]
        if isinstance(value, str):
            flags.append(f"--{name}={value}")
        elif value:
            if not all(isinstance(entry, str) for entry in value):
                raise UserError(f"--config {path}: {name} is no list of plain values; put what holds ': ' in quotes")
            flags += [f"--{name}", *value]
    return flags


# Options, what has to hold for their values, and that in words
LIMITS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "train_batch_size gradient_accumulation_steps checkpointing_steps checkpoints_total_limit num_class_images "
        "sample_batch_size num_validation_images validation_epochs validation_steps prior_num_inference_steps "
        "validation_num_inference_steps lr_num_cycles max_train_steps num_train_epochs resolution",
        lambda value: value >= 1,
        "at least 1",
    ),
    (
        "seed lr_warmup_steps dataloader_num_workers learning_rate prior_loss_weight adam_beta1 adam_beta2 "
        "adam_weight_decay adam_epsilon",
        lambda value: value >= 0,
        "0 or more; it cannot be negative",
    ),
    ("adam_beta1 adam_beta2", lambda value: value < 1, "below 1"),
    ("max_grad_norm", lambda value: value > 0, "above 0; 1e9 clips nothing"),
    ("seed", lambda value: value < 2**32, f"below {2**32}"),
    ("resolution", lambda value: value % 8 == 0, "a multiple of 8"),
)


def check_config(config: TrainingConfig) -> None:
    """Raise UserError where an option is out of range, or options do not go together."""
    for name, value in asdict(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} is {value}; it has to be a finite number")
    for names, holds, words in LIMITS:
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not holds(value):
                raise UserError(f"--{name} is {value}; it has to be {words}")
    if strangers := set(config.report_to) - {"tensorboard", "wandb", "none"}:
        raise UserError(f"--report_to {' '.join(sorted(strangers))}: it can be tensorboard, wandb or none")
    if "none" in config.report_to and len(config.report_to) > 1:
        raise UserError("--report_to none does not go with other trackers")
    config.factors_by_target()
    _check_prior(config)


def _check_prior(config: TrainingConfig) -> None:
    if not config.with_prior_preservation:
        if config.class_data_dir or config.class_prompt:
            raise UserError("--class_data_dir and --class_prompt need --with_prior_preservation")
        return
    if not config.class_prompt:
        raise UserError("--with_prior_preservation needs --class_prompt, for example 'a photo of dog'")
    if not config.class_data_dir:
        raise UserError("--with_prior_preservation needs --class_data_dir, the folder where class images are kept")
    if Path(config.class_data_dir).resolve() == Path(config.instance_data_dir).resolve():
        raise UserError("--class_data_dir and --instance_data_dir are the same folder; class images need their own")


def save_config(config: TrainingConfig, path: Path) -> None:
    """Write the options as YAML that `--config` reads back."""
    options = {name: value for name, value in asdict(config).items() if value not in (None, [])}
    path.write_text(yaml.safe_dump(options, sort_keys=False, allow_unicode=True), encoding="utf-8")
