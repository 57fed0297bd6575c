"""The training loop, `train_steps`, and how many steps it takes."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from dreambooth.base_model.process import NoiseProcess
from dreambooth.data.dataset import Batch
from dreambooth.family import Embeddings
from dreambooth.loop.health import StepReport, is_sound, read_reports
from dreambooth.loop.losses import dreambooth_losses, row_losses
from dreambooth.options.steps import BatchOptions
from dreambooth.options.training import TrainingConfig
from dreambooth.runtime.ranks import average_gradients, mean_over_processes

# ---- how many steps ----


def steps_per_pass(samples: int, config: BatchOptions, num_ranks: int) -> int:
    """Return the optimizer steps in one pass over the instance photos, which is `samples` samples, rounded up."""
    return math.ceil(samples / (config.train_batch_size * config.gradient_accumulation_steps * num_ranks))


def count_steps(samples: int, config: BatchOptions, num_ranks: int) -> int:
    """Return the optimizer steps to train, from max_train_steps or num_train_epochs."""
    if config.max_train_steps is None and config.num_train_epochs is not None:
        return config.num_train_epochs * steps_per_pass(samples, config, num_ranks)
    return config.max_train_steps or 500


# ---- the loop ----


class Denoiser:
    """The component that predicts, called with prompt rows instead of embeddings.

    A prompt row is an index into the list of distinct prompts. `encode` maps prompt rows to embeddings; `condition`
    maps embeddings and size conditions to the component's keyword arguments, which is where families differ.
    """

    def __init__(
        self, model: ModelMixin, encode: Callable[[Tensor], Embeddings], condition: Callable[..., dict[str, Any]]
    ):
        self.model, self.encode, self.condition = model, encode, condition
        self.dtype = model.dtype  # read once: diffusers searches all modules for it

    def __call__(
        self, noisy_latents: Tensor, timesteps: Tensor, prompt_rows: Tensor, size_conditions: Tensor
    ) -> Tensor:
        """Return the prediction (rows, channels, H / 8, W / 8) for noisy latents of that shape."""
        embeddings = {name: tensor.to(self.dtype) for name, tensor in self.encode(prompt_rows).items()}
        keywords = self.condition(embeddings, size_conditions)
        return self.model(noisy_latents.to(self.dtype), timesteps, **keywords).sample


def train_steps(
    accelerator: Accelerator,
    denoiser: Denoiser,
    latents_of: Callable[[Batch], Tensor],
    process: NoiseProcess,
    without: Callable[[], AbstractContextManager[None]],
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    lr_scheduler: LRScheduler,
    config: TrainingConfig,
) -> Iterator[StepReport]:
    """Train on `batches`, yielding once per optimizer step. No step waits for the device, except with --skip_nonfinite.

    `latents_of` samples a batch's latents, fp32. Inside the context `without()` the denoiser is the base model.
    The processes' gradients are averaged in one exchange instead of by DistributedDataParallel: an adapter's are too
    small to be worth overlapping with the backward pass, and this way they can live in the optimizer's own buffers.
    With --skip_nonfinite a step that is not finite leaves the parameters as they are.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    losses: list[Tensor] = []
    for batch in batches:
        batch = batch.to(accelerator.device)
        with accelerator.accumulate():
            noised = process.noise(latents_of(batch), batch.noise, batch.timesteps)
            inputs, target = (noised.latents, noised.timesteps, batch.prompt_rows, batch.size_conditions), noised.target
            if config.uses_base_model_prior:
                prior_inputs = [tensor[batch.num_instances :] for tensor in inputs]
                with torch.no_grad(), without(), accelerator.autocast():
                    prior = denoiser(*prior_inputs)
                target = torch.cat([target[: batch.num_instances], prior.to(target)])
            with accelerator.autocast():
                prediction = denoiser(*inputs)
            rows = row_losses(prediction, target, batch.timesteps, batch.loss_weights, process, config)
            instance_loss, prior_loss = dreambooth_losses(rows, batch.num_instances)
            loss = instance_loss + config.prior_loss_weight * prior_loss
            accelerator.backward(loss)
            losses.append(torch.stack([loss, instance_loss, prior_loss]).detach())
            if not accelerator.sync_gradients:
                continue
            average_gradients(parameters, accelerator)
            accelerator.unscale_gradients(optimizer)  # not clip_grad_norm_, which unscales twice under FSDP
            grad_norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            means = mean_over_processes(torch.stack(losses).mean(0), accelerator)
            learning_rate = optimizer.param_groups[0]["lr"] * optimizer.param_groups[0].get("d", 1)  # d: Prodigy's own
            report = StepReport(torch.cat([means, grad_norm.view(1)]), learning_rate)
            if config.skip_nonfinite == 0 or is_sound(read_reports([report])[0], accelerator):
                optimizer.step()
            elif accelerator.scaler is not None:
                accelerator.scaler.update()  # as the skipped optimizer step would have done
            optimizer.zero_grad()
            lr_scheduler.step()
        losses.clear()
        yield report
