"""The training loop: `train_steps` is the only one. And what it needs to begin."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from torch import Tensor, nn

from dreambooth.config import TrainingConfig, UserError
from dreambooth.data import Batch
from dreambooth.diffusion import NoiseScheduler, diffuse, row_losses
from dreambooth.ranks import PATIENCE, average_gradients, check_sharding

# ---- setting up ----


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """Return the accelerator, with logging and precision as configured."""
    check_sharding(config)
    try:
        accelerator = Accelerator(
            # Said outright: accelerate joins several processes without a GPU only if it knows that they want none.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=config.mixed_precision,
            kwargs_handlers=[PATIENCE],
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
            f"--mixed_precision {config.mixed_precision} --report_to {' '.join(config.report_to)}: {error}"
        ) from error
    if config.base_precision == "fp16" and accelerator.mixed_precision != "fp16":
        raise UserError("--base_precision fp16 needs --mixed_precision fp16, which scales the gradients; or use bf16")
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=level, force=True)
    for noisy in ("httpx", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    set_seed(config.seed)
    return accelerator


def steps_per_pass(samples: int, config: TrainingConfig, num_ranks: int) -> int:
    """Return the optimizer steps of one pass over the instance photos, `samples` in all, rounded up."""
    return math.ceil(samples / (config.train_batch_size * config.gradient_accumulation_steps * num_ranks))


def count_steps(samples: int, config: TrainingConfig, num_ranks: int) -> int:
    """Return the optimizer steps to train, from max_train_steps or num_train_epochs."""
    if config.max_train_steps is None and config.num_train_epochs is not None:
        return config.num_train_epochs * steps_per_pass(samples, config, num_ranks)
    return config.max_train_steps or 500


# ---- one step ----


class Denoiser:
    """The UNet, called with rows of the list of prompts instead of embeddings.

    `encode` maps such rows to embeddings; `condition` maps embeddings and size conditions to the UNet's keyword
    arguments, all in which the Stable Diffusion families differ.
    """

    def __init__(
        self,
        unet: nn.Module,
        encode: Callable[[Tensor], dict[str, Tensor]],
        condition: Callable[[dict[str, Tensor], Tensor], dict[str, Any]],
    ):
        self.unet, self.encode, self.condition = unet, encode, condition
        self.dtype = unet.dtype  # once: diffusers looks through all modules for it

    def __call__(
        self, noisy_latents: Tensor, timesteps: Tensor, prompt_rows: Tensor, size_conditions: Tensor
    ) -> Tensor:
        """Return the UNet's prediction (rows, channels, height, width)."""
        embeddings = {name: tensor.to(self.dtype) for name, tensor in self.encode(prompt_rows).items()}
        keywords = self.condition(embeddings, size_conditions)
        return self.unet(noisy_latents.to(self.dtype), timesteps, **keywords).sample


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did. Its numbers are still on their way from the device: see `read_reports`."""

    numbers: Tensor  # (4,): loss, instance loss, prior loss, all means over forward passes and devices; gradient norm
    learning_rate: float


def read_reports(reports: Sequence[StepReport]) -> list[dict[str, float]]:
    """Return the numbers of steps by name. Waits, once for all, until the device has done the last of them."""
    rows = torch.stack([report.numbers for report in reports]).tolist()
    return [
        {
            "loss": loss,
            "instance_loss": instance_loss,
            "prior_loss": prior_loss,
            "learning_rate": report.learning_rate,
            "grad_norm": grad_norm,
        }
        for report, (loss, instance_loss, prior_loss, grad_norm) in zip(reports, rows)
    ]


def is_sound(values: Mapping[str, float], accelerator: Accelerator) -> bool:
    """Whether a step's loss and gradients are finite; with fp16, its loss: the scaler itself passes over gradients
    that its scale made overflow, and lowers it."""
    return math.isfinite(values["loss"]) and (accelerator.scaler is not None or math.isfinite(values["grad_norm"]))


def train_steps(
    accelerator: Accelerator,
    denoiser: Denoiser,
    latents_of: Callable[[Batch], Tensor],
    noise_scheduler: NoiseScheduler,
    base_model: Callable[[], AbstractContextManager],
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    lr_scheduler: Any,
    config: TrainingConfig,
) -> Iterator[StepReport]:
    """Train on `batches`, yielding once per optimizer step. Nothing in a step waits for the device.

    `latents_of` samples a batch's latents, fp32. Inside the context `base_model()` the denoiser is the base model.
    The processes' gradients are averaged in one exchange, instead of by DistributedDataParallel: the few that factors
    have need no overlap with the backward pass, and may so lie in the optimizer's own buffers.
    With --skip_nonfinite every step is read, and the factors stay as they are where it is not sound.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    losses = []
    for batch in batches:
        batch = batch.to(accelerator.device)
        with accelerator.accumulate():
            latents = latents_of(batch)
            noisy_latents, unet_timesteps, target = diffuse(noise_scheduler, latents, batch.noise, batch.timesteps)
            inputs = (noisy_latents, unet_timesteps, batch.prompt_rows, batch.size_conditions)
            if config.with_prior_preservation and config.prior_source == "base_model":
                prior_inputs = [tensor[batch.num_instances :] for tensor in inputs]
                with torch.no_grad(), base_model(), accelerator.autocast():
                    prior = denoiser(*prior_inputs)
                target = torch.cat([target[: batch.num_instances], prior.to(target)])
            with accelerator.autocast():
                prediction = denoiser(*inputs)
            rows = row_losses(prediction, target, batch.timesteps, batch.loss_weights, noise_scheduler, config)
            instance_loss, prior_loss = dreambooth_losses(rows, batch.num_instances)
            loss = instance_loss + config.prior_loss_weight * prior_loss
            accelerator.backward(loss)
            losses.append(torch.stack([loss, instance_loss, prior_loss]).detach())
            if not accelerator.sync_gradients:
                continue
            average_gradients(parameters, accelerator)
            accelerator.unscale_gradients(optimizer)  # accelerate's own clipping does it twice under FSDP
            grad_norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            means = accelerator.reduce(torch.stack(losses).mean(0), "mean")
            learning_rate = optimizer.param_groups[0]["lr"] * optimizer.param_groups[0].get("d", 1)  # d: Prodigy's own
            report = StepReport(torch.cat([means, grad_norm.view(1)]), learning_rate)
            if config.skip_nonfinite == 0 or is_sound(read_reports([report])[0], accelerator):
                optimizer.step()
            elif accelerator.scaler is not None:
                accelerator.scaler.update()  # as the optimizer's own step would have done
            optimizer.zero_grad()
            lr_scheduler.step()
        losses.clear()
        yield report


def dreambooth_losses(rows: Tensor, num_instances: int) -> tuple[Tensor, Tensor]:
    """Return the mean loss of the instance rows and of the class rows (0 where there are none)."""
    instance_rows, class_rows = rows[:num_instances], rows[num_instances:]
    return instance_rows.mean(), class_rows.mean() if len(class_rows) else rows.new_zeros(())
