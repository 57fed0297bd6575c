"""The training step: noise, timesteps, target, loss, optimizer. `train_steps` is the one loop."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from dreambooth.config import TrainingConfig, UserError
from dreambooth.data import Batch

# ---- setting up ----


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """Return the accelerator, with logging and precision as configured."""
    try:
        accelerator = Accelerator(
            # Said outright: accelerate joins several processes without a GPU only if it knows that they want none.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=config.mixed_precision,
            # The stream of batches has no end, so accelerate must not look for one: with 5 images and accumulation 4
            # it would alternate full and quarter gradients.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            log_with=None if "none" in config.report_to else config.report_to,
            project_config=ProjectConfiguration(
                project_dir=config.output_dir, logging_dir=f"{config.output_dir}/{config.logging_dir}"
            ),
        )
    except ValueError as error:
        raise UserError(
            f"--mixed_precision {config.mixed_precision} --report_to {config.report_to}: {error}"
        ) from error
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=level, force=True)
    for noisy in ("httpx", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    set_seed(config.seed)
    return accelerator


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """Return the dtype of frozen weights."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: TrainingConfig, num_ranks: int
) -> torch.optim.Optimizer:
    """Return AdamW over the factors."""
    if config.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as optimizer_class
    else:
        optimizer_class = torch.optim.AdamW
    samples_per_step = config.train_batch_size * config.gradient_accumulation_steps * num_ranks
    return optimizer_class(
        parameters,
        lr=config.learning_rate * (samples_per_step if config.scale_lr else 1),
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )


def build_lr_scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig, total_steps: int):
    """Return the learning-rate schedule, stepped once per optimizer step."""
    return get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=total_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def steps_per_epoch(num_instances: int, config: TrainingConfig, num_ranks: int) -> int:
    """Return the optimizer steps of one pass over the instance photos, rounded up."""
    return math.ceil(num_instances / (config.train_batch_size * config.gradient_accumulation_steps * num_ranks))


def count_steps(num_instances: int, config: TrainingConfig, num_ranks: int) -> int:
    """Return the optimizer steps to train, from max_train_steps or num_train_epochs."""
    if config.max_train_steps is None and config.num_train_epochs is not None:
        return config.num_train_epochs * steps_per_epoch(num_instances, config, num_ranks)
    return config.max_train_steps or 500


# ---- one step ----


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did, as this device saw it. Losses are means over the step's forward passes."""

    loss: float
    instance_loss: float
    prior_loss: float
    learning_rate: float
    grad_norm: float


def train_steps(
    accelerator: Accelerator,
    unet: nn.Module,
    vae: AutoencoderKL,
    noise_scheduler: DDPMScheduler,
    condition: Callable[[Batch], dict[str, Any]],
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    lr_scheduler: Any,
    config: TrainingConfig,
) -> Iterator[StepReport]:
    """Train on `batches`, yielding once per optimizer step.

    `condition` maps a batch to the UNet's keyword arguments: all that differs between the Stable Diffusion families.
    """
    losses = []
    for batch in batches:
        batch = batch.to(accelerator.device)
        with accelerator.accumulate(unet):
            noise, timesteps, latents = draw_latents(vae, batch, noise_scheduler.config.num_train_timesteps)
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
            target = training_target(noise_scheduler, latents, noise, timesteps)
            prediction = unet(noisy_latents, timesteps, **condition(batch)).sample
            instance_loss, prior_loss = dreambooth_losses(prediction, target, batch.num_instances)
            loss = instance_loss + config.prior_loss_weight * prior_loss
            accelerator.backward(loss)
            losses.append(torch.stack([loss, instance_loss, prior_loss]).detach())
            if not accelerator.sync_gradients:
                continue
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            grad_norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
            learning_rate = lr_scheduler.get_last_lr()[0]
            optimizer.step()
            optimizer.zero_grad()
            lr_scheduler.step()
        means = accelerator.reduce(torch.stack(losses).mean(0), "mean").tolist()
        losses.clear()
        yield StepReport(*means, learning_rate, float(grad_norm))


def draw_latents(vae: AutoencoderKL, batch: Batch, num_timesteps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return noise, timesteps and latents of a batch, each row's from its own seed.

    noise, latents: (rows, channels, height, width), the VAE's dtype    timesteps: (rows,) int64

    Drawn on the CPU, so that every device and every split over devices sees the same numbers.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in batch.noise_seeds.tolist()]
    with torch.no_grad():
        posterior = vae.encode(batch.pixel_values.to(vae.dtype)).latent_dist
        shift = vae.config.get("shift_factor") or 0.0
        latents = (posterior.sample(generators) - shift) * vae.config.scaling_factor
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    timesteps = torch.cat([torch.randint(num_timesteps, (1,), generator=generator) for generator in generators])
    return noise.to(latents), timesteps.to(latents.device), latents


def training_target(noise_scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the UNet should predict, by the scheduler's prediction type."""
    kind = noise_scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    raise UserError(f"the base model's scheduler has prediction_type {kind!r}; epsilon and v_prediction can be trained")


def dreambooth_losses(prediction: Tensor, target: Tensor, num_instances: int) -> tuple[Tensor, Tensor]:
    """Return the mean squared errors of the instance rows and of the class rows (0 where there are none), fp32."""
    squared_errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
    instance_errors, prior_errors = squared_errors[:num_instances], squared_errors[num_instances:]
    prior_loss = prior_errors.mean() if len(prior_errors) else squared_errors.new_zeros(())
    return instance_errors.mean(), prior_loss
