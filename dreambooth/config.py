"""The options: one frozen dataclass, and the YAML file that it is written to."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


class UserError(ValueError):
    """Something the user can mend. The message says what is wrong, where, and what to do."""

    exit_code = 2  # what argparse ends with too


class SaveError(UserError):
    """Something could not be written, for example to a full disk."""

    exit_code = 74  # EX_IOERR of sysexits.h


@contextmanager
def readable_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End the program with the message alone on a UserError, or one of `kinds`: with its exit code, 2 by default."""
    try:
        yield
    except (UserError, *kinds) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(getattr(error, "exit_code", UserError.exit_code))


def option(help: str, default=MISSING):
    """A field that becomes a flag. `help` says what it does, with its unit."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


OPTIMIZERS = ("AdamW", "Prodigy", "Adafactor", "ScheduleFreeAdamW")
TRACKERS = ("tensorboard", "wandb", "trackio")  # the names of their packages too
UNIT_TIME = re.compile("(?=.)" + "".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in "dhms"))  # 1h30m
CLOCK_TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")  # 1:30:00, or as Slurm writes it, 2-12:00:00


@dataclass(frozen=True, kw_only=True)
class AdaptedModelConfig:
    """What scripts need that take a base model and an adapter."""

    pretrained_model_name_or_path: str = option("Base model: a name on the Hub or a folder in diffusers' layout.")
    revision: str | None = option("Revision of the base model on the Hub.", None)
    variant: str | None = option("Variant of the base model's weight files, for example fp16.", None)
    adapter: list[str] = option("Adapter files, as FILE or FILE:SCALE. Default: none, the base model alone.", [])
    adapter_scale: float = option("Strength of all adapters: 0 is the base model, 1 as trained.", 1.0)
    dtype: Literal["fp32", "fp16", "bf16"] = option("Precision of the model.", "fp32")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Every option of a training run. A field is the only place where a flag exists."""

    # Base model
    pretrained_model_name_or_path: str = option("Base model: a name on the Hub or a folder in diffusers' layout.")
    revision: str | None = option("Revision of the base model on the Hub.", None)
    variant: str | None = option("Variant of the base model's weight files, for example fp16.", None)

    pretrained_vae_model_name_or_path: str | None = option("Another VAE for the base model, name or folder.", None)
    vae_precision: Literal["fp32", "fp16", "bf16"] = option("Precision of the VAE.", "fp32")
    base_precision: Literal["fp32", "fp16", "bf16", "nf4", "int8"] | None = option(
        "Precision of the frozen UNet and text encoders; nf4 and int8 quantise the UNet with bitsandbytes. "
        "Default: that of mixed_precision.",
        None,
    )

    # Instance images
    instance_data_dir: str | None = option(
        "Folder with the photos of the subject. Captions: photo.txt beside photo.jpg, or metadata.jsonl; masks: "
        "photo.mask.png; class prompts: photo.class.txt.",
        None,
    )
    dataset_name: str | None = option("Dataset on the Hub, or a local one, instead of instance_data_dir.", None)
    dataset_config_name: str | None = option("Configuration of that dataset.", None)
    image_column: str = option("Column of that dataset with the images.", "image")
    caption_column: str | None = option("Column with captions, of that dataset or of metadata.jsonl.", None)
    instance_prompt: str = option('Prompt with a rare token and the class, for example "a photo of sks dog".')
    caption_dropout_probability: float = option("Share of samples that are trained with an empty prompt.", 0.0)
    repeats: int = option("Times that a photo occurs in each pass over the photos.", 1)
    unmasked_weight: float = option("Weight of the loss outside a photo's mask, where it has one; 1 inside.", 0.0)
    resolution: int = option("Side of the training images, px. A multiple of 8.", 512)
    center_crop: bool = option(
        "Crop images at their centre, instead of anew at random every time they are used.", False
    )
    random_flip: bool = option("Mirror half of the samples.", False)
    aspect_ratio_buckets: bool = option(
        "Train each photo in the shape nearest to its own: sides that are multiples of 64 px, area resolution².", False
    )
    cache_latents: Literal["auto", "on", "off"] = option(
        "Encode photos once. auto: where crops do not vary; on: always, each photo with one crop.", "auto"
    )
    cache_latents_to_disk: str | None = option(
        "Folder in which encoded photos and prompts are kept for later runs.", None
    )
    image_interpolation_mode: Literal["lanczos", "bicubic", "bilinear", "box", "hamming", "nearest"] = option(
        "How images are resized.", "lanczos"
    )

    # Prior preservation
    with_prior_preservation: bool = option("Train on class images too, so that the class keeps its variety.", False)
    prior_source: Literal["images", "base_model"] = option(
        "images: class images. base_model: what the base model predicts for the class prompt; needs no images.",
        "images",
    )
    prior_loss_weight: float = option("Weight of the class images' loss.", 1.0)
    class_data_dir: str | None = option("Folder with the class images; missing ones are drawn by the base model.", None)
    class_prompt: str | None = option('Prompt of the class images, for example "a photo of dog".', None)
    num_class_images: int = option("Class images wanted; only those the folder lacks are drawn, images.", 100)
    sample_batch_size: int = option("Class images, and samples of a prompt, drawn at once on each device, images.", 4)
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

    train_text_encoder: bool = option("Adapt the text encoders' attention too.", False)
    text_encoder_lr: float | None = option("Learning rate of the text encoders' factors. Default: learning_rate.", None)
    text_encoder_kron_a1: int | None = option("kron_a1 for the text encoders. Default: kron_a1.", None)
    text_encoder_kron_a2: int | None = option("kron_a2 for the text encoders. Default: kron_a2.", None)

    # Loss
    snr_gamma: float | None = option("Min-SNR loss weighting with this gamma, 5 in its paper. Default: none.", None)
    noise_offset: float = option("Strength of noise that is constant over each latent channel.", 0.0)
    loss_type: Literal["mse", "huber"] = option(
        "Squared error, or pseudo-Huber scheduled over the noise levels.", "mse"
    )
    huber_c: float = option(
        "Error at which the pseudo-Huber loss turns from square to linear at the highest noise; 1 without noise.", 0.1
    )
    min_timestep: int = option("Lowest training timestep.", 0)
    max_timestep: int | None = option("Highest training timestep. Default: the base model's.", None)

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
    optimizer: str = option("AdamW, Prodigy, Adafactor or ScheduleFreeAdamW.", "AdamW")
    use_8bit_adam: bool = option("AdamW with 8-bit state from bitsandbytes.", False)
    adam_beta1: float = option("Beta 1 of Adam and its kin.", 0.9)
    adam_beta2: float = option("Beta 2 of Adam and its kin.", 0.999)
    adam_weight_decay: float = option("Weight decay.", 1e-2)
    adam_epsilon: float = option("Epsilon of Adam and its kin.", 1e-8)
    max_grad_norm: float = option("Gradients are clipped to this norm.", 1.0)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        "Precision of the frozen model and the activations; factors stay fp32. Default: accelerate's configuration.",
        None,
    )
    gradient_checkpointing: bool = option("Recompute activations in the backward pass: less memory, slower.", False)
    allow_tf32: bool = option("Allow TF32 matrix products on NVIDIA GPUs.", False)
    compile: bool = option("Compile the UNet's repeated blocks with torch.compile.", False)
    channels_last: bool = option("Keep the UNet and the VAE in the channels-last memory format.", False)
    enable_xformers_memory_efficient_attention: bool = option("Use xformers' attention instead of PyTorch's.", False)
    skip_nonfinite: int = option(
        "Steps with a loss or gradients that are not finite that are skipped before the run stops, optimizer steps. "
        "Counted anew after resuming. Above 0 it has every step waited for.",
        0,
    )
    dataloader_num_workers: int = option("Processes that prepare batches; 0 means the training process.", 0)

    # Checkpoints and samples
    checkpointing_steps: int = option("Save a checkpoint every so many optimizer steps.", 500)
    save_precision: Literal["fp32", "fp16", "bf16"] = option("Precision of the factors in the adapter file.", "fp32")
    checkpoints_total_limit: int | None = option("Keep so many of the newest checkpoints. Default: all.", None)
    resume_from_checkpoint: str | None = option(
        "Checkpoint folder to go on from, or 'latest': the newest whole one in output_dir.", None
    )
    allow_config_change: bool = option("Resume although options or photos changed that change the result.", False)
    on_save_error: Literal["stop", "continue"] = option(
        "What follows when a checkpoint cannot be written, for example to a full disk.", "stop"
    )
    max_train_time: str | None = option(
        "Save a checkpoint and stop, with exit code 75, after the step in which the run gets so old: 3h, 90m, 45s, "
        "1h30m or 1:30:00. Default: no limit.",
        None,
    )
    validation_prompt: list[str] = option("Prompts to draw while training; each is one row of the sheet.", [])
    num_validation_images: int = option("Images for each validation prompt, images.", 4)
    validation_epochs: int = option("Draw samples every so many passes over the instance images.", 50)
    validation_steps: int | None = option("Draw samples every so many optimizer steps instead.", None)
    validation_num_inference_steps: int = option("Denoising steps for a sample.", 25)
    validation_guidance_scale: float = option("Classifier-free guidance for samples.", 7.5)
    report_to: list[str] = option(
        "Where to log: tensorboard, wandb, trackio (several at once), or none.", ["tensorboard"]
    )
    logging_steps: int = option(
        "Read losses from the device every so many optimizer steps; every step is logged all the same.", 10
    )
    push_to_hub: bool = option("Upload the adapter and its model card to the Hub at the end.", False)
    hub_model_id: str | None = option("Repository on the Hub. Default: the name of output_dir.", None)
    hub_token: str | None = option("Token for the Hub; better: `hf auth login`. Never written to any file.", None)
    logging_dir: str = option("Folder for TensorBoard's files, inside output_dir.", "logs")

    @property
    def uses_class_images(self) -> bool:
        return self.with_prior_preservation and self.prior_source == "images"

    def time_limit(self) -> float | None:
        """Return max_train_time in seconds. Raises UserError where it does not read."""
        if self.max_train_time is None:
            return None
        text = "".join(self.max_train_time.lower().split())
        match = UNIT_TIME.fullmatch(text) or CLOCK_TIME.fullmatch(text)
        days, hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0.0,) * 4
        total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        if not total > 0:
            raise UserError(
                f"--max_train_time {self.max_train_time}: write a time above 0 such as 3h, 90m, 45s, 1h30m or 1:30:00 "
                "(hours:minutes:seconds)"
            )
        return total

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

    def optimizer_name(self) -> str:
        """Return one of OPTIMIZERS, however it was spelled. Raises UserError where it is none of them."""
        for name in OPTIMIZERS:
            if name.lower() == self.optimizer.lower().replace("_", ""):
                return name
        raise UserError(f"--optimizer {self.optimizer}: it can be {', '.join(OPTIMIZERS[:-1])} or {OPTIMIZERS[-1]}")


def public_options(config: TrainingConfig) -> dict[str, Any]:
    """Return the options that may be written anywhere: all but tokens and keys."""
    return {name: value for name, value in asdict(config).items() if "token" not in name and "key" not in name}


def save_config(config: TrainingConfig, path: Path) -> None:
    """Write the options as YAML that `--config` reads back. Tokens and keys are left out."""
    options = {name: value for name, value in public_options(config).items() if value not in (None, [])}
    path.write_text(yaml.safe_dump(options, sort_keys=False, allow_unicode=True), encoding="utf-8")
