"""Optimizer steps: loss, seed, batches, optimizer, and in what precision and for how long they run."""

import re
from dataclasses import dataclass
from typing import Literal

from dreambooth.errors import UserError
from dreambooth.options.field import option

OPTIMIZERS = ("AdamW", "Prodigy", "Adafactor", "ScheduleFreeAdamW")
UNIT_TIME = re.compile("(?=.)" + "".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in "dhms"))  # 1h30m
CLOCK_TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")  # 1:30:00, or as Slurm writes it, 2-12:00:00


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Loss."""

    snr_gamma: float | None = option(
        "Gamma of min-SNR loss weighting, 5 in its paper. Default: no weighting.", None, above=0
    )
    noise_offset: float = option(
        "Strength of an additional noise that is constant over each latent channel.", 0.0, at_least=0
    )
    loss_type: Literal["mse", "huber"] = option(
        "mse: squared error; huber: pseudo-Huber, scheduled over the noise levels.", "mse"
    )
    huber_c: float = option(
        "Error at which the pseudo-Huber loss turns from quadratic to linear, at the highest noise level; it is 1 "
        "without noise.",
        0.1,
        above=0,
        needs={"loss_type": ["huber"]},
    )
    min_timestep: int = option("Lowest training timestep.", 0, at_least=0)
    max_timestep: int | None = option("Highest training timestep. Default: the base model's.", None, at_least=0)

    timestep_sampling: Literal["uniform", "thinned"] = option(
        "How often timesteps are trained on. uniform: all alike; thinned: those of the most noise, the last fifth, a "
        "quarter as often as the others.",
        "uniform",
    )

    def highest_timestep(self, num_timesteps: int) -> int:
        """Return the highest training timestep for a base model with timesteps 0 ... num_timesteps - 1."""
        return num_timesteps - 1 if self.max_timestep is None else self.max_timestep


@dataclass(frozen=True, kw_only=True)
class SeedOptions:
    """Randomness."""

    seed: int = option(
        "Seed for everything random: initialisation, order, crops, noise, timesteps, samples.",
        0,
        at_least=0,
        below=2**32,  # np.random.seed takes no more
    )


@dataclass(frozen=True, kw_only=True)
class BatchOptions(SeedOptions):
    """Batches and steps."""

    train_batch_size: int = option("Instance images per device and forward pass.", 1, at_least=1)
    gradient_accumulation_steps: int = option("Forward passes per optimizer step.", 1, at_least=1)
    max_train_steps: int | None = option(
        "Optimizer steps to train. Default: computed from num_train_epochs if set, else 500.", None, at_least=1
    )
    num_train_epochs: int | None = option(
        "Passes over the instance images. Ignored if max_train_steps is set.",
        None,
        at_least=1,
        needs={"max_train_steps": [None]},
    )
    dataloader_num_workers: int = option(
        "Processes that prepare batches; 0 prepares them in the training process.", 0, at_least=0, decides_result=False
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer and learning rate."""

    learning_rate: float = option("Learning rate, after warm-up.", 5e-4, at_least=0)
    scale_lr: bool = option("Multiply learning rates by the number of devices, accumulation and batch size.", False)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = option("Schedule of the learning rate.", "constant")
    lr_warmup_steps: int = option(
        "Warm-up of the learning rate, optimizer steps. Ignored by lr_scheduler constant.",
        0,
        at_least=0,
        needs={"lr_scheduler": ["constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]},
    )
    lr_num_cycles: int = option(
        "Cycles of lr_scheduler cosine_with_restarts.", 1, at_least=1, needs={"lr_scheduler": ["cosine_with_restarts"]}
    )
    lr_power: float = option("Exponent of lr_scheduler polynomial.", 1.0, needs={"lr_scheduler": ["polynomial"]})
    optimizer: str = option("AdamW, Prodigy, Adafactor or ScheduleFreeAdamW.", "AdamW")
    use_8bit_adam: bool = option("AdamW with 8-bit state, from bitsandbytes.", False)
    adam_beta1: float = option("Beta 1 of Adam-like optimizers.", 0.9, at_least=0, below=1)
    adam_beta2: float = option("Beta 2 of Adam-like optimizers.", 0.999, at_least=0, below=1)
    adam_weight_decay: float = option("Weight decay, for every optimizer.", 1e-2, at_least=0)
    adam_epsilon: float = option("Epsilon of Adam-like optimizers.", 1e-8, at_least=0)
    max_grad_norm: float = option("Norm to which gradients are clipped; 1e9 clips nothing.", 1.0, above=0)
    ema_decay: float | None = option(
        "Decay of an exponential moving average of what trains, for example 0.99, which is saved beside the result, in "
        "OUTPUT_DIR/ema. Default: no average.",
        None,
        above=0,
        below=1,
    )
    skip_nonfinite: int = option(
        "Optimizer steps with a non-finite loss or gradient to skip before the run stops. Resuming resets the count. "
        "Values above 0 synchronise with the device at every step.",
        0,
        at_least=0,
        decides_result=False,
    )

    def optimizer_name(self) -> str:
        """Return the optimizer as OPTIMIZERS spells it. Raises UserError if it is not one of them."""
        for name in OPTIMIZERS:
            if name.lower() == self.optimizer.lower().replace("_", ""):
                return name
        raise UserError(f"--optimizer {self.optimizer}: choose from {', '.join(OPTIMIZERS)}")

    def check(self) -> None:
        name = self.optimizer_name()
        if self.use_8bit_adam and name != "AdamW":
            raise UserError(f"--use_8bit_adam works with --optimizer AdamW only, not with --optimizer {name}")
        rules = {
            "Prodigy": self._check_prodigy,
            "Adafactor": self._check_adafactor,
            "ScheduleFreeAdamW": self._check_schedule_free,
        }
        if name in rules:
            rules[name](f"--optimizer {name}")

    def _check_prodigy(self, flag: str) -> None:
        for name in ("learning_rate", "adam_epsilon"):
            if not getattr(self, name) > 0:
                raise UserError(f"{flag} needs --{name} above 0")
        if self.scale_lr:
            raise UserError(f"{flag} finds the learning rate itself and does not work with --scale_lr")

    def _check_adafactor(self, flag: str) -> None:
        for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            if getattr(self, name) != getattr(type(self), name):
                raise UserError(
                    f"--{name} has no effect with {flag}, which uses only --adam_weight_decay of Adam's options"
                )

    def _check_schedule_free(self, flag: str) -> None:
        if not self.lr_scheduler.startswith("constant"):
            raise UserError(f"{flag} does not work with --lr_scheduler {self.lr_scheduler}; constant_with_warmup does")
        if self.adam_beta1 == 0:
            raise UserError(f"{flag} needs --adam_beta1 above 0")
        if self.ema_decay is not None:
            raise UserError(f"{flag} saves an average itself and does not work with --ema_decay")


@dataclass(frozen=True, kw_only=True)
class TextEncoderOptions(SeedOptions, OptimizerOptions):
    """Text encoders."""

    train_text_encoder: bool = option("Adapt the text encoders as well.", False)
    text_encoder_lr: float | None = option(
        "Learning rate of the text encoders. Default: learning_rate.", None, at_least=0
    )

    @property
    def text_encoder_learning_rate(self) -> float:
        """The text encoders' learning rate, after warm-up."""
        return self.learning_rate if self.text_encoder_lr is None else self.text_encoder_lr

    def check(self) -> None:
        if self.text_encoder_lr is not None and not self.train_text_encoder:
            raise UserError("--text_encoder_lr needs --train_text_encoder")
        if self.optimizer_name() == "Prodigy" and self.text_encoder_lr not in (None, self.learning_rate):
            raise UserError("--optimizer Prodigy finds a single learning rate and does not work with --text_encoder_lr")


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """Precision and time."""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        "Precision of the frozen model and of activations; what trains stays fp32. Default: accelerate's.", None
    )
    allow_tf32: bool = option("Allow TF32 matrix products on NVIDIA GPUs.", False)
    max_train_time: str | None = option(
        "Time limit: 3h, 90m, 45s, 1h30m or 1:30:00. After the step that reaches it, the run saves a checkpoint and "
        "stops with exit code 75. Default: none.",
        None,
        decides_result=False,
    )

    def time_limit(self) -> float | None:
        """Return max_train_time in seconds. Raises UserError if it cannot be parsed."""
        if self.max_train_time is None:
            return None
        text = "".join(self.max_train_time.lower().split())
        match = UNIT_TIME.fullmatch(text) or CLOCK_TIME.fullmatch(text)
        days, hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0.0,) * 4
        total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        if not total > 0:
            raise UserError(
                f"--max_train_time {self.max_train_time}: use a time above 0 such as 3h, 90m, 45s, 1h30m or 1:30:00 "
                "(hours:minutes:seconds)"
            )
        return total

    def check(self) -> None:
        self.time_limit()
