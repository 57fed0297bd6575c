"""Which options are in range and go together: every rule that a run's options have to keep, in words with the flags."""

import math
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dreambooth.config import TRACKERS, TrainingConfig, UserError

# Options, what has to hold for their values, and that in words
LIMITS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "train_batch_size gradient_accumulation_steps checkpointing_steps checkpoints_total_limit num_class_images "
        "sample_batch_size num_validation_images validation_epochs validation_steps prior_num_inference_steps "
        "validation_num_inference_steps lr_num_cycles max_train_steps num_train_epochs resolution repeats "
        "logging_steps",
        lambda value: value >= 1,
        "at least 1",
    ),
    (
        "seed lr_warmup_steps dataloader_num_workers learning_rate prior_loss_weight adam_beta1 adam_beta2 "
        "adam_weight_decay adam_epsilon caption_dropout_probability unmasked_weight skip_nonfinite",
        lambda value: value >= 0,
        "0 or more; it cannot be negative",
    ),
    ("adam_beta1 adam_beta2", lambda value: value < 1, "below 1"),
    ("text_encoder_kron_a1 text_encoder_kron_a2", lambda value: value >= 1, "at least 1"),
    ("text_encoder_lr noise_offset min_timestep max_timestep", lambda value: value >= 0, "0 or more"),
    ("snr_gamma huber_c", lambda value: value > 0, "above 0"),
    ("caption_dropout_probability", lambda value: value <= 1, "at most 1"),
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
    config.factors_by_target()
    config.time_limit()
    if config.allow_config_change and config.resume_from_checkpoint is None:
        raise UserError("--allow_config_change needs --resume_from_checkpoint")
    _check_photos(config)
    _check_trackers(config)
    _check_prior(config)
    _check_text_encoder(config)
    _check_precision(config)
    _check_optimizer(config)


def _check_photos(config: TrainingConfig) -> None:
    if config.instance_data_dir is None and config.dataset_name is None:
        raise UserError("--instance_data_dir, the folder with the photos, or --dataset_name is needed")
    if config.instance_data_dir is not None and config.dataset_name is not None:
        raise UserError("--instance_data_dir and --dataset_name both say where the photos are; give one of them")
    if config.dataset_config_name is not None and config.dataset_name is None:
        raise UserError("--dataset_config_name needs --dataset_name")
    if config.image_column != "image" and config.dataset_name is None:
        raise UserError("--image_column needs --dataset_name")
    if config.aspect_ratio_buckets and config.resolution < 64:
        raise UserError(
            f"--aspect_ratio_buckets are multiples of 64 px, so they need a --resolution of 64 or more, not "
            f"{config.resolution}"
        )
    if config.cache_latents == "off" and config.cache_latents_to_disk is not None:
        raise UserError("--cache_latents_to_disk does not go with --cache_latents off")


def _check_trackers(config: TrainingConfig) -> None:
    if strangers := set(config.report_to) - {*TRACKERS, "none"}:
        raise UserError(f"--report_to {' '.join(sorted(strangers))}: it can be {', '.join(TRACKERS)} or none")
    if "none" in config.report_to:
        if len(config.report_to) > 1:
            raise UserError("--report_to none does not go with other trackers")
        return
    for name in config.report_to:
        try:
            version(name)
        except PackageNotFoundError:
            raise UserError(f"--report_to {name} needs a package that is not installed: pip install {name}") from None


def _check_prior(config: TrainingConfig) -> None:
    if not config.with_prior_preservation:
        if config.class_data_dir or config.class_prompt:
            raise UserError("--class_data_dir and --class_prompt need --with_prior_preservation")
        if config.prior_source == "base_model":
            raise UserError("--prior_source base_model needs --with_prior_preservation")
        return
    if not config.class_prompt:
        raise UserError("--with_prior_preservation needs --class_prompt, for example 'a photo of dog'")
    if config.prior_source == "base_model":
        if config.class_data_dir:
            raise UserError("--class_data_dir does not go with --prior_source base_model, which needs no class images")
        return
    if not config.class_data_dir:
        raise UserError("--with_prior_preservation needs --class_data_dir, the folder where class images are kept")
    if config.instance_data_dir is None:
        return
    if Path(config.class_data_dir).resolve() == Path(config.instance_data_dir).resolve():
        raise UserError("--class_data_dir and --instance_data_dir are the same folder; class images need their own")


def _check_text_encoder(config: TrainingConfig) -> None:
    for name in ("text_encoder_lr", "text_encoder_kron_a1", "text_encoder_kron_a2"):
        if getattr(config, name) is not None and not config.train_text_encoder:
            raise UserError(f"--{name} needs --train_text_encoder")


def _check_precision(config: TrainingConfig) -> None:
    if config.compile and config.base_precision in ("nf4", "int8"):
        raise UserError(f"--compile does not go with --base_precision {config.base_precision}: quantised layers break")


def _check_optimizer(config: TrainingConfig) -> None:
    name = config.optimizer_name()
    flag = f"--optimizer {name}"
    if config.use_8bit_adam and name != "AdamW":
        raise UserError(f"--use_8bit_adam goes with --optimizer AdamW only, not with {flag}")
    if name == "Prodigy":
        _check_prodigy(config, flag)
    if name == "Adafactor":
        for option in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            if getattr(config, option) != getattr(TrainingConfig, option):
                raise UserError(f"--{option} means nothing to {flag}; of Adam's options it takes --adam_weight_decay")
    if name == "ScheduleFreeAdamW":
        if not config.lr_scheduler.startswith("constant"):
            raise UserError(f"{flag} does not go with --lr_scheduler {config.lr_scheduler}; constant_with_warmup does")
        if config.adam_beta1 == 0:
            raise UserError(f"{flag} needs an --adam_beta1 above 0")


def _check_prodigy(config: TrainingConfig, flag: str) -> None:
    for option in ("learning_rate", "adam_epsilon"):
        if not getattr(config, option) > 0:
            raise UserError(f"{flag} needs a --{option} above 0")
    if config.scale_lr:
        raise UserError(f"{flag} finds the learning rate itself and does not go with --scale_lr")
    if config.text_encoder_lr not in (None, config.learning_rate):
        raise UserError(f"{flag} finds one learning rate for all factors and does not go with --text_encoder_lr")
